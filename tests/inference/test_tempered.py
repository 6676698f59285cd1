"""The tempered posterior: the true one from draws of the prior, and its evidence."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import dscsnet_jax as dj
from dscsnet_jax.inference.lanes import lanes_last, to_lanes
from dscsnet_jax.inference.scene_model import HARD, scene_model
from dscsnet_jax.inference.tempered import Tempered, tempered
from dscsnet_jax.physics.scene import frame_keys, simulate

pytestmark = pytest.mark.slow

run = jax.jit(partial(tempered, num_particles=256, num_moves=48))


def in_turn(seen: Any, mask: np.ndarray, known: dj.Known, seed: int = 0) -> Tempered:
    """Window by window: on a CPU a few lanes are quicker than many."""
    key = jax.random.key(seed)
    parts = [
        jax.device_get(run(*jax.tree.map(lambda a, i=i: a[i : i + 1], (seen, mask)), known, key))
        for i in range(len(mask))
    ]
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


@jax.jit
@lanes_last
def log_likelihood(seen: Any, truth: dj.Targets, known: dj.Known) -> jax.Array:
    seen, truth = to_lanes((seen, truth))
    model = scene_model(seen, truth.mask, known, softness=HARD, uniform=True)
    return model.log_likelihood(model.pack(truth))


@pytest.fixture(scope="module", params=["std1", "std5", "wide1"])
def fixture(request: pytest.FixtureRequest, data_dir: Path) -> tuple[Any, ...]:
    """Frames with samples of their posteriors by an independent program, and ours."""
    data = np.load(data_dir / "posterior" / f"{request.param}.npz")
    mask = np.arange(5) < data["count"][:, None]
    prior = dj.scene_prior(
        intensity=tuple(map(float, data["intensity"])),
        separation=0.5,
        cluster_size=1.0,
        cluster_offset=-0.4,
    )
    sensor = dj.Sensor(read_noise=float(data["noise"]), background=0.0)
    known = dj.Known(dj.Gaussian(0.5), sensor, prior).for_windows()
    seen = jax.tree.map(np.asarray, dj.observe(data["frames"].astype("f4"), sensor))
    return data, mask, known, seen, in_turn(seen, mask, known)


def test_the_posterior_is_the_true_one(fixture: tuple[Any, ...]) -> None:
    """Moments of all targets of a frame together, which have no numbers to be exchanged."""
    data, mask, _, _, found = fixture
    off, ratio = [], []
    for i, here in enumerate(mask):
        ours = np.asarray(found.posterior.samples[i][:, here], float).reshape(-1, 3)
        mean, std = data["mean"][i, here], data["std"][i, here]
        spread = np.sqrt((std**2 + mean**2).mean(0) - mean.mean(0) ** 2)
        off.append((ours.mean(0) - mean.mean(0)) / spread)
        ratio.append(np.log(ours.std(0) / spread))
    # Both are of a few hundred samples, which are not independent.
    assert np.sqrt(np.mean(np.square(off), 0)).max() < 0.12
    assert np.abs(np.mean(off, 0)).max() < 0.03
    assert np.abs(np.mean(ratio, 0)).max() < 0.03


def test_samples_have_the_likelihood_of_the_truth(fixture: tuple[Any, ...]) -> None:
    """The sign of a posterior that is right: the truth is one of its samples."""
    data, mask, known, seen, found = fixture
    truth = dj.Targets(
        data["true_position"].astype("f4"), data["true_intensity"].astype("f4"), mask
    )
    off = found.log_likelihood - np.asarray(log_likelihood(seen, truth, known))
    assert abs(off.mean()) < 3 * off.std(ddof=1) / len(off) ** 0.5


def test_evidence_is_the_integral() -> None:
    """Of no target, and of one anywhere in a small frame, by a sum over a lattice."""
    low, high, side, noise = 20.0, 60.0, 5, 6.0
    truth = dj.from_lists([[(1.8, 2.3, 40.0)], [(3.0, 0.7, 25.0)], []], 1)
    clean = np.asarray(dj.render(truth, frame_size=side, psf=0.5))
    y = np.float32(clean + noise * np.random.default_rng(0).normal(size=clean.shape))
    sensor = dj.Sensor(read_noise=noise, background=0.0, quantised=False)
    known = dj.Known(dj.Gaussian(0.5), sensor, dj.scene_prior(intensity=(low, high)))
    seen = jax.tree.map(np.asarray, dj.observe(y, sensor))
    told = known.for_windows()
    base = -((y / noise) ** 2).sum((1, 2)) / 2 - side**2 * np.log(noise)
    none = in_turn(seen, np.zeros((3, 1), bool), told)
    np.testing.assert_allclose(none.log_evidence, base, rtol=1e-5)
    place = (np.arange(75) + 0.5) / 15 - 0.5
    lattice = np.stack(np.meshgrid(place, place, indexing="ij"), -1).reshape(-1, 1, 2)
    ones = dj.Targets(
        np.float32(lattice), np.ones((len(lattice), 1), "f4"), np.ones((len(lattice), 1), bool)
    )
    shape = np.asarray(dj.render(ones, frame_size=side, psf=0.5), float).reshape(len(lattice), -1)
    energy = low + (high - low) * (np.arange(40) + 0.5) / 40
    one = in_turn(seen, np.ones((3, 1), bool), told)
    for frame, start, got in zip(y.reshape(3, -1), base, one.log_evidence, strict=True):
        gain = (shape @ frame)[:, None] * energy - (shape**2).sum(1)[:, None] * energy**2 / 2
        exact = start + logsumexp(gain / noise**2) - np.log(gain.size)
        assert got == pytest.approx(exact, abs=0.2)


@pytest.mark.parametrize(("places", "share"), [("sequential", 0.386), ("joint", 0.325)])
def test_where_frames_tell_nothing_the_prior_is_left(places: str, share: float) -> None:
    """P(some target in the central quarter of the square) of the simulator, and of joint draws."""
    preset = dj.get_preset("csist_float", read_noise=1e5)
    known = preset.known.for_windows()
    known = known.replace(prior=known.prior.replace(places=places))
    y = np.float32(np.random.default_rng(0).normal(0, 1e5, (24, 11, 11)))
    seen = jax.tree.map(np.asarray, dj.observe(y, preset.known.sensor))
    found = in_turn(seen, np.ones((24, 2), bool), known).posterior.samples
    within = found[..., :2] - np.floor(found[..., :2] + 0.4) + 0.4  # in the square
    assert ((within >= 0) & (within < 1)).all()
    central = (np.abs(within - 0.5) < 0.25).all(-1).any(-1).mean(1)
    assert abs(central.mean() - share) < 4 * central.std() / 24**0.5 + 0.005
    apart = np.sqrt(((found[:, :, 0, :2] - found[:, :, 1, :2]) ** 2).sum(-1))
    assert apart.min() > 0.5 - 4 * HARD
    if places == "sequential":  # the number is the simulator's own
        made = jax.jit(partial(simulate, dj.get_preset("csist", count_mean=2.0, count_std=0.0)))(
            frame_keys(0, "val", np.arange(4000))
        )
        place = np.asarray(made.targets.position)[:, :2] + 0.4
        own = (np.abs(place - np.floor(place) - 0.5) < 0.25).all(-1).any(-1)
        assert abs(own.mean() - share) < 4 * own.std() / 4000**0.5


def test_five_targets_in_a_pixel_keep_their_distance() -> None:
    """Hardly any joint draw does: places are drawn one after the other, and weighed."""
    preset = dj.get_preset("csist_float", read_noise=1e5)
    y = np.float32(np.random.default_rng(0).normal(0, 1e5, (4, 11, 11)))
    seen = jax.tree.map(np.asarray, dj.observe(y, preset.known.sensor))
    found = in_turn(seen, np.ones((4, 5), bool), preset.known.for_windows()).posterior.samples
    apart = found[:, :, :, None, :2] - found[:, :, None, :, :2]
    distance = np.sqrt((apart**2).sum(-1)) + 9 * np.eye(5)
    assert distance.min() > 0.5 - 4 * HARD


def test_populations_that_disagree_are_not_believed(data_dir: Path) -> None:
    data = np.load(data_dir / "posterior" / "std1.npz")
    some = np.flatnonzero(data["count"] >= 4)[:4]
    sensor = dj.Sensor(read_noise=1.0, background=0.0)
    prior = dj.scene_prior(
        intensity=(220.0, 250.0), separation=0.5, cluster_size=1.0, cluster_offset=-0.4
    )
    known = dj.Known(dj.Gaussian(0.5), sensor, prior).for_windows()
    seen = dj.observe(data["frames"][some].astype("f4"), sensor)
    hasty = jax.jit(partial(tempered, num_particles=64, num_moves=1))
    found = hasty(seen, np.ones((4, 4), bool), known, jax.random.key(0))
    assert not np.asarray(found.posterior.converged).any()


def test_windows_stand_alone(data_dir: Path) -> None:
    """Neither their order nor their neighbours change an answer by more than rounding."""
    data = np.load(data_dir / "posterior" / "std5.npz")
    mask = (np.arange(5) < data["count"][:, None])[:4]
    sensor = dj.Sensor(read_noise=5.0, background=0.0)
    prior = dj.scene_prior(intensity=(220.0, 250.0), separation=0.5, cluster_size=1.0)
    known = dj.Known(dj.Gaussian(0.5), sensor, prior).for_windows()
    seen = dj.observe(data["frames"][:4].astype("f4"), sensor)
    key = jax.random.key(3)
    some = jax.jit(partial(tempered, num_particles=64, num_moves=8))
    one = some(seen, mask, known, key)
    turned = some(*jax.tree.map(lambda a: jnp.asarray(a)[::-1], (seen, mask)), known, key)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(turned), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b)[::-1])
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        tempered(seen, mask, known, key, num_particles=12)
