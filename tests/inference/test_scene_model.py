"""The scene model: derivatives, information, and densities that integrate to one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr
from scipy.stats import norm, qmc

from dscsnet_jax.inference.intensity import Histogram, LogNormal, Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import preset_prior, scene_prior
from dscsnet_jax.inference.scene_model import HARD, scene_model
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.physics.targets import Targets

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIDE, PEDESTAL = 7, 3.0
HISTOGRAM = Histogram(np.array([10.0, 30.0, 60.0, 200.0]), np.array([0.2, 0.5, 0.3]))
LAWS = {
    "uniform": Uniform(20.0, 150.0),
    "log_normal": LogNormal(4.0, 0.6),
    "histogram": HISTOGRAM,
}
PRIORS = {
    "none": scene_prior(),
    "uniform, separation": scene_prior(intensity=LAWS["uniform"], separation=0.8),
    "log_normal, square": scene_prior(
        intensity=LAWS["log_normal"], separation=0.5, cluster_size=0.6, cluster_offset=0.3
    ),
    "histogram, size": scene_prior(intensity=HISTOGRAM, cluster_size=1.2),
}


def f64(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, float), tree)


# The scene: two targets, one of them beyond the squares and limits of most priors.
POSITION = np.array([[2.7, 2.8], [3.2, 3.35]])
THETA = {  # of the first target, the second, and the level
    "none": (0.5, 0.3, 0.4),
    "uniform, separation": (0.3, -0.6, 0.4),
    "log_normal, square": (0.3, -0.6, 0.4),
    "histogram, size": (0.3, -0.6, 0.4),
}


def theta_of(kind):
    first, second, level = THETA[kind]
    return jnp.array([*POSITION[0], first, *POSITION[1], second, level])


def windows(gains: np.ndarray | None, saturations: np.ndarray, backgrounds: np.ndarray):
    """Windows of noise about a bright spot, all with an unknown level."""
    rng = np.random.default_rng(0)
    across = np.arange(SIDE) - 3
    spot = 60 * np.exp(-(across[:, None] ** 2 + across**2) / 1.0)
    frames = PEDESTAL + spot + rng.normal(0, 3, (len(saturations), SIDE, SIDE))
    frames = frames + backgrounds[:, None, None]
    valid = np.ones(frames.shape, bool)
    valid[:, 0, 2] = False
    seen = observe(
        frames,
        Sensor(
            read_noise=1.5,
            pedestal=PEDESTAL,
            background=backgrounds,
            saturation=saturations,
            gain=gains,
        ),
        valid=valid,
    )
    return dataclasses.replace(seen, background_std=jnp.full(len(frames), 0.7))


def sensors(noise: str):
    """Windows (B,), some of them saturated, and what light adds to the noise of each."""
    if noise != "shot noise":
        misfits = np.array([0.1, 0.3]) if noise == "misfit" else None
        return windows(None, np.array([np.inf, 25.0]), np.zeros(2)), Sensor(misfit=misfits)
    gains = np.array([1.0, 0.2, 2.0, 2.0])
    seen = windows(gains, np.array([np.inf, np.inf, np.inf, 35.0]), np.array([0, 0, 10.0, 10.0]))
    return seen, Sensor(gain=gains)


BOTH = np.ones(2, bool)


def of_windows(sensor: Sensor, number: int):
    """`Sensor` whose fields have each window's number."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (number,)), sensor)


@lanes_last
@quick_jit
def derivatives(seen: Observation, theta: jax.Array, known: Known):
    """Quadratic, autodiff gradient, and the function itself, of windows, each with its noise."""

    def one(seen: Observation, sensor: Sensor, theta: jax.Array):
        model = scene_model(seen, jnp.asarray(BOTH), known.replace(sensor=sensor))

        def minus(at: jax.Array) -> jax.Array:
            return -model.log_likelihood(at) - model.log_prior(at)

        return model.quadratic(theta), jax.grad(minus)(theta), minus(theta)

    return jax.vmap(one, (0, 0, None))(seen, of_windows(known.sensor, len(seen.counts)), theta)


@pytest.mark.parametrize(
    ("kind", "noise"),
    [("none", "read noise"), ("none", "misfit"), *((kind, "shot noise") for kind in PRIORS)],
)
def test_gradient_is_that_of_likelihood_and_prior(x64, kind, noise):
    seen, sensor = sensors(noise)
    known = f64(Known(psf=Gaussian((0.5, 0.6)), sensor=sensor, prior=PRIORS[kind]))
    theta = theta_of(kind)
    quadratic, gradient, value = derivatives(seen, theta, known)
    np.testing.assert_allclose(quadratic.cost, value, rtol=1e-10)
    np.testing.assert_allclose(quadratic.gradient, gradient, rtol=1e-8, atol=1e-7)
    step = 1e-5
    for i, unit in enumerate(np.eye(len(theta))):
        up, down = (derivatives(seen, theta + s * step * unit, known)[2] for s in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * step), gradient[:, i], rtol=1e-5, atol=1e-4)


@lanes_last
@quick_jit
def curvature(seen: Observation, theta: jax.Array, known: Known):
    """Information of windows, and the Hessian of minus the log likelihood expected of pixels.

    A pixel's Hessian is a polynomial of second degree of its residual, which therefore has the
    mean of those of one standard deviation above and below.
    """

    def one(seen: Observation, sensor: Sensor):
        model = scene_model(seen, jnp.asarray(BOTH), known.replace(sensor=sensor))
        source = model.source(theta)
        mu = seen.level + seen.background_std * theta[-1] + source
        sd = jnp.sqrt(model.variance(source, theta[-1])[0])

        def hessian(counts: jax.Array) -> jax.Array:
            other = dataclasses.replace(model, seen=dataclasses.replace(seen, counts=counts))
            return jax.hessian(lambda at: -other.log_likelihood(at))(theta)

        above, below, observed = jax.vmap(hessian)(jnp.stack([mu + sd, mu - sd, seen.counts]))
        return model.quadratic(theta).information, (above + below) / 2, observed

    return jax.vmap(one)(seen, of_windows(known.sensor, len(seen.counts)))


@pytest.mark.parametrize("noise", ["read noise", "shot noise", "misfit"])
def test_information_is_that_of_fisher(x64, noise):
    seen, sensor = sensors(noise)
    known = f64(Known(psf=Gaussian((0.5, 0.6)), sensor=sensor, prior=PRIORS["none"]))
    information, expected, observed = curvature(seen, theta_of("none"), known)
    information = information.at[:, -1, -1].add(-1)  # the prior of the level
    full = ~np.asarray(seen.saturated).any((1, 2))
    assert full.sum() == (3 if noise == "shot noise" else 1)
    np.testing.assert_allclose(information[full], expected[full], rtol=1e-9, atol=1e-9)
    # Censored pixels have no counts to average over: theirs is the curvature by what `mu` is
    # straight in. What light adds by the bend of the deviation is left out.
    straight = np.array([2, 5, 6])
    block = np.ix_(~full, straight, straight)
    if noise == "read noise":
        np.testing.assert_allclose(np.asarray(information)[block], np.asarray(observed)[block])


@pytest.mark.parametrize("gain", [None, 0.5])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_censored_pixels_far_from_the_limit(dtype, gain):
    with jax.enable_x64(dtype == "f8"):
        residual = np.concatenate([np.linspace(-50, 50, 41), [-1.0, -0.1, 0, 0.1, 1.0]])
        noise, level, std, t = 2.0, 30.0, 0.7, 0.5
        slope = 0.0 if gain is None else 1 / gain
        sd = np.sqrt(noise**2 + (level + std * t) * slope)
        # One pixel a window, saturated at `residual` standard deviations above what is expected.
        limit = (PEDESTAL + level + std * t + residual * sd).astype(dtype)
        counts = jnp.asarray(limit)[:, None, None]
        ones = jnp.ones_like(counts[:, 0, 0])
        seen = Observation(
            counts=counts,
            valid=jnp.ones(counts.shape, bool),
            saturated=jnp.ones(counts.shape, bool),
            neighbours=jnp.zeros_like(counts),
            origin=jnp.zeros((len(ones), 2), dtype),
            noise=noise * ones[:, None, None],
            pedestal=PEDESTAL * ones[:, None, None],
            background=level * ones[:, None, None],
            background_std=std * ones,
        )
        known = Known(psf=Gaussian(jnp.asarray(0.5, dtype)), sensor=Sensor(gain=gain))

        def one(seen: Observation):
            model = scene_model(seen, jnp.zeros(1, bool), known)
            theta = jnp.asarray([0, 0, 0, t], dtype)
            return model.log_likelihood(theta), model.quadratic(theta)

        value, at = lanes_last(quick_jit(jax.vmap(one)))(seen)
    # The residual that the rounded limit has.
    residual = (limit.astype(float) - PEDESTAL - level - std * t) / sd
    exact = log_ndtr(-residual)
    mills = np.exp(norm.logpdf(residual) - exact)
    by_sd = 1 / sd + residual * slope / sd**2 / 2
    # mills - residual loses its digits far up, where it is 1/r - 2/r^3 + 10/r^5.
    far = np.where(residual > 20, residual, 20)
    excess = np.where(residual > 20, 1 / far - 2 / far**3 + 10 / far**5, mills - residual)
    assert np.isfinite(value).all()
    loose = dtype == "f4"
    # The series that JAX has for log Phi ends there in float64.
    limits = {"rtol": 1e-5, "atol": 1e-6} if loose else {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(value, exact, **limits)
    slope_exact = -mills * by_sd * std + t
    np.testing.assert_allclose(
        at.gradient[:, -1], slope_exact, rtol=2e-4 if loose else 2e-8, atol=1e-6 if loose else 1e-12
    )
    information = mills * excess * (by_sd * std) ** 2 + 1
    np.testing.assert_allclose(at.information[:, -1, -1], information, rtol=1e-3 if loose else 1e-6)


@pytest.mark.parametrize("name", LAWS)
def test_intensities_have_one_density(x64, name):
    law = LAWS[name]
    v = jnp.linspace(-3, 3, 61) + 0.013  # not at the edge of a bin
    u, step = jnp.asarray(norm.cdf(v)), 1e-6
    value = law.value(v)
    np.testing.assert_allclose(law.quantile(u), value, rtol=1e-9)
    np.testing.assert_allclose(law.latent(value), v, atol=1e-7)
    slope = (law.value(v + step) - law.value(v - step)) / (2 * step)
    np.testing.assert_allclose(law.slope(v), slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(law.quantile_slope(u) * norm.pdf(v), slope, rtol=1e-6, atol=1e-9)
    bend = (law.slope(v + step) - law.slope(v - step)) / (2 * step) / law.slope(v)
    np.testing.assert_allclose(law.bend(v), bend, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_less(np.diff(value), np.inf)
    assert (np.diff(value) > 0).all()


def density(name: str, intensity: np.ndarray) -> np.ndarray:
    """Density of an intensity, written out."""
    if name == "uniform":
        return np.full_like(intensity, 1 / 130)
    if name == "log_normal":
        return norm.pdf(np.log(intensity), 4.0, 0.6) / intensity
    per_count = np.asarray(HISTOGRAM.share) / np.diff(HISTOGRAM.edges)
    return per_count[np.searchsorted(HISTOGRAM.edges, intensity, side="right") - 1]


@pytest.mark.parametrize("name", LAWS)
def test_both_ways_to_tell_an_intensity_are_one_model(x64, name):
    seen = jax.tree.map(lambda a: a[0], sensors("shot noise")[0])
    known = f64(
        Known(psf=Gaussian(0.5), sensor=Sensor(gain=1.0), prior=scene_prior(intensity=LAWS[name]))
    )
    energies = np.column_stack([np.linspace(25, 140, 24), np.linspace(110, 31, 24)])

    def density_of(targets: Targets, uniform: bool):
        model = scene_model(seen, targets.mask, known, uniform=uniform)
        theta = model.pack(targets)
        slope = model.intensity_slope(theta[2:-1:3])
        prior = model.log_prior(theta) + model.log_normalisation(theta) - jnp.log(slope).sum()
        return model.log_likelihood(theta), prior, model.unpack(theta).intensity

    scenes = Targets(
        jnp.broadcast_to(POSITION, (24, 2, 2)), jnp.asarray(energies), jnp.ones((24, 2), bool)
    )
    by_v, by_u = (
        lanes_last(quick_jit(jax.vmap(partial(density_of, uniform=uniform))))(scenes)
        for uniform in (False, True)
    )
    np.testing.assert_allclose(by_v[0], by_u[0], rtol=1e-9)
    np.testing.assert_allclose(by_v[1], by_u[1], rtol=1e-9)
    np.testing.assert_allclose(by_v[2], energies, rtol=1e-9)
    places = np.log(2) - 2 * np.log(SIDE**2 - 1) - np.log(2 * np.pi) / 2  # one pixel is not valid
    expected = np.log(density(name, energies)).sum(1) + places
    np.testing.assert_allclose(by_v[1], expected, rtol=1e-9)


SQUARE = {"intensity": (20, 150), "cluster_size": 1.6, "cluster_offset": 0.3}
DENSITIES = {
    "none": scene_prior(),
    "separation": scene_prior(intensity=(20, 150), separation=0.8),
    "size": scene_prior(intensity=LAWS["log_normal"], cluster_size=1.2),
    "size, joint": scene_prior(cluster_size=1.2, separation=0.5),
    "size, sequential": scene_prior(cluster_size=1.2, separation=0.5, places="sequential"),
    "square": scene_prior(**SQUARE),
    "square, joint": scene_prior(**SQUARE, separation=0.5),
    "square, sequential": scene_prior(**SQUARE, separation=0.5, places="sequential"),
    "preset": preset_prior(get_preset("csist")).replace(count=None),
}


@pytest.mark.parametrize("kind", DENSITIES)
def test_places_have_a_density(x64, kind):
    # By quasi-random places: a first target in a pixel amid the window (any would do, up to the
    # window's border) and a second in all of the window, or all that the cluster reaches.
    prior = DENSITIES[kind]
    size = prior.cluster_size
    extent = SIDE / 2 if size is None else 1.01 * size
    sample = qmc.Sobol(4, seed=0).random_base2(15)
    if size is None:
        first, second = SIDE * sample[:, :2] - 0.5, SIDE * sample[:, 2:] - 0.5
    else:
        first = 2.5 + sample[:, :2]
        second = first + extent * (2 * sample[:, 2:] - 1)
    places = np.stack([first, second], 1)
    volume = (2 * extent) ** 2 * SIDE**2
    seen = observe(np.zeros((1, SIDE, SIDE)), Sensor(read_noise=1.0, background=0.0))
    seen = jax.tree.map(lambda a: a[0], seen)
    known = f64(Known(psf=Gaussian(0.5), prior=prior))

    def log_density(place: jax.Array, mask: jax.Array) -> jax.Array:
        model = scene_model(seen, mask, known, softness=HARD)
        v = 0.5 if prior.intensity is None else 0.0
        theta = jnp.append(jnp.pad(place, [(0, 0), (0, 1)], constant_values=v).reshape(-1), 0.0)
        return model.log_prior(theta) + model.log_normalisation(theta)

    per_place = lanes_last(quick_jit(jax.vmap(log_density, (0, None))))
    for n in (1, 2):
        value = np.exp(per_place(jnp.asarray(places), jnp.arange(2) < n))
        # Gaussian densities of `v` and `t` were taken at their tops.
        gaussian = 1 + n * (prior.intensity is not None)
        value = value * (2 * np.pi) ** (gaussian / 2)
        area = SIDE**2 if n == 1 else volume / 2  # numbered either way
        error = 0.02 if n == 2 else 0.002
        np.testing.assert_allclose(value.mean() * area, 1, rtol=error)
