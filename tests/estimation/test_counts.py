"""Counts: wrong ones are put right, the evidence is an integral, frames stand alone."""

from functools import partial

import jax
import numpy as np
import pytest
from scipy.special import erf

from dscsnet_jax.estimation.blocks import in_blocks
from dscsnet_jax.estimation.counts import Selected, log_evidence, select_count
from dscsnet_jax.estimation.observe import Observation, observe
from dscsnet_jax.estimation.prior import ScenePrior, preset_prior, scene_prior
from dscsnet_jax.estimation.refine import Fit, refine
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.targets import Targets, from_lists

CSIST = scene.get_preset("csist")
PRIOR = preset_prior(CSIST)
FRAMES = 64
SLOTS = 6

jit_refine = jax.jit(lambda frames, prior: refine(*frames, prior))
jit_render = jax.jit(partial(render, frame_size=11, sigma=0.5))
jit_observe = jax.jit(partial(observe, sigma=0.5))
jit_evidence = jax.jit(log_evidence)


def fitted(seen: Observation, start: Targets, prior: ScenePrior) -> Fit:
    start = jax.tree.map(np.asarray, start)
    start = Targets(start.position.astype("f4"), start.intensity.astype("f4"), start.mask)
    return in_blocks(jit_refine, (seen, start), prior)


@pytest.fixture(scope="module")
def csist() -> tuple[Targets, Observation]:
    """Frames of the benchmark, the truth with a slot left free."""
    made = jax.jit(scene.simulate, static_argnums=0)(
        CSIST, scene.frame_keys(3, "val", np.arange(FRAMES))
    )
    free = ((0, 0), (0, SLOTS - 5))
    truth = Targets(
        np.pad(made.targets.position, (*free, (0, 0))),
        np.pad(made.targets.intensity, free),
        np.pad(made.targets.mask, free),
    )  # type: ignore[arg-type]
    seen = jit_observe(made.frames, noise=0.0, background=0.0, saturation=255.0)
    return truth, jax.tree.map(np.asarray, seen)


def changed(truth: Targets, change: int) -> Targets:
    """One target too few, at random which, or one too many, at a random place near by."""
    rng = np.random.default_rng(1)
    position, intensity, mask = (np.array(a) for a in jax.tree.leaves(truth))
    for frame, number in enumerate(mask.sum(1)):
        slot = rng.integers(number) if change < 0 else number
        centre = position[frame, :number].mean(0)
        more = change > 0
        position[frame, slot] = centre + rng.uniform(-0.5, 0.5, 2) if more else 0
        intensity[frame, slot] = 235 if more else 0
        mask[frame, slot] = more
    return Targets(position, intensity, mask)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[-1, 1], ids=["one too few", "one too many"])
def corrected(
    request: pytest.FixtureRequest, csist: tuple[Targets, Observation]
) -> tuple[Fit, Selected]:
    truth, seen = csist
    start = fitted(seen, changed(truth, request.param), PRIOR)
    wanted = np.asarray(truth.count) + request.param
    np.testing.assert_array_equal(start.targets.count, wanted)
    return start, select_count(seen, start, PRIOR)


def test_wrong_counts_are_put_right(
    csist: tuple[Targets, Observation], corrected: tuple[Fit, Selected]
) -> None:
    truth, _ = csist
    right = np.asarray(corrected[1].fit.targets.count) == np.asarray(truth.count)
    assert right.sum() >= 61  # 95 % of 64


def test_the_chosen_count_has_the_best_evidence(corrected: tuple[Fit, Selected]) -> None:
    fit, table = corrected[1]
    assert table.shape == (FRAMES, SLOTS + 1)
    np.testing.assert_array_equal(table.argmax(1), fit.targets.count)
    assert not np.isnan(table).any()
    assert (np.isfinite(table).sum(1) >= 2).mean() > 0.9  # the others were tried


def test_right_counts_are_left_alone(csist: tuple[Targets, Observation]) -> None:
    truth, seen = csist
    answer = select_count(seen, fitted(seen, truth, PRIOR), PRIOR)
    right = np.asarray(answer.fit.targets.count) == np.asarray(truth.count)
    assert right.sum() >= 63


def test_frames_do_not_depend_on_each_other(
    csist: tuple[Targets, Observation], corrected: tuple[Fit, Selected]
) -> None:
    _, seen = csist
    start, whole = corrected
    order = np.random.default_rng(2).permutation(FRAMES)[:23]
    some = partial(jax.tree.map, lambda a: np.asarray(a)[order])
    part = select_count(some(seen), some(start), PRIOR)
    for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(some(whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_evidence_does_not_depend_on_the_order_of_the_slots(
    csist: tuple[Targets, Observation],
) -> None:
    truth, seen = csist
    order = np.random.default_rng(4).permutation(SLOTS)
    turned = Targets(truth.position[:, order], truth.intensity[:, order], truth.mask[:, order])
    one, other = (fitted(seen, t, PRIOR) for t in (truth, turned))
    assert np.asarray(one.converged).sum() > 40
    both = np.asarray(one.converged & other.converged)
    first, second = (np.asarray(jit_evidence(f, seen, PRIOR)) for f in (one, other))
    assert np.isfinite(first).all()
    # Rounding in float32: a thousandth of what decides a count.
    np.testing.assert_allclose(first[both], second[both], atol=0.02)


@pytest.mark.parametrize("known", [False, True], ids=["no prior", "prior"])
def test_evidence_is_the_integral_over_a_target(known: bool) -> None:
    """Of likelihood times prior over row, col and intensity, on a lattice.

    Without noise in the frame: Laplace's integral leaves out how residuals bend the peak.
    """
    noise = 4.0
    frame = np.asarray(jit_render(from_lists([[(5.1, 4.8, 240.0)]], SLOTS)), np.float32)
    seen = jax.tree.map(np.asarray, jit_observe(frame, noise=noise, background=0.0))
    prior = scene_prior(intensity=(220, 270)) if known else ScenePrior()
    fit = fitted(seen, from_lists([[(5.0, 5.0, 220.0)]], SLOTS), prior)
    assert bool(fit.converged[0])
    got = float(jit_evidence(fit, seen, prior)[0])

    def response(place: np.ndarray) -> np.ndarray:
        edges = np.arange(12) - 0.5
        return np.diff(erf((edges - place[:, None]) * 2**0.5) / 2, axis=1)

    steps = np.linspace(-5, 5, 41)
    best = np.append(fit.targets.position[0, 0], fit.targets.intensity[0, 0]).astype(float)
    std = np.asarray(fit.std, float)[0, 0]
    row, col, intensity = best[:, None] + std[:, None] * steps
    psf = np.einsum("ai,bj->abij", response(row), response(col)).reshape(-1, 121)
    # Quadratic in the intensity: sum of (y - I psf)^2.
    data = frame[0].astype(float).ravel()
    square, product, own = data @ data, psf @ data, (psf**2).sum(1)
    misfit = square - 2 * np.outer(product, intensity) + np.outer(own, intensity**2)
    log = -misfit / noise**2 / 2
    if known:
        middle, spread = 245.0, 50 / 12**0.5
        log = log - ((intensity - middle) / spread) ** 2 / 2 - np.log(spread * (2 * np.pi) ** 0.5)
    else:
        log = log - np.log(data.sum())
    cell = (std * (steps[1] - steps[0])).prod()
    expected = log.max() + np.log(np.exp(log - log.max()).sum() * cell) - np.log(121)
    assert got == pytest.approx(expected, abs=0.02)


def test_only_add_grows_from_nothing_and_stops() -> None:
    tables = [
        [(2.2, 2.1, 200.0), (2.4, 8.2, 150.0), (8.3, 7.6, 100.0), (8.0, 2.0, 60.0)],
        [(5.0, 5.0, 100.0)],
        [],
    ]
    truth = from_lists(tables, SLOTS)
    clean = np.asarray(jit_render(truth))
    frames = (clean + np.random.default_rng(5).normal(size=clean.shape)).astype("f4")
    seen = jax.tree.map(np.asarray, jit_observe(frames, noise=1.0, background=0.0))
    empty = from_lists([[], [], []], SLOTS)
    answer = select_count(seen, fitted(seen, empty, ScenePrior()), ScenePrior(), only_add=True)
    targets = answer.fit.targets
    assert targets.count.tolist() == [4, 1, 0]
    # Found from the brightest on, each in the next slot.
    np.testing.assert_allclose(targets.position[0, :4], truth.position[0, :4], atol=0.1)
    np.testing.assert_allclose(targets.intensity[0, :4], truth.intensity[0, :4], atol=10)
    one = select_count(
        seen, fitted(seen, empty, ScenePrior()), ScenePrior(), only_add=True, max_rounds=1
    )
    assert one.fit.targets.count.tolist() == [1, 1, 0]


def test_no_frames(csist: tuple[Targets, Observation], corrected: tuple[Fit, Selected]) -> None:
    none = jax.tree.map(lambda a: np.asarray(a)[:0], (csist[1], corrected[0]))
    answer = select_count(*none, PRIOR)
    assert answer.log_evidence.shape == (0, SLOTS + 1)
    assert answer.fit.targets.mask.shape == (0, SLOTS)
