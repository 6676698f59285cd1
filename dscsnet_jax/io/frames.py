"""Frames: users' arrays, files and folders to batches of detector frames."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from dscsnet_jax.io.formats import SUFFIXES, decode

_EXACT_INTEGER = 2**53


@dataclass(frozen=True, eq=False)
class FrameStack:
    """Frames of one size with their names.

    Attributes:
      names: per frame the file's name, or `name.npy[index]` for one of an array or stack.
      frames: (B, N, M) float32 or float64 counts.
      full_well: counts at which the frames' type saturates; see `full_well`.
    """

    names: tuple[str, ...]
    frames: np.ndarray
    full_well: float = float("inf")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def kind(self) -> str:
        """What all frames of a stack have in common, in words."""
        limit = "" if self.full_well == float("inf") else f" up to {self.full_well:.0f} counts"
        return f"{self.frames.shape[1:]} {self.frames.dtype}{limit}"


def full_well(dtype: DTypeLike) -> float:
    """Counts at which pixels of a type saturate: of 8 and 16 bits; others never do.

    Example:
      >>> full_well(np.uint8), full_well(float)
      (255.0, inf)
    """
    kind = np.dtype(dtype)
    known = kind.kind == "u" and kind.itemsize <= 2
    return float(np.iinfo(kind).max) if known else float("inf")


def as_frames(array: ArrayLike, *, mask_invalid: bool = False, name: str = "frames") -> np.ndarray:
    """Any array of counts as a batch of frames, cast exactly and never rescaled.

    8- and 16-bit integers, float16 and float32 become float32; wider integers and
    float64 become float64. Negative counts (background subtracted) are welcome. Axes
    are never guessed or swapped.

    Args:
      array: (N, M), (B, N, M) or (B, N, M, 1) real numbers, counts.
      mask_invalid: leave NaN and infinite pixels in place, for the estimator to mask.
      name: what to call the array in an error.

    Returns:
      (B, N, M) float32 or float64.

    Raises:
      ValueError: for another shape or kind of number, or for a NaN or infinite pixel
        unless `mask_invalid`.

    Example:
      >>> y = as_frames(np.full((11, 11), 7, np.uint16))
      >>> y.shape, y.dtype, float(y.max())
      ((1, 11, 11), dtype('float32'), 7.0)
    """
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{name}: a masked array would lose its mask; fill it with NaN")
    try:
        raw = np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name}: frames differ in size, expected one array") from error
    frames = _batched(_real(raw, name), name)
    if not mask_invalid:
        _refuse_invalid(frames, name)
    return frames


def _real(raw: np.ndarray, name: str) -> np.ndarray:
    """Cast to float32 where that is exact for every value of the type, else float64."""
    if raw.dtype.kind not in "uif" or (raw.dtype.kind == "f" and raw.dtype.itemsize > 8):
        raise ValueError(
            f"{name}: expected integers or floats of up to 64 bits, got dtype {raw.dtype}"
        )
    wide = raw.dtype.kind in "ui" and raw.dtype.itemsize == 8 and raw.size > 0
    if wide and max(int(raw.max()), -int(raw.min())) > _EXACT_INTEGER:
        raise ValueError(f"{name}: integers beyond 2^53 cannot be cast exactly")
    return raw.astype(np.promote_types(raw.dtype, np.float32))


def _batched(frames: np.ndarray, name: str) -> np.ndarray:
    """(N, M), (B, N, M) or (B, N, M, 1) to (B, N, M)."""
    shape = frames.shape
    if frames.ndim == 4 and shape[-1] == 1:
        frames = frames[..., 0]
    elif frames.ndim == 2:
        frames = frames[None]
    elif frames.ndim != 3 or shape[-1] == 1:
        # (N, M, 1) is refused: one frame with a channel, or N frames one pixel wide?
        raise ValueError(f"{name}: expected shape (N, M), (B, N, M) or (B, N, M, 1), got {shape}")
    if 0 in frames.shape[1:]:
        raise ValueError(f"{name}: expected frames with at least one pixel, got shape {shape}")
    return frames


def _refuse_invalid(frames: np.ndarray, name: str) -> None:
    """Raise for the first frame that holds a NaN or infinite pixel."""
    bad = np.argwhere(~np.isfinite(frames))
    if len(bad):
        index, row, col = bad[0]
        raise ValueError(
            f"{name}: frame {index} has a NaN or infinite pixel at row {row}, column {col} "
            f"({len(bad)} in all); mask_invalid leaves such pixels out"
        )


def read_frames(path: str | Path, *, mask_invalid: bool = False) -> FrameStack:
    """Read the frames of one file, or of a folder whose frames have one size.

    Args:
      path: a PNG (grey, 8 or 16 bit), TIFF (one or more grey pages), NPY or NPZ file, or
        a folder of such files, taken in natural order of their names (2 before 10).
      mask_invalid: accept NaN and infinite pixels and leave them in place.

    Returns:
      The `FrameStack`.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if a file is refused (the message names it) or sizes differ.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as home:
      ...     np.save(f"{home}/night.npy", np.zeros((2, 11, 11)))
      ...     read_frames(home).names
      ('night.npy[0]', 'night.npy[1]')
    """
    stacks = read_many([path], mask_invalid=mask_invalid)
    if len(stacks) > 1:
        kinds = sorted({s.kind for s in stacks})
        raise ValueError(
            f"{path}: expected frames of one size and type, got {', '.join(kinds)}; "
            "read_many returns one stack for each"
        )
    return stacks[0]


def read_many(paths: Sequence[str | Path], *, mask_invalid: bool = False) -> list[FrameStack]:
    """Read several files and folders, in order.

    Neighbours of the same size and type share a stack, so the frames of the returned
    stacks, one after the other, are in the order of the files. A file whose name occurs
    twice is named by its path instead.

    Args:
      paths: files and folders, as in `read_frames`.
      mask_invalid: accept NaN and infinite pixels and leave them in place.

    Returns:
      At least one `FrameStack`.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if a file is refused or given twice, or a folder has no frames.
    """
    if not paths:
        raise ValueError("paths: expected at least one file or folder")
    files = [file for path in paths for file in _files(Path(path))]
    repeated = [str(f) for f, times in Counter(f.resolve() for f in files).items() if times > 1]
    if repeated:
        raise ValueError(f"given more than once: {', '.join(repeated)}")
    shared = Counter(file.name for file in files)
    labels = [file.name if shared[file.name] == 1 else file.as_posix() for file in files]
    stacks = (
        _read_file(file, label, mask_invalid) for file, label in zip(files, labels, strict=True)
    )
    runs = groupby(stacks, key=lambda s: s.kind)
    return [_join(run) for _, run in runs]


def _files(path: Path) -> list[Path]:
    """The path itself, or the frame files of a folder in natural order."""
    if not path.is_dir():
        return [path]
    files = [
        file
        for file in path.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise ValueError(
            f"{path}: the folder holds no frames ({', '.join(SUFFIXES)}); "
            "folders inside it are not searched"
        )
    return sorted(files, key=lambda file: natural_key(file.name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares runs of digits as numbers.

    Example:
      >>> sorted(["f10.png", "f9.png"], key=natural_key)
      ['f9.png', 'f10.png']
    """
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _read_file(path: Path, label: str, mask_invalid: bool) -> FrameStack:
    """The frames of one file, named."""
    array, is_image = decode(path)
    frames = as_frames(array, mask_invalid=mask_invalid, name=str(path))
    names = (label,) if is_image else tuple(f"{label}[{i}]" for i in range(len(frames)))
    return FrameStack(names=names, frames=frames, full_well=full_well(array.dtype))


def _join(run: Iterable[FrameStack]) -> FrameStack:
    """One stack of a run of stacks of the same size."""
    stacks = list(run)
    if len(stacks) == 1:
        return stacks[0]
    return FrameStack(
        names=tuple(name for stack in stacks for name in stack.names),
        frames=np.concatenate([stack.frames for stack in stacks]),
        full_well=stacks[0].full_well,
    )
