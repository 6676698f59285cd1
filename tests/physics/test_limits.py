"""Limits: information against autodiff, bounds against Monte Carlo, no lies, no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike
from scipy.optimize import least_squares

from dscsnet_jax.physics.limits import (
    Bounds,
    cramer_rao,
    estimates_at_bound,
    fisher_information,
    information_root,
    preset_limit,
    render_jacobian,
)
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import digital
from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.physics.sensor import Sensor, expose
from dscsnet_jax.physics.targets import Targets, from_lists

OPTICS = {"frame_size": 11, "psf": 0.5}
PRIORS = {"position_prior_variance": 1 / 12, "intensity_prior_variance": 75.0}
READ = Sensor(read_noise=2.0)

# A pair, a target alone (with two padded slots), a close three.
SCENES = [
    [(4.2, 5.1, 240.0), (5.6, 6.3, 130.0)],
    [(7.4, 2.2, 225.0)],
    [(5.0, 5.0, 230.0), (5.5, 5.1, 240.0), (5.1, 5.6, 250.0)],
]


@pytest.fixture
def targets() -> Targets:
    return from_lists(SCENES)


# One compilation each, instead of one for every operation.
jit_root = jax.jit(information_root, static_argnames="frame_size")
jit_information = jax.jit(fisher_information, static_argnames="frame_size")
jit_estimates = jax.jit(estimates_at_bound)


@jax.jit
def bounds(targets: Targets, sensor: Sensor, psf: ArrayLike = 0.5, **priors: float) -> Bounds:
    root = information_root(targets, frame_size=11, psf=psf, sensor=sensor, **priors)
    return cramer_rao(root, targets.mask)


def one(*table: tuple[float, float, float]) -> Targets:
    return from_lists([table])


# --- derivatives and information ---------------------------------------------------


SHAPE, WIDTHS = (9, 12), (0.45, 0.7)
SENSORS = [
    READ,
    Sensor(gain=3.0, read_noise=1.5, pedestal=20.0),
    digital(8, pedestal=100.0, read_noise=5.0),
    digital(8, gain=0.5, pedestal=100.0),
]


@jax.jit
def frame(parameters: jax.Array, mask: jax.Array) -> jax.Array:
    """`render` of one frame as a function of the (3K,) parameters."""
    table = parameters.reshape(-1, 3)
    truth = Targets(table[:, :2], table[:, 2], mask)
    return render(truth, frame_size=SHAPE, psf=jnp.array(WIDTHS))


means = jax.jit(jax.vmap(frame))
jacobians = jax.jit(jax.vmap(jax.jacfwd(frame)))


def mean_and_jacobian(truth: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Frames (B, N, M) and their derivatives (B, N, M, 3K), by autodiff."""
    table = np.concatenate([truth.position, truth.intensity[..., None]], -1)
    flat = jnp.asarray(table.reshape(len(table), -1))
    return np.asarray(means(flat, truth.mask)), np.asarray(jacobians(flat, truth.mask))


def test_render_jacobian_equals_autodiff(x64: None, targets: Targets) -> None:
    _, expected = mean_and_jacobian(targets)
    got = render_jacobian(targets, frame_size=SHAPE, psf=jnp.array(WIDTHS))
    np.testing.assert_allclose(np.moveaxis(got, 1, -1), expected, atol=1e-11)
    assert not got[1, 3:].any()


@pytest.mark.parametrize("sensor", SENSORS)
def test_information_equals_autodiff(x64: None, targets: Targets, sensor: Sensor) -> None:
    mean, jacobian = mean_and_jacobian(targets)
    noise = float(sensor.read_noise or 0) ** 2 + (1 / 12 if sensor.quantised else 0)
    shot = 0.0 if sensor.gain is None else mean / sensor.gain
    seen = mean + (sensor.pedestal or 0) < (sensor.saturation or np.inf)
    assert seen.all() == (sensor.saturation is None), "the scenes must reach the well"
    expected = np.einsum("bijp,bij,bijq->bpq", jacobian, seen / (noise + shot), jacobian)
    present = np.repeat(targets.mask, 3, axis=-1)
    expected += np.stack([np.diag(1.0 - m) for m in present])
    diagonal = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
    got = jit_information(targets, frame_size=SHAPE, psf=jnp.array(WIDTHS), sensor=sensor)
    error = np.abs(got - expected) / (diagonal[:, :, None] * diagonal[:, None, :])
    assert error.max() < 1e-13
    padded = ~present[:, :, None] | ~present[:, None, :]
    identity = np.broadcast_to(np.eye(9), got.shape)
    np.testing.assert_array_equal(np.abs(got)[padded], identity[padded])


def test_prior_adds_to_the_diagonal(targets: Targets) -> None:
    plain = jit_information(targets, sensor=READ, **OPTICS)
    both = jit_information(targets, sensor=READ, **OPTICS, **PRIORS)
    added = jnp.array([12.0, 12.0, 1 / 75.0] * 3)
    present = jnp.repeat(jnp.asarray(targets.mask), 3, axis=-1)
    expected = plain + jax.vmap(lambda m: jnp.diag(jnp.where(m, added, 0)))(present)
    np.testing.assert_allclose(both, expected, rtol=2e-6, atol=2e-3)


def test_pure_shot_noise_on_dark_pixels_is_finite(targets: Targets) -> None:
    """Where nothing is expected the variance is 0: no information, not 0/0."""
    got = bounds(targets, Sensor(gain=10.0))
    for std in got:
        assert np.isfinite(std[targets.mask]).all()
    # One bright star: photon statistics bound its flux by its own shot noise at least.
    alone = bounds(one((5.0, 5.0, 1000.0)), Sensor(gain=4.0))
    assert float(alone.intensity_std[0, 0]) == pytest.approx(np.sqrt(1000 / 4), rel=1e-4)


# --- bounds ------------------------------------------------------------------------


def test_float32_bounds_of_tight_clusters_equal_float64() -> None:
    """Five targets within one pixel: `F` in float32 would have no digit left."""
    corners = [(4.7, 4.7), (4.65, 5.25), (5.3, 4.72), (5.35, 5.3), (5.0, 5.02)]
    cluster = one(*[(r, c, 235.0) for r, c in corners])
    single = bounds(cluster, READ)
    with jax.enable_x64(True):
        double = bounds(cluster, READ)
        info = jit_information(cluster, sensor=READ, **OPTICS)[0]
        expected = np.sqrt(np.diag(np.linalg.inv(info))).reshape(-1, 3)
        assert np.linalg.cond(info) > 1e7
    for axis in range(3):
        np.testing.assert_allclose(double[axis][0], expected[:, axis], rtol=1e-6)
        np.testing.assert_allclose(single[axis], double[axis], rtol=2e-4)


def test_bounds_follow_the_read_noise(targets: Targets) -> None:
    weak, strong = (bounds(targets, Sensor(read_noise=s)) for s in (0.5, 5.0))
    for low, high in zip(weak, strong, strict=True):
        np.testing.assert_allclose(10 * low[targets.mask], high[targets.mask], rtol=1e-3)


def test_quantisation_alone_counts_a_twelfth(targets: Targets) -> None:
    whole = bounds(targets, Sensor(quantised=True))
    equal = bounds(targets, Sensor(read_noise=12**-0.5))
    for low, high in zip(whole, equal, strict=True):
        np.testing.assert_allclose(low, high, rtol=1e-3)


def test_maximum_likelihood_attains_the_bound() -> None:
    """200 noisy frames of two separated targets, fitted by least squares.

    A sample variance of 200 draws has the relative standard error sqrt(2 / 199) =
    10 %: each of the six ratios must lie within four of them, and their mean closer.
    """
    table = np.array([(4.2, 4.1, 240.0), (6.4, 6.3, 200.0)])
    sensor = Sensor(read_noise=1.0, pedestal=10.0)
    mean = render(from_lists([table]), frame_size=11, psf=0.5)
    frames = expose(sensor, jax.random.key(0), jnp.broadcast_to(mean, (200, 11, 11)))
    frames = np.asarray(frames, float) - 10.0

    @jax.jit
    def model(parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = parameters.reshape(1, 2, 3)
        truth = Targets(p[..., :2], p[..., 2], jnp.ones((1, 2), bool))
        jacobian = render_jacobian(truth, **OPTICS)
        return render(truth, **OPTICS).ravel(), jacobian.reshape(6, -1).T

    def fit(frame: np.ndarray) -> np.ndarray:
        return least_squares(
            lambda p: np.asarray(model(p)[0], float) - frame.ravel(),
            table.ravel(),
            jac=lambda p: np.asarray(model(p)[1], float),
            method="lm",
            x_scale=[0.1, 0.1, 10.0] * 2,
        ).x

    errors = np.stack([fit(frame) for frame in frames]) - table.ravel()
    bound = np.stack(bounds(from_lists([table]), sensor), -1).ravel()
    assert np.all(np.abs(errors.mean(0)) < 4 * bound / np.sqrt(200))
    ratio = (errors**2).mean(0) / bound**2
    one_error = np.sqrt(2 / 200)
    assert np.all(np.abs(ratio - 1) < 4 * one_error)
    assert abs(ratio.mean() - 1) < 4 * one_error / np.sqrt(6)


def test_row4_losing_saturated_pixels_raises_the_bound() -> None:
    tight = one(*SCENES[2])
    open_well = bounds(tight, Sensor(read_noise=2.0))
    clipped = bounds(tight, Sensor(read_noise=2.0, saturation=200.0))
    with_offset = bounds(tight, Sensor(read_noise=2.0, saturation=210.0, pedestal=10.0))
    for free, full, shifted in zip(open_well, clipped, with_offset, strict=True):
        assert np.all(np.asarray(full) > np.asarray(free))
        np.testing.assert_array_equal(full, shifted)


def test_row4_a_frame_of_saturated_pixels_bounds_nothing() -> None:
    got = bounds(one((5.0, 5.0, 240.0)), Sensor(read_noise=2.0, saturation=0.0))
    assert all(np.isposinf(std).all() for std in got)


def test_a_prior_tightens_and_limits_every_bound(targets: Targets) -> None:
    for noise in (0.5, 5.0, 500.0):
        sensor = Sensor(read_noise=noise)
        free, held = bounds(targets, sensor), bounds(targets, sensor, **PRIORS)
        limits = (12**-0.5, 12**-0.5, 75**0.5)
        for without, having, limit in zip(free, held, limits, strict=True):
            m = targets.mask
            assert np.all(having[m] < without[m])
            assert np.all(having[m] <= limit * (1 + 1e-6))
    # Where the frame tells nothing the prior is all there is.
    np.testing.assert_allclose(held.intensity_std[targets.mask], 75**0.5, rtol=0.02)


def test_row13_coincident_targets_have_infinite_bounds_not_a_lie() -> None:
    rng = np.random.default_rng(0)
    place, other = rng.uniform(2, 8, (2, 40, 2))
    level = rng.uniform(50, 250, (40, 2))
    tables = [
        [(*p, a), (*p, b), (*q, 200.0)]
        for p, q, (a, b) in zip(place, other, level, strict=True)
        if np.hypot(*(p - q)) > 2.5
    ]
    truth = from_lists(tables)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            got = bounds(truth, READ)
            alone = bounds(from_lists([t[2:] for t in tables]), READ)
        for std, reference in zip(got, alone, strict=True):
            assert np.isposinf(std[:, :2]).all()
            # The third target is far away and keeps its own bound.
            np.testing.assert_allclose(std[:, 2], reference[:, 0], rtol=0.05)


def test_row13_a_prior_makes_coincident_targets_finite() -> None:
    got = bounds(one((5.0, 5.0, 240.0), (5.0, 5.0, 230.0)), READ, **PRIORS)
    for std, limit in zip(got, (12**-0.5, 12**-0.5, 75**0.5), strict=True):
        assert np.all(np.asarray(std) < limit)
        assert np.all(np.asarray(std) > limit / 2)  # only the sum of the two is seen


def test_row13_bounds_grow_without_limit_as_targets_meet(x64: None) -> None:
    gaps = 2.0 ** -np.arange(0, 8)
    truth = from_lists([[(5.0, 5.0 - g / 2, 240.0), (5.0, 5.0 + g / 2, 240.0)] for g in gaps])
    std = np.asarray(bounds(truth, READ).col_std)[:, 0]
    assert np.all(np.diff(std) > 0)
    # To leading order the position along the pair is told by its second moment, gap^2.
    np.testing.assert_allclose(std[-1] / std[-2], 4.0, rtol=0.05)


def test_a_target_without_intensity_or_outside_the_frame_is_undecided() -> None:
    truth = from_lists([[(5.0, 5.0, 0.0)], [(-400.0, 5.0, 240.0)]])
    got = bounds(truth, READ)
    assert np.isposinf(got.row_std).all()
    assert np.isposinf(got.col_std).all()
    assert np.isposinf(got.intensity_std[1, 0])
    # The intensity of a dark target at a known place is still measurable.
    assert np.isfinite(got.intensity_std[0, 0])


def test_padded_slots_are_infinite_and_do_not_change_the_others(targets: Targets) -> None:
    wide, narrow = bounds(targets, READ), bounds(from_lists(SCENES[1:2]), READ)
    for padded, alone in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(np.isposinf(padded), ~targets.mask)
        np.testing.assert_allclose(padded[1, 0], alone[0, 0], rtol=1e-6)


def test_bounds_turn_with_the_frame(x64: None) -> None:
    table = np.array(SCENES[2])
    turned = np.stack((table[:, 1], 10 - table[:, 0], table[:, 2]), -1)
    upright = bounds(from_lists([table]), READ, psf=jnp.array([0.45, 0.6]))
    rotated = bounds(from_lists([turned]), READ, psf=jnp.array([0.6, 0.45]))
    np.testing.assert_allclose(rotated.row_std, upright.col_std, rtol=1e-9)
    np.testing.assert_allclose(rotated.col_std, upright.row_std, rtol=1e-9)
    np.testing.assert_allclose(rotated.intensity_std, upright.intensity_std, rtol=1e-9)


def test_bounds_move_with_whole_pixels_and_swap_with_the_targets(x64: None) -> None:
    table = np.array(SCENES[2])
    base = bounds(from_lists([table]), READ)
    moved = bounds(from_lists([table + np.array([2, -1, 0])]), READ)
    swapped = bounds(from_lists([table[::-1]]), READ)
    for a, b, c in zip(base, moved, swapped, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
        np.testing.assert_allclose(c[:, ::-1], a, rtol=1e-9)


@pytest.mark.parametrize("sensor", [Sensor(), Sensor(saturation=255.0), Sensor(pedestal=3.0)])
def test_a_noiseless_sensor_is_refused(targets: Targets, sensor: Sensor) -> None:
    with pytest.raises(ValueError, match="needs read_noise > 0"):
        fisher_information(targets, sensor=sensor, **OPTICS)


@pytest.mark.parametrize("name", list(PRIORS))
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_priors_that_are_not_positive_are_refused(
    targets: Targets, name: str, value: float
) -> None:
    with pytest.raises(ValueError, match="prior variances must be positive"):
        information_root(targets, sensor=READ, **OPTICS, **{name: value})


def test_vmap_over_frames_equals_the_batch(targets: Targets) -> None:
    batch = jax.tree.map(jnp.asarray, targets)
    whole = bounds(batch, READ)
    mapped = jax.vmap(lambda t: bounds(t, READ))(batch)
    for a, b in zip(whole, mapped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# --- estimates at the bound --------------------------------------------------------


def test_estimates_have_the_covariance_of_the_bound(x64: None) -> None:
    draws = 20_000
    truth = from_lists(SCENES[2:])
    info = jit_information(truth, sensor=READ, **OPTICS, **PRIORS)[0]
    root = jit_root(truth, sensor=READ, **OPTICS, **PRIORS)
    keys = jax.random.split(jax.random.key(3), draws)
    got = jax.jit(jax.vmap(estimates_at_bound, (0, None, None)))(keys, truth, root)
    error = np.concatenate(
        [got.position - truth.position[None], (got.intensity - truth.intensity[None])[..., None]],
        -1,
    ).reshape(draws, -1)
    expected = np.linalg.inv(info)
    deviation = np.sqrt(np.diag(expected))
    assert np.all(np.abs(error.mean(0)) < 4 * deviation / np.sqrt(draws))
    # Standard error of a covariance: sqrt((s_aa s_bb + s_ab^2) / n).
    spread = np.sqrt((np.outer(deviation, deviation) ** 2 + expected**2) / draws)
    np.testing.assert_array_less(np.abs(error.T @ error / draws - expected), 4.5 * spread)


def test_estimates_keep_mask_and_range_and_zero_the_padding(targets: Targets) -> None:
    root = jit_root(targets, sensor=Sensor(read_noise=20.0), **OPTICS)
    got = jit_estimates(jax.random.key(0), targets, root, (220.0, 250.0))
    np.testing.assert_array_equal(got.mask, targets.mask)
    assert not got.position[~targets.mask].any()
    assert not got.intensity[~targets.mask].any()
    inside = np.asarray(got.intensity[targets.mask])
    assert inside.min() >= 220.0
    assert inside.max() <= 250.0
    assert np.unique(inside).size > 2
    free = jit_estimates(jax.random.key(0), targets, root)
    np.testing.assert_array_equal(free.position, got.position)
    assert float(np.abs(free.intensity - got.intensity).max()) > 1.0


def test_row13_estimates_of_coincident_targets_are_far_off_but_finite() -> None:
    truth = from_lists([[(5.0, 5.0, 240.0), (5.0, 5.0, 230.0)], [(5.0, 5.0, 0.0)]])
    root = jit_root(truth, sensor=READ, **OPTICS)
    got = jit_estimates(jax.random.key(1), truth, root)
    assert np.isfinite(got.position).all()
    assert np.isfinite(got.intensity).all()
    away = np.abs(got.position - truth.position)[truth.mask]
    assert away.max(-1).min() > 1.0


def test_row32_same_key_same_estimates(targets: Targets) -> None:
    root = jit_root(targets, sensor=READ, **OPTICS)
    draws = [jit_estimates(jax.random.key(k), targets, root) for k in (5, 5, 6)]
    jax.tree.map(np.testing.assert_array_equal, draws[0], draws[1])
    assert np.all((draws[0].position != draws[2].position).any(-1)[targets.mask])


def test_preset_limit_takes_priors_and_range_from_the_preset() -> None:
    preset = get_preset(
        "csist_wide", sigma=0.6, extent=(-0.2, 0.4), quantised=False, read_noise=2.0
    )
    truth = from_lists(SCENES)
    root = jit_root(
        truth,
        frame_size=11,
        psf=0.6,
        sensor=preset.sensor,
        position_prior_variance=0.6**2 / 12,
        intensity_prior_variance=200.0**2 / 12,
    )
    expected = jit_estimates(jax.random.key(2), truth, root, (50.0, 250.0))
    got = preset_limit(jax.random.key(2), truth, preset)
    np.testing.assert_array_equal(got.mask, truth.mask)
    np.testing.assert_allclose(got.position, expected.position, atol=1e-4)
    np.testing.assert_allclose(got.intensity, expected.intensity, atol=1e-2)


def test_preset_limit_of_a_noiseless_preset_is_refused(targets: Targets) -> None:
    with pytest.raises(ValueError, match="needs read_noise > 0"):
        preset_limit(jax.random.key(0), targets, get_preset("csist_float"))


def test_preset_limit_of_a_varied_preset_is_refused(targets: Targets) -> None:
    with pytest.raises(ValueError, match=r"'csist_varied' varies .* from frame to frame"):
        preset_limit(jax.random.key(0), targets, get_preset("csist_varied"))
