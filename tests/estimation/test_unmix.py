"""`unmix`: values on simulated frames, and every fault of the table it answers for."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.estimation import solve as solving
from dscsnet_jax.estimation.limit import bayes_limit
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.estimation.unmix import Options, pretrained, unmix
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.inference.fit import fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.search import Selected
from dscsnet_jax.io.weights import packaged_weights
from dscsnet_jax.maps.network import network_of
from dscsnet_jax.maps.readout import peak_centroids
from dscsnet_jax.maps.tiling import TILE
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import render, sensing_operator
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf_gaussians import Moffat
from dscsnet_jax.physics.sensor import expose
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

pytestmark = pytest.mark.slow

CSIST = scene.get_preset("csist")
KNOWN = CSIST.known
BATCH = 8  # the network is compiled once: every set of frames is filled up to this many
PAIR = [(5.0, 4.6, 200.0), (5.3, 5.6, 150.0)]

jit_render_wide = jax.jit(partial(render, frame_size=11, psf=0.7))


def run(frames: Any, base: Known = Known(), **given: Any) -> UnmixResult:  # noqa: B008
    """`unmix` with what is known besides, and options, by name."""
    sensor, options = (
        {f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given}
        for kind in (Sensor, Options)
    )
    known = base.replace(
        psf=given.pop("psf", base.psf), sensor=dataclasses.replace(base.sensor, **sensor)
    )
    return unmix(frames, known, options=Options(**options), **given)


in_map = partial(run, estimate="map")
on_grid = partial(run, method="grid")
jit_render = jax.jit(partial(render, frame_size=11, psf=0.5))


def frames_of(tables: list, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Eight frames of up to three targets; those not given are empty."""
    clean = np.asarray(jit_render(from_lists([*tables, *[[]] * (BATCH - len(tables))], 3)))
    return clean + noise * np.random.default_rng(seed).normal(size=clean.shape)


@pytest.fixture(scope="module")
def csist() -> tuple[Targets, np.ndarray]:
    keys = scene.frame_keys(5, "val", np.arange(296))
    made = jax.jit(scene.simulate, static_argnums=0)(CSIST, keys)
    return jax.tree.map(np.asarray, made.targets), np.asarray(made.frames)


@pytest.fixture(scope="module")
def averaged(csist: tuple[Targets, np.ndarray]) -> UnmixResult:
    """Posterior means of the first eight frames, all told of their scenes."""
    return run(csist[1][:BATCH], base=KNOWN)


def assert_same(a: Any, b: Any, frames: Any = slice(None)) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[frames], np.asarray(other)[frames])


def everything(answer: UnmixResult) -> dict[str, Any]:
    fields = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer)}
    return {**fields, "maps": None, "known": None, "status": answer.status()}


# --- values ------------------------------------------------------------------------


def test_specialised_weights_beat_the_published_best(csist: tuple[Targets, np.ndarray]) -> None:
    truth, frames = csist
    special = partial(on_grid, frames, weights="csist_c3")
    cells = evaluate(special(readout="cells").targets, truth).as_dict()
    peaks = evaluate(special().targets, truth)
    assert cells["mAP"] > 53.5  # published best: 46.74
    assert cells["AP25"] > 98.5
    assert peaks.count_accuracy > 0.95
    assert peaks.cso.mean > 0.65


def test_what_is_known_off_the_grid_is_better_than_the_map(
    csist: tuple[Targets, np.ndarray],
) -> None:
    truth, frames = csist
    some = jax.tree.map(lambda a: a[:64], truth)
    fit = evaluate(in_map(frames[:64], base=KNOWN).targets, some)
    grid = evaluate(on_grid(frames[:64], weights="csist_c3").targets, some)
    assert fit.count_accuracy > 0.95
    assert fit.cso.mean > grid.cso.mean + 0.05


def test_the_mean_of_unknown_counts_is_near_that_of_known_ones(
    csist: tuple[Targets, np.ndarray], averaged: UnmixResult
) -> None:
    truth, frames = csist
    some = jax.tree.map(lambda a: a[:BATCH], truth)
    reference = bayes_limit(frames[:BATCH], KNOWN, count=some.count)
    assert reference.targets.count.tolist() == some.count.tolist()
    assert averaged.targets.count.tolist() == some.count.tolist()
    assert (
        evaluate(averaged.targets, some).cso.mean > evaluate(reference.targets, some).cso.mean - 0.1
    )
    mask = np.asarray(averaged.targets.mask)
    assert (averaged.std[mask] > 0).all()
    low, high = KNOWN.prior.intensity.range
    assert (np.asarray(averaged.targets.intensity)[mask] > low - 1).all()
    assert (np.asarray(averaged.targets.intensity)[mask] < high + 1).all()
    # Most pixels hold no light and no rounding error.
    assert (averaged.chi_square > 0).all()
    assert (averaged.chi_square < 2).all()


@pytest.mark.parametrize("method", ["dscsnet", "greedy"])
def test_targets_are_found_where_they_are_without_a_prior(method: str) -> None:
    """With nothing known but the PSF: a target alone, a pair, and two far apart."""
    tables = [[(5.0, 4.0, 235.0)], PAIR, [(2.5, 2.2, 150.0), (8.1, 7.7, 250.0)], []]
    frames = frames_of(tables, noise=1.0)
    answer = in_map(frames, method=method)
    assert answer.targets.count.tolist() == [len(t) for t in tables] + [0] * 4
    for i, table in enumerate(tables[:3]):
        order = np.argsort([-intensity for _, _, intensity in table])
        got = to_lists(answer.targets)[i]
        error = np.abs(got - np.array(table)[order]) / answer.std[i, : len(table)]
        assert error.max() < 4.5
        assert (answer.std[i, : len(table), :2] < 0.05).all()
        assert set(answer.status()[i, : len(table)]) == {"ok"}
    np.testing.assert_allclose(answer.noise, 1, rtol=0.35)
    np.testing.assert_allclose(answer.chi_square, 1, atol=0.7)
    np.testing.assert_allclose(answer.count_probability.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("method", ["dscsnet", "greedy"])
def test_bright_neighbours_ask_for_no_targets(method: str) -> None:
    """The light that windows see of each other is first that of rough starts."""
    table = [(10.0, 8.2, 3000.0), (10.3, 12.4, 1000.0), (14.5, 10.0, 2000.0)]
    frame = jax.jit(partial(render, frame_size=21, psf=0.55))(from_lists([table]))
    answer = in_map(frame, method=method, psf=0.55, read_noise=1.0, background=0.0)
    assert answer.targets.count.tolist() == [3]
    assert answer.chi_square[0] < 0.01  # there is no noise
    found = np.sort(answer.targets.intensity[0, :3])
    np.testing.assert_allclose(found, [1000, 2000, 3000], rtol=1e-3)


def test_the_grid_alone_gives_no_errors(csist: tuple[Targets, np.ndarray]) -> None:
    answer = on_grid(csist[1][:BATCH], return_maps=True)
    assert np.isnan(answer.std).all()
    assert np.isnan(answer.interval).all()
    assert np.isnan(answer.count_probability).all()
    assert answer.maps is not None
    assert answer.maps.shape == (BATCH, 33, 33)
    np.testing.assert_allclose(
        answer.maps.sum((1, 2)), csist[1][:BATCH].sum((1, 2)), rtol=0.1
    )  # the map holds the frame's energy


def test_frames_do_not_depend_on_each_other(
    csist: tuple[Targets, np.ndarray], averaged: UnmixResult
) -> None:
    order = np.random.default_rng(0).permutation(BATCH)
    frames = csist[1][:BATCH]
    turned = everything(run(frames[order], base=KNOWN))
    whole = everything(averaged)
    for name in whole:
        expected = jax.tree.map(lambda a: np.asarray(a)[order], whole[name])
        assert_same(turned[name], expected)
    others = csist[1][100:240]  # more windows than a block holds
    more = everything(run(np.concatenate([others, frames]), base=KNOWN))
    for name in whole:
        assert_same(jax.tree.map(lambda a: np.asarray(a)[len(others) :], more[name]), whole[name])
    some = slice(2, 7, 2)
    part = everything(run(frames[some], base=KNOWN))
    for name in whole:
        assert_same(part[name], jax.tree.map(lambda a: np.asarray(a)[some], whole[name]))


# --- pedestal and background ---------------------------------------------------------


@pytest.fixture(scope="module")
def sky() -> np.ndarray:
    """100 frames of nothing but light, of a gain of one."""
    rng = np.random.default_rng(0)
    return rng.poisson(1000, (100, 11, 11)) + rng.normal(0, 2, (100, 11, 11))


def test_light_of_the_sky_has_shot_noise(sky: np.ndarray) -> None:
    answer = in_map(sky, read_noise=2.0, gain=1.0, background=1000.0)
    assert (np.asarray(answer.targets.count) == 0).sum() >= 98
    np.testing.assert_array_equal(answer.pedestal, np.zeros(100))
    np.testing.assert_array_equal(answer.background, np.full(100, 1000))
    np.testing.assert_array_equal(answer.noise, np.full(100, 2))
    empty = np.asarray(answer.targets.count) == 0
    ideal = (2 / (121 * empty.sum())) ** 0.5
    assert abs(answer.chi_square[empty].mean() - 1) < 4 * ideal
    assert not answer.unexplained[empty].any()


def test_a_pedestal_has_no_shot_noise(sky: np.ndarray) -> None:
    """The map alone: told as a pedestal the same light is full of targets."""
    told = {"read_noise": 2.0, "gain": 1.0}
    light = on_grid(sky, **told, background=1000.0)
    assert (np.asarray(light.targets.count) == 0).sum() >= 98
    offset = on_grid(sky, **told, pedestal=1000.0, background=0.0)
    assert (np.asarray(offset.targets.count) > 0).sum() >= 98
    np.testing.assert_array_equal(offset.pedestal, np.full(100, 1000))
    np.testing.assert_array_equal(offset.background, np.zeros(100))
    assert (offset.residual < light.residual).sum() >= 98  # which took some of the scatter


def test_an_estimated_level_is_background_above_the_pedestal(sky: np.ndarray) -> None:
    """And what is left of the scatter when its shot noise is taken out is the noise."""
    plain, above = on_grid(sky, gain=1.0), on_grid(sky, gain=1.0, pedestal=400.0)
    np.testing.assert_array_equal(plain.pedestal, np.zeros(100))
    np.testing.assert_array_equal(above.pedestal, np.full(100, 400))
    np.testing.assert_allclose(above.background + 400, plain.background, rtol=1e-6)
    for answer, light in ((plain, 1000), (above, 600)):
        error = answer.background - light
        assert abs(error.mean()) < 4 * error.std(ddof=1) / 10 + 0.05 * 1000**0.5
    # The pedestal's 400 counts have no shot noise, so it is read noise that explains theirs.
    variance = above.noise.astype(float) ** 2
    off = variance.mean() - 404
    assert abs(off) < 4 * variance.std(ddof=1) / 10 + 0.04 * 1004
    assert (plain.noise < above.noise).mean() > 0.9


# --- faults and bad input ------------------------------------------------------------


def test_row1_invalid_pixels_are_refused_or_flagged(
    csist: tuple[Targets, np.ndarray], averaged: UnmixResult
) -> None:
    frames = csist[1][:BATCH].copy()
    row, col = np.asarray(averaged.targets.position)[3, 0].round().astype(int)
    frames[3, row, col + 1] = np.nan  # beside a target
    with pytest.raises(ValueError, match="frame 3"):
        run(frames, base=KNOWN)
    after = run(frames, base=KNOWN, mask_invalid=True)
    assert after.invalid.tolist() == [i == 3 for i in range(BATCH)]
    others = [i for i in range(BATCH) if i != 3]
    ours, theirs = everything(after), everything(averaged)
    for name in ours:
        assert_same(ours[name], theirs[name], others)
    assert "invalid" in after.status()[3, 0]
    assert np.isfinite(np.asarray(after.targets.position)).all()
    assert after.targets.count[3] >= 1


@pytest.mark.parametrize("method", ["dscsnet", "greedy", "grid"])
def test_rows2_and_3_constant_frames_have_no_targets(method: str) -> None:
    level = np.array([0.0, 40.0, 254.0, 1e4, 1e-5, -7.0, 0.0, 0.0])
    frames = np.broadcast_to(level[:, None, None], (BATCH, 11, 11))
    answer = in_map(frames, method=method)
    assert answer.targets.count.tolist() == [0] * BATCH
    np.testing.assert_allclose(answer.background, level, rtol=1e-6)
    np.testing.assert_allclose(answer.residual, 0, atol=1e-3)


def test_row4_a_saturated_core_tells_a_lower_limit() -> None:
    tables = [[(5.2, 4.9, 1500.0)], [(5.2, 4.9, 240.0)]]
    frames = np.minimum(np.round(frames_of(tables, noise=1.0)), 255)
    assert (frames[0] == 255).sum() >= 2
    answer = in_map(frames, saturation=255.0, read_noise=1.0, background=0.0)
    assert answer.targets.count.tolist()[:2] == [1, 1]
    assert answer.saturated[:2, 0].tolist() == [True, False]
    assert "saturated" in answer.status()[0, 0]
    error = np.abs(np.asarray(answer.targets.intensity)[:2, 0] - [1500, 240])
    assert (error < 4 * answer.std[:2, 0, 2]).all()
    assert (answer.std[:2, 0, 2] < [100, 10]).all()
    np.testing.assert_allclose(answer.targets.position[:2, 0], [[5.2, 4.9]] * 2, atol=0.1)
    # The full well of 8 bit is known from the type.
    of_bytes = in_map(frames.clip(0).astype(np.uint8), method="grid")
    assert of_bytes.saturated[0].any()
    assert not in_map(frames, method="grid", saturation=1e6).saturated.any()


@pytest.mark.parametrize("shape", [(2, 11, 11, 3), (11,), (1, 2, 3, 4, 5)])
def test_row5_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        run(np.zeros(shape, np.float32))


def test_rows6_7_9_shapes_and_types_give_one_answer(csist: tuple[Targets, np.ndarray]) -> None:
    frames = csist[1][:BATCH]
    grid = partial(on_grid, saturation=255.0)
    expected = grid(frames).targets
    for same in (frames[..., None], frames.astype(np.uint8), frames.astype(float), frames.tolist()):
        assert_same(expected, grid(same).targets)
    lowered = grid(frames - 7)  # negative pixels: the estimated background takes the offset out
    assert lowered.targets.count.tolist() == expected.count.tolist()


def test_row6_one_frame_is_a_batch_of_one() -> None:
    frames = frames_of([PAIR, [(3.0, 3.0, 200.0)]], noise=1.0)
    whole, one = in_map(frames, method="greedy"), in_map(frames[0], method="greedy")
    assert one.targets.mask.shape == (1, 16)
    assert_same(one.targets, jax.tree.map(lambda a: a[:1], whole.targets))


@pytest.mark.parametrize("kind", [bool, complex, object])
def test_row8_other_kinds_of_numbers_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="dtype"):
        run(np.zeros((11, 11), kind))


def test_row10_answers_scale_with_the_frame() -> None:
    frames = frames_of([PAIR, [(5.0, 4.0, 235.0)], []], noise=2.0)
    expected = in_map(frames)
    assert expected.targets.count.tolist() == [2, 1] + [0] * 6
    for scale in (1e-6, 1e-3, 1e3, 1e6):
        answer = in_map(frames * scale)
        np.testing.assert_array_equal(answer.targets.mask, expected.targets.mask)
        np.testing.assert_allclose(answer.targets.position, expected.targets.position, atol=1e-2)
        for name in ("noise", "residual"):
            np.testing.assert_allclose(
                getattr(answer, name) / scale, getattr(expected, name), rtol=1e-3
            )
        mask = np.asarray(expected.targets.mask)
        ours = np.asarray(answer.targets.intensity)[mask] / scale
        np.testing.assert_allclose(ours, np.asarray(expected.targets.intensity)[mask], rtol=2e-3)
        assert answer.status().tolist() == expected.status().tolist()


def test_row11_near_edge() -> None:
    frames = frames_of([[(0.2, 5.0, 235.0)], [(5.0, 5.0, 235.0)], [(10.4, 10.3, 235.0)]], noise=0.3)
    answer = in_map(frames, read_noise=0.3, background=0.0)
    assert answer.targets.count.tolist()[:3] == [1, 1, 1]
    assert answer.near_edge[:3, 0].tolist() == [True, False, True]
    assert answer.status()[:2, 0].tolist() == ["near_edge", "ok"]
    np.testing.assert_allclose(answer.targets.position[0, 0], [0.2, 5.0], atol=0.05)
    np.testing.assert_allclose(answer.targets.position[2, 0], [10.4, 10.3], atol=0.05)


def test_row12_truncated_is_flagged() -> None:
    frames = frames_of([[(3.0, 3.0, 150.0), (8.0, 8.0, 250.0)], [(5.0, 5.0, 200.0)]], noise=1.0)
    for method in ("dscsnet", "greedy", "grid"):
        answer = in_map(frames, method=method, max_targets=1, read_noise=1.0, background=0.0)
        # The map alone has a second, faint peak beside the single target, too.
        assert answer.truncated.tolist()[:2] == [True, method == "grid"]
        assert answer.targets.count.tolist()[:2] == [1, 1]
        np.testing.assert_allclose(answer.targets.intensity[0], [250], rtol=0.2)
        assert "truncated" in answer.status()[0, 0]
        assert answer.residual[0] > 3  # counts: the missing target


def test_row13_coincident_targets_are_one() -> None:
    coincident = frames_of([[(5.1, 5.2, 100.0), (5.1, 5.2, 150.0)]] * 4, noise=1.0)
    answer = in_map(coincident, read_noise=1.0, background=0.0)
    assert answer.targets.count.tolist() == [1] * 4 + [0] * 4
    np.testing.assert_allclose(answer.targets.intensity[:4, 0], 250, atol=10)
    np.testing.assert_allclose(answer.targets.position[:4, 0], [[5.1, 5.2]] * 4, atol=0.04)


def test_row13_a_target_too_bright_for_one_is_unresolved() -> None:
    coincident = frames_of([[(5.1, 5.2, 230.0), (5.1, 5.2, 240.0)]] * 4)
    told = {"base": KNOWN, "saturation": 1e6}
    answer = in_map(np.round(coincident), **told)
    mask = np.asarray(answer.targets.mask)[:4]
    assert mask.any(1).all()
    # Two in the prior's distance fit worse than one: unresolved, or not explained.
    flags = answer.unresolved[:4] | answer.unexplained[:4, None]
    assert flags[mask].all()
    assert "ok" not in answer.status()[:4][mask]
    alone = in_map(np.round(frames_of([[(5.1, 5.2, 240.0)]])), **told)
    assert alone.status()[0, 0] == "ok"


def test_row21_another_psf() -> None:
    """The method `grid` refuses it; `dscsnet` starts from detection, and says so."""
    wide = jit_render_wide(from_lists([[(5.0, 4.7, 240.0), (5.2, 6.6, 200.0)]]))
    frames = np.asarray(wide) + np.random.default_rng(0).normal(size=(1, 11, 11))
    with pytest.raises(ValueError, match=r"0\.5.*0\.7"):
        run(frames, psf=0.7, weights="csist_c3", method="grid")
    with pytest.warns(UserWarning, match=r"0\.45.*0\.55.*0\.7.*detection"):
        answer = in_map(frames, psf=0.7, read_noise=1.0, background=0.0)
    assert answer.start.tolist() == ["detection"]
    assert answer.targets.count.tolist() == [2]
    np.testing.assert_allclose(answer.targets.position[0, :2], [[5, 4.7], [5.2, 6.6]], atol=0.05)
    assert in_map(np.zeros((11, 11)), psf=0.7, method="greedy").start.tolist() == ["detection"]


def test_light_that_is_not_quite_the_model_s_makes_no_targets() -> None:
    """Told of the misfit, a bright star is one target, as uncertain as the misfit lets it be."""
    table = [[(5.1 + 0.01 * i, 4.8, 2000.0)] for i in range(48)]
    sensor = Sensor(read_noise=1.0, background=0.0, misfit=0.1)
    frames = expose(sensor, jax.random.key(0), frames_of(table))
    untold = dataclasses.replace(sensor, misfit=None)
    shattered, whole = (in_map(frames, Known(0.5, s)) for s in (untold, sensor))
    assert (np.asarray(shattered.targets.count) > 1).mean() > 0.7
    assert (np.asarray(whole.targets.count) == 1).mean() > 0.9
    np.testing.assert_allclose(np.median(whole.chi_square), 1, atol=0.1)
    off = np.asarray(whole.targets.position)[:, 0] - np.array(table)[:, 0, :2]
    pull = (off / whole.std[:, 0, :2])[np.asarray(whole.targets.count) == 1]
    assert 0.75 < np.sqrt((pull**2).mean()) < 1.3


def test_row33_ragged_batches_score_every_frame(csist: tuple[Targets, np.ndarray]) -> None:
    frames = csist[1][:16]
    whole, ragged = on_grid(frames), on_grid(frames, block=11)
    assert ragged.targets.count.tolist() == whole.targets.count.tolist()
    np.testing.assert_allclose(ragged.targets.position, whole.targets.position, atol=1e-4)


def test_no_frames_give_no_targets() -> None:
    answer = in_map(np.zeros((0, 11, 11)), method="greedy")
    assert answer.targets.mask.shape[0] == 0
    assert answer.status().shape[0] == 0
    assert on_grid(np.zeros((0, 11, 11))).targets.mask.shape[0] == 0


def test_row34_a_fit_that_has_not_settled_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit is stopped before its first step."""
    frames = frames_of([[(5.0, 4.0, 235.0)], [(3.2, 6.1, 150.0)]], noise=1.0)

    @partial(jax.jit, static_argnames="only_add")
    def stopped(given: tuple, known: Any, compare: Any, *, only_add: bool) -> Any:
        found = fit(*given[:2], known, num_iterations=0)
        counts = found.targets.mask.shape[1] + 1
        table = jnp.zeros((len(found.theta), counts))
        same = jax.tree.map(lambda a: jnp.repeat(a[:, None], counts, 1), found.targets)
        return Selected(found, table, same)

    monkeypatch.setattr(solving, "_select", stopped)
    answer = in_map(frames, read_noise=1.0, background=0.0)
    mask = np.asarray(answer.targets.mask)
    assert mask[:2].any(1).all()
    assert answer.not_converged[mask].all()
    assert not answer.not_converged[~mask].any()
    assert all("not_converged" in text for text in answer.status()[mask])
    assert np.isfinite(answer.residual).all()


def test_row36_large_frame_in_tiles_as_in_one_piece() -> None:
    rng = np.random.default_rng(1)
    shape = (TILE + 40, TILE + 25)
    rows, cols = np.meshgrid(np.arange(8, shape[0] - 8, 12), np.arange(8, shape[1] - 8, 12))
    centre = np.stack([rows.ravel(), cols.ravel()], -1)
    first = centre + rng.uniform(-0.3, 0.3, centre.shape)
    table = np.concatenate([first, first + np.array([0.45, 0.5])])
    table = np.column_stack([table, rng.uniform(220, 250, len(table))])
    frame = np.round(render(from_lists([table]), frame_size=shape, psf=0.5))
    tiled = to_lists(on_grid(frame, weights="csist_c3").targets)[0]

    weights = pretrained("csist_c3")
    operator = sensing_operator(shape, division=3, psf=0.5)
    x = network_of(weights).apply(weights.params, jnp.asarray(frame), operator).x
    read = peak_centroids(x, division=3, separation=0.4, capacity=235.0, max_targets=len(table) * 2)
    whole = to_lists(read.targets)[0]
    assert len(tiled) == len(whole)
    assert abs(len(tiled) - len(table)) <= 0.03 * len(table)
    distance = np.linalg.norm(tiled[:, None, :2] - whole[None, :, :2], axis=-1).min(1)
    assert distance.max() < 0.01


def test_row36_all_groups_of_a_large_frame_are_found() -> None:
    rng = np.random.default_rng(4)
    rows, cols = np.divmod(np.arange(12), 4)
    centre = np.column_stack([25 + 50 * rows, 20 + 36 * cols]) + rng.uniform(-10, 10, (12, 2))
    shift = np.array([[0.0, 0.0], [0.7, 0.1], [0.1, 0.8]])
    groups = [c + shift[: 1 + i % 3] for i, c in enumerate(centre)]
    place = np.concatenate(groups)
    table = np.column_stack([place, rng.uniform(220, 250, len(place))])
    clean = np.asarray(render(from_lists([table]), frame_size=150, psf=0.5))
    frame = clean + 0.5 * rng.normal(size=clean.shape)
    answer = in_map(frame, read_noise=0.5, background=0.0)
    found = to_lists(answer.targets)[0]
    assert len(found) == len(table) == 24
    apart = np.linalg.norm(found[:, None, :2] - table[None, :, :2], axis=-1)
    assert sorted(apart.argmin(1)) == list(range(24))
    error = np.abs(found - table[apart.argmin(1)]) / answer.std[0, : len(found)]
    assert error.max() < 4
    assert apart.min(1).max() < 0.1
    assert np.median(apart.min(1)) < 0.02
    assert answer.status()[0, : len(found)].tolist() == ["ok"] * len(found)


def test_weights_by_path_and_unknown_choices(csist: tuple[Targets, np.ndarray]) -> None:
    frames = csist[1][:BATCH]
    by_name = on_grid(frames, weights="csist_c3").targets
    assert_same(by_name, on_grid(frames, weights=packaged_weights("csist_c3")).targets)
    assert_same(by_name, on_grid(frames, weights=pretrained("csist_c3")).targets)
    assert_same(on_grid(frames).targets, on_grid(frames, weights="varied_c3").targets)
    for wrong in ({"method": "magic"}, {"readout": "tea"}, {"estimate": "mode"}):
        (value,) = wrong.values()
        with pytest.raises(ValueError, match=value):
            run(frames, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cells' goes with the method 'grid'"):
        run(frames, readout="cells")
    with pytest.raises(FileNotFoundError, match="varied_c3"):
        run(frames, weights="magic")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("read_noise", -1.0),
        ("read_noise", np.inf),
        ("background", np.nan),
        ("pedestal", np.inf),
        ("gain", -1.0),
        ("saturation", 0.0),
        ("block", 0),
        ("max_targets", 0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        run(np.zeros((11, 11)), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("psf", [-0.5, (0.5, 0.0), float("nan"), Moffat(1.2, 1.0)])
def test_row21_what_is_no_psf_is_refused(psf: Any) -> None:
    with pytest.raises(ValueError, match="PSF must have positive parameters"):
        run(np.zeros((11, 11)), psf=psf)


def test_row21_the_map_alone_is_refused_for_other_psfs() -> None:
    with pytest.raises(ValueError, match="trained for Gaussian PSFs, got Moffat"):
        on_grid(np.zeros((11, 11)), psf=Moffat(0.86, 2.5))


def test_presets_without_conditions_in_common_have_nothing_to_tell() -> None:
    with pytest.raises(ValueError, match="csist_varied"):
        _ = scene.get_preset("csist_varied").known
