"""Network: its sub-pixel map of frames, and the targets read out of it.

Frames may be windows, with the light of neighbours told.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from dscsnet_jax.batching import frames_per_block
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.pixels import pixel_std
from dscsnet_jax.io.weights import Weights, check_geometry
from dscsnet_jax.maps.readout import REFERENCE_THRESHOLD, Readout, ReadoutRule
from dscsnet_jax.maps.tiling import TILE, tiled_map
from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.physics.psf import Gaussian, Psf, require
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.unfolding.registry import Network, make_network

_TILE_BATCH = 4
_PEAK_SHARE, _PEAK_NOISE = 0.15, 6.0  # least energy of a peak: of the scale, in noise
_PRIOR_SHARE = 0.4  # least energy of a peak, of the prior's least intensity

_operator = jax.jit(sensing_operator, static_argnames=("frame_size", "division"))


def network_of(weights: Weights) -> Network:
    """The network that a set of weights belongs to."""
    return make_network(weights.metadata.method, **weights.metadata.config)


def check_psf(weights: Weights, psf: Psf) -> None:
    """The PSF must be among those that the weights were trained for.

    Raises:
      ValueError: if it is not.
    """
    kind = type(psf).__name__
    require(isinstance(psf, Gaussian), f"the weights are trained for Gaussian PSFs, got {kind}")
    width = np.asarray(psf.width)
    trained = _trained_sigma(weights)
    if trained:
        slack = 1e-6
        if ((width >= trained[0] - slack) & (width <= trained[1] + slack)).all():
            return
        raise ValueError(
            f"the weights are trained for PSF sigmas of {trained[0]} to {trained[1]} pixels, "
            f"got {[float(str(value)) for value in width]}"
        )
    geometry = weights.metadata.geometry
    operator = _operator((3, 3), division=geometry.division, psf=width.astype(np.float32))
    check_geometry(weights.metadata, operator)


def read_maps(
    observation: Observation,
    weights: Weights,
    known: Known,
    *,
    readout: str,
    threshold: float | None,
    max_targets: int,
) -> tuple[np.ndarray, Targets, np.ndarray]:
    """Maps of frames, the targets read out of them, and where slots were missing.

    A network that was told the PSF of each frame in training is told it here; another sees its own.
    """
    # Saturated pixels hold the least value that rounds to the full well; it was trained on that.
    recorded = np.where(observation.saturated, np.ceil(observation.counts), observation.counts)
    above = recorded - observation.neighbours - observation.level
    y = _fill_invalid(above.astype(observation.counts.dtype), observation.valid)
    geometry = weights.metadata.geometry
    network = network_of(weights)
    seen = known.psf.width if _sees_optics(weights) else geometry.sigma
    width = np.broadcast_to(np.asarray(seen, np.float32), (2,))
    operator = _operator(y.shape[1:], division=geometry.division, psf=width)
    model = _Model(network, jax.device_put(weights.params), operator)
    noise = root_mean_square(pixel_std(observation, known.effective_gain), observation.valid)
    scale = np.asarray(network.scale(jnp.asarray(y), jnp.asarray(noise))) if len(y) else noise
    least, capacity = threshold, None
    if known.prior.intensity is not None:
        low, high = (float(v) for v in known.prior.intensity.range)
        capacity = (low + high) / 2 if low > high / 2 else None
        least = _PRIOR_SHARE * low if threshold is None and low > 0 else threshold
    elif getattr(network.config, "normalise", "fixed") == "fixed":
        capacity = _capacity(weights)
        least = REFERENCE_THRESHOLD if threshold is None else threshold
    if readout == "cells":
        least = REFERENCE_THRESHOLD if threshold is None else threshold
    unit = np.ones(len(y), np.float32)
    if least is None:  # relative to each frame
        unit = np.maximum(_PEAK_SHARE * scale, _PEAK_NOISE * noise).astype(np.float32)
        least = 1.0
    rule = ReadoutRule(
        name=readout,
        division=geometry.division,
        threshold=float(least),
        separation=_separation(weights, width),
        capacity=capacity,
        max_targets=max_targets,
    )
    size = frames_per_block(y.shape[1:])
    columns = (_batches(a, size) for a in (y, noise, scale, unit))
    parts = []
    for frames, level, peak, energy in zip(*columns, strict=True):
        if max(y.shape[1:]) > TILE:
            x = np.stack([_large_map(model, *one) for one in zip(frames, level, peak, strict=True)])
        else:
            x = _make_map(model.params, frames, level, peak, model.operator, model.network)
        parts.append((np.asarray(x), _read(x, energy, rule)))
    maps, read = (_join(side, len(y)) for side in zip(*parts, strict=True))
    return maps, read.targets, read.truncated


@functools.partial(jax.jit, static_argnames="network")
def _make_map(
    params: Any,
    y: jax.Array,
    noise: jax.Array,
    scale: jax.Array,
    operator: SensingOperator,
    network: Network,
) -> jax.Array:
    return network.apply(params, y, operator, noise=noise, scale=scale).x


@functools.partial(jax.jit, static_argnames="rule")
def _read(x: jax.Array, unit: jax.Array, rule: ReadoutRule) -> Readout:
    """Targets of maps whose energies are counted in `unit` (B,) counts."""
    read = rule(x / unit[:, None, None])
    targets = read.targets
    return dataclasses.replace(
        read, targets=dataclasses.replace(targets, intensity=targets.intensity * unit[:, None])
    )


class _Model(NamedTuple):
    """A network with its parameters and the optics of whole frames."""

    network: Network
    params: Any
    operator: SensingOperator


def _large_map(
    model: _Model, frame: np.ndarray, noise: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """Map of one frame that is larger than a tile; all tiles are scaled as the frame is."""
    division, psf = model.operator.division, model.operator.psf

    def make_map(tiles: np.ndarray) -> np.ndarray:
        local = _operator(tiles.shape[1:], division=division, psf=psf)
        parts = []
        for batch in _batches(tiles, _TILE_BATCH):
            levels = [np.full(len(batch), value, np.float32) for value in (noise, scale)]
            parts.append(_make_map(model.params, batch, *levels, local, model.network))
        return _join(parts, len(tiles))

    return tiled_map(make_map, frame, division=division)


def root_mean_square(values: Any, valid: Any) -> np.ndarray:
    """(B,) root mean square of values (B, N, M) over the valid pixels, or the number (B, 1, 1)."""
    square = np.asarray(values, float) ** 2
    if square.shape[1:] == (1, 1):
        return np.sqrt(square[:, 0, 0]).astype(np.float32)
    number = np.maximum(np.asarray(valid).sum((1, 2)), 1)
    mean = np.where(valid, square, 0).sum((1, 2)) / number
    return np.sqrt(np.where(mean > 0, mean, 1)).astype(np.float32)


def _batches(y: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of one shape; the last is filled up with its last row, no frame is left out."""
    missing = -len(y) % size if len(y) else size
    filling = y[-1:] if len(y) else np.ones((1, *y.shape[1:]), y.dtype)
    padded = np.concatenate([y, np.repeat(filling, missing, 0)])
    return np.split(padded, len(padded) // size)


def _join(parts: Any, length: int) -> Any:
    """Put the batches' answers together as NumPy arrays, without the padding."""
    return jax.tree.map(lambda *a: np.concatenate([np.asarray(v) for v in a])[:length], *parts)


def _trained_sigma(weights: Weights) -> tuple[float, ...]:
    """Least and largest width of the PSFs of training, pixels; nothing if there was one only."""
    low, high = weights.metadata.training.get("sigma") or (0.0, 0.0)
    return (low, high) if low < high else ()


def _sees_optics(weights: Weights) -> bool:
    """Whether the network was told the PSF of each frame in training."""
    return weights.metadata.training.get("optics") == "told"


def _separation(weights: Weights, width: np.ndarray) -> float:
    """Least distance of two read-out peaks, pixels: that of the targets in training.

    It grows with the PSF where that varied. A fifth is left for the error of the two centroids.
    """
    least = float(weights.metadata.training.get("separation", 0.5))
    wide = float(np.mean(width) / np.mean(weights.metadata.geometry.sigma))
    share = 0.8 * (wide if _sees_optics(weights) else 1)
    return round(share * least, 2)  # few programs


def _capacity(weights: Weights) -> float | None:
    """Energy of a typical target, counts: the middle of the trained range, if narrow."""
    low, high = weights.metadata.training.get("intensity", (0.0, 1.0))
    return (low + high) / 2 if low > high / 2 else None


def _fill_invalid(y: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Replace NaN and Inf pixels by the mean of the valid pixels around them, or 0."""
    if valid.all():
        return y
    size = (1, 3, 3)
    total = ndimage.uniform_filter(np.where(valid, y, 0), size, mode="constant")
    share = ndimage.uniform_filter(valid.astype(y.dtype), size, mode="constant")
    return np.where(valid, y, total / np.maximum(share, 1 / 18))
