"""Known: all that is known before a frame is seen: optics, sensor and scene."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np

from dscsnet_jax.inference import known_file
from dscsnet_jax.inference.alike import AnyIntensity
from dscsnet_jax.inference.prior import Poisson, ScenePrior, preset_prior, weak_prior
from dscsnet_jax.io.plain import read_plain, write_plain
from dscsnet_jax.physics.preset import LightNoise, Preset, Sensor
from dscsnet_jax.physics.psf import as_psf, require, with_both_widths
from dscsnet_jax.physics.sensor import PER_PIXEL, checked


@flax.struct.dataclass
class Known:
    """What is known before a frame is seen; what is not given is not assumed.

    Attributes:
      psf: of the optics, a `physics.psf.Psf`; a number or a pair are the widths of a Gaussian
        one, pixels; None: not known.
      sensor: the detector.
      prior: of the scene.

    Example:
      >>> Known(psf=0.5, sensor=Sensor(read_noise=2.0)).sensor.read_noise
      2.0
    """

    psf: Any = None
    sensor: Sensor = Sensor()
    prior: ScenePrior = ScenePrior()

    @property
    def effective_gain(self) -> Any:
        """`Sensor.effective_gain`: counts of light by their variance; None: no shot noise."""
        return self.sensor.effective_gain

    @property
    def light_noise(self) -> LightNoise | None:
        """`Sensor.light_noise`: what the light of targets adds to the noise."""
        return self.sensor.light_noise

    def checked(self, shape: tuple[int, int, int] | None = None) -> Known:
        """Itself, if it can be.

        Args:
          shape: (B, N, M) of the frames it shall be of; None: any.

        Raises:
          ValueError: for a number out of its range, or a map of another shape; names the field.
        """
        if self.psf is not None:
            width = np.asarray(as_psf(self.psf).width)
            right = bool((np.isfinite(width) & (width > 0)).all())
            require(right, f"the PSF must have positive parameters, got {self.psf}")
        checked(self.sensor, shape)
        return self

    def of_frames(self, first: int, last: int) -> Known:
        """What is known of some of the frames: of numbers and planes of each frame, theirs."""
        fields = {name: getattr(self.sensor, name) for name in PER_PIXEL}
        some = {name: v[first:last] for name, v in fields.items() if np.ndim(v) in (1, 3)}
        return dataclasses.replace(self, sensor=dataclasses.replace(self.sensor, **some))

    def of_any_count(self) -> Known:
        """The same, but for the probabilities of the counts."""
        return dataclasses.replace(self, prior=dataclasses.replace(self.prior, count=None))

    def of_parts(self) -> Known:
        """What is known of parts of a cluster: their counts only if targets do not know others."""
        return self if isinstance(self.prior.count, Poisson) else self.of_any_count()

    def for_windows(self) -> Known:
        """What an `Observation` does not hold, as float32: all that programs of windows ask for.

        They are then compiled once, whatever else of a sensor is known.
        """
        prior = self.prior
        if isinstance(prior.intensity, AnyIntensity):
            prior = dataclasses.replace(prior, intensity=None)
        psf = with_both_widths(as_psf(self.psf))
        psf = jax.tree.map(lambda a: np.asarray(a, np.float32), psf)
        light = {"gain": self.effective_gain, "misfit": self.sensor.misfit}
        return Known(psf, Sensor(**jax.tree.map(np.float32, light)), prior)

    def with_weak_prior(self) -> Known:
        """The same; where no intensities are told, with what is assumed then (`weak_prior`)."""
        return dataclasses.replace(self, prior=weak_prior(self.prior))

    def to_json(self, path: str | Path) -> None:
        """Write a JSON file that a person can read and edit (`known_file`), and an NPZ beside it.

        The second one only if there are large arrays. What is there is replaced.

        Raises:
          ValueError: for a PSF or density of a class that has no kind in files.

        Example:
          >>> import tempfile
          >>> with tempfile.TemporaryDirectory() as home:
          ...     Known(psf=0.5).to_json(f"{home}/sensor.json")
          ...     Known.from_json(f"{home}/sensor.json").psf
          Gaussian(sigma=0.5)
        """
        psf = None if self.psf is None else as_psf(self.psf)
        write_plain(path, known_file.told(psf, self.sensor, self.prior))

    @classmethod
    def from_json(cls, path: str | Path) -> Known:
        """Read such a file. What it does not tell is not known; units may be left out.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: for an unknown field, another version or unit, what is out of range, or
            arrays that are missing or do not belong to it; names file and field.
        """
        tree = read_plain(path)
        try:
            return cls(*known_file.read(tree, Path(path).parent)).checked()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def preset_known(preset: Preset) -> Known:
    """All there is to know of a preset's scenes and sensor; also `preset.known`.

    Raises:
      ValueError: if the preset's conditions differ from frame to frame.

    Example:
      >>> from dscsnet_jax.physics.preset import presets
      >>> presets()["csist_noise"].known.sensor.pedestal
      10.0
    """
    if preset.variation is not None:
        raise ValueError(f"every frame of {preset.name} has a sensor of its own")
    return Known(as_psf(preset.sigma), preset.sensor, preset_prior(preset))
