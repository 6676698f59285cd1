"""Plain: nested dicts of numbers, text and arrays as JSON that a person can read and edit.

Arrays of more than some numbers go into an NPZ file beside it, each with the digest of its
content: a JSON never answers with the arrays of another one. An infinity is the text "inf".
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dscsnet_jax.io.outputs import replacing

_INLINE = 64  # numbers
_BROKEN = (KeyError, OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def write_plain(path: str | Path, tree: dict[str, Any]) -> None:
    """Write nested dicts as JSON; the files appear at the end, whole.

    Args:
      path: the .json file; arrays go to the .npz of the same name.
      tree: dicts of dicts, numbers, text, None and arrays.

    Raises:
      ValueError: for another suffix.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as home:
      ...     write_plain(f"{home}/a.json", {"b": {"c": 2.0}, "d": np.arange(100)})
      ...     read_plain(f"{home}/a.json")["d"].sum()
      np.int64(4950)
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: expected the suffix .json, got {path.suffix!r}")
    beside, arrays = path.with_suffix(".npz"), {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: plain(item, f"{name}.{key}".lstrip(".")) for key, item in value.items()}
        if value is None or isinstance(value, str | bool | int):
            return value
        array = np.asarray(value)
        if array.size <= _INLINE and not (np.isnan(array) | (array == -np.inf)).any():
            return _listed(array.tolist())
        arrays[name] = array
        return {"file": beside.name, "name": name, "sha256": _digest(array)}

    text = json.dumps(plain(tree, ""), indent=2, allow_nan=False)
    if arrays:
        with replacing(beside) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    with replacing(path) as partial:
        partial.write_text(_short_lists(text) + "\n", encoding="utf-8")


def read_plain(path: str | Path) -> dict[str, Any]:
    """Read what `write_plain` wrote, or a person; lists become arrays.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no JSON, or its arrays are missing, damaged or those of another file.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is no JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: no JSON so deeply nested is read") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected an object {{...}}, got {type(tree).__name__}")
    return {key: _rich(value, path, key) for key, value in tree.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object, none of them twice."""
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"field {', '.join(sorted(twice))} is there twice")
    return dict(pairs)


def _rich(value: Any, path: Path, name: str) -> Any:
    if isinstance(value, dict) and value.keys() == {"file", "name", "sha256"}:
        return _array(value, path, name)
    if isinstance(value, dict):
        return {key: _rich(item, path, f"{name}.{key}") for key, item in value.items()}
    if value == "inf":
        return math.inf
    if isinstance(value, list):
        try:
            array = np.array([_infinite(item) for item in value])
        except ValueError:
            array = np.array(None)
        if array.dtype.kind not in "bif":
            raise ValueError(f"{path}: {name} must be a list of numbers, all rows of one length")
        return array
    return value


def _array(told: dict[str, Any], path: Path, name: str) -> np.ndarray:
    """An array of the file beside, which must be as it was written."""
    if not all(isinstance(value, str) for value in told.values()):
        raise ValueError(f"{path}: {name} must tell file, name and sha256 as text")
    if Path(told["file"]).name != told["file"]:
        raise ValueError(f"{path}: {name} must be in a file beside it, got {told['file']!r}")
    beside = path.with_name(told["file"])
    try:
        with beside.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            array = arrays[told["name"]]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {name} is in {beside}, which is missing") from error
    except _BROKEN as error:
        raise ValueError(f"{path}: {name} cannot be read from {beside} ({error})") from error
    if _digest(array) != told["sha256"]:
        raise ValueError(f"{path}: {name} in {beside} is not what was written with this file")
    return array


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _listed(value: Any) -> Any:
    if isinstance(value, list):
        return [_listed(item) for item in value]
    return "inf" if value == math.inf else value


def _infinite(value: Any) -> Any:
    if isinstance(value, list):
        return [_infinite(item) for item in value]
    return math.inf if value == "inf" else value


def _short_lists(text: str) -> str:
    """The lists of numbers each on one line."""
    parts: list[str] = []
    depth = 0
    for line in text.split("\n"):
        bare = line.strip()
        if depth:
            parts[-1] += bare
        else:
            parts.append(line)
        depth += bare.endswith("[") - bare.startswith("]")
        parts[-1] += " " if depth and bare.endswith(",") else ""
    return "\n".join(parts)
