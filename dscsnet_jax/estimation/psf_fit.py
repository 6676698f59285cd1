"""PSF fit: the free parameters of a PSF, common to all frames, fitted with their targets."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from dscsnet_jax.batching import in_blocks, windows_per_block
from dscsnet_jax.estimation import windows
from dscsnet_jax.estimation.solve import gathered, sampled_windows, selected
from dscsnet_jax.estimation.windows import Flat
from dscsnet_jax.inference.evidence import laplace, psf_information
from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.physics.psf import Psf, with_both_widths
from dscsnet_jax.physics.psf_coordinates import Coordinates, coordinates

_REACHES = (0.3, 0.1)  # of the width's logarithm, in each pass
_STEPS, _FAR = 9, 3  # most, of all parameters; those by the fits' information alone
_FARTHEST = 0.15  # that a coordinate may move in a step, or three standard errors
_DONE = 0.3  # standard errors of a last step
_ENOUGH = 10  # windows for each parameter, whose scatter tells the errors
_LEAST = 1e-4  # of a direction's information, against the best known one: else it stays


class PsfFit(NamedTuple):
    """What is known once the PSF is fitted.

    Attributes:
      known: with the fitted PSF, of the class that was told.
      targets: of the frames.
      parameters: of the PSF by name: value and standard error, in the units of the PSF.
    """

    known: Known
    targets: Flat
    parameters: dict[str, tuple[float, float]]


def fit_psf(
    observation: Observation,
    start: Flat,
    known: Known,
    *,
    greedy: bool = False,
    seed: int = 0,
) -> PsfFit:
    """Fit all free parameters of a PSF, common to all frames, with the targets.

    First one factor of its width: for each trial all targets are fitted anew, and the one with
    the largest Laplace evidence is taken. (The likelihood alone prefers narrow PSFs: noise
    drives the places of blended targets apart.) As a wrong width asks for wrong counts, counts
    are selected in between. Then all parameters by Newton's steps on the marginal likelihood:
    its slope is the posterior mean of that of the likelihood (Fisher's identity), its
    information at first that of the fits with their targets unknown, then the scatter of the
    windows' slopes as well, which tells the errors (Berndt, Hall, Hall and Hausman).

    Args:
      observation: B whole frames.
      start: their targets.
      known: a first guess of the PSF, sensor's gain and scene prior.
      greedy: as in `solve`.
      seed: of the posterior chains.

    Returns:
      `PsfFit`; the error of what the frames do not tell is inf, and it keeps its value.

    Raises:
      ValueError: if there is no target to fit it to, or the PSF has no free parameters.

    Example:
      >>> import dscsnet_jax as dj
      >>> from dscsnet_jax.estimation.windows import flat
      >>> truth = dj.from_lists([[(3.0, 3.2, 240.0)], [(2.8, 3.4, 240.0)], [(3.1, 2.9, 240.0)]])
      >>> y = dj.render(truth, frame_size=7, psf=0.5)
      >>> seen = dj.observe(y, dj.Sensor(read_noise=0.1, background=0.0))
      >>> found = fit_psf(seen, flat(truth), Known(psf=dj.Gaussian(np.float32(0.52))))
      >>> round(found.parameters["sigma"][0], 1)
      0.5

    References:
      R. A. Fisher, Proc. Camb. Philos. Soc. 22 (1925) 700; E. K. Berndt, B. H. Hall, R. E. Hall,
      J. A. Hausman, Ann. Econ. Soc. Meas. 3 (1974) 653.
    """
    coordinates(known.psf)  # it has some
    observation, targets = jax.tree.map(np.asarray, observation), start
    # Evidences compare over the same pixels only: windows of the largest width for all.
    widest = float(windows.widest_of(known.psf) * np.exp(sum(_REACHES)))

    def fits(trial: Known) -> list[tuple[windows.Windows, Fit]]:
        counted = selected(observation, targets, trial, compare=False, widest=widest, sweeps=1)
        return [(w, s.fit) for w, s in counted]

    def cost(log_factor: float) -> float:
        trial = _with(known, _widened(known.psf, np.exp(np.float32(log_factor))))
        parts = (
            in_blocks(_evidence, (f, w.observation), trial, size=windows_per_block())
            for w, f in fits(trial)
        )
        # A window whose count the prior excludes tells nothing of the width.
        return -float(sum(part.sum(dtype=float, where=np.isfinite(part)) for part in parts))

    log_factor = 0.0
    for reach in _REACHES:
        trial = _with(known, _widened(known.psf, np.exp(np.float32(log_factor))))
        targets = gathered(selected(observation, targets, trial, greedy=greedy))
        if not len(targets.frame):
            raise ValueError("without targets the width of the PSF cannot be fitted")
        log_factor = optimize.minimize_scalar(
            cost,
            bounds=(log_factor - reach, log_factor + reach),
            method="bounded",
            options={"xatol": 1e-4, "maxiter": 20},
        ).x
    psf = _widened(known.psf, np.exp(np.float32(log_factor)))
    free = coordinates(psf)
    values, covariance = np.asarray(free.values, float), np.diag([np.inf] * len(free.names))
    for number in range(_STEPS):
        trial = _with(known, free.psf(jnp.asarray(values, np.float32)))
        if number == 1:  # the shape may ask for other counts
            targets = gathered(selected(observation, targets, trial, greedy=greedy))
        scores, parts = [], []
        for w, f in fits(trial):
            w = w._replace(targets=f.targets)
            scores.append(sampled_windows(w, trial, seed=seed, psf_slope=True).psf_slope)
            part = in_blocks(_information, (f, w.observation), trial, size=windows_per_block())
            parts.append(part.sum(0, dtype=float))
        slope = _slope_of_windows(free, jnp.asarray(values, np.float32))
        together = np.concatenate(scores).astype(float) @ slope
        information = slope.T @ sum(parts) @ slope
        step, covariance = _newton(together, information, near=number >= _FAR)
        values = values + step
        if number >= _FAR and (np.abs(step) <= _DONE * np.sqrt(np.diagonal(covariance))).all():
            break
    at = free._replace(values=jnp.asarray(values, np.float32))
    fitted = dataclasses.replace(known, psf=at.psf(at.values))
    return PsfFit(fitted, targets, at.errors(covariance))


def _newton(
    scores: np.ndarray, information: np.ndarray, *, near: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's step (P,) by the windows' slopes (W, P) and information; covariance (P, P) there.

    Far off, the slopes scatter by the misfit, and the fits' information is the better one; near,
    where it may be too small, the scatter of the slopes is the information itself. Directions
    of which the windows tell next to nothing are left alone.
    """
    number, size = scores.shape
    slope, off = scores.sum(0), scores - scores.mean(0)
    scatter = off.T @ off * number / max(number - 1, 1)
    naive, _ = _inverse(information)
    covariance, unknown = _inverse(scatter)
    if number < _ENOUGH * size:
        covariance = covariance + naive
    inverse = _inverse(information + scatter)[0] if near else naive
    step = np.where(unknown, 0, inverse @ slope)
    covariance[unknown, unknown] = np.inf
    std = np.sqrt(np.diagonal(covariance))
    farthest = np.where(unknown, 1, np.maximum(_FARTHEST, 3 * std))
    return step / max(np.abs(step / farthest).max(initial=0), 1), covariance


def _inverse(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse (P, P) but for directions that are next to nothing, and which parameters are so."""
    scale = np.sqrt(np.diagonal(matrix))
    scale = np.where(scale > 0, scale, 1)
    share, axes = np.linalg.eigh(matrix / np.outer(scale, scale))
    told = share > _LEAST * max(share[-1], 1e-30)
    inverse = (axes * np.where(told, 1 / np.where(told, share, 1), 0)) @ axes.T
    unknown = ((axes[:, ~told] ** 2).sum(1) > 0.5) | (np.diagonal(matrix) <= 0)
    return inverse / np.outer(scale, scale), unknown


def _slope_of_windows(free: Coordinates, values: jax.Array) -> np.ndarray:
    """Derivative of the coordinates of what windows are told by those of the PSF."""
    psf = free.psf(values)
    if with_both_widths(psf) is psf:
        return np.eye(len(values))

    def told(values: jax.Array) -> jax.Array:
        return coordinates(with_both_widths(free.psf(values))).values

    return np.asarray(jax.jacfwd(told)(values), float)


def _with(known: Known, psf: Any) -> Known:
    """What windows are told with another PSF."""
    return dataclasses.replace(known, psf=psf).for_windows()


@jax.jit
def _widened(psf: Psf, factor: jax.Array) -> Psf:
    return psf.widened(factor)


@jax.jit
def _information(given: tuple[Fit, Observation], known: Known) -> jax.Array:
    return psf_information(*given, known)


@jax.jit
def _evidence(given: tuple[Fit, Observation], known: Known) -> jax.Array:
    return laplace(*given, known, limits=False)  # they would make it jump with the width
