"""Outputs: refused when present, checked before the work, replaced whole or not at all."""

import os
from pathlib import Path

import pytest

from dscsnet_jax.io.outputs import prepare_output, replacing


def test_row35_existing_file_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "targets.csv"
    target.write_text("old")
    with pytest.raises(FileExistsError, match=r"output file .*targets\.csv exists; use force"):
        prepare_output(target)
    assert prepare_output(target, force=True) == target
    assert target.read_text() == "old"


def test_row35_folder_with_content_is_refused_without_force(tmp_path: Path) -> None:
    assert prepare_output(tmp_path / "a" / "b", folder=True).is_dir()
    (tmp_path / "a" / "b" / "x").write_text("")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        prepare_output(tmp_path / "a" / "b", folder=True)
    assert prepare_output(tmp_path / "a" / "b", folder=True, force=True).is_dir()


@pytest.mark.parametrize("folder", [False, True])
def test_row35_wrong_kind_is_refused_even_with_force(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"
    target.write_text("") if folder else target.mkdir()
    with pytest.raises(FileExistsError, match="is not a " + ("folder" if folder else "file")):
        prepare_output(target, folder=folder, force=True)


@pytest.mark.parametrize("folder", [False, True])
def test_row35_unwritable_output_fails_first_and_is_named(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(OSError, match=r"output .*plain/below/out cannot be written"):
        prepare_output(tmp_path / "plain" / "below" / "out", folder=folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_row25_read_only_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PermissionError, match=r"locked/out\.csv cannot be written"):
        prepare_output(tmp_path / "locked" / "out.csv")


def test_prepare_leaves_nothing_behind(tmp_path: Path) -> None:
    prepare_output(tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


def test_row25_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with replacing(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
