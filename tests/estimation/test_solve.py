"""Solve: counts kept or told, errors that are right, noise measured, every part on its own."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dscsnet_jax.estimation import solve as solving
from dscsnet_jax.estimation import windows
from dscsnet_jax.estimation.solve import Solved, selected, solve
from dscsnet_jax.estimation.windows import Windows, flat
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import ScenePrior, preset_prior
from dscsnet_jax.inference.search import Selected
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.limits import cramer_rao, information_root
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.sensor import Sensor
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

pytestmark = pytest.mark.slow

NOISY = scene.get_preset("csist_noise")
KNOWN = Known(psf=Gaussian(np.full(2, 0.5, np.float32)), prior=preset_prior(NOISY))
LOW, HIGH = 220.0, 250.0
NOISE, LEVEL = 5.0, 10.0
FRAMES, SLOTS = 32, 8
OPTICS: dict[str, Any] = {"frame_size": 11, "psf": 0.5}

jit_simulate = jax.jit(scene.simulate, static_argnums=0)
jit_observe = jax.jit(observe)
jit_render = jax.jit(partial(render, **OPTICS))


@pytest.fixture(scope="module")
def noisy() -> tuple[Targets, np.ndarray]:
    made = jit_simulate(NOISY, scene.frame_keys(9, "val", np.arange(FRAMES)))
    return jax.tree.map(np.asarray, made.targets), np.asarray(made.frames)


@pytest.fixture(scope="module")
def seen(noisy: tuple[Targets, np.ndarray]) -> Observation:
    told = jit_observe(
        noisy[1], Sensor(read_noise=NOISE, pedestal=LEVEL, background=0.0, saturation=255.0)
    )
    return jax.tree.map(np.asarray, told)


@pytest.fixture(scope="module")
def fitted(noisy: tuple[Targets, np.ndarray], seen: Observation) -> Solved:
    """Counts as in truth, so that errors can be compared target by target."""
    return solve(seen, flat(noisy[0]), KNOWN, max_targets=SLOTS, estimate="map", fixed_count=True)


@pytest.fixture(scope="module")
def averaged(noisy: tuple[Targets, np.ndarray], seen: Observation) -> Solved:
    return solve(seen, flat(noisy[0]), KNOWN, max_targets=SLOTS, fixed_count=True)


@pytest.fixture(scope="module")
def counted(noisy: tuple[Targets, np.ndarray], seen: Observation) -> Solved:
    return solve(seen, flat(noisy[0]), KNOWN, max_targets=SLOTS, estimate="map")


def squared_errors(answer: Solved, truth: Targets) -> np.ndarray:
    """Mean squared distance to the truth of each frame, targets paired at best."""
    errors = []
    for ours, theirs in zip(to_lists(answer.targets), to_lists(truth), strict=True):
        cost = ((ours[:, None, :2] - theirs[None, :, :2]) ** 2).sum(-1)
        errors.append(cost[linear_sum_assignment(cost)].mean() if len(theirs) else 0.0)
    return np.array(errors)


def assert_same(ours: Any, theirs: Any, index: Any = slice(None)) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other)[index])


# --- answers ---------------------------------------------------------------------------


def test_fixed_counts_are_kept(
    noisy: tuple[Targets, np.ndarray], fitted: Solved, averaged: Solved
) -> None:
    number = np.asarray(noisy[0].count)
    assert len(set(number.tolist())) >= 4
    for answer in (fitted, averaged):
        np.testing.assert_array_equal(answer.targets.count, number)
        certain = np.arange(SLOTS + 1) == number[:, None]
        np.testing.assert_array_equal(answer.count_probability, certain)
        assert not answer.truncated.any()
        assert (np.diff(np.asarray(answer.targets.intensity), axis=1) <= 0).all()  # brightest first
        for value in (answer.std, answer.interval, answer.effective_sample_size):
            assert not value[~np.asarray(answer.targets.mask)].any()


def test_the_mean_has_less_error_than_the_fit(
    noisy: tuple[Targets, np.ndarray], fitted: Solved, averaged: Solved
) -> None:
    truth = noisy[0]
    fit, mean = squared_errors(fitted, truth), squared_errors(averaged, truth)
    assert mean.mean() < fit.mean()
    assert not np.array_equal(fitted.targets.position, averaged.targets.position)
    mask = np.asarray(averaged.targets.mask)
    assert np.isinf(fitted.effective_sample_size[mask]).all()
    assert (averaged.effective_sample_size[mask] >= 1).all()
    assert np.isfinite(averaged.effective_sample_size[mask]).all()
    assert averaged.converged[mask].mean() > 0.9


def test_intervals_of_the_mean_hold_the_truth(
    noisy: tuple[Targets, np.ndarray], averaged: Solved
) -> None:
    """Of the intensities, whose prior is uniform, and of the places on average."""
    mask = np.asarray(averaged.targets.mask)
    interval = averaged.interval[mask]
    assert (interval[:, 2, 0] >= LOW).all()
    assert (interval[:, 2, -1] <= HIGH).all()
    assert (np.diff(interval, axis=-1) >= 0).all()
    # A squared distance is the sum of two variances; the best pairing makes it a little less.
    variance = (averaged.std[..., :2] ** 2).sum(-1).sum(1) / mask.sum(1)
    ratio = squared_errors(averaged, noisy[0]) / variance
    error = ratio.std(ddof=1) / FRAMES**0.5
    assert error < 0.2, "the frames must tell"
    assert abs(ratio.mean() - 1) < 3 * error + 0.1


def test_the_error_of_the_fit_is_the_bound_of_a_target_alone(fitted: Solved) -> None:
    """With what the prior tells of the intensity `I(v)`, `v` standard normal."""
    alone = np.flatnonzero(np.asarray(fitted.targets.count) == 1)
    assert len(alone) >= 1
    some = jax.tree.map(lambda a: np.asarray(a)[alone, :1], fitted.targets)
    sensor = Sensor(read_noise=(NOISE**2 + 1 / 12) ** 0.5)
    root = jax.jit(partial(information_root, sensor=sensor, **OPTICS))(some)
    information = np.einsum("bap,baq->bpq", root, root).astype(float)
    law = KNOWN.prior.intensity
    v = np.asarray(law.latent(np.asarray(some.intensity)), float)[:, 0]
    slope = np.asarray(law.slope(np.float32(v)), float)
    # At the mode the pixels pull by `v / slope`, and `dI/dv` bends by `-v`.
    information[:, 2, 2] += (1 + v**2) / slope**2
    bound = np.sqrt(np.diagonal(np.linalg.inv(information), axis1=1, axis2=2))
    np.testing.assert_allclose(fitted.std[alone, 0], bound, rtol=2e-3)
    free = np.stack(cramer_rao(root, some.mask), -1)[:, 0]
    assert (fitted.std[alone, 0, 2] < 0.9 * free[:, 2]).all(), "the prior must tell"


def test_count_probabilities(noisy: tuple[Targets, np.ndarray], counted: Solved) -> None:
    share, number = counted.count_probability, np.asarray(counted.targets.count)
    assert share.shape == (FRAMES, SLOTS + 1)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-12)
    assert (share >= 0).all()
    np.testing.assert_array_equal(share.argmax(1), number)
    right = number == np.asarray(noisy[0].count)
    chance = share.max(1)
    assert (chance > 0.9).sum() >= 8
    # As often right as they say, by their own errors and that of a tenth.
    error = np.sqrt((chance * (1 - chance)).sum()) / FRAMES
    assert right.mean() > chance.mean() - 3 * error - 0.1


def test_source_and_observation_belong_to_the_answer(counted: Solved, seen: Observation) -> None:
    assert_same(counted.observation, seen)  # noise was given
    expected = jit_render(jax.tree.map(np.asarray, counted.targets))
    np.testing.assert_allclose(counted.source, expected, atol=1e-3)
    left = counted.observation.counts - counted.source - LEVEL
    used = ~seen.saturated
    # All parameters of the fits are used up; a mean square of so many pixels.
    freedom = used.sum() - 3 * np.asarray(counted.targets.count).sum()
    noise2 = NOISE**2 + 1 / 12
    assert abs((left[used] ** 2).sum() / freedom / noise2 - 1) < 4 * (2 / freedom) ** 0.5 + 0.02


@pytest.mark.parametrize("how", ["map", "mean"])
def test_a_slice_of_the_frames_has_the_answers_of_the_whole(
    noisy: tuple[Targets, np.ndarray], seen: Observation, how: str, request: Any
) -> None:
    """To the last bit: of fits with their counts selected, and of chains."""
    whole = request.getfixturevalue({"map": "counted", "mean": "averaged"}[how])
    some = slice(5, 20, 3)
    given = jax.tree.map(lambda a: np.asarray(a)[some], (seen, noisy[0]))
    told = {"max_targets": SLOTS, "estimate": how, "fixed_count": how == "mean"}
    part = solve(given[0], flat(given[1]), KNOWN, **told)
    assert_same(part, whole, some)


# --- light, level and noise ------------------------------------------------------------


def test_noise_is_measured_where_no_target_is_left() -> None:
    made = jit_simulate(
        scene.get_preset("csist_noise", read_noise=2.0),
        scene.frame_keys(2, "val", np.arange(FRAMES)),
    )
    observation = jax.tree.map(
        np.asarray, jit_observe(made.frames, Sensor(pedestal=4.0, saturation=255.0))
    )
    answer = solve(
        observation,
        flat(made.targets),
        KNOWN,
        max_targets=SLOTS,
        estimate="map",
        estimate_noise=True,
        fixed_count=True,
    )
    again, true = answer.observation, (4 + 1 / 12) ** 0.5
    off = again.noise[:, 0, 0] / true - 1
    # 121 pixels tell 6.7 %; what the fits of few of them leave, a little less.
    assert abs(off.mean()) < 4 * 0.067 / FRAMES**0.5 + 0.03
    assert np.sqrt((off**2).mean()) < 0.15
    assert not np.array_equal(again.noise, observation.noise)
    np.testing.assert_array_equal(again.pedestal[:, 0, 0], np.full(FRAMES, 4.0))
    pull = (again.level[:, 0, 0] - LEVEL) / again.background_std
    assert np.abs(pull).max() < 4.5
    # A mean of the pixels, not a median with twice its error.
    assert (again.background_std < 0.6 * np.asarray(observation.background_std)).all()


def test_light_of_neighbouring_groups_is_told_and_not_taken_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two groups so near that each window sees the other's light, at the shot noise of both."""
    table = [(5.0, 3.0, 4000.0), (5.0, 6.4, 3000.0)]
    frame = np.asarray(jit_render(from_lists([table], 2)))
    frames = np.random.default_rng(0).poisson(np.repeat(frame, FRAMES, 0)).astype(np.float32)
    observation = jit_observe(frames, Sensor(read_noise=1.0, background=0.0, saturation=1e9))
    given: list[Observation] = []
    run = solving._run

    def watched(function: Any, w: Any, *shared: Any) -> Any:
        given.append(w.observation)
        return run(function, w, *shared)

    monkeypatch.setattr(solving, "_run", watched)
    known = Known(psf=Gaussian(np.full(2, 0.5, np.float32)), sensor=Sensor(gain=np.float32(1)))
    start = flat(from_lists([table] * FRAMES, SLOTS))
    answer = solve(observation, start, known, max_targets=SLOTS, estimate="map", fixed_count=True)
    windows, *_ = given  # and again, where the fit has moved the light
    assert len(windows.counts) == 2 * FRAMES
    for k, (row, col) in enumerate(windows.origin.astype(int)):
        there = frames[k // 2, row : row + 7, col : col + 7]
        np.testing.assert_array_equal(windows.counts[k], there)
    assert windows.neighbours.max((1, 2)).min() > 30
    # Brightest first, as they are in the table.
    error = np.concatenate(
        [
            answer.targets.position[:, :2] - np.array(table)[:, :2],
            (answer.targets.intensity[:, :2] - np.array(table)[:, 2])[..., None],
        ],
        -1,
    )
    pull = error / answer.std[:, :2]
    number = pull.size / 3
    assert np.all(np.abs(pull.mean((0, 1))) < 4 / number**0.5)
    assert np.all(np.abs((pull**2).mean((0, 1)) - 1) < 4 * (2 / number) ** 0.5)


# --- searches --------------------------------------------------------------------------


def test_what_the_start_missed_is_found_in_any_number() -> None:
    """From nothing: targets far apart, and a cluster of as many as a window has slots."""
    tables = [
        [(2.2, 2.1, 200.0), (2.4, 8.2, 150.0), (8.3, 7.6, 100.0), (8.0, 2.0, 60.0)],
        [(5.0, 4.2, 150.0), (5.0, 5.5, 140.0), (6.2, 4.8, 130.0), (3.8, 4.8, 120.0)],
        [(5.0, 5.0, 100.0)],
        [],
    ]
    truth = from_lists(tables, 5)
    clean = np.asarray(jit_render(truth))
    frames = (clean + np.random.default_rng(5).normal(size=clean.shape)).astype("f4")
    observation = jax.tree.map(
        np.asarray, jit_observe(frames, Sensor(read_noise=1.0, background=0.0, saturation=255.0))
    )
    known = dataclasses.replace(KNOWN, prior=ScenePrior())
    nothing = flat(from_lists([[]] * 4, SLOTS))
    for greedy in (False, True):
        answer = solve(
            observation, nothing, known, max_targets=SLOTS, estimate="map", greedy=greedy
        )
        assert answer.targets.count.tolist() == [4, 4, 1, 0]
        assert (squared_errors(answer, truth) < 0.1**2).all()
        assert answer.converged[np.asarray(answer.targets.mask)].all()
    few = solve(observation, nothing, known, max_targets=2, estimate="map")
    assert few.targets.count.tolist() == [2, 2, 1, 0]
    assert few.truncated.tolist() == [True, True, False, False]
    np.testing.assert_allclose(few.count_probability.sum(1), 1, rtol=1e-12)
    # What is above the slots is counted as the last of them.
    assert (few.count_probability[:2, 2] > 0.99).all()


def test_every_frame_is_answered_by_its_windows_once(
    noisy: tuple[Targets, np.ndarray], seen: Observation
) -> None:
    """Frames that are done again replace what they had."""
    parts = selected(seen, flat(from_lists([[]] * FRAMES, 1)), KNOWN)
    frames = np.concatenate([w.frame for w, _ in parts])
    np.testing.assert_array_equal(np.sort(frames), np.arange(FRAMES))  # one cluster each
    for w, s in parts:
        assert len(w.frame) == len(s.log_evidence) == len(w.targets.mask)
        assert not w.split.any()
        assert not w.guest.any()


def test_probabilities_of_groups_are_folded(seen: Observation) -> None:
    """Counts of independent windows add up, without guests; what is above the slots is the last."""

    def part(frame: list[int], chances: list[list[float]], number: int = 0) -> Any:
        with np.errstate(divide="ignore"):
            table = np.log(chances) - 1000.0
        mask = np.tile([number > 0, number > 1], (len(frame), 1))
        place = np.tile([[0.0, 0.0], [3.0, 0.0]], (len(frame), 1, 1))
        targets = Targets(place, mask * 1.0, mask)
        fit = type("Fit", (), {"targets": targets})
        guest = mask & [False, number > 1]
        none = np.zeros(len(frame), bool)
        window = Windows(np.array(frame), seen, targets, guest, none, np.zeros_like(mask))
        return window, Selected(fit, table, targets)  # type: ignore[arg-type]

    counted = [
        part([0, 2, 0], [[0.1, 0.9, 0.0], [0.0, 0.5, 0.5], [0.25, 0.0, 0.75]]),
        part([2, 3], [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
    ]
    got = solving._count_probability(counted, 4, 3)
    expected = [[0.025, 0.225, 0.075, 0.675], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    # Of two targets the second is a guest: one target less, and never less than none.
    shared = [part([1], [[0.2, 0.6, 0.2]], number=2)]
    got = solving._count_probability(shared, 2, 3)
    np.testing.assert_allclose(got, [[1, 0, 0, 0], [0.75, 0.25, 0, 0]], atol=1e-12)


def test_chains_from_the_start_itself(
    noisy: tuple[Targets, np.ndarray], seen: Observation, averaged: Solved
) -> None:
    """Where they forget it they find the same, by the errors of their means."""
    given = jax.tree.map(lambda a: a[:8], (seen, noisy[0]))
    posteriors = solving.sampled(given[0], flat(given[1]), KNOWN, seed=0)
    found, _ = windows.gather([(w, p.targets, ()) for w, p in posteriors])
    targets, *_ = windows.padded(found, [], 8, SLOTS)
    alone = np.asarray(targets.count) <= 2
    assert alone.sum() >= 3
    there = np.asarray(targets.mask) & alone[:, None]
    error = averaged.std[:8] / np.sqrt(np.maximum(averaged.effective_sample_size[:8], 1))[..., None]
    both = np.sqrt(2) * error[..., :2]
    # Numbered by brightness: of two as bright either may come first.
    off = np.sort(targets.position, 1) - np.sort(averaged.targets.position[:8], 1)
    assert (off != 0).any()
    assert np.abs(off / np.where(there[..., None], np.maximum(both, 1e-9), np.inf)).max() < 5


# --- nothing to solve ------------------------------------------------------------------


def test_no_targets_and_no_frames(seen: Observation) -> None:
    blank = dataclasses.replace(seen, counts=np.full_like(seen.counts, LEVEL))
    none = flat(from_lists([[]] * FRAMES, 2))
    answer = solve(blank, none, KNOWN, max_targets=SLOTS)
    assert answer.targets.count.tolist() == [0] * FRAMES
    np.testing.assert_array_equal(answer.count_probability, np.eye(SLOTS + 1)[[0] * FRAMES])
    assert not answer.source.any()
    empty = jax.tree.map(lambda a: np.asarray(a)[:0], blank)
    assert solve(empty, none, KNOWN, max_targets=SLOTS).targets.mask.shape == (0, SLOTS)
    assert solve(empty, none, KNOWN).count_probability.shape[0] == 0


def test_an_unknown_estimate_is_refused(seen: Observation, noisy: tuple) -> None:
    with pytest.raises(ValueError, match="unknown estimate 'mode'"):
        solve(seen, flat(noisy[0]), KNOWN, max_targets=SLOTS, estimate="mode")
