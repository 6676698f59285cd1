"""Evidence against sums over places and intensities, written out here in NumPy and SciPy."""

import dataclasses
import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, gammaln, log_ndtr

from dscsnet_jax.inference.evidence import dark, laplace
from dscsnet_jax.inference.fit import Fit, fit
from dscsnet_jax.inference.intensity import Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import preset_prior, scene_prior
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.physics.targets import Targets, from_lists

pytestmark = pytest.mark.usefixtures("x64")
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SIDE, SIGMA, TOP = 7, 0.5, 100.0
SEPARATION, SIZE = 0.5, 2.0


class Law(NamedTuple):
    """Of a pixel."""

    noise: float = 1.0
    background: float = 0.0
    gain: float | None = None
    saturation: float = np.inf
    misfit: float | None = None


SENSORS = {
    "gaussian": Law(),
    "saturation": Law(saturation=0.2),  # of the brightest target's counts
    "gain_1": Law(gain=1.0),
    "gain_0.2": Law(gain=0.2),
    "photons": Law(background=10.0, gain=2.0),
    "misfit": Law(misfit=0.15),
}
PEDESTAL = 3.0
PRIORS = {
    "none": scene_prior(),
    "range": scene_prior(intensity=(0, TOP)),
    "separation": scene_prior(intensity=(0, TOP), separation=SEPARATION),
    "size": scene_prior(intensity=(0, TOP), separation=SEPARATION, cluster_size=SIZE),
    "square": scene_prior(
        intensity=(0, TOP), separation=SEPARATION, cluster_size=SIZE, cluster_offset=0.0
    ),
}
# 12 and 40 counts at several places, of 2 to 80 electrons; then pairs 1.2 px apart, along an axis
# and across.
ALONE = [
    (3.0 + dr, 3.0 + dc, energy)
    for energy in (12.0, 40.0)
    for dr, dc in ((0.05, 0.02), (-0.2, 0.15), (0.18, -0.1))
]
PAIRS = [
    [(2.4, 3.05, 240.0), (3.6, 2.95, 180.0)],
    [(2.57, 2.6, 200.0), (3.45, 3.4, 280.0)],
    [(3.0, 3.6, 190.0), (2.95, 2.4, 200.0)],
]


def response(place):
    edges = np.arange(SIDE + 1) - 0.5
    return np.diff(erf((edges - np.asarray(place)[..., None]) / (SIGMA * 2**0.5))) / 2


def variance(source, sensor):
    total = sensor.noise**2 + ((sensor.misfit or 0) * source) ** 2
    if sensor.gain is not None:
        total = total + np.maximum(sensor.background + source, 0) / sensor.gain
    return total


def log_likelihood(y, source, sensor):
    saturation = sensor.saturation
    mu, var = PEDESTAL + sensor.background + source, variance(source, sensor)
    value = -((y - mu) ** 2 / var + np.log(var)) / 2
    if (y >= saturation).any():
        censored = log_ndtr((mu - saturation) / np.sqrt(var))
        value = np.where(y >= saturation, censored, value)
    return value.sum((-2, -1))


def record(scene, sensor, rng):
    source = sum(i * np.outer(response(r), response(c)) for r, c, i in scene)
    noise = np.sqrt(variance(source, sensor)) * rng.standard_normal(source.shape)
    return np.minimum(PEDESTAL + sensor.background + source + noise, sensor.saturation)


def squares(low, high, size=SIZE):
    """Squares that begin at whole pixels and hold an interval, along an axis."""
    begin = np.arange(-5, SIDE + 5)
    low, high = np.asarray(low)[..., None], np.asarray(high)[..., None]
    return ((begin <= low) & (high <= begin + size)).sum(-1)


def free_share(reach):
    """Share of pairs in a unit square that are farther apart than `reach`."""
    return 1 - (np.pi * reach**2 - 8 / 3 * reach**3 + reach**4 / 2)


def place_density(place, kind, size=SIZE, separation=SEPARATION):
    """Of (..., n, 2) numbered places in the window."""
    low, high = place.min(-2), place.max(-2)
    n = place.shape[-2]
    if kind in ("size", "square"):
        per_axis = np.maximum(size - (high - low), 0) if kind == "size" else squares(low, high)
        density = per_axis.prod(-1) / (SIDE**2 * size ** (2 * n))
    else:
        density = np.full(place.shape[:-2], float(SIDE) ** (-2 * n))
    if n == 2 and kind in ("separation", "size", "square") and separation > 0:
        extent = SIDE if kind == "separation" else size
        apart = np.linalg.norm(place[..., 0, :] - place[..., 1, :], axis=-1)
        density = density * (apart >= separation) / free_share(separation / extent)
    inside = ((low >= -0.5) & (high <= SIDE - 0.5)).all(-1)
    return np.where(inside, density, 0)


def most(y, sensor, kind, top):
    """Density of an intensity and the largest one.

    Where pixels saturate the counts of a window are no bound, and the density goes on.
    """
    above = np.maximum(y - PEDESTAL - sensor.background, 0).sum()
    if kind != "none":
        return 1 / top, top
    return 1 / above, np.inf if (y >= sensor.saturation).any() else above


def logarithm(value):
    with np.errstate(divide="ignore"):
        return np.log(value)


def exact_of_one(y, truth, std, sensor, kind, num=20, likelihood=log_likelihood, intensities=None):
    """Log evidence of one target: midpoints of a box of +- 8 standard deviations."""
    density, top = most(y, sensor, kind, TOP)
    faintest = 0.0
    if intensities is not None:
        faintest, top = intensities
        density = 1 / (top - faintest)
    (r, c, e), step = zip(
        *(
            (low + (high - low) * (np.arange(num) + 0.5) / num, (high - low) / num)
            for low, high in (
                (max(x - 8 * s, least), min(x + 8 * s, last))
                for x, s, least, last in zip(
                    truth, std, (-0.5, -0.5, faintest), (SIDE - 0.5, SIDE - 0.5, top), strict=True
                )
            )
        ),
        strict=True,
    )
    source = np.einsum("ri,cj,e->rceij", response(r), response(c), e)
    place = np.stack(np.meshgrid(r, c, indexing="ij"), -1)[:, :, None]
    value = likelihood(y, source, sensor) + logarithm(place_density(place, kind))[:, :, None]
    highest = value.max()
    return highest + np.log(np.exp(value - highest).sum() * np.prod(step) * density)


def exact_of_two(y, mode, covariance, sensor, kind, top, rng, num=4096, freedom=6.0, **square):
    """Log evidence of two targets and its standard error.

    Draws of Student's t around the fit weigh as the posterior; both ways to number the
    targets are proposed alike.
    """
    density, top = most(y, sensor, kind, top)
    root = np.linalg.cholesky(covariance * 1.3**2)
    size = len(mode)
    z = rng.standard_normal((num, size)) @ root.T
    draws = mode + z / np.sqrt(rng.chisquare(freedom, (num, 1)) / freedom)

    def proposal(x):
        q2 = (np.linalg.solve(root, (x - mode).T) ** 2).sum(0)
        log = gammaln((freedom + size) / 2) - gammaln(freedom / 2)
        log = log - size / 2 * np.log(freedom * np.pi) - np.log(np.diag(root)).sum()
        return log - (freedom + size) / 2 * np.log1p(q2 / freedom)

    turned = draws[:, [3, 4, 5, 0, 1, 2]]
    log_proposal = np.logaddexp(proposal(draws), proposal(turned)) - np.log(2)
    table = draws.reshape(num, 2, 3)
    in_row, in_col = response(table[..., 0]), response(table[..., 1])
    source = np.einsum("nki,nkj,nk->nij", in_row, in_col, table[..., 2])
    allowed = ((table[..., 2] >= 0) & (table[..., 2] <= top)).all(-1)
    log_prior = logarithm(place_density(table[..., :2], kind, **square) * allowed * density**2)
    value = log_likelihood(y, source, sensor) + log_prior - log_proposal
    highest = value.max()
    weight = np.exp(value - highest)
    mean = weight.mean()
    return highest + np.log(mean), weight.std() / mean / num**0.5


@quick_jit
def solve(seen: Observation, start: Targets, known: Known) -> tuple[Fit, jax.Array]:
    best = fit(seen, start, known)
    return best, laplace(best, seen, known)


def answers(frames, scenes, sensor, prior, **changes):
    """Fits of the scenes' counts and log evidence, of them and of no targets.

    No gain is told as a large one for some priors: fewer programs are compiled.
    """
    told, gain = sensor.misfit is None and prior.intensity is not None, sensor.gain
    gain = 1e12 if gain is None and told else gain
    seen = observe(
        np.concatenate([frames, frames]),
        Sensor(
            read_noise=sensor.noise,
            pedestal=PEDESTAL,
            background=sensor.background,
            gain=gain,
            saturation=sensor.saturation,
        ),
    )
    seen = dataclasses.replace(
        seen, **{name: jnp.full(2 * len(frames), value, float) for name, value in changes.items()}
    )
    law = Sensor(gain=gain, misfit=sensor.misfit)
    known = Known(psf=Gaussian(SIGMA), sensor=law, prior=prior)
    known = jax.tree.map(lambda a: jnp.asarray(a, float), known)
    start = from_lists([*scenes, *([[]] * len(frames))], 2)
    best, evidence = solve(seen, start, known)
    best, evidence = jax.tree.map(np.asarray, (best, evidence))
    best = jax.tree.map(lambda a: a[: len(frames)], best)
    return best, evidence[: len(frames)], evidence[len(frames) :]


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(SENSORS, PRIORS)))
def test_is_that_of_brute_force(name, kind):
    rng = np.random.default_rng(5)
    sensor = SENSORS[name]._replace(saturation=SENSORS[name].saturation * TOP)
    frames = np.array([record([target], sensor, rng) for target in ALONE])
    best, some, none = answers(frames, [[target] for target in ALONE], sensor, PRIORS[kind])
    empty = log_likelihood(frames, np.zeros_like(frames), sensor)
    np.testing.assert_allclose(none, empty, atol=1e-8)
    for y, truth, std, value in zip(frames, ALONE, best.std[:, 0], some, strict=True):
        exact = exact_of_one(y, truth, std, sensor, kind)
        # Where a place is known to a fifth of the PSF's width, the posterior is Gaussian, up to
        # half of it nearly so. At gain 0.2 12 counts are 2.4 electrons, whose law is skew.
        # What is fainter is nowhere for certain, and its evidence may only be too small.
        largest = std[:2].max()
        limit = 0.3 if largest < 0.1 else 0.6 if largest < 0.25 else 0.9
        limit = 0.9 if name == "gain_0.2" and truth[2] < 20 else limit
        assert value - exact < min(limit, 0.6)
        assert value - exact > -limit or largest > 0.3, (name, kind, truth, value - exact)

    top = 4 * TOP
    sensor = SENSORS[name]._replace(saturation=SENSORS[name].saturation * top)
    scenes = PAIRS * 2
    frames = np.array([record(scene, sensor, rng) for scene in scenes])
    prior = PRIORS[kind]
    if kind != "none":
        prior = prior.replace(intensity=Uniform(0.0, top))
    best, some, none = answers(frames, scenes, sensor, prior)
    for i in range(len(PAIRS)):
        mode = np.column_stack([best.targets.position[i], best.targets.intensity[i]]).ravel()
        exact, error = exact_of_two(frames[i], mode, best.covariance[i], sensor, kind, top, rng)
        assert error < 0.03
        np.testing.assert_allclose(some[i], exact, atol=0.6 if name == "gain_0.2" else 0.35)


def test_limits_of_pairs_tell_nothing_about_one_target():
    rng = np.random.default_rng(5)
    sensor = SENSORS["gain_1"]
    frames = np.array([record([target], sensor, rng) for target in ALONE])
    scenes = [[target] for target in ALONE]
    known = [answers(frames, scenes, sensor, PRIORS[kind])[1] for kind in list(PRIORS)[1:]]
    np.testing.assert_allclose(known[1:], [known[0]] * 3, atol=1e-6)


def test_room_of_a_square_of_unknown_place():
    # A pair as long as the square has little room along an axis, and more across.
    rng = np.random.default_rng(2)
    sensor, top = SENSORS["gaussian"], 4 * TOP
    prior = PRIORS["size"]
    prior = prior.replace(intensity=Uniform(0.0, top), separation=0.0, cluster_size=1.0)
    bright = 390.0  # of a place known to 1/100 pixel
    scenes = []
    for apart in (0.8, 0.95):
        across = apart / 2 / 2**0.5
        scenes += [
            [(3 - apart / 2, 3.0, bright), (3 + apart / 2, 3.0, bright)],
            [(3.0, 3 - apart / 2, bright), (3.0, 3 + apart / 2, bright)],
            [(3 - across, 3 - across, bright), (3 + across, 3 + across, bright)],
        ]
    # What is expected, without noise: differences are those of the prior.
    frames = np.array(
        [PEDESTAL + sum(i * np.outer(response(r), response(c)) for r, c, i in s) for s in scenes]
    )
    best, some, _ = answers(frames, scenes, sensor, prior)
    for i, y in enumerate(frames):
        mode = np.column_stack([best.targets.position[i], best.targets.intensity[i]]).ravel()
        exact, error = exact_of_two(
            y, mode, best.covariance[i], sensor, "size", top, rng, size=1.0, separation=0.0
        )
        assert error < 0.03
        np.testing.assert_allclose(some[i], exact, atol=0.3)
    # Mirrored about the diagonal the evidence is the same, and a diagonal pair has more room.
    np.testing.assert_allclose(some[0::3], some[1::3], atol=1e-6)


def test_an_unknown_level_is_integrated_out():
    rng = np.random.default_rng(3)
    sensor, std = SENSORS["gaussian"], 0.5
    frames = np.array([record([target], sensor, rng) for target in ALONE])
    frames += std * rng.standard_normal((len(frames), 1, 1))
    scenes = [[target] for target in ALONE]
    best, some, none = answers(frames, scenes, sensor, PRIORS["range"], background_std=std)

    def likelihood(y, source, sensor):
        # Noise of all pixels together: variance 1 + std^2 along their mean.
        residual = y - PEDESTAL - source
        along = 1 + std**2 * SIDE**2
        square = (residual**2).sum((-2, -1)) - std**2 / along * residual.sum((-2, -1)) ** 2
        return -(square + np.log(along)) / 2

    np.testing.assert_allclose(none, likelihood(frames, 0, sensor), atol=1e-8)
    for y, truth, error, value in zip(frames, ALONE, best.std[:, 0], some, strict=True):
        exact = exact_of_one(y, truth, error, sensor, "range", likelihood=likelihood)
        np.testing.assert_allclose(value, exact, atol=0.3 if error[:2].max() < 0.1 else 0.8)


def test_intensities_at_the_ends_of_their_range():
    # There the fit leans on the prior, which bends by what `I` bends in `v`.
    rng = np.random.default_rng(7)
    sensor, ends = SENSORS["gaussian"], (60.0, 80.0)
    scenes = [[(3.1, 2.9, energy)] for energy in (57.0, 60.0, 61.0, 79.0, 80.0, 83.0)]
    frames = np.array([record(scene, sensor, rng) for scene in scenes])
    prior = PRIORS["range"].replace(intensity=Uniform(*ends))
    best, some, _ = answers(frames, scenes, sensor, prior)
    for y, [truth], std, value in zip(frames, scenes, best.std[:, 0], some, strict=True):
        around = (*truth[:2], np.clip(truth[2], *ends))
        width = (*std[:2], 2.0)  # that of the intensity from the window alone
        exact = exact_of_one(y, around, width, sensor, "range", num=32, intensities=ends)
        np.testing.assert_allclose(value, exact, atol=0.25)


def test_an_intensity_known_exactly():
    rng = np.random.default_rng(4)
    sensor, scenes = SENSORS["gaussian"], [[(3.1, 2.9, 230.0)], *([PAIRS[2]] * 5)]
    frames = np.array([record(scene, sensor, rng) for scene in scenes])
    narrow, exactly = (
        answers(frames, scenes, sensor, PRIORS["range"].replace(intensity=Uniform(low, high)))
        for low, high in ((229.99, 230.01), (230.0, 230.0))
    )
    best, some, _ = exactly
    assert np.isfinite(some).all()
    assert np.isfinite(best.theta).all()
    assert best.converged.all()
    mask = np.asarray(best.targets.mask)
    np.testing.assert_allclose(best.targets.intensity[mask], 230.0)
    np.testing.assert_array_equal(best.std[..., 2], 0.0)
    assert (best.std[..., :2][mask] > 0).all()
    np.testing.assert_allclose(some, narrow[1], atol=0.02)
    prior = scene_prior(intensity=(230, 230))
    np.testing.assert_array_equal(prior.intensity.range, 230.0)


@lanes_last
@jax.jit
@partial(jax.grad, has_aux=True)
def slopes_of(numbers: dict, frames: jax.Array, start: Targets) -> tuple:
    """Log evidence of windows, fitted anew, of the numbers of sensor, optics, and prior."""
    n = numbers
    seen = observe(
        frames,
        Sensor(
            read_noise=n["noise"],
            pedestal=n["pedestal"],
            background=n["background"],
            gain=n["gain"],
        ),
    )
    prior = PRIORS["square"].replace(
        intensity=Uniform(n["low"], n["high"]),
        separation=n["separation"],
        cluster_size=n["cluster_size"],
        count=tuple(n["count"]),
        places="sequential",
    )
    known = Known(psf=Gaussian(n["sigma"]), sensor=Sensor(gain=n["gain"]), prior=prior)
    evidence = laplace(fit(seen, start, known, num_iterations=60), seen, known)
    return evidence.sum(), evidence


NUMBERS = {
    "noise": 1.3,
    "pedestal": 3.0,
    "background": 2.0,
    "gain": 2.0,
    "sigma": 0.5,
    "low": 100.0,
    "high": 300.0,
    "separation": 0.53,
    "cluster_size": 2.03,
    "count": [0.2, 0.3, 0.4, 0.1],
}


@pytest.fixture(scope="module")
def clusters():
    """Frames of two and one targets, and starts."""
    rng = np.random.default_rng(6)
    sensor = Law(1.3, 2.0, 2.0)
    scenes = [*PAIRS, [(3.1, 3.0, 150.0)]]
    frames = np.array([record(scene, sensor, rng) for scene in scenes])
    return frames, from_lists(scenes, 2)


def test_differentiable_by_every_number(clusters):
    numbers = jax.tree.map(jnp.asarray, NUMBERS)
    gradient, _ = slopes_of(numbers, *clusters)
    flat, tree = jax.tree.flatten(numbers)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        step = 1e-5 * float(flat[i])
        up, down = (
            slopes_of(
                jax.tree.unflatten(tree, [x + s * step * (i == j) for j, x in enumerate(flat)]),
                *clusters,
            )[1]
            for s in (1, -1)
        )
        numeric = float((up - down).sum() / (2 * step))
        np.testing.assert_allclose(slope, numeric, rtol=1e-3, atol=1e-6)


def test_counts_that_the_prior_excludes(clusters):
    numbers = jax.tree.map(jnp.asarray, NUMBERS)
    base = slopes_of(numbers, *clusters)[1]
    assert np.isfinite(base).all()
    told = {**numbers, "count": [jnp.asarray(p) for p in (0.1, 0.9, 0.0, 0.0)]}
    excluded = slopes_of(told, *clusters)[1]
    np.testing.assert_array_equal(excluded[:3], -np.inf)
    np.testing.assert_allclose(excluded[3], base[3] + np.log(0.9 / 0.3))


def test_a_preset_of_one_count():
    prior = preset_prior(get_preset("csist", count_std=0.0))
    np.testing.assert_array_equal(prior.count, (0, 0, 0, 1, 0, 0))


def test_windows_without_targets():
    rng = np.random.default_rng(0)
    y = rng.normal(7, 2, (3, 5, 5)).astype(np.float32)
    seen = observe(y, Sensor(read_noise=2.0, pedestal=3.0, background=4.0))
    expected = -((y.astype(float) - 7) ** 2 / 8 + np.log(2.0)).sum((1, 2))
    np.testing.assert_allclose(dark(seen, Known(Gaussian(0.5))), expected, rtol=1e-5)
