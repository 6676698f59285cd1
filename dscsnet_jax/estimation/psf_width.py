"""PSF width: one factor of the told width, common to all frames, fitted with their targets."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from scipy import optimize

from dscsnet_jax.batching import in_blocks, windows_per_block
from dscsnet_jax.estimation import windows
from dscsnet_jax.estimation.solve import gathered, sampled_windows, selected
from dscsnet_jax.estimation.windows import Flat
from dscsnet_jax.inference.evidence import laplace
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.physics.psf import Psf

_REACHES = (0.3, 0.1)  # of the factor's logarithm, in each pass
_STEP = 0.02  # of the factor's logarithm, for the slope's own slope


def fit_width(
    observation: Observation,
    start: Flat,
    known: Known,
    *,
    greedy: bool = False,
    seed: int = 0,
) -> tuple[Known, Flat]:
    """Fit one factor of the PSF's width, common to all frames, with the targets.

    For each trial width all targets are fitted anew; the width with the largest Laplace
    evidence is taken. (The likelihood alone prefers narrow PSFs: noise drives the places of
    blended targets apart.) As a wrong width asks for wrong counts, counts are selected in
    between. Laplace's evidence ignores the prior's hard limits and is then some 1 % narrow:
    where there are any, the slope by the width of posterior chains is brought to zero at last.

    Args:
      observation: B whole frames.
      start: their targets.
      known: a first guess of the width, gain and scene prior.
      greedy: as in `solve`.
      seed: of the posterior chains.

    Returns:
      What is known, with the fitted width, and the targets.

    Raises:
      ValueError: if there is no target to fit it to.

    Example:
      >>> from dscsnet_jax.estimation.windows import flat
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(3.0, 3.2, 240.0)]])
      >>> sensor = Sensor(read_noise=0.1, background=0.0)
      >>> seen = observe(render(truth, frame_size=7, psf=0.5), sensor)
      >>> fit_width(seen, flat(truth), Known(psf=Gaussian(0.52)))[0].psf.width.round(2).tolist()
      [0.5, 0.5]
    """
    observation, targets = jax.tree.map(np.asarray, observation), start
    # Evidences compare over the same pixels only: windows of the largest width for all.
    widest = float(windows.widest_of(known.psf) * np.exp(sum(_REACHES)))

    def widened(log_factor: float) -> Known:
        return dataclasses.replace(known, psf=_widened(known.psf, np.exp(np.float32(log_factor))))

    def fits(trial: Known) -> list[tuple[windows.Windows, Fit]]:
        counted = selected(observation, targets, trial, compare=False, widest=widest, sweeps=1)
        return [(w, s.fit) for w, s in counted]

    def cost(log_factor: float) -> float:
        trial = widened(log_factor)
        parts = (
            in_blocks(_evidence, (f, w.observation), trial, size=windows_per_block())
            for w, f in fits(trial)
        )
        # A window whose count the prior excludes tells nothing of the width.
        return -float(sum(part.sum(dtype=float, where=np.isfinite(part)) for part in parts))

    def slope(log_factor: float) -> float:
        trial = widened(log_factor)
        posteriors = (
            sampled_windows(w._replace(targets=f.targets), trial, seed=seed, width_slope=True)
            for w, f in fits(trial)
        )
        return float(sum(p.width_slope.sum(dtype=float) for p in posteriors))

    log_factor = 0.0
    for reach in _REACHES:
        trial = widened(log_factor)
        targets = gathered(selected(observation, targets, trial, greedy=greedy))
        if not len(targets.frame):
            raise ValueError("without targets the width of the PSF cannot be fitted")
        log_factor = optimize.minimize_scalar(
            cost,
            bounds=(log_factor - reach, log_factor + reach),
            method="bounded",
            options={"xatol": 1e-4, "maxiter": 20},
        ).x

    prior = known.prior
    if prior.intensity is None and prior.cluster_size is None and float(prior.separation) == 0:
        return widened(log_factor), targets
    first, second = (slope(trial) for trial in (log_factor, log_factor + _STEP))
    if first > second:  # the evidence has its maximum where the slope falls through zero
        reach = _REACHES[-1]
        log_factor += float(np.clip(first / (first - second) * _STEP, -reach, reach))
    return widened(log_factor), targets


@jax.jit
def _widened(psf: Psf, factor: jax.Array) -> Psf:
    return psf.widened(factor)


@jax.jit
def _evidence(given: tuple[Fit, Observation], known: Known) -> jax.Array:
    return laplace(*given, known, limits=False)  # they would make it jump with the width
