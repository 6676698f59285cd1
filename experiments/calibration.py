"""Simulation-based calibration of the posterior: are its intervals as often right as they say?

    python experiments/calibration.py --num 2000

draws scenes of one and two targets from each prior, records them with each sensor, and samples
their posteriors at the true count, from fits that begin beside the truth. If the sampler is right,
the truth has any rank among the samples as often; chi-squared judges the histogram of the ranks of
row, col and intensity (Talts et al. 2018). For the count it compares how many frames hold two
targets with the sum of their probabilities, found from starts of one or two targets by chance.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax
from scipy.stats import chi2, norm

from dscsnet_jax.inference.fit import fit
from dscsnet_jax.inference.intensity import Histogram, LogNormal
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation, observe
from dscsnet_jax.inference.prior import ScenePrior, scene_prior
from dscsnet_jax.inference.sampler import sample
from dscsnet_jax.inference.search import select
from dscsnet_jax.inference.summary import Posterior
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets

SIDE, MIDDLE, SIGMA, NOISE = 7, 3.0, 0.5, 2.0
RANGE = (150.0, 250.0)
APART = 2.0  # pixels; without a prior, nearer targets would feel where their intensities end
COUNT = (0.0, 0.5, 0.5)
BESIDE = 0.15  # pixels from the truth, of starts
BINS = 8  # of ranks
SQUARE = {"intensity": RANGE, "separation": 0.5, "cluster_size": 1.0, "count": COUNT}
PRIORS: dict[str, ScenePrior] = {
    "none": scene_prior(),
    "intensity": scene_prior(intensity=RANGE),
    "separation": scene_prior(intensity=RANGE, separation=0.6, count=COUNT),
    "log-normal": scene_prior(intensity=LogNormal(5.3, 0.2)),
    "histogram": scene_prior(intensity=Histogram([120.0, 180.0, 220.0, 300.0], [0.3, 0.2, 0.5])),
    "cluster": scene_prior(**SQUARE, cluster_offset=-0.4),
    "one by one": scene_prior(**SQUARE, cluster_offset=-0.4, places="sequential"),
    # Squares on whole pixels that overlap.
    "wide cluster": scene_prior(**SQUARE | {"cluster_size": 1.6}, cluster_offset=-0.4),
    "free square": scene_prior(**SQUARE),
}
SENSORS: dict[str, dict[str, float]] = {
    "gaussian": {},
    "shot noise": {"gain": 1.0},
    "background": {"gain": 1.0, "background": 100.0},
    "saturation": {"saturation": 60.0},
    "misfit": {"misfit": 0.15},
}


class Drawn(NamedTuple):
    """Scenes and their frames: `Targets` (B, 2, ...) and (B, N, N) counts."""

    targets: Targets
    frames: np.ndarray


def draw(prior: str, sensor: str, num: int, rng: np.random.Generator) -> Drawn:
    """Scenes of a prior, recorded with a sensor.

    Args:
      prior: a name of `PRIORS`.
      sensor: a name of `SENSORS`.
      num: of scenes.
      rng: of all that is drawn.
    """
    law = PRIORS[prior]
    size = 3.0 if law.cluster_size is None else law.cluster_size
    low = np.full((num, 1, 2), -1.5 if law.cluster_offset is None else law.cluster_offset)
    if law.cluster_size is not None and law.cluster_offset is None:
        low = rng.uniform(-1, 0, low.shape)
    mask = np.stack([np.ones(num, bool), rng.uniform(size=num) < COUNT[2]], 1)
    apart = APART if prior == "none" else float(law.separation)
    places = low + size * rng.uniform(size=(num, 2, 2))
    again = slice(1 if law.places == "sequential" else 0, None)
    while (
        near := mask[:, 1] & (np.linalg.norm(places[:, 0] - places[:, 1], axis=1) < apart)
    ).any():
        other = low + size * rng.uniform(size=places.shape)
        places[near, again] = other[near, again]
    energy = rng.uniform(size=(num, 2))
    energy = (
        np.interp(energy, (0, 1), RANGE)
        if law.intensity is None
        else np.asarray(law.intensity.quantile(jnp.asarray(energy)))
    )
    targets = Targets(
        np.where(mask[..., None], MIDDLE + places, 0).astype("f"),
        np.where(mask, energy, 0).astype("f"),
        mask,
    )
    known = SENSORS[sensor]
    expected = np.asarray(render(targets, frame_size=SIDE, psf=SIGMA), float)
    if "misfit" in known:
        expected = expected * (1 + known["misfit"] * rng.normal(size=expected.shape))
    photons = np.maximum(expected, 0) + known.get("background", 0.0)
    recorded = rng.poisson(photons * known["gain"]) / known["gain"] if "gain" in known else photons
    recorded = recorded + rng.normal(0, NOISE, recorded.shape)
    return Drawn(targets, np.minimum(recorded, known.get("saturation", np.inf)).astype("f"))


@jax.jit
def _answer(seen: Observation, start: Targets, known: Known, key: jax.Array) -> Posterior:
    return sample(seen, fit(seen, start, known).targets, known, key, keep_samples=True)


@jax.jit
def _evidence(seen: Observation, start: Targets, known: Known) -> jax.Array:
    return select(seen, start, known).log_evidence


def calibrate(prior: str, sensor: str, num: int, seed: int) -> dict[str, float]:
    """Probabilities of so large a chi-squared, of row, col and intensity, and that of the count.

    Args:
      prior: a name of `PRIORS`.
      sensor: a name of `SENSORS`.
      num: of scenes.
      seed: of scenes and chains.
    """
    drawn = draw(prior, sensor, num, np.random.default_rng(seed))
    known: dict[str, Any] = {"background": 0.0} | SENSORS[sensor]
    seen = observe(drawn.frames, Sensor(read_noise=NOISE, **known))
    told = Known(psf=Gaussian(np.float32(SIGMA)), prior=PRIORS[prior])
    light = {name: np.float32(known[name]) for name in ("gain", "misfit") if name in known}
    told = dataclasses.replace(told, sensor=Sensor(**light))
    start, of_any = _starts(drawn.targets, np.random.default_rng(seed + 1))
    answer = jax.tree.map(np.asarray, _answer(seen, start, told, jax.random.key(seed)))
    truth, mask = _numbered(drawn.targets, answer.targets.position), drawn.targets.mask
    rank = (answer.samples < truth[:, None]).sum(1)
    found = {}
    for axis, name in enumerate(("row", "col", "intensity")):
        found[name] = _probability(rank[mask][:, axis], answer.samples.shape[1])
    if told.prior.count is not None:
        chance = softmax(np.asarray(_evidence(seen, of_any, told)), axis=1)[:, 2]
        off = (mask.sum(1) == 2).sum() - chance.sum()
        spread = np.sqrt((chance * (1 - chance)).sum() + 1e-9)
        found["count"] = float(2 * norm.sf(abs(off) / max(spread, 1)))
    return found


def _starts(truth: Targets, rng: np.random.Generator) -> tuple[Targets, Targets]:
    """Beside the truth, of its count and of any: what is too much is beside the first target."""
    beside = rng.normal(0, BESIDE, truth.position.shape)
    place = np.where(truth.mask[..., None], truth.position, truth.position[:, :1]) + beside
    energy = np.full(truth.mask.shape, np.mean(RANGE))
    any_count = np.stack([truth.mask[:, 0], rng.uniform(size=len(place)) < COUNT[2]], 1)

    def of(mask: np.ndarray) -> Targets:
        there = np.where(mask[..., None], place, 0), np.where(mask, energy, 0)
        return Targets(*(jnp.asarray(a, jnp.float32) for a in there), jnp.asarray(mask))

    return of(truth.mask), of(any_count)


def _numbered(truth: Targets, place: np.ndarray) -> np.ndarray:
    """(B, 2, 3) rows, cols and intensities in the order of the places (B, 2, 2)."""
    table = np.concatenate([truth.position, truth.intensity[..., None]], -1)
    both = truth.mask.all(1)
    gain = ((table[:, 0, :2] - table[:, 1, :2]) * (place[:, 1] - place[:, 0])).sum(-1)
    return np.where((both & (gain > 0))[:, None, None], table[:, ::-1], table)


def _probability(rank: np.ndarray, most: int) -> float:
    """Of so large a chi-squared of the histogram of ranks, from 0 to the number of samples."""
    edges = np.arange(most + 1) * BINS // (most + 1)
    expected = np.bincount(edges) * len(rank) / (most + 1)
    histogram = np.bincount(edges[rank], minlength=BINS)
    return float(chi2.sf(((histogram - expected) ** 2 / expected).sum(), BINS - 1))


def main(arguments: list[str] | None = None) -> None:
    """Print the probability of each histogram; under chance they are uniform in 0 .. 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--priors", nargs="+", default=list(PRIORS), choices=list(PRIORS))
    parser.add_argument("--sensors", nargs="+", default=list(SENSORS), choices=list(SENSORS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    print(f"{args.num} scenes each, {jax.devices()[0].device_kind}")
    run = partial(calibrate, num=args.num, seed=args.seed)
    for prior in args.priors:
        for sensor in args.sensors:
            found = run(prior, sensor)
            cells = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"{prior:<12}{sensor:<12}{cells}", flush=True)


if __name__ == "__main__":
    main()
