"""Preset: recipes for frames as plain data, without JAX: the command line's help shows them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dscsnet_jax.inference.known import Known

SPLITS = {"train": 0, "val": 1, "test": 2}
_DARK: dict[str, Any] = {"read_noise": 0.0, "pedestal": 0.0, "background": 0.0}


class LightNoise(NamedTuple):
    """Noise that grows with the light.

    Attributes:
      gain: counts of light by their variance, `Sensor.effective_gain`; None: no shot noise.
      misfit: as of `Sensor`.
    """

    gain: Any = None
    misfit: Any = None


@dataclasses.dataclass(frozen=True)
class Sensor:
    """What the detector does to the expected counts; None: not known, where nothing else is said.

    A map has the shape (N, M) of the frames. A simulated frame has none of what is not known.

    Attributes:
      read_noise: standard deviation of additive Gaussian noise, counts; a number, one for
        each frame (B,), a map, or an error plane for each frame (B, N, M), where a NaN or an
        infinity marks a pixel that tells nothing.
      pedestal: electronic offset, counts; it has no noise of its own; as `read_noise`.
      background: photon background, counts, whose shot noise goes by the gain; as `read_noise`.
      gain: electrons per count of the shot noise; None: no shot noise.
      excess_noise: factor by which multiplication in the detector increases the variance of
        the shot noise: 1 for none, 2 for an EMCCD of high gain.
      saturation: largest value a pixel can hold (full well), counts; inf: none; None: that of
        the frames' type.
      quantised: counts are rounded to whole ones; None: where all of a frame's are whole.
      bad_pixels: (N, M) bool, pixels to be left out.
      misfit: standard deviation of a pixel's light from targets, by what is expected of it: of
        a PSF that is not quite the true one, and of pixels that respond not quite alike (PRNU);
        None: none.

    Example:
      >>> Sensor(read_noise=2.0, gain=4.0).effective_gain
      4.0
    """

    read_noise: Any = None
    pedestal: Any = None
    background: Any = None
    gain: Any = None
    excess_noise: Any = 1.0
    saturation: Any = None
    quantised: bool | None = dataclasses.field(default=None, metadata={"static": True})
    bad_pixels: Any = None
    misfit: Any = None

    @property
    def effective_gain(self) -> Any:
        """Counts of light by their variance, 1 / counts; None: no shot noise."""
        return None if self.gain is None else self.gain / self.excess_noise

    @property
    def light_noise(self) -> LightNoise | None:
        """Noise that grows with the light of targets; None: none does."""
        if self.gain is None and self.misfit is None:
            return None
        return LightNoise(self.effective_gain, self.misfit)


def digital(bits: int, **fields: Any) -> Sensor:
    """A sensor that stores whole counts of `bits` bits, saturating at `2^bits - 1`.

    Raises:
      ValueError: if `bits` is not in 1..32.

    Example:
      >>> digital(8).saturation
      255.0
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must lie in 1..32, got {bits}")
    return Sensor(saturation=2.0**bits - 1, quantised=True, **fields)


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
      sigma: PSF standard deviation, pixels; its logarithm is uniform, and distances within a
        cluster grow with it, being those of the cluster at the preset's sigma.
      read_noise: standard deviation, counts; what is drawn below 0 is no noise.
      pedestal: counts.
      least_intensity: lower end of the frame's range of intensities, counts; the upper
        end is the cluster's.
      digital: share of frames recorded with 8 bit; the others are not rounded nor cut.
      empty: share of frames without any target.
      pedestal_error: error of the pedestal that users know, in standard deviations of a pixel.
      noise_error: relative error of the noise that users know.
    """

    sigma: tuple[float, float] = (0.4, 1.0)
    read_noise: tuple[float, float] = (-1.0, 10.0)
    pedestal: tuple[float, float] = (0.0, 20.0)
    least_intensity: tuple[float, float] = (50.0, 220.0)
    digital: float = 0.5
    empty: float = 0.05
    pedestal_error: float = 0.13
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
    sensor: Sensor = dataclasses.field(default_factory=lambda: digital(8, **_DARK))
    frame_size: int = 11
    division: int = 3
    sigma: float | tuple[float, float] = 0.5
    variation: Variation | None = None

    @property
    def known(self) -> Known:
        """All there is to know of its frames; see `inference.known.preset_known`."""
        from dscsnet_jax.inference.known import preset_known

        return preset_known(self)


def presets() -> dict[str, Preset]:
    """All presets by name, at c = 3 and N = 11.

    Example:
      >>> sorted(presets())
      ['csist', 'csist_float', 'csist_noise', 'csist_varied', 'csist_wide']
    """
    plain = Sensor(**_DARK, saturation=float("inf"))
    wide = ClusterModel(intensity=(50.0, 250.0))
    recipes = (
        Preset("csist"),
        Preset("csist_float", sensor=plain),
        Preset("csist_noise", sensor=digital(8, **_DARK | {"read_noise": 5.0, "pedestal": 10.0})),
        Preset("csist_wide", cluster=wide),
        Preset("csist_varied", cluster=wide, variation=Variation()),
    )
    return {p.name: p for p in recipes}
