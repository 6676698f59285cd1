"""Answers for single windows, from counts to intervals, against theory and under faults."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import truncnorm

from dscsnet_jax.inference import evidence
from dscsnet_jax.inference.evidence import laplace
from dscsnet_jax.inference.fit import Fit, fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe, remeasured
from dscsnet_jax.inference.prior import ScenePrior, preset_prior, scene_prior
from dscsnet_jax.inference.sampler import sample
from dscsnet_jax.inference.scene_model import scene_model
from dscsnet_jax.inference.search import Selected, select
from dscsnet_jax.inference.summary import Posterior
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.limits import cramer_rao, information_root
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.sensor import Sensor
from dscsnet_jax.physics.targets import Targets, from_lists

pytestmark = pytest.mark.slow

SIDE, NOISE = 9, 4.0
OPTICS: dict[str, Any] = {"frame_size": SIDE, "psf": 0.5}
WIDTH = np.full(2, 0.5, np.float32)
PLAIN = Known(psf=Gaussian(WIDTH))

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jit_render = quick_jit(partial(render, **OPTICS))
jit_observe = quick_jit(observe)
jit_fit = quick_jit(fit)
jit_select = jax.jit(select, static_argnames="only_add")


def single(targets: Targets) -> Targets:
    position, intensity = (np.asarray(a, np.float32) for a in (targets.position, targets.intensity))
    return Targets(position, intensity, np.asarray(targets.mask))  # type: ignore[arg-type]


def table(targets: Targets) -> np.ndarray:
    return np.concatenate([targets.position, np.asarray(targets.intensity)[..., None]], -1)


def assert_same(ours: Any, theirs: Any) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


# --- posteriors ------------------------------------------------------------------------

ALONE = slice(0, 4)
APART = slice(4, 8)  # pairs that Fisher information describes
CLOSE, WIDE, BLEND, EMPTY = 8, 7, 9, 10
SCENES = [
    [(4.0, 4.0, 240.0)],
    [(3.8, 5.3, 150.0)],
    [(2.7, 2.6, 300.0)],
    [(5.5, 3.5, 240.0)],
    [(4.0, 3.0, 240.0), (4.0, 5.1, 240.0)],
    [(3.0, 4.1, 200.0), (5.0, 4.1, 250.0)],
    [(3.2, 3.2, 200.0), (4.8, 4.6, 200.0)],
    [(2.0, 5.5, 245.0), (6.1, 3.0, 240.0)],
    [(4.0, 3.7, 240.0), (4.0, 4.3, 240.0)],
    [(4.0, 4.0, 240.0), (4.05, 4.0, 240.0)],
    [],
]
TRUTH = single(from_lists(SCENES, 2))
LOW, HIGH, NEAR, FAR = 235.0, 250.0, 0.9, 4.0
LIMITED = Known(
    psf=Gaussian(WIDTH),
    prior=scene_prior(intensity=(LOW, HIGH), separation=NEAR, cluster_size=FAR),
)


@partial(jax.jit)
def posterior(seen: Observation, start: Targets, known: Known) -> Posterior:
    return sample(seen, start, known, jax.random.key(0), num_samples=64, psf_slope=True)


@pytest.fixture(scope="module")
def seen() -> Observation:
    """Windows without noise, whose posterior is centred at the truth."""
    told = jit_observe(jit_render(TRUTH), Sensor(read_noise=NOISE, background=0.0))
    return jax.tree.map(np.asarray, told)


@pytest.fixture(scope="module")
def free(seen: Observation) -> Posterior:
    return posterior(seen, TRUTH, PLAIN)


@pytest.fixture(scope="module")
def limited(seen: Observation) -> Posterior:
    return posterior(seen, TRUTH, LIMITED)


@pytest.fixture(scope="module")
def bounds() -> np.ndarray:
    """(B, K, 3) Cramer-Rao bounds."""

    @jax.jit
    def of(truth: Targets) -> tuple:
        root = information_root(truth, sensor=Sensor(read_noise=NOISE), **OPTICS)
        return cramer_rao(root, truth.mask)

    return np.stack(of(TRUTH), -1)


def worth(answer: Posterior, windows: Any) -> float:
    """Independent samples of the worst parameter of the worst window."""
    return float(np.asarray(answer.effective_sample_size)[windows].min())


@pytest.mark.parametrize("windows", [ALONE, APART], ids=["alone", "pairs"])
def test_mean_and_std_are_those_of_the_fisher_information(
    free: Posterior, bounds: np.ndarray, windows: slice
) -> None:
    mask, number = TRUTH.mask[windows], worth(free, windows)
    off = (table(free.targets) - table(TRUTH))[windows][mask] / bounds[windows][mask]
    assert number > 40
    # Off a little: the posterior is not quite a Gaussian.
    assert np.abs(off).max() < 4 / number**0.5 + 0.1
    assert (off**2).mean() < 2 / number + 0.01
    ratio = free.std[windows][mask] / bounds[windows][mask]
    assert np.abs(ratio - 1).max() < 4 / (2 * number) ** 0.5 + 0.05
    assert free.converged[windows].all()


def test_the_interval_of_a_gaussian_is_that_of_its_std(free: Posterior) -> None:
    centre, std = table(free.targets)[ALONE, 0], free.std[ALONE, 0]
    scaled = (free.interval[ALONE, 0] - centre[..., None]) / std[..., None]
    # 12 parameters; a quantile at two standard deviations is 2.8 times as uncertain as a mean.
    error = 2.8 / (worth(free, ALONE) * 12) ** 0.5
    np.testing.assert_allclose(scaled.mean((0, 1)), [-2, -1, 1, 2], atol=4 * error)
    assert (np.diff(np.asarray(free.interval)[TRUTH.mask], axis=-1) > 0).all()


def test_covariance_belongs_to_std(free: Posterior) -> None:
    variance = np.diagonal(free.covariance, axis1=-2, axis2=-1)
    np.testing.assert_allclose(variance, free.std.reshape(len(SCENES), -1) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(free.covariance, np.swapaxes(free.covariance, -1, -2))


def test_empty_slots_stay_zero(free: Posterior, limited: Posterior) -> None:
    assert (~TRUTH.mask).sum() == 6
    for answer in (free, limited):
        np.testing.assert_array_equal(answer.targets.mask, TRUTH.mask)
        for value in (answer.targets.intensity, answer.std, answer.interval):
            assert not np.asarray(value)[~TRUTH.mask].any()
            assert np.isfinite(value).all()
        assert answer.converged[EMPTY]


def test_a_range_of_intensities_cuts_the_posterior_off(
    limited: Posterior, free: Posterior, bounds: np.ndarray
) -> None:
    """A target alone at 240 counts +- 8 within 235 .. 250: a Gaussian cut off at both."""
    std = bounds[0, 0, 2]
    assert std > 5
    cut = truncnorm((LOW - 240) / std, (HIGH - 240) / std, loc=240, scale=std)
    got = limited.interval[0, 0, 2]
    assert got[0] >= LOW
    assert got[-1] <= HIGH
    number = worth(limited, slice(0, 1))
    assert number > 40
    levels = np.array([0.0228, 0.1587, 0.8413, 0.9772])
    quantiles = cut.ppf(levels)
    error = np.sqrt(levels * (1 - levels) / number) / cut.pdf(quantiles)
    assert (np.abs(got - quantiles) < 4 * error).all()
    mean = float(limited.targets.intensity[0, 0])
    assert abs(mean - cut.mean()) < 4 * cut.std() / number**0.5
    assert abs(limited.std[0, 0, 2] / cut.std() - 1) < 4 / (2 * number) ** 0.5
    assert free.interval[0, 0, 2, 0] < LOW
    assert free.interval[0, 0, 2, -1] > HIGH


def test_a_start_outside_the_range_finds_its_way_in(limited: Posterior) -> None:
    for window in (1, 2):  # of 150 and of 300 counts
        assert LOW <= float(limited.targets.intensity[window, 0]) <= HIGH


def mean_square_distance(answer: Posterior, window: int) -> np.ndarray:
    """(2,) mean over the samples of the squared distance of a pair along row and col."""
    apart = answer.targets.position[window, 0] - answer.targets.position[window, 1]
    c = np.asarray(answer.covariance)[window].reshape(2, 3, 2, 3)
    spread = [c[0, i, 0, i] + c[1, i, 1, i] - 2 * c[0, i, 1, i] for i in (0, 1)]
    return np.asarray(apart) ** 2 + np.array(spread)


def test_separation_and_cluster_size_hold(limited: Posterior, free: Posterior) -> None:
    """Of all samples, so of their mean square; the walls are soft by a hundredth of a pixel."""
    # The error of a mean square distance: of the distance's spread, by the samples' worth.
    spread = np.sqrt((np.asarray(free.std)[CLOSE, :, :2] ** 2).sum())
    error = spread / worth(free, CLOSE) ** 0.5
    assert mean_square_distance(free, CLOSE).sum() ** 0.5 + 2 * error < NEAR - 0.01
    assert mean_square_distance(limited, CLOSE).sum() ** 0.5 > NEAR - 0.01
    assert mean_square_distance(free, WIDE).max() ** 0.5 > FAR + 0.05
    assert mean_square_distance(limited, WIDE).max() ** 0.5 < FAR + 0.01


def test_exchanged_targets_are_the_same_targets(
    seen: Observation, free: Posterior, bounds: np.ndarray
) -> None:
    """Turns by half a circle exchange equal targets: that must not blur their places."""
    swapped = jax.tree.map(lambda a: a[:, ::-1], TRUTH)
    other = posterior(seen, swapped, PLAIN)
    windows = [4, 5, 6, 7]
    np.testing.assert_array_equal(other.targets.mask, swapped.mask)
    off = table(other.targets)[windows, ::-1] - table(free.targets)[windows]
    number = min(worth(other, windows), worth(free, windows))
    assert np.abs(off / bounds[windows]).max() < 5 * (2 / number) ** 0.5


def test_psf_slope_is_that_of_the_evidence(seen: Observation) -> None:
    """Where the posterior is Gaussian, Laplace's evidence has no error; the PSF is too narrow."""

    @quick_jit
    def of_width(seen: Observation, start: Targets, known: Known) -> jax.Array:
        return laplace(fit(seen, start, known), seen, known)

    narrow, wide = (
        np.asarray(of_width(seen, TRUTH, PLAIN.replace(psf=Gaussian(np.float32(f) * WIDTH))), float)
        for f in (0.88, 0.92)
    )
    expected = (wide - narrow) / np.log(0.92 / 0.88)
    slope = posterior(
        seen, TRUTH, PLAIN.replace(psf=Gaussian(np.float32(0.9) * WIDTH))
    ).psf_slope.sum(1)
    gaussian = slice(ALONE.start, APART.stop)
    assert expected[gaussian].max() > 100
    np.testing.assert_allclose(slope[gaussian], expected[gaussian], rtol=0.1, atol=5)


def test_row13_what_cannot_be_told_apart_has_large_errors(free: Posterior) -> None:
    assert not free.converged[BLEND] or free.std[BLEND, :, :2].max() > 0.1
    assert free.std[BLEND, :, 2].min() > 5 * free.std[0, 0, 2]


@pytest.mark.parametrize(
    "wrong", [{"num_chains": 1}, {"num_samples": 1}, {"num_burn_in": 0}, {"thinning": 0}]
)
def test_too_few_chains_or_steps_are_refused(seen: Observation, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 chains"):
        sample(seen, TRUTH, PLAIN, jax.random.key(0), **wrong)


# --- fits ------------------------------------------------------------------------------


def test_error_bars_of_many_are_the_cramer_rao_bounds(seen: Observation) -> None:
    """The whole matrix: of targets alone and of pairs far apart and blended."""
    found = jit_fit(seen, TRUTH, PLAIN)
    some = np.arange(APART.start, CLOSE + 1)
    targets = jax.tree.map(lambda a: np.asarray(a)[some], found.targets)
    root = jax.jit(partial(information_root, sensor=Sensor(read_noise=NOISE), **OPTICS))(targets)
    information = np.einsum("bap,baq->bpq", root, root).astype(float)
    expected = np.linalg.inv(information)
    scale = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
    both = scale[:, :, None] * scale[:, None, :]
    got = np.asarray(found.covariance)[some]
    np.testing.assert_allclose(got / both, expected / both, atol=2e-3)
    assert np.abs(expected / both)[4, 0, 3:].max() > 0.3, "blended targets must be correlated"


def test_row1_invalid_pixels_tell_nothing_whatever_they_hold(seen: Observation) -> None:
    valid = seen.valid.copy()
    valid[:, 4, 4] = valid[:, 0, 1] = False
    masked = dataclasses.replace(seen, valid=valid)
    wild = dataclasses.replace(masked, counts=np.where(valid, seen.counts, np.float32(1e9)))
    one, other = (jit_fit(w, TRUTH, PLAIN) for w in (masked, wild))
    np.testing.assert_array_equal(one.num_pixels, SIDE**2 - 2)
    assert_same(one, other)
    whole = jit_fit(seen, TRUTH, PLAIN)
    assert (one.std[ALONE, 0, 2] > 1.01 * whole.std[ALONE, 0, 2]).any()


def test_the_truth_of_a_preset_meets_no_resistance() -> None:
    """Separation and square of the prior cost simulated scenes nothing."""
    preset = scene.get_preset("csist")
    prior = preset_prior(preset)
    made = quick_jit(partial(scene.simulate, preset))(scene.frame_keys(0, "val", np.arange(200)))
    window = jax.tree.map(
        lambda a: a[0], jit_observe(np.zeros((1, 11, 11), "f4"), Sensor(read_noise=1.0))
    )

    def cost(truth: Targets, known: Known) -> jax.Array:
        model = scene_model(window, truth.mask, known)
        return model.log_prior(model.pack(truth))

    limits = {"separation": 0.0, "cluster_size": None, "cluster_offset": None}
    without = dataclasses.replace(prior, **limits)
    costs = quick_jit(jax.vmap(cost, (0, None)))
    with jax.numpy_rank_promotion("allow"):
        full = costs(made.targets, Known(psf=Gaussian(WIDTH), prior=prior))
        freely = costs(made.targets, Known(psf=Gaussian(WIDTH), prior=without))
        there = made.targets.position.at[:, 0, 0].add(3.0)
        off = dataclasses.replace(made.targets, position=there)
        moved = costs(off, Known(psf=Gaussian(WIDTH), prior=prior))
    np.testing.assert_allclose(full, freely, rtol=1e-5, atol=1e-3)
    many = np.asarray(made.targets.count) > 1
    assert (np.asarray(moved) < np.asarray(full) - 10)[many].all()


def test_a_quartic_well_is_as_wide_as_its_gaussian() -> None:
    """What the evidence takes the bend of a blend for: equal integrals."""
    # The norm of the second derivative of a Gaussian PSF of width 1.
    x = np.linspace(-9, 9, 4001)
    bend = (x**2 - 1) * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    across = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    norm2 = (bend**2).sum() * (across**2).sum() * (x[1] - x[0]) ** 2
    q = norm2**0.5 / 2  # of one count and noise 1
    x = np.linspace(-30, 30, 2_000_001) / q**0.5
    well = np.exp(-((q * x**2) ** 2) / 2).sum() * (x[1] - x[0])
    np.testing.assert_allclose(2 * np.pi / well**2, evidence._QUARTIC, rtol=4e-3)


# --- counts ----------------------------------------------------------------------------

CSIST = scene.get_preset("csist")
TOLD = Known(psf=Gaussian(WIDTH), prior=preset_prior(CSIST))
FRAMES, SLOTS = 64, 6


@pytest.fixture(scope="module")
def csist() -> tuple[Targets, Observation]:
    """Frames of the benchmark, the truth with a slot left free."""
    made = jax.jit(scene.simulate, static_argnums=0)(
        CSIST, scene.frame_keys(3, "val", np.arange(FRAMES))
    )
    free = SLOTS - made.targets.mask.shape[1]
    truth = jax.tree.map(
        lambda a: np.pad(a, [(0, 0), (0, free)] + [(0, 0)] * (a.ndim - 2)), made.targets
    )
    told = jit_observe(made.frames, Sensor(read_noise=0.0, background=0.0, saturation=255.0))
    return truth, jax.tree.map(np.asarray, told)


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


@pytest.mark.parametrize("change", [-1, 0, 1], ids=["one too few", "right", "one too many"])
def test_wrong_counts_are_put_right(csist: tuple[Targets, Observation], change: int) -> None:
    truth, seen = csist
    start = changed(truth, change) if change else truth
    found: Selected = jit_select(seen, start, TOLD, only_add=False)
    count = np.asarray(found.fit.targets.count)
    assert (count == np.asarray(truth.count)).sum() >= 61  # 95 % of 64
    shares = np.asarray(found.log_evidence)
    assert shares.shape == (FRAMES, SLOTS + 1)
    assert not np.isnan(shares).any()
    np.testing.assert_array_equal(shares.argmax(1), count)
    if change:
        assert (np.isfinite(shares).sum(1) >= 2).mean() > 0.9  # the others were tried


def test_evidence_does_not_depend_on_the_order_of_the_slots(
    csist: tuple[Targets, Observation],
) -> None:
    truth, seen = csist
    order = np.random.default_rng(4).permutation(SLOTS)
    turned = jax.tree.map(lambda a: a[:, order], truth)

    @quick_jit
    def solved(seen: Observation, start: Targets) -> tuple[Fit, jax.Array]:
        best = fit(seen, start, TOLD)
        return best, laplace(best, seen, TOLD)

    (one, first), (other, second) = solved(seen, truth), solved(seen, turned)
    both = np.asarray(one.converged & other.converged)
    assert both.sum() > 30
    assert np.isfinite(first).all()
    # Rounding in float32, and fits that end a hundredth of a standard deviation apart.
    np.testing.assert_allclose(np.asarray(first)[both], np.asarray(second)[both], atol=0.02)


def test_only_add_grows_from_nothing_and_stops() -> None:
    tables = [
        [(2.2, 2.1, 200.0), (2.4, 7.2, 150.0), (7.3, 6.6, 100.0), (7.0, 2.0, 60.0)],
        [(5.0, 5.0, 100.0)],
        [],
    ]
    truth = from_lists(tables, SLOTS)
    clean = np.asarray(jit_render(single(truth)))
    frames = (clean + np.random.default_rng(5).normal(size=clean.shape)).astype("f4")
    seen = jit_observe(frames, Sensor(read_noise=1.0, background=0.0))
    nothing = single(from_lists([[], [], []], SLOTS))
    found = jit_select(seen, nothing, Known(psf=Gaussian(WIDTH), prior=ScenePrior()), only_add=True)
    targets = found.fit.targets
    assert targets.count.tolist() == [4, 1, 0]
    # Found from the brightest on, each in the next slot.
    np.testing.assert_allclose(targets.position[0, :4], truth.position[0, :4], atol=0.1)
    np.testing.assert_allclose(targets.intensity[0, :4], truth.intensity[0, :4], atol=10)
    # Each count on the way was noted, and none was left out.
    tried = np.isfinite(found.log_evidence)
    assert tried[0, :5].all()
    assert (np.diff(np.asarray(found.log_evidence)[0, :5]) > 0).all()


# --- noise -----------------------------------------------------------------------------


def test_remeasured_noise_is_what_shot_noise_leaves() -> None:
    """Of the sky and of the targets; what was told stays, and what was not is unbiased."""
    rng = np.random.default_rng(2)
    gain, number = 2.0, 400
    source = np.repeat(np.asarray(jit_render(TRUTH))[4:5], number, 0)
    photons = 30 + source
    electrons = rng.poisson(photons * gain)
    y = np.float32(7 + electrons / gain + rng.normal(0, 3, photons.shape))
    again = quick_jit(remeasured)(
        jit_observe(y, Sensor(pedestal=7.0, gain=gain)),
        source,
        np.full(number, 2.0, np.float32),
        gain,
    )
    np.testing.assert_array_equal(again.pedestal[:, 0, 0], np.full(number, 7))
    off = np.asarray(again.background, float)[:, 0, 0] - 30
    assert abs(off.mean()) < 4 * off.std() / number**0.5
    assert (np.abs(off / np.asarray(again.background_std)) < 2).mean() > 0.9
    # The targets were not fitted but told, so no freedom was used up: 6 of 80.
    variance = np.asarray(again.noise, float) ** 2
    assert abs(variance.mean() / 9 - 1) < 4 * variance.std() / number**0.5 / 9 + 6 / 75 * 24 / 9
    told = jit_observe(y, Sensor(pedestal=7.0, gain=gain, background=28.0))
    kept = quick_jit(remeasured)(told, source, np.full(number, 2.0, np.float32), gain)
    np.testing.assert_array_equal(kept.background[:, 0, 0], np.full(number, 28))
    np.testing.assert_array_equal(kept.background_std, np.zeros(number))
    # Two counts of light that were not told are noise.
    assert np.asarray(kept.noise).mean() > np.asarray(again.noise).mean()
