"""Scene: random clusters of point targets per preset, and the frames a sensor records.

The protocol is written from the published facts of the CSIST benchmark: one cluster
a frame, one to five targets within one pixel, no two closer than half a pixel. The
frames are ours, simulated on the fly; they are not the published CSIST-100K set.

Scenes are float32 also where JAX is set to float64: a random number of another type is
another number, and a seed shall name the same frames in every setting.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dscsnet_jax.physics import optics
from dscsnet_jax.physics.preset import SPLITS, ClusterModel, Preset, Variation, presets
from dscsnet_jax.physics.psf import Psf, as_psf
from dscsnet_jax.physics.sensor import Sensor, expose, level, variance
from dscsnet_jax.physics.targets import Targets

_normal = partial(jax.random.normal, dtype=jnp.float32)
_uniform = partial(jax.random.uniform, dtype=jnp.float32)

_ROWS = 64


class Scene(NamedTuple):
    """Simulated frames and their truth.

    Attributes:
      targets: the truth, `Targets` of (B, K, ...).
      frames: (B, N, N) recorded counts.
      level: (B,) counts of a pixel without targets as a user would know them.
      noise: (B,) standard deviation of a pixel as a user would know it, read noise and
        quantisation, counts.
      sigma: (B, 2) standard deviations of the Gaussian PSF alike, along rows and columns, pixels.
    """

    targets: Targets
    frames: jax.Array
    level: jax.Array
    noise: jax.Array
    sigma: jax.Array


def get_preset(name: str, **changes: Any) -> Preset:
    """A preset by name, with changes to it.

    Args:
      name: one of `presets()`.
      **changes: fields of `Preset` (`division`, `frame_size`, `sigma`, ...), of its
        `ClusterModel` (`intensity`, ...) or of its `Sensor` (`read_noise`, ...). A whole
        `cluster` or `sensor` is put in first, then changes to its fields.

    Returns:
      The changed `Preset`.

    Raises:
      ValueError: if the name or a field is unknown, the frame too small for the cluster's
        margin, the range of intensities wrong, or a change would have no effect because
        the preset's variation draws that quantity for every frame.

    Example:
      >>> get_preset("csist_float", division=5, read_noise=1.0).sensor.read_noise
      1.0
    """
    known = presets()
    if name not in known:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(sorted(known))}")
    preset, given = known[name], set(changes)
    parts: dict[str, Any] = {p: changes.pop(p, getattr(preset, p)) for p in ("cluster", "sensor")}
    parts["preset"] = preset
    for field, value in changes.items():
        part = next((p for p, v in parts.items() if field in _field_names(v)), None)
        if part is None or field == "name":
            raise ValueError(f"preset {name!r} has no field {field!r} to change")
        parts[part] = dataclasses.replace(parts[part], **{field: value})
    changed = dataclasses.replace(parts["preset"], cluster=parts["cluster"], sensor=parts["sensor"])
    if changed.frame_size <= 2 * changed.cluster.margin:
        raise ValueError(
            f"frame_size {changed.frame_size} leaves no room inside a margin of "
            f"{changed.cluster.margin} pixels on each side"
        )
    low, high = changed.cluster.intensity
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"intensity: expected 0 <= low <= high < inf, got {low} .. {high}")
    if changed.variation is not None:
        _check_variation(changed, changed.variation, given, preset.cluster.intensity[0])
    return changed


def frame_keys(seed: int, split: str, index: ArrayLike) -> jax.Array:
    """PRNG keys of the frames of a split.

    Every frame has its own key, so frames do not depend on how they are batched or
    spread over devices, and the splits of one seed never share a key.

    Args:
      seed: the data set's seed.
      split: `train`, `val` or `test`.
      index: (B,) numbers of the frames within the split.

    Returns:
      (B,) PRNG keys.

    Raises:
      ValueError: if the split is unknown.

    Example:
      >>> frame_keys(0, "test", jnp.arange(4)).shape
      (4,)
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    base = jax.random.fold_in(jax.random.key(seed), SPLITS[split])
    return jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.asarray(index))


def sample_targets(
    cluster: ClusterModel, frame_size: int, key: jax.Array, scale: ArrayLike = 1.0
) -> Targets:
    """Draw the targets of one frame (use `jax.vmap` for more).

    Args:
      cluster: distribution of the targets.
      frame_size: detector pixels per side, `N`.
      key: PRNG key of the frame.
      scale: of the distances within the cluster.

    Returns:
      Unbatched `Targets` with `cluster.max_targets` slots.

    Example:
      >>> t = sample_targets(ClusterModel(), 11, jax.random.key(0))
      >>> t.position.shape
      (5, 2)
    """
    place_key, count_key, pixel_key, intensity_key = jax.random.split(key, 4)
    slots = cluster.max_targets
    drawn = jnp.round(cluster.count_mean + cluster.count_std * _normal(count_key))
    wanted = jnp.clip(drawn, 1, slots).astype(jnp.int32)
    last = frame_size - 1 - cluster.margin
    pixel = jax.random.randint(pixel_key, (2,), cluster.margin, last + 1, jnp.int32)
    offset, possible = _place(place_key, slots, cluster.separation, *cluster.extent)
    mask = (jnp.arange(slots) < wanted) & possible
    intensity = _uniform(
        intensity_key, (slots,), minval=cluster.intensity[0], maxval=cluster.intensity[1]
    )
    return Targets(
        position=jnp.where(mask[:, None], pixel[None] + scale * offset, 0),
        intensity=jnp.where(mask, intensity, 0),
        mask=mask,
    )


def simulate(preset: Preset, keys: jax.Array, psf: Psf | None = None) -> Scene:
    """Simulate frames: scene -> optics -> sensor, vectorised over frames.

    Args:
      preset: the recipe.
      keys: (B,) PRNG keys, one per frame (see `frame_keys`).
      psf: of the optics, if not the preset's Gaussian; not for presets that vary it.

    Returns:
      A `Scene` of B frames.

    Raises:
      ValueError: if a PSF is given for a preset that varies it.

    Example:
      >>> scene = simulate(get_preset("csist"), frame_keys(0, "train", jnp.arange(2)))
      >>> scene.frames.shape, float(scene.frames.max()) <= 255.0
      ((2, 11, 11), True)
    """
    if psf is not None and preset.variation is not None:
        raise ValueError(f"{preset.name} draws the PSF of every frame: none can be given")

    def one(key: jax.Array) -> Scene:
        target_key, sensor_key = jax.random.split(key)
        if preset.variation is not None:
            return _varied(preset, preset.variation, target_key, sensor_key)
        targets = sample_targets(preset.cluster, preset.frame_size, target_key)
        seen_by = as_psf(preset.sigma if psf is None else psf)
        expected = optics.render(targets, frame_size=preset.frame_size, psf=seen_by)
        frame = expose(preset.sensor, sensor_key, expected)
        noise = jnp.sqrt(variance(preset.sensor, jnp.float32(0)))
        width = jnp.asarray(seen_by.width, jnp.float32)
        return Scene(targets, frame, level(preset.sensor, noise), noise, width)

    return jax.vmap(one)(keys)


def _varied(preset: Preset, varied: Variation, target_key: jax.Array, key: jax.Array) -> Scene:
    """One frame under conditions of its own; its cluster is as wide as its PSF asks for."""
    condition_key, error_key, sensor_key = jax.random.split(key, 3)
    share = _uniform(condition_key, (6,))

    def between(index: int, low_high: tuple[float, float]) -> jax.Array:
        return low_high[0] + (low_high[1] - low_high[0]) * share[index]

    sigma = varied.sigma[0] * (varied.sigma[1] / varied.sigma[0]) ** share[4]
    wide = sigma / np.float32(np.mean(preset.sigma))
    targets = sample_targets(preset.cluster, preset.frame_size, target_key, wide)
    low, high = preset.cluster.intensity
    least = between(0, varied.least_intensity)
    intensity = least + (targets.intensity - low) * (high - least) / (high - low)
    mask = targets.mask & (share[1] >= varied.empty)
    targets = Targets(
        jnp.where(mask[:, None], targets.position, 0), jnp.where(mask, intensity, 0), mask
    )
    plain = Sensor(
        pedestal=between(2, varied.pedestal),
        read_noise=jnp.maximum(between(3, varied.read_noise), 0),
    )
    expected = optics.render(targets, frame_size=preset.frame_size, psf=sigma)
    eight_bit = dataclasses.replace(plain, saturation=255.0, quantised=True)
    is_digital = share[5] < varied.digital
    frame = jnp.where(
        is_digital, expose(eight_bit, sensor_key, expected), expose(plain, sensor_key, expected)
    )
    none = jnp.float32(0)
    noise = jnp.sqrt(jnp.where(is_digital, variance(eight_bit, none), variance(plain, none)))
    error = _normal(error_key, (2,))
    return Scene(
        targets,
        frame,
        plain.pedestal + varied.pedestal_error * noise * error[0],
        noise * jnp.exp(varied.noise_error * error[1]),
        jnp.broadcast_to(sigma, (2,)),
    )


def _check_variation(preset: Preset, varied: Variation, given: set[str], own_low: float) -> None:
    """Refuse changes that the variation would silently overrule."""
    overruled = given & {"sensor", *_field_names(preset.sensor)}
    low, high = preset.cluster.intensity
    if "variation" not in given:
        # With a variation of one's own, sigma is what the operator is built for.
        overruled |= given & {"sigma"}
        overruled |= {"intensity's lower end"} if low != own_low else set()
    if overruled:
        raise ValueError(
            f"preset {preset.name!r} draws the conditions of every frame by itself: "
            f"{', '.join(sorted(overruled))} cannot be set"
        )
    if not max(low, varied.least_intensity[1]) <= high or low == high:
        raise ValueError(
            f"preset {preset.name!r} draws the lower end of the intensities from "
            f"{varied.least_intensity[0]} .. {varied.least_intensity[1]}; the upper end must lie "
            f"above, got {high}"
        )


def _field_names(instance: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(instance)}


def _place(
    key: jax.Array, slots: int, separation: float, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """Places of up to `slots` targets, one after the other, each uniform over what is free.

    Drawing until a draw keeps its distance is uniform over the free area. We reach the
    same distribution without a loop of unknown length: a lattice of `_ROWS` x 32
    points, shifted at random for each target, covers the square evenly, and one of its
    free points is chosen at random. Once no point is free the other targets are dropped.

    Returns (slots, 2) places and (slots,) whether each could be placed.
    """
    uniform = _uniform(key, (slots, 4))
    radius = separation / (high - low)
    placed, possible = [uniform[0, :2]], [jnp.array(True)]
    for slot in range(1, slots):
        row = (jnp.arange(_ROWS) + uniform[slot, 0]) / _ROWS
        shift = uniform[slot, 1]
        free = ~_covered(row, shift, jnp.stack(placed), radius)
        last = _running_sum(jax.lax.population_count(free))
        chosen_row = (last <= jnp.floor(uniform[slot, 2] * last[-1])).sum()
        bits = jnp.where(jnp.arange(_ROWS) == chosen_row, free, 0).sum(dtype=jnp.uint32)
        last_bit = _running_sum((bits >> jnp.arange(32, dtype=jnp.uint32)) & 1)
        chosen_col = (last_bit <= jnp.floor(uniform[slot, 3] * last_bit[-1])).sum()
        placed.append(
            jnp.stack([(chosen_row + uniform[slot, 0]) / _ROWS, (chosen_col + shift) / 32])
        )
        possible.append(possible[-1] & (last[-1] > 0))
    return low + (high - low) * jnp.stack(placed), jnp.stack(possible)


def _covered(row: jax.Array, shift: jax.Array, centres: jax.Array, radius: float) -> jax.Array:
    """Which of 32 lattice points a row lie within `radius` of a centre, one bit a point.

    The points of a row of height `row` have columns `(b + shift) / 32`, b = 0..31.
    Returns (rows,) uint32.
    """
    reach2 = radius**2 - (row[:, None] - centres[None, :, 0]) ** 2
    reach = jnp.sqrt(jnp.maximum(reach2, 0))
    first = jnp.ceil(32 * (centres[None, :, 1] - reach) - shift).clip(0, 32)
    last = jnp.floor(32 * (centres[None, :, 1] + reach) - shift).clip(-1, 31)
    inside = (reach2 > 0) & (first <= last)
    ones = jnp.uint32(0xFFFFFFFF)
    above = ones << jnp.minimum(first, 31).astype(jnp.uint32)
    below = ones >> (31 - jnp.maximum(last, 0)).astype(jnp.uint32)
    bits = jnp.where(inside, above & below, 0)
    return jax.lax.reduce(bits, np.uint32(0), jax.lax.bitwise_or, (1,))


def _running_sum(values: jax.Array) -> jax.Array:
    """Cumulative sum of a short vector of small counts, as one product with a triangle."""
    triangle = np.tri(len(values), dtype=np.float32)
    return jnp.dot(triangle, values.astype(jnp.float32), precision="highest")
