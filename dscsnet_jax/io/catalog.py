"""Catalog: tables of targets as CSV, ECSV (astropy) or Parquet (pyarrow).

One row per target; a frame without targets has no row.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dscsnet_jax.io.outputs import prepare_output, replacing
from dscsnet_jax.physics.targets import Targets


@dataclass(frozen=True, eq=False)
class Catalog:
    """A table of targets, one array of the same length per column.

    Attributes:
      frame: str, name of the frame.
      target: int64, number of the target within its frame, from 0.
      row, col: float64 position, pixels; pixel centres on integers.
      intensity: float64 total energy, counts.
      row_std, col_std: float64 standard deviations, pixels; NaN where unknown.
      intensity_std: float64 standard deviation, counts; NaN where unknown.
      status: str, flags of the target; empty where there is nothing to say.
    """

    frame: np.ndarray
    target: np.ndarray
    row: np.ndarray
    col: np.ndarray
    intensity: np.ndarray
    row_std: np.ndarray
    col_std: np.ndarray
    intensity_std: np.ndarray
    status: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)


COLUMNS = tuple(field.name for field in fields(Catalog))
_TYPES: dict[str, type] = {"frame": str, "target": int, "status": str}
_UNITS = {
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
) -> Catalog:
    """The catalog of a batch of frames, in the order of the frames and their slots.

    Args:
      names: B names of the frames.
      targets: `Targets` of shapes (B, K, 2), (B, K), (B, K).
      std: (B, K, 3) standard deviations of row, col (pixels), intensity (counts).
      status: text per frame, (B,), or per target, (B, K).

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
    )


def concatenate(catalogs: Sequence[Catalog]) -> Catalog:
    """One catalog of several, one after the other.

    Raises:
      ValueError: if there are none.
    """
    return Catalog(*(np.concatenate([getattr(c, name) for c in catalogs]) for name in COLUMNS))


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
    _require(path)
    return prepare_output(path, force=force)


def write_catalog(path: str | Path, catalog: Catalog, *, force: bool = False) -> None:
    """Write a catalog in the format of the suffix; numbers keep all their digits.

    CSV is UTF-8 with decimal points; an unknown standard deviation is an empty field.

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
      frame,target,row,col,intensity,row_std,col_std,intensity_std,status
      a.png,0,1.0,2.5,240.0,,,,
    """
    path = prepare_catalog(path, force=force)
    with replacing(path) as partial:
        _FORMATS[path.suffix.lower()].write(partial, catalog)


def read_catalog(path: str | Path) -> Catalog:
    """Read a catalog; the columns are found by name, others are ignored.

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
    _require(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        columns = _FORMATS[path.suffix.lower()].read(path)
    except Exception as error:
        raise ValueError(f"{path}: not a readable catalog ({error})") from error
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"{path}: columns {', '.join(missing)} are missing")
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


def _write_csv(path: Path, catalog: Catalog) -> None:
    columns = [getattr(catalog, name).tolist() for name in COLUMNS]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in zip(*columns, strict=True):
            writer.writerow(["" if value != value else value for value in row])


def _read_csv(path: Path) -> Mapping[str, Sequence]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file, strict=True))
    if not lines:
        raise ValueError("the file is empty")
    header, *rows = lines
    for i, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(f"row {i} has {len(row)} fields, the header {len(header)}")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def as_astropy(catalog: Catalog) -> Any:
    """The catalog as an `astropy.table.Table` with units."""
    from astropy.table import Table

    table = Table({name: getattr(catalog, name) for name in COLUMNS})
    for name, unit in _UNITS.items():
        table[name].unit = unit
    return table


def as_arrow(catalog: Catalog) -> Any:
    """The catalog as a `pyarrow.Table`."""
    from pyarrow import table

    return table({name: getattr(catalog, name) for name in COLUMNS})


def _write_ecsv(path: Path, catalog: Catalog) -> None:
    as_astropy(catalog).write(path, format="ascii.ecsv")


def _read_ecsv(path: Path) -> Mapping[str, Sequence]:
    from astropy.table import Table

    table = Table.read(path, format="ascii.ecsv")
    return {name: table[name].tolist() for name in table.colnames}


def _write_parquet(path: Path, catalog: Catalog) -> None:
    from pyarrow import parquet

    parquet.write_table(as_arrow(catalog), path)


def _read_parquet(path: Path) -> Mapping[str, Sequence]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pydict()


@dataclass(frozen=True)
class _Format:
    """How one suffix is written and read, and the package it takes."""

    write: Callable[[Path, Catalog], None]
    read: Callable[[Path], Mapping[str, Sequence]]
    module: str


_FORMATS = {
    ".csv": _Format(_write_csv, _read_csv, "csv"),
    ".ecsv": _Format(_write_ecsv, _read_ecsv, "astropy.table"),
    ".parquet": _Format(_write_parquet, _read_parquet, "pyarrow.parquet"),
}


def _require(path: Path) -> None:
    """Raise unless the suffix is known and its package installed."""
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"{path}: expected one of {', '.join(_FORMATS)}, got {suffix!r}")
    module = _FORMATS[suffix].module
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{path}: {suffix} needs {module.partition('.')[0]}: pip install 'dscsnet_jax[catalog]'"
        ) from error
