"""Torch checkpoint: arrays of a PyTorch `.pth` file, read without PyTorch and without code.

A file of `torch.save` is a zip archive: `NAME/data.pkl`, a pickle that describes tensors,
and their numbers as raw bytes in `NAME/data/KEY`. A pickle can run any code by the names it
calls; here a name is answered by a stand-in that can only describe a tensor or a mapping, by
one that does nothing (what training tools keep beside the tensors), or refused.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from scipy.io import loadmat

_ZIP_SIGNATURE = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 2**26
_MAX_ARRAY_BYTES = 2**31
_TYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_REBUILD = ("_rebuild_tensor_v2", "_rebuild_parameter")
# What mmengine and NumPy leave beside the tensors (logs, random states): named, not made.
_SKIPPED_ROOMS = ("mmengine.", "numpy.")
_SKIPPED = frozenset(
    {
        "_codecs.encode",
        "__builtin__.set",  # as torch.save spells it: pickle protocol 2
        "builtins.set",
        "collections.defaultdict",
        "collections.deque",
    }
)
_AS_STATE = (
    "PyTorch can make a file of plain tensors of it: torch.save(torch.load(FILE, "
    "weights_only=True)['state_dict'], NEW), or weights_only=False if you trust the file"
)


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch state dict, saved alone or as `state_dict` in a dict.

    Nothing in the file is executed. Other things in it, as the logs and the optimizer's
    state that mmengine stores, are skipped.

    Args:
      path: a file of `torch.save` in its zip format, the default since PyTorch 1.6.

    Returns:
      Arrays by name, in the file's order and types (bfloat16 as float32).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is of another kind, truncated or altered, names something
        that is neither a tensor nor known to be skipped, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(_ZIP_SIGNATURE)) != _ZIP_SIGNATURE:
            raise ValueError(
                f"{path}: not in the zip format of torch.save (since PyTorch 1.6); older files "
                "are plain pickles and refused; " + _AS_STATE
            )
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive).state()
    # What damaged or hostile pickles raise is not limited to UnpicklingError.
    except Exception as error:
        raise ValueError(f"{path}: {error or type(error).__name__}") from error


def read_initial_matrix(path: str | Path) -> np.ndarray:
    """Read the initial matrix `Q` that the published networks start from, `x = Q y`.

    Args:
      path: a MATLAB file (version 7 or older) that holds `Qinit`, or a `.npy` file.

    Returns:
      (cN cM, N M) matrix as stored.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds no such matrix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
        else:
            matrix = loadmat(path, variable_names=["Qinit"])["Qinit"]
    except Exception as error:  # the decoders raise what they like on damaged files
        raise ValueError(f"{path}: not a MATLAB file of version 7 with Qinit ({error})") from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise ValueError(f"{path}: expected a matrix of numbers, got shape {matrix.shape}")
    return matrix


@dataclass(frozen=True)
class _Storage:
    """Numbers of an array in the archive, not read yet."""

    kind: str
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    """An array as a view of a storage, not read yet; nothing of it is checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Archive:
    """A zip archive of `torch.save`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.left = archive, _MAX_ARRAY_BYTES
        found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("a zip archive, but not one of torch.save: no data.pkl in it")
        self.home = found[0].removesuffix("data.pkl")

    def state(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        if f"{self.home}byteorder" in self.archive.namelist():
            order = self.member("byteorder", 16)
            if order != b"little":
                raise ValueError(f"expected byte order little, got {order!r}")
        content = _Unpickler(io.BytesIO(self.member("data.pkl", _MAX_PICKLE_BYTES))).load()
        tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
        if not isinstance(tensors, Mapping) or not tensors:
            raise ValueError("expected a dict of tensors by name, or one as 'state_dict'")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise ValueError(f"expected tensors by name, got something else as {name!r}")
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in tensors.items():
            try:
                arrays[name] = self.array(tensor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return arrays

    def member(self, name: str, limit: int) -> bytes:
        """Content of a member, if it is no larger than that."""
        info = self.archive.getinfo(f"{self.home}{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename}: compressed; torch.save does not compress")
        if info.file_size > limit:
            raise ValueError(f"{info.filename}: {info.file_size} bytes, more than {limit}")
        return self.archive.read(info)

    def array(self, tensor: _Tensor) -> np.ndarray:
        """Read a tensor, after a check that it lies within its storage."""
        storage = tensor.storage
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        offset, *_ = numbers = _whole(tensor.offset, *_sequence(tensor.shape))
        shape, strides = numbers[1:], _whole(*_sequence(tensor.strides))
        if len(shape) != len(strides):
            raise ValueError(f"shape {tensor.shape} and strides {tensor.strides} do not fit")
        bfloat = storage.kind == "bf16"
        dtype = np.dtype("<u2" if bfloat else "<" + storage.kind)
        # Strides of 0, and many views of one storage, can make a small file huge arrays.
        self.left -= math.prod(shape) * dtype.itemsize
        if self.left < 0:
            raise ValueError(f"more than {_MAX_ARRAY_BYTES} bytes of arrays are refused")
        flat = np.frombuffer(self.member(f"data/{storage.key}", _MAX_ARRAY_BYTES), dtype)
        if flat.size != storage.size:
            raise ValueError(f"expected {storage.size} numbers, the file has {flat.size}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= flat.size:
            raise ValueError(f"reaches beyond its {flat.size} numbers")
        steps = [step * dtype.itemsize for step in strides]
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
        if bfloat:
            return (view.astype(np.uint32) << 16).view(np.float32)
        return view.copy()


class _Unpickler(pickle.Unpickler):
    """Reads what describes tensors; every name it may call is answered here."""

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in of a name."""
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in _REBUILD:
            return _Callable(_tensor if name == _REBUILD[0] else _parameter)
        if module == "torch" and name in _TYPES:
            return _Callable(_refuse_call, _TYPES[name])
        if module == "torch" and name == "Size":
            return _Callable(tuple)
        if full in _SKIPPED or module.partition(".")[0] + "." in _SKIPPED_ROOMS:
            # A type of its own: whatever the pickle does to it stays there.
            return type("Skipped", (_Skipped,), {"__slots__": ()})
        raise ValueError(
            f"the pickle calls {full}, which is neither a tensor nor known to be harmless, and "
            f"is refused: calling it could run any code; {_AS_STATE}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage in the archive: ('storage', type, key, device, numbers)."""
        _, kind, key, _, size = pid
        if not isinstance(kind, _Callable) or kind.kind is None or not isinstance(key, str):
            raise ValueError(f"a storage of a type that is not known: {pid!r}")
        return _Storage(kind.kind, key, _whole(size)[0])


class _Callable:
    """What a name stands for: a function, and nothing that a pickle can change."""

    __slots__ = ("function", "kind")
    function: Callable[..., Any]
    kind: str | None

    def __init__(self, function: Callable[..., Any], kind: str | None = None) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "kind", kind)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_call()


class _Skipped:
    """Takes whatever a pickle hands to an object and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Skipped:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Keep nothing."""

    def extend(self, items: Any) -> None:
        """Keep nothing."""


def _refuse_call(*args: Any) -> NoReturn:
    raise ValueError("the pickle treats a type of numbers as a function")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _sequence(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError(f"expected a tuple of whole numbers, got {value!r}")
    return value


def _whole(*values: Any) -> list[int]:
    """Numbers that are whole and not negative."""
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"expected whole numbers, not negative, got {value!r}")
    return list(values)
