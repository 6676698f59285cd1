"""Catalog: tables of targets, and of frames, as CSV, ECSV (astropy) or Parquet (pyarrow).

A catalog has one row per target; a frame without targets has none. A table of frames has one row
per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from dscsnet_jax.io import tables
from dscsnet_jax.io.outputs import prepare_output, replacing
from dscsnet_jax.physics.targets import Targets


@dataclass(frozen=True, eq=False)
class _Rows:
    """A table, one array of the same length per column."""

    frame: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)


@dataclass(frozen=True, eq=False)
class Catalog(_Rows):
    """A table of targets, one array of the same length per column.

    Attributes:
      frame: str, name of the frame.
      target: int64, number of the target within its frame, from 0.
      row, col: float64 position, pixels; pixel centres on integers.
      intensity: float64 total energy, counts.
      row_std, col_std: float64 standard deviations, pixels; NaN where unknown.
      intensity_std: float64 standard deviation, counts; NaN where unknown.
      status: str, flags of the target; empty where there is nothing to say.
      confidence: float64, expected share of the radii 0.05, 0.10 .. 0.25 pixels within which a
        true target lies; NaN where unknown.
    """

    target: np.ndarray
    row: np.ndarray
    col: np.ndarray
    intensity: np.ndarray
    row_std: np.ndarray
    col_std: np.ndarray
    intensity_std: np.ndarray
    status: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True, eq=False)
class FrameTable(_Rows):
    """What is known of frames as a whole, one array of the same length per column.

    Attributes:
      frame: str, name of the frame.
      count: int64 number of targets.
      probability: float64, that there are so many; NaN where unknown.
      runner_up: int64, the most probable other number; -1 where unknown.
      runner_up_probability: float64; NaN where unknown.
      noise, pedestal, background: float64, as told or estimated, counts.
      residual: float64 root mean square of frame minus model, counts.
      status: str, flags of the frame or any target of it, or `ok`.
    """

    count: np.ndarray
    probability: np.ndarray
    runner_up: np.ndarray
    runner_up_probability: np.ndarray
    noise: np.ndarray
    pedestal: np.ndarray
    background: np.ndarray
    residual: np.ndarray
    status: np.ndarray


Table = TypeVar("Table", bound=_Rows)
COLUMNS = tuple(field.name for field in fields(Catalog))
_LATER = ("confidence",)  # columns that older catalogs lack
_TYPES: dict[str, type] = {
    "frame": str,
    "target": int,
    "status": str,
    "count": int,
    "runner_up": int,
}
_UNITS = dict.fromkeys(("noise", "pedestal", "background", "residual"), "ct") | {
    "row": "pix",
    "col": "pix",
    "intensity": "ct",
    "row_std": "pix",
    "col_std": "pix",
    "intensity_std": "ct",
}


def from_targets(
    names: Sequence[str],
    targets: Targets,
    *,
    std: ArrayLike | None = None,
    status: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
) -> Catalog:
    """The catalog of a batch of frames, in the order of the frames and their slots.

    Args:
      names: B names of the frames.
      targets: `Targets` of shapes (B, K, 2), (B, K), (B, K).
      std: (B, K, 3) standard deviations of row, col (pixels), intensity (counts).
      status: text per frame, (B,), or per target, (B, K).
      confidence: (B, K), see `Catalog`.

    Returns:
      A `Catalog` with one row per present target.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> table = from_targets(["a.png", "b.png"], from_lists([[], [(1.0, 2.0, 240.0)]]))
      >>> table.frame.tolist(), table.col.tolist(), table.row_std.tolist()
      (['b.png'], [2.0], [nan])
    """
    mask = np.asarray(targets.mask, bool)
    if mask.ndim != 2 or len(names) != len(mask):
        raise ValueError(f"expected one name per frame, got {len(names)}, mask {mask.shape}")
    table = np.concatenate(
        [np.asarray(targets.position, float), np.asarray(targets.intensity, float)[..., None]], -1
    )
    errors = np.full(table.shape, np.nan) if std is None else np.asarray(std, float)
    if errors.shape != table.shape:
        raise ValueError(f"std: expected shape {table.shape}, got {errors.shape}")
    flags = np.asarray("" if status is None else status, str)
    if flags.shape not in ((), mask.shape[:1], mask.shape):
        raise ValueError(f"status: expected shape {mask.shape[:1]} or {mask.shape}")
    flags = np.broadcast_to(flags[:, None] if flags.ndim == 1 else flags, mask.shape)
    trust = np.full(mask.shape, np.nan) if confidence is None else np.asarray(confidence, float)
    if trust.shape != mask.shape:
        raise ValueError(f"confidence: expected shape {mask.shape}, got {trust.shape}")
    frame, slot = np.nonzero(mask)
    row, col, intensity = table[frame, slot].T
    row_std, col_std, intensity_std = errors[frame, slot].T
    return Catalog(
        frame=np.array([names[i] for i in frame.tolist()], str),
        target=(np.cumsum(mask, axis=1) - 1)[frame, slot],
        row=row,
        col=col,
        intensity=intensity,
        row_std=row_std,
        col_std=col_std,
        intensity_std=intensity_std,
        status=flags[frame, slot],
        confidence=trust[frame, slot],
    )


def concatenate(several: Sequence[Table]) -> Table:
    """One table of several of a kind, one after the other.

    Raises:
      ValueError: if there are none.
    """
    if not several:
        raise ValueError("need at least one table to concatenate")
    names = _columns(several[0])
    return type(several[0])(*(np.concatenate([getattr(t, n) for t in several]) for n in names))


def prepare_catalog(path: str | Path, *, force: bool = False) -> Path:
    """Check, before the work starts, that a catalog can be written to `path`.

    Args:
      path: file with the suffix `.csv`, `.ecsv` or `.parquet`.
      force: allow an existing file.

    Returns:
      `path` as a `Path`.

    Raises:
      ValueError: for another suffix.
      ImportError: if the package for the suffix is not installed.
      FileExistsError: if the file exists and `force` is false.
      OSError: if it cannot be written.
    """
    path = Path(path)
    tables.require(path)
    return prepare_output(path, force=force)


def write_catalog(path: str | Path, catalog: _Rows, *, force: bool = False) -> None:
    """Write a catalog, or a table of frames, in the format of the suffix.

    Numbers keep all their digits. CSV is UTF-8 with decimal points; an unknown number is an
    empty field.

    Args:
      path: file with the suffix `.csv`, `.ecsv` or `.parquet`.
      catalog: the table.
      force: replace an existing file.

    Raises:
      ValueError, ImportError, FileExistsError, OSError: as `prepare_catalog`.

    Example:
      >>> import tempfile
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> table = from_targets(["a.png"], from_lists([[(1.0, 2.5, 240.0)]]))
      >>> with tempfile.TemporaryDirectory() as home:
      ...     write_catalog(f"{home}/t.csv", table)
      ...     print(Path(home, "t.csv").read_text(), end="")
      frame,target,row,col,intensity,row_std,col_std,intensity_std,status,confidence
      a.png,0,1.0,2.5,240.0,,,,,
    """
    path = prepare_catalog(path, force=force)
    with replacing(path) as partial:
        tables.write(partial, _columns(catalog), _UNITS, suffix=path.suffix)


def read_catalog(path: str | Path) -> Catalog:
    """Read a catalog; the columns are found by name, others are ignored.

    Catalogs of before `confidence` was a column have none known.

    Args:
      path: file with the suffix `.csv`, `.ecsv` or `.parquet`.

    Returns:
      The `Catalog`.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package for the suffix is not installed.
      ValueError: if the file is no catalog; the message names it and the column.
    """
    path = Path(path)
    tables.require(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        columns = tables.read(path)
    except Exception as error:
        raise ValueError(f"{path}: not a readable catalog ({error})") from error
    missing = [name for name in COLUMNS if name not in (*columns, *_LATER)]
    if missing:
        raise ValueError(f"{path}: columns {', '.join(missing)} are missing")
    unknown = [""] * len(columns["frame"])
    columns = dict.fromkeys(_LATER, unknown) | dict(columns)
    return Catalog(*(_typed(path, name, columns[name]) for name in COLUMNS))


def _typed(path: Path, name: str, column: Sequence) -> np.ndarray:
    """A column in the type of its name; absent text is empty, an absent number NaN."""
    kind = _TYPES.get(name, float)
    if kind is float:
        column = ["nan" if value is None or value == "" else value for value in column]
    elif kind is str:
        column = ["" if value is None else value for value in column]
    values = []
    for i, value in enumerate(column):
        try:
            values.append(kind(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: row {i + 1}, column {name}: expected {kind.__name__}, got {value!r}"
            ) from error
    return np.array(values, kind)


def _columns(table: _Rows) -> dict[str, np.ndarray]:
    """The columns by name."""
    return {field.name: getattr(table, field.name) for field in fields(table)}


def as_astropy(catalog: _Rows) -> Any:
    """The catalog as an `astropy.table.Table` with units."""
    return tables.as_astropy(_columns(catalog), _UNITS)


def as_arrow(catalog: _Rows) -> Any:
    """The catalog as a `pyarrow.Table`."""
    return tables.as_arrow(_columns(catalog))
