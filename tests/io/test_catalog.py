"""Catalog: every format gives back the same numbers; faults name file and column."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.io import tables
from dscsnet_jax.io.catalog import (
    COLUMNS,
    Catalog,
    FrameTable,
    concatenate,
    from_targets,
    prepare_catalog,
    read_catalog,
    write_catalog,
)
from dscsnet_jax.physics.targets import Targets, from_lists

SUFFIXES = ["csv", "ecsv", "parquet"]
NAMES = ["a.png", "b, with comma.png", "ü.npy[3]"]
TABLES = [[(0.1, 1 / 3, 240.0), (2.0, 1e-300, -5.5)], [], [(1e22, 3.0, 250.0)]]


def example() -> Catalog:
    targets = from_lists(TABLES)
    std = np.arange(18.0).reshape(3, 2, 3) / 7
    std[0, 1] = np.inf
    std[2, 0, 1] = np.nan
    status = [["", "near_edge|saturated"], ["", ""], ["unresolved", ""]]
    confidence = [[0.5, 1 / 3], [0.0, 0.0], [np.nan, 0.0]]
    return from_targets(NAMES, targets, std=std, status=status, confidence=confidence)


def assert_same(got: Catalog, expected: Catalog) -> None:
    for name in COLUMNS:
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype.kind == other.dtype.kind, name
        np.testing.assert_array_equal(one, other, err_msg=name)


def test_columns_are_the_contract() -> None:
    text = "frame,target,row,col,intensity,row_std,col_std,intensity_std,status,confidence"
    assert ",".join(COLUMNS) == text


def test_from_targets_numbers_the_present_targets() -> None:
    table = example()
    assert len(table) == 3
    assert table.frame.tolist() == [NAMES[0], NAMES[0], NAMES[2]]
    assert table.target.tolist() == [0, 1, 0]
    assert table.row.tolist() == [0.1, 2.0, 1e22]
    assert table.col.tolist() == [1 / 3, 1e-300, 3.0]
    assert table.intensity.tolist() == [240.0, -5.5, 250.0]
    assert table.row_std.tolist() == [0.0, np.inf, 12 / 7]
    assert table.intensity_std.tolist() == [2 / 7, np.inf, 14 / 7]
    assert table.status.tolist() == ["", "near_edge|saturated", "unresolved"]


def test_gaps_in_the_padding_do_not_number() -> None:
    targets = Targets(
        position=jnp.asarray([[[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]]),
        intensity=jnp.asarray([[5.0, 0.0, 6.0]]),
        mask=jnp.asarray([[True, False, True]]),
    )
    table = from_targets(["f"], targets, status=["ok"])
    assert table.target.tolist() == [0, 1]
    assert table.col.tolist() == [2.0, 4.0]
    assert table.status.tolist() == ["ok", "ok"]
    assert np.isnan(table.row_std).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_keeps_every_digit(tmp_path: Path, suffix: str) -> None:
    write_catalog(tmp_path / f"t.{suffix}", example())
    assert_same(read_catalog(tmp_path / f"t.{suffix}"), example())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_of_float32_estimates(tmp_path: Path, suffix: str) -> None:
    value = np.float32(3.2)
    targets = Targets(
        position=np.full((1, 1, 2), value),  # type: ignore[arg-type]
        intensity=np.full((1, 1), value),  # type: ignore[arg-type]
        mask=np.ones((1, 1), bool),  # type: ignore[arg-type]
    )
    write_catalog(tmp_path / f"t.{suffix}", from_targets(["f"], targets))
    assert np.float32(read_catalog(tmp_path / f"t.{suffix}").row[0]) == value


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_row2_frames_without_targets_have_no_rows(tmp_path: Path, suffix: str) -> None:
    empty = from_targets(["a.png"], from_lists([[]]))
    assert len(empty) == 0
    write_catalog(tmp_path / f"t.{suffix}", empty)
    assert_same(read_catalog(tmp_path / f"t.{suffix}"), empty)


def test_csv_text_is_plain(tmp_path: Path) -> None:
    write_catalog(tmp_path / "t.csv", example())
    assert (tmp_path / "t.csv").read_bytes().decode("utf-8").splitlines() == [
        ",".join(COLUMNS),
        "a.png,0,0.1,0.3333333333333333,240.0,0.0,0.14285714285714285,0.2857142857142857,,0.5",
        "a.png,1,2.0,1e-300,-5.5,inf,inf,inf,near_edge|saturated,0.3333333333333333",
        "ü.npy[3],0,1e+22,3.0,250.0,1.7142857142857142,,2.0,unresolved,",
    ]


def test_ecsv_carries_units(tmp_path: Path) -> None:
    from astropy.table import Table

    write_catalog(tmp_path / "t.ecsv", example())
    table = Table.read(tmp_path / "t.ecsv", format="ascii.ecsv")
    assert (str(table["row"].unit), str(table["intensity_std"].unit)) == ("pix", "ct")


def test_concatenate_keeps_the_order() -> None:
    one = from_targets(["z"], from_lists([[(1, 2, 3)]]))
    both = concatenate([one, example()])
    assert both.frame.tolist() == ["z", NAMES[0], NAMES[0], NAMES[2]]
    assert both.intensity.tolist() == [3.0, 240.0, -5.5, 250.0]


def test_extra_columns_and_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    write_catalog(tmp_path / "t.csv", example())
    lines = (tmp_path / "t.csv").read_text("utf-8").splitlines()
    wider = "\r\n".join(f"note,{line}" for line in lines)
    (tmp_path / "t.csv").write_text(wider, "utf-8-sig")
    assert_same(read_catalog(tmp_path / "t.csv"), example())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("intensity,", "flux,", "columns intensity are missing"),
        ("240.0", '"240,0"', "row 1, column intensity: expected float, got '240,0'"),
        ("a.png,1", "a.png,one", "row 2, column target: expected int, got 'one'"),
        ("unresolved", "unresolved,1", "row 3 has 11 fields, the header 10"),
        ("ü", "\udcff", "not a readable catalog"),
    ],
)
def test_row16_broken_csv_names_file_row_and_column(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    path = tmp_path / "t.csv"
    write_catalog(path, example())
    text = path.read_text("utf-8").replace(old, new, 1)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"t\.csv: .*{says}"):
        read_catalog(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_and_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"t\.{suffix}: no such file"):
        read_catalog(tmp_path / f"t.{suffix}")
    (tmp_path / f"t.{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"t\.{suffix}: not a readable catalog"):
        read_catalog(tmp_path / f"t.{suffix}")


def test_row35_existing_catalog_is_refused_without_force(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(FileExistsError, match=r"t\.csv exists"):
        write_catalog(path, example())
    assert path.read_text() == "old"
    write_catalog(path, example(), force=True)
    assert_same(read_catalog(path), example())


def test_unknown_suffix_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.xlsx: expected one of \.csv, \.ecsv, \.parquet"):
        prepare_catalog(tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match="expected one of"):
        read_catalog(tmp_path / "targets")


@pytest.mark.parametrize(("suffix", "package"), [("ecsv", "astropy"), ("parquet", "pyarrow")])
def test_missing_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    says = rf"t\.{suffix}: \.{suffix} needs {package}: pip install 'dscsnet_jax\[catalog\]'"
    for act in (prepare_catalog, read_catalog):
        with pytest.raises(ImportError, match=says):
            act(tmp_path / f"t.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_row5_shapes_that_do_not_fit_are_refused() -> None:
    targets = from_lists(TABLES)
    with pytest.raises(ValueError, match="one name per frame, got 2"):
        from_targets(["a", "b"], targets)
    with pytest.raises(ValueError, match=r"std: expected shape \(3, 2, 3\), got \(3, 2, 2\)"):
        from_targets(NAMES, targets, std=np.zeros((3, 2, 2)))
    with pytest.raises(ValueError, match=r"status: expected shape \(3,\) or \(3, 2\)"):
        from_targets(NAMES, targets, status=["a", "b"])
    with pytest.raises(ValueError, match=r"confidence: expected shape \(3, 2\), got \(3,\)"):
        from_targets(NAMES, targets, confidence=[0.5, 0.5, 0.5])


def test_catalogs_of_before_confidence_are_read(tmp_path: Path) -> None:
    write_catalog(tmp_path / "t.csv", example())
    lines = (tmp_path / "t.csv").read_text("utf-8").splitlines()
    (tmp_path / "t.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines), "utf-8")
    old = read_catalog(tmp_path / "t.csv")
    assert np.isnan(old.confidence).all()
    assert old.status.tolist() == example().status.tolist()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_of_frames_has_a_row_for_each(tmp_path: Path, suffix: str) -> None:
    table = FrameTable(
        frame=np.array(["a", "b"]),
        count=np.array([2, 0]),
        probability=np.array([0.75, np.nan]),
        runner_up=np.array([1, -1]),
        runner_up_probability=np.array([0.25, np.nan]),
        noise=np.array([1.5, 2.0]),
        pedestal=np.zeros(2),
        background=np.array([10.0, 0.0]),
        residual=np.array([1.25, 2.5]),
        status=np.array(["ok", "invalid"]),
    )
    path = tmp_path / f"t.{suffix}"
    both = concatenate([table, table])
    assert len(both) == 4
    write_catalog(path, both)
    columns = tables.read(path)
    assert tuple(columns) == tuple(vars(table))
    assert list(columns["count"]) in ([2, 0] * 2, ["2", "0"] * 2)
    assert list(columns["frame"]) == ["a", "b"] * 2
    with pytest.raises(ValueError, match="columns target, row"):
        read_catalog(path)
