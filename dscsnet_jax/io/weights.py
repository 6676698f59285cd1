"""Weights: released parameters as safetensors with a JSON file of metadata beside them.

The geometry the parameters were trained for (pixels per side, cells per pixel, PSF
width) travels with them, and so do checksums of both files. Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from dscsnet_jax.io.formats import refuse_pickle
from dscsnet_jax.io.outputs import prepare_output, replacing
from dscsnet_jax.physics.optics import SensingOperator

FORMAT_VERSION = 1
_SUFFIX = ".safetensors"
_SEPARATOR = "/"
_SIGMA_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Geometry:
    """What the parameters were trained to look at.

    Attributes:
      frame_size: (N, M) detector pixels in training; other sizes are allowed later.
      division: cells per pixel side, `c`.
      sigma: PSF standard deviation (row, col), pixels.
    """

    frame_size: tuple[int, int]
    division: int
    sigma: tuple[float, float]


@dataclass(frozen=True)
class Metadata:
    """What a set of weights is, where it comes from and how well it did.

    All values are plain JSON ones; a tuple inside a dict comes back as a list.

    Attributes:
      method: name of the network.
      config: the network's fields.
      geometry: the `Geometry` of training.
      score: measured scores by name.
      training: free notes on the training.
      package_version: version of this package that wrote the file.
      format_version: version of the file format.
    """

    method: str
    config: dict[str, Any]
    geometry: Geometry
    score: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    package_version: str = field(default_factory=lambda: _package_version())
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class Weights:
    """Parameters and their metadata.

    Attributes:
      params: nested dict of NumPy arrays.
      metadata: the `Metadata`.
    """

    params: dict[str, Any]
    metadata: Metadata


def geometry_of(operator: SensingOperator) -> Geometry:
    """The geometry of a sensing operator.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> geometry_of(sensing_operator(11, division=3, psf=0.5))
      Geometry(frame_size=(11, 11), division=3, sigma=(0.5, 0.5))
    """
    # The shortest number that is this float32: 0.7, not 0.699999988079071.
    row, col = (float(str(value)) for value in np.asarray(operator.psf.width))
    return Geometry(operator.frame_shape, operator.division, (row, col))


def check_geometry(metadata: Metadata, operator: SensingOperator) -> None:
    """Refuse an operator the weights were not trained for.

    The frame's size is free. Call it outside of `jit`: it looks at numbers.

    Args:
      metadata: the weights' metadata.
      operator: the operator they are to be used with.

    Raises:
      ValueError: if the cells per pixel or the PSF width (relative 1e-6) differ.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> trained = Metadata("dscsnet", {}, Geometry((11, 11), 3, (0.5, 0.5)))
      >>> check_geometry(trained, sensing_operator(20, division=5, psf=0.5))
      Traceback (most recent call last):
      ValueError: the dscsnet weights were trained for division 3, sigma (0.5, 0.5); the
      operator has division 5, sigma (0.5, 0.5)
    """
    trained, given = metadata.geometry, geometry_of(operator)
    same_psf = np.allclose(trained.sigma, given.sigma, rtol=_SIGMA_TOLERANCE, atol=0)
    if trained.division != given.division or not same_psf:
        raise ValueError(
            f"the {metadata.method} weights were trained for division {trained.division}, sigma "
            f"{trained.sigma}; the operator has division {given.division}, sigma {given.sigma}"
        )


def save_weights(
    path: str | Path, params: Mapping[str, Any], metadata: Metadata, *, force: bool = False
) -> None:
    """Write parameters to `NAME.safetensors` and metadata to `NAME.json`.

    Args:
      path: file with the suffix `.safetensors`.
      params: nested dict of arrays; keys are text without `/`.
      metadata: the `Metadata`.
      force: replace existing files.

    Raises:
      FileExistsError: if a file exists and `force` is false.
      OSError: if the files cannot be written.
      ValueError: if the suffix, a key, a leaf or a value of the metadata cannot be stored.

    Example:
      >>> import tempfile
      >>> about = Metadata("dscsnet", {"K": 4}, Geometry((11, 11), 3, (0.5, 0.5)))
      >>> with tempfile.TemporaryDirectory() as home:
      ...     save_weights(f"{home}/w.safetensors", {"conv": {"bias": np.ones(2)}}, about)
      ...     weights = load_weights(f"{home}/w.safetensors")
      >>> weights.params, weights.metadata == about
      ({'conv': {'bias': array([1., 1.])}}, True)
    """
    path, side = _pair(path)
    tensors = save(dict(_flatten(params)))
    try:
        about = json.loads(json.dumps(dataclasses.asdict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata for {path}: expected plain JSON values ({error})") from error
    sums = {"tensors": _digest(tensors), "metadata": _digest(_canonical(about))}
    for output in (path, side):
        prepare_output(output, force=force)
    with replacing(path) as partial, replacing(side) as partial_side:
        partial.write_bytes(tensors)
        partial_side.write_text(json.dumps({**about, "sha256": sums}, indent=2) + "\n", "utf-8")


def load_weights(path: str | Path) -> Weights:
    """Read weights written by `save_weights`, checking both files against their sums.

    Args:
      path: file with the suffix `.safetensors`; its `.json` lies beside it.

    Returns:
      The `Weights`, as NumPy arrays of the stored types.

    Raises:
      FileNotFoundError: if one of the two files is missing.
      ValueError: if the file is of another kind (pickles are refused), of a newer format,
        truncated or altered.

    Example:
      >>> load_weights(packaged_weights("csist_c3")).metadata.method
      'dscsnet'
    """
    path, side = _pair(path)
    for file in (path, side):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; weights are {path.name} + {side.name}")
    try:
        about = json.loads(side.read_bytes())
        version, sums = about["format_version"], about.pop("sha256")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {FORMAT_VERSION} expected, got {version!r}")
        expected = {"tensors": str(sums["tensors"]), "metadata": str(sums["metadata"])}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{side}: not metadata of weights ({error!r})") from error
    tensors = path.read_bytes()
    for file, part, content in ((path, "tensors", tensors), (side, "metadata", _canonical(about))):
        if _digest(content) != expected[part]:
            raise ValueError(f"{file}: truncated or altered (its SHA-256 is not the one stored)")
    geometry = Geometry(**{k: _tuple(v) for k, v in about.pop("geometry").items()})
    return Weights(_nest(load(tensors)), Metadata(geometry=geometry, **about))


def packaged_weights(name: str = "csist_c3") -> Path:
    """Path of weights released with the package.

    Args:
      name: stem of the file, e.g. `csist_c3`.

    Returns:
      Path to hand to `load_weights`.

    Raises:
      FileNotFoundError: if there are none of that name; the message lists the others.
    """
    found = packaged()
    if name not in found:
        available = ", ".join(found) or "none"
        raise FileNotFoundError(f"no packaged weights {name!r}; available: {available}")
    return found[name]


def packaged() -> dict[str, Path]:
    """Weights released with the package: their files by name.

    Example:
      >>> sorted(packaged())
      ['csist_c3', 'varied_c3']
    """
    home = Path(str(resources.files("dscsnet_jax") / "pretrained"))
    return {path.stem: path for path in sorted(home.glob(f"*{_SUFFIX}"))}


def _package_version() -> str:
    # Imported late: the package's own front page may import this room.
    from dscsnet_jax import __version__

    return __version__


def _pair(path: str | Path) -> tuple[Path, Path]:
    """The tensors' file and the metadata's."""
    path = Path(path)
    refuse_pickle(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"{path}: expected the suffix {_SUFFIX}, got {path.suffix!r}")
    return path, path.with_suffix(".json")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(about: Mapping[str, Any]) -> bytes:
    """The one spelling of the metadata that its checksum is taken of."""
    return json.dumps(about, sort_keys=True).encode()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Leaves of a nested dict under names joined by `/`."""
    if not tree:
        raise ValueError(f"params: {prefix or 'the tree'} is empty and cannot be stored")
    for key, value in tree.items():
        if not isinstance(key, str) or not key or _SEPARATOR in key:
            raise ValueError(f"params: expected keys of text without '/', got {prefix}{key!r}")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}{_SEPARATOR}")
        elif hasattr(value, "dtype") and np.dtype(value.dtype).kind in "biuf":
            yield f"{prefix}{key}", np.array(value, order="C")
        else:
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"params: {prefix}{key}: expected an array of numbers, got {kind}")


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(_SEPARATOR)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
