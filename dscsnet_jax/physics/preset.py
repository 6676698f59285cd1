"""Preset: recipes for frames as plain data, without JAX: the command line's help shows them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclasses.dataclass(frozen=True)
class Sensor:
    """What the detector does to the expected counts, in the order of the fields.

    Attributes:
      electrons_per_count: gain of the Poisson (shot) noise; None: no shot noise.
      offset: mean of the background added to every pixel, counts.
      read_noise: standard deviation of additive Gaussian noise, counts.
      saturation: largest value a pixel can hold (full well), counts; inf: none.
      quantised: round to whole counts.
    """

    electrons_per_count: float | jax.Array | None = None
    offset: float | jax.Array = 0.0
    read_noise: float | jax.Array = 0.0
    saturation: float | jax.Array = float("inf")
    quantised: bool = dataclasses.field(default=False, metadata={"static": True})


def digital(bits: int, **fields: object) -> Sensor:
    """A sensor that stores whole counts of `bits` bits, saturating at `2^bits - 1`.

    Raises:
      ValueError: if `bits` is not in 1..32.

    Example:
      >>> digital(8).saturation
      255.0
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must lie in 1..32, got {bits}")
    return Sensor(saturation=2.0**bits - 1, quantised=True, **fields)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class ClusterModel:
    """Distribution of one cluster of targets.

    Attributes:
      count_mean, count_std: the count is `round(Normal(mean, std))`, clipped to
        1 .. `max_targets`.
      max_targets: most targets in a cluster, and the slots of the padding.
      margin: the cluster's pixel is uniform over `margin .. N-1-margin` in both axes.
      extent: positions are uniform in `[r0 + extent[0], r0 + extent[1])`, pixels.
      separation: least distance between two targets, pixels.
      intensity: range of the uniform intensity, counts.
    """

    count_mean: float = 3.0
    count_std: float = 1.0
    max_targets: int = 5
    margin: int = 2
    extent: tuple[float, float] = (-0.4, 0.6)
    separation: float = 0.5
    intensity: tuple[float, float] = (220.0, 250.0)


@dataclasses.dataclass(frozen=True)
class Variation:
    """Ranges from which every frame draws conditions of its own, uniformly.

    For weights that shall serve sensors nobody knows in advance.

    Attributes:
      sigma: PSF standard deviation, pixels.
      read_noise: standard deviation, counts; what is drawn below 0 is no noise.
      offset: background, counts.
      least_intensity: lower end of the frame's range of intensities, counts; the upper
        end is the cluster's.
      digital: share of frames recorded with 8 bit; the others are not rounded nor cut.
      empty: share of frames without any target.
      offset_error: error of the offset that users know, in standard deviations of a pixel.
      noise_error: relative error of the noise that users know.
    """

    sigma: tuple[float, float] = (0.45, 0.55)
    read_noise: tuple[float, float] = (-1.0, 10.0)
    offset: tuple[float, float] = (0.0, 20.0)
    least_intensity: tuple[float, float] = (50.0, 220.0)
    digital: float = 0.5
    empty: float = 0.05
    offset_error: float = 0.13
    noise_error: float = 0.1


@dataclasses.dataclass(frozen=True)
class Preset:
    """A whole recipe for frames: targets, optics, sensor and the grid of the truth.

    Attributes:
      name: what users call it.
      cluster: distribution of the targets.
      sensor: what the detector does.
      frame_size: detector pixels per side, `N`.
      division: cells per pixel side of the grid truth, `c`.
      sigma: PSF standard deviation, pixels; a number or (sigma_row, sigma_col).
      variation: conditions that differ from frame to frame; None: all as above.
    """

    name: str
    cluster: ClusterModel = ClusterModel()
    sensor: Sensor = dataclasses.field(default_factory=lambda: digital(8))
    frame_size: int = 11
    division: int = 3
    sigma: float | tuple[float, float] = 0.5
    variation: Variation | None = None


def presets() -> dict[str, Preset]:
    """All presets by name, at c = 3 and N = 11.

    Example:
      >>> sorted(presets())
      ['csist', 'csist_float', 'csist_noise', 'csist_varied', 'csist_wide']
    """
    wide = ClusterModel(intensity=(50.0, 250.0))
    recipes = (
        Preset("csist"),
        Preset("csist_float", sensor=Sensor()),
        Preset("csist_noise", sensor=digital(8, offset=10.0, read_noise=5.0)),
        Preset("csist_wide", cluster=wide),
        Preset("csist_varied", cluster=wide, variation=Variation()),
    )
    return {p.name: p for p in recipes}
