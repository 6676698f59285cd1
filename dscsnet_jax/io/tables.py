"""Tables: columns as CSV, ECSV (astropy) or Parquet (pyarrow), and back.

The suffix of the file says which; the last two need the extra `catalog`.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Columns = Mapping[str, np.ndarray]
Units = Mapping[str, str]


def write(path: Path, columns: Columns, units: Units, *, suffix: str) -> None:
    """Write columns of one length, with the units of those that have some, as of a suffix."""
    _FORMATS[suffix.lower()].write(path, columns, units)


def read(path: Path) -> Mapping[str, Sequence]:
    """Columns by name, as the format has them."""
    return _FORMATS[path.suffix.lower()].read(path)


def require(path: Path) -> None:
    """Raise unless the suffix is known and its package installed.

    Raises:
      ValueError: for another suffix.
      ImportError: if the package is missing; says how it is installed.
    """
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


def as_astropy(columns: Columns, units: Units) -> Any:
    """An `astropy.table.Table` with units."""
    from astropy.table import Table

    return Table(dict(columns), units={n: unit for n, unit in units.items() if n in columns})


def as_arrow(columns: Columns) -> Any:
    """A `pyarrow.Table`."""
    from pyarrow import table

    return table(dict(columns))


def _write_csv(path: Path, columns: Columns, units: Units) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*(column.tolist() for column in columns.values()), strict=True):
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


def _write_ecsv(path: Path, columns: Columns, units: Units) -> None:
    as_astropy(columns, units).write(path, format="ascii.ecsv")


def _read_ecsv(path: Path) -> Mapping[str, Sequence]:
    from astropy.table import Table

    table = Table.read(path, format="ascii.ecsv")
    return {name: table[name].tolist() for name in table.colnames}


def _write_parquet(path: Path, columns: Columns, units: Units) -> None:
    from pyarrow import parquet

    parquet.write_table(as_arrow(columns), path)


def _read_parquet(path: Path) -> Mapping[str, Sequence]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pydict()


class _Format(NamedTuple):
    """How one suffix is written and read, and the package it takes."""

    write: Callable[[Path, Columns, Units], None]
    read: Callable[[Path], Mapping[str, Sequence]]
    module: str


_FORMATS = {
    ".csv": _Format(_write_csv, _read_csv, "csv"),
    ".ecsv": _Format(_write_ecsv, _read_ecsv, "astropy.table"),
    ".parquet": _Format(_write_parquet, _read_parquet, "pyarrow.parquet"),
}
