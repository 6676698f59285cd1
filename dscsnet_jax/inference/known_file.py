"""Known file: the fields of optics, sensor and scene in a JSON, with their units and ranges.

    {"version": 1, "units": {"psf.sigma": "pixel", ...},
     "psf": {"kind": "gaussian", "sigma": 0.5}, "sensor": {...}, "prior": {...}}

What is left out or null is not known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dscsnet_jax.inference.alike import Alike, AnyIntensity
from dscsnet_jax.inference.intensity import Histogram, LogNormal, Uniform
from dscsnet_jax.inference.prior import Poisson, ScenePrior, scene_prior
from dscsnet_jax.io.formats import decode
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian, require
from dscsnet_jax.physics.psf_airy import Airy, airy
from dscsnet_jax.physics.psf_gaussians import (
    GaussianMixture,
    Moffat,
    RotatedGaussian,
    rotated_gaussian,
)
from dscsnet_jax.physics.psf_tables import Empirical, empirical
from dscsnet_jax.physics.sensor import checked

VERSION = 1
"""Of the file; another one is refused."""

_PIXEL, _PER_PIXEL, _COUNT = "pixel", "1 / pixel", "count"


class Kind(NamedTuple):
    """A class of PSFs or of densities in files.

    Attributes:
      cls: the class.
      units: of its fields, which are attributes of that name; empty: none.
      make: one of these fields, checked.
    """

    cls: type
    units: dict[str, str]
    make: Callable[..., Any]


def _gaussian(sigma: Any) -> Gaussian:
    width = np.asarray(sigma)
    right = width.shape in ((), (2,)) and bool(((width > 0) & (width < np.inf)).all())
    require(right, f"sigma must be one or two positive numbers of pixels, got {sigma}")
    return Gaussian(sigma)


def _rotated(sigma: Any, angle: float, num_terms: int | None = None) -> RotatedGaussian:
    psf = rotated_gaussian(tuple(np.ravel(sigma)), angle)
    return psf.replace(sigma=sigma, num_terms=num_terms or psf.num_terms)  # type: ignore[attr-defined]


def _moffat(fwhm: float, beta: float = 2.5) -> Moffat:
    require(0 < fwhm < math.inf, f"fwhm must be a positive number of pixels, got {fwhm}")
    require(1 < beta < math.inf, f"beta must be finite and above 1, got {beta}")
    return Moffat(fwhm, beta)


def _mixture(weight: Any, sigma: Any, offset: Any = None) -> GaussianMixture:
    shape = np.shape(weight)
    right = len(shape) == 1 and np.shape(sigma) in (shape, (*shape, 2))
    require(right and np.shape(offset) in ((), (*shape, 2)), "weights, sigmas and offsets differ")
    positive = all(bool((np.asarray(a) > 0).all()) for a in (weight, sigma))
    require(positive, f"weight and sigma must be positive, got {weight} and {sigma}")
    return GaussianMixture(weight, sigma, offset)


def _airy(
    resolution: float, *, half: int | None = None, over: int | None = None, **given: float
) -> Airy:
    psf = airy(resolution, **given)
    return psf.replace(half=half or psf.half, over=over or psf.over)  # type: ignore[attr-defined]


def _empirical(table: Any, offset: Any, scale: float, over: int) -> Empirical:
    right = np.ndim(table) == 3 and np.shape(table)[0] == 2 and np.shape(offset) == (2,)
    require(right and bool(np.isfinite(table).all()), "table and offset are not those of a PSF")
    require(scale > 0 and over >= 1, f"scale and over must be positive, got {scale} and {over}")
    return Empirical(table, offset, scale, over)


def _from_array(
    array: Any, oversampling: int, centre: Any = None, values: str = "optical"
) -> Empirical:
    """A person's own array: (H, W), or the name of a file beside."""
    place = None if centre is None else tuple(np.ravel(centre))
    return empirical(array, oversampling=oversampling, centre=place, kind=values)


PSF_KINDS = {
    "gaussian": Kind(Gaussian, {"sigma": _PIXEL}, _gaussian),
    "rotated_gaussian": Kind(
        RotatedGaussian, {"sigma": _PIXEL, "angle": "degree", "num_terms": ""}, _rotated
    ),
    "moffat": Kind(Moffat, {"fwhm": _PIXEL, "beta": ""}, _moffat),
    "gaussian_mixture": Kind(
        GaussianMixture, {"weight": "", "sigma": _PIXEL, "offset": _PIXEL}, _mixture
    ),
    "airy": Kind(
        Airy,
        {"resolution": _PIXEL, "jitter": _PIXEL, "obscuration": "", "half": _PIXEL}
        | {"over": _PER_PIXEL},
        _airy,
    ),
    "empirical": Kind(
        Empirical, {"table": "", "offset": _PIXEL, "scale": "", "over": _PER_PIXEL}, _empirical
    ),
    "array": Kind(
        type(None),
        {"array": "", "oversampling": _PER_PIXEL, "centre": "", "values": ""},
        _from_array,
    ),
}
"""PSFs by their kind; one of your own is added here. `array` is read and never written."""

INTENSITY_KINDS = {
    "uniform": Kind(Uniform, {"low": _COUNT, "high": _COUNT}, Uniform),
    "log_normal": Kind(LogNormal, {"log_mean": "log count", "log_std": "log count"}, LogNormal),
    "histogram": Kind(Histogram, {"edges": _COUNT, "share": ""}, Histogram),
    "alike": Kind(Alike, {"log_std": "log count", "scale_log_std": "log count"}, Alike),
    "any": Kind(AnyIntensity, {}, AnyIntensity),
}

SENSOR_UNITS = {
    "read_noise": _COUNT,
    "pedestal": _COUNT,
    "background": _COUNT,
    "gain": "electron / count",
    "excess_noise": "",
    "saturation": _COUNT,
    "quantised": "",
    "bad_pixels": "",
    "misfit": "",
}
PRIOR_UNITS = {
    "separation": _PIXEL,
    "cluster_size": _PIXEL,
    "cluster_offset": _PIXEL,
    "spread": "PSF width",
    "count": "",
    "places": "",
}
_COUNT_KINDS = {"poisson": Kind(Poisson, {"mean": ""}, Poisson)}
_KINDS = {"psf": PSF_KINDS, "prior.intensity": INTENSITY_KINDS, "prior.count": _COUNT_KINDS}
_TRUTH = frozenset({"quantised"})
_WHOLE = frozenset({"num_terms", "half", "over", "oversampling"})
_TEXT = frozenset({"kind", "places", "values", "array"})


def told(psf: Any, sensor: Sensor, prior: ScenePrior) -> dict[str, Any]:
    """The tree of a file.

    Raises:
      ValueError: for a PSF or density of a class that has no kind.
    """
    intensity = _of_kind("prior.intensity", prior.intensity)
    scene = {name: getattr(prior, name) for name in PRIOR_UNITS}
    if isinstance(prior.count, Poisson):
        scene["count"] = _of_kind("prior.count", prior.count)
    elif prior.count is not None:
        scene["count"] = np.asarray(prior.count, float)
    tree = {
        "psf": _of_kind("psf", psf),
        "sensor": {name: getattr(sensor, name) for name in SENSOR_UNITS},
        "prior": {"intensity": intensity, **scene},
    }
    return {"version": VERSION, "units": dict(_units(tree)), **tree}


def read(tree: dict[str, Any], folder: Path) -> tuple[Any, Sensor, ScenePrior]:
    """PSF, sensor and prior of a file's tree.

    Args:
      tree: of the file.
      folder: where it lies, and the arrays that it names.

    Raises:
      ValueError: for an unknown field, another version or unit, or what is out of range;
        names the field.
    """
    _known_fields("the file", tree, ("version", "units", "psf", "sensor", "prior"))
    version = tree.get("version")
    require(
        version == VERSION and version is not True, f"version must be {VERSION}, got {version!r}"
    )
    parts = {name: _object(name, tree.get(name)) for name in ("psf", "sensor", "prior", "units")}
    intensity = _object("prior.intensity", parts["prior"].get("intensity"))
    _known_fields("sensor", parts["sensor"], SENSOR_UNITS)
    _known_fields("prior", parts["prior"], ("intensity", *PRIOR_UNITS))
    for name, unit in _units(parts, every=True):
        got = parts["units"].pop(name, unit)
        require(got == unit, f"the unit of {name} must be {unit!r}, got {got!r}")
    require(not parts["units"], f"units of unknown fields: {', '.join(parts['units'])}")
    for name in ("psf", "sensor", "prior"):
        _check_values(name, parts[name])
    array = parts["psf"].get("array")
    if isinstance(array, str):
        require(Path(array).name == array, f"psf.array must be a file beside, got {array!r}")
        parts["psf"]["array"] = decode(folder / array)[0]
    given = {k: v for k, v in parts["sensor"].items() if not (k == "excess_noise" and v is None)}
    prior = dict(parts["prior"])
    prior["intensity"] = _made("prior.intensity", intensity)
    if isinstance(prior.get("count"), dict):
        prior["count"] = _made("prior.count", prior["count"])
    prior = {name: value for name, value in prior.items() if value is not None}
    return _made("psf", parts["psf"]), checked(Sensor(**given)), scene_prior(**prior)


def _of_kind(where: str, value: Any) -> dict[str, Any] | None:
    """Fields of a PSF or a density, with its kind."""
    if value is None:
        return None
    for name, kind in _KINDS[where].items():
        if type(value) is kind.cls:
            return {"kind": name, **{field: getattr(value, field) for field in kind.units}}
    known = ", ".join(kind.cls.__name__ for kind in _KINDS[where].values())
    raise ValueError(f"{where} of class {type(value).__name__} has no kind; those are {known}")


def _made(where: str, fields: dict[str, Any]) -> Any:
    """The PSF or density of some fields; None of none."""
    if not fields:
        return None
    name = fields.get("kind")
    known = _KINDS[where]
    require(name in known, f"{where}.kind must be one of {', '.join(known)}, got {name!r}")
    kind = known[str(name)]
    given = {k: v for k, v in fields.items() if k != "kind" and v is not None}
    _known_fields(where, given, kind.units)
    needed = [
        p.name for p in inspect.signature(kind.make).parameters.values() if p.default is p.empty
    ]
    missing = [n for n in needed if n in kind.units and n not in given]
    require(not missing, f"{where} of kind {name} lacks {', '.join(missing)}")
    try:
        made = kind.make(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return made.checked() if hasattr(made, "checked") else made


def _units(tree: dict[str, Any], *, every: bool = False) -> Iterator[tuple[str, str]]:
    """Dotted names of the fields that are told and have a unit, or of all, with their units."""
    parts = [("sensor", tree["sensor"], SENSOR_UNITS), ("prior", tree["prior"], PRIOR_UNITS)]
    for where, part in (("psf", tree["psf"]), ("prior.intensity", tree["prior"].get("intensity"))):
        kind = _KINDS[where].get(str((part or {}).get("kind")))
        parts += [(where, part, kind.units)] if kind else []
    for where, part, units in parts:
        for name, unit in units.items():
            if unit and (every or part.get(name) is not None):
                yield f"{where}.{name}", unit


def _object(name: str, value: Any) -> dict[str, Any]:
    """A copy of an object's fields; none of null."""
    value = {} if value is None else value
    require(isinstance(value, dict), f"{name} must be an object {{...}}, got {value!r}")
    return dict(value)


def _known_fields(where: str, given: Any, known: Any) -> None:
    unknown = [name for name in given if name not in known]
    text = f"{where} has no field {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
    require(not unknown, text)


def _check_values(where: str, part: dict[str, Any]) -> None:
    """Numbers, arrays, truth values or null, but where text is asked for."""
    for name, value in part.items():
        if isinstance(value, dict) and f"{where}.{name}" in _KINDS:
            _check_values(f"{where}.{name}", value)
            continue
        text = isinstance(value, str) and name in _TEXT
        truth = isinstance(value, bool) and name in _TRUTH
        number = isinstance(value, int | float | np.ndarray) and not isinstance(value, bool)
        right = value is None or number or text or truth
        require(right, f"{where}.{name} must be a number or a list of them, got {value!r}")
        huge = isinstance(value, int) and abs(value) > 2**53
        require(not huge, f"{where}.{name} is beyond what a number holds, got {value!r}")
        whole = name not in _WHOLE or value is None or (value >= 1 and value % 1 == 0)
        require(whole, f"{where}.{name} must be a positive whole number, got {value!r}")
