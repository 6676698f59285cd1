"""Csist: the published layout, read against independent frames and round trip."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dscsnet_jax.io.csist import read_csist, write_csist
from dscsnet_jax.io.frames import read_frames
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.targets import from_lists, to_lists

TABLES = [
    [(5.1, 6.7, 240.123456789), (5.0, 7.3, 220.0)],
    [],
    [(1 / 3, 2.0, 1e-300)],
]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A small split of three frames, ids 0, 1, 2."""
    root = tmp_path / "split"
    frames = np.arange(3 * 9 * 13).reshape(3, 9, 13) % 256
    write_csist(root, frames, from_lists(TABLES), sigma=0.5)
    return root


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_sample_frames_are_the_rounded_clipped_integrals(data_dir: Path) -> None:
    sample = read_csist(data_dir / "csist_sample")
    truth = np.load(data_dir / "csist_sample" / "frames_float64.npz")["frames"]
    assert sample.ids.tolist() == list(range(48))
    assert sample.names[10] == "image_10.png"
    assert sample.sigma == 0.5
    assert sample.frames.dtype == np.float32
    np.testing.assert_array_equal(sample.frames, np.clip(np.round(truth), 0, 255))


def test_sample_targets_render_to_the_integrals(data_dir: Path) -> None:
    sample = read_csist(data_dir / "csist_sample")
    truth = np.load(data_dir / "csist_sample" / "frames_float64.npz")["frames"]
    frames = render(sample.targets, frame_size=11, psf=sample.sigma)
    np.testing.assert_allclose(np.asarray(frames), truth, rtol=0, atol=1e-3)


def test_sample_first_coordinate_is_the_row(data_dir: Path) -> None:
    first = to_lists(read_csist(data_dir / "csist_sample").targets)[0]
    assert first.shape == (5, 3)
    assert first[0].tolist() == [7.66590120328818, 2.0329063686359117, 241.9509056377434]


@pytest.mark.parametrize("bits", [8, 16, None])
@pytest.mark.parametrize("shape", [(11, 11), (9, 13), (33, 24)])
def test_round_trip_is_exact(tmp_path: Path, shape: tuple[int, int], bits: int | None) -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(100, 50, (12, *shape)).astype(np.float32)
    if bits is not None:
        frames = np.clip(np.round(frames * (bits - 7)), 0, 2**bits - 1)
    tables = [rng.uniform(0, 9, (n % 5, 3)) for n in range(12)]
    write_csist(tmp_path, frames, from_lists(tables), sigma=0.37, bits=bits, first_id=7)
    split = read_csist(tmp_path)
    assert split.ids.tolist() == list(range(7, 19))
    assert split.sigma == 0.37
    assert split.frames.dtype == np.float32
    np.testing.assert_array_equal(split.frames, frames)
    for got, expected in zip(to_lists(split.targets), tables, strict=True):
        np.testing.assert_array_equal(got, expected)
    # The names are those the same files get from read_frames (and so in a catalog).
    assert split.names == read_frames(tmp_path / "cso_img").names


def test_double_precision_frames_stay_double(tmp_path: Path) -> None:
    frames = np.full((1, 4, 4), 0.1)
    write_csist(tmp_path, frames, from_lists([[]]), sigma=0.5, bits=None)
    np.testing.assert_array_equal(read_csist(tmp_path).frames, frames)
    assert read_csist(tmp_path).names == ("image_0.npy[0]",)


def test_written_annotation_is_the_published_one(data_dir: Path, tmp_path: Path) -> None:
    sample = read_csist(data_dir / "csist_sample")
    write_csist(tmp_path, sample.frames, sample.targets, sigma=sample.sigma)
    for i in (0, 47):
        name = f"CSO{i}.xml"
        published = (data_dir / "csist_sample" / "Annotations" / name).read_text()
        assert (tmp_path / "Annotations" / name).read_text() == published


def test_one_based_annotations_are_shifted(split: Path) -> None:
    zero, one = read_csist(split), read_csist(split, one_based=True)
    shift = to_lists(zero.targets)[0] - to_lists(one.targets)[0]
    np.testing.assert_allclose(shift, [[1, 1, 0], [1, 1, 0]], rtol=0, atol=1e-15)


def test_older_annotation_names_are_read(split: Path) -> None:
    for i in range(3):
        (split / "Annotations" / f"CSO{i}.xml").rename(split / "Annotations" / f"COS{i}.xml")
    np.testing.assert_array_equal(to_lists(read_csist(split).targets)[0], TABLES[0])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("</annotation>", "", "malformed XML"),
        ("<xc>5.1</xc>", "", r"field object\[1\]/coordinate/xc is missing"),
        ("<brightness>220.0</brightness>", "", r"field object\[2\]/coordinate/brightness is miss"),
        (
            "<yc>6.7</yc>",
            "<yc>nan</yc>",
            r"object\[1\]/coordinate/yc: expected a number, got 'nan'",
        ),
        (
            "<yc>6.7</yc>",
            "<yc>6,7</yc>",
            r"object\[1\]/coordinate/yc: expected a number, got '6,7'",
        ),
        ("<yc>6.7</yc>", "<yc/>", r"object\[1\]/coordinate/yc: expected a number, got ''"),
        ("<sigma>0.5</sigma>", "", "field sigma is missing"),
        ("<sigma>0.5</sigma>", "<sigma>0</sigma>", "field sigma: expected a positive number"),
        ("<sigma>0.5</sigma>", "<sigma>inf</sigma>", "field sigma: expected a number, got 'inf'"),
        ("<width>13</width>", "", "field size/width is missing"),
        (
            "<width>13</width>",
            "<width>9</width>",
            r"field size/height, size/width: expected \(9, 13",
        ),
        ("annotation>", "note>", "malformed XML"),
    ],
)
def test_row16_malformed_xml_names_file_and_field(
    split: Path, old: str, new: str, says: str
) -> None:
    edit(split / "Annotations" / "CSO0.xml", old, new)
    with pytest.raises(ValueError, match=rf"CSO0\.xml: .*{says}"):
        read_csist(split)


def test_row16_other_root_element_and_other_encoding(split: Path) -> None:
    path = split / "Annotations" / "CSO1.xml"
    path.write_text("<note/>")
    with pytest.raises(ValueError, match=r"CSO1\.xml: expected the root element annotation"):
        read_csist(split)
    path.write_bytes(b'<?xml version="1.0" encoding="martian"?><annotation/>')
    with pytest.raises(ValueError, match=r"CSO1\.xml: malformed XML"):
        read_csist(split)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"CSO1\.xml: malformed XML"):
        read_csist(split)


def test_row16_sigma_that_differs_names_the_file(split: Path) -> None:
    edit(split / "Annotations" / "CSO2.xml", "<sigma>0.5<", "<sigma>0.6<")
    with pytest.raises(ValueError, match=r"CSO2\.xml: sigma is 0\.6, before it 0\.5"):
        read_csist(split)


def test_row17_entity_bomb_is_refused_before_expansion(split: Path) -> None:
    entities = "".join(
        f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "x" * 100}">' for i in range(12)
    )
    (split / "Annotations" / "CSO0.xml").write_text(
        f"<!DOCTYPE annotation [{entities}]><annotation>&e11;</annotation>"
    )
    with pytest.raises(ValueError, match=r"CSO0\.xml: document types and entities are refused"):
        read_csist(split)


def test_row17_external_entity_is_refused(split: Path) -> None:
    secret = split.parent / "secret.txt"
    secret.write_text("0.5")
    edit(split / "Annotations" / "CSO0.xml", "<sigma>0.5<", "<sigma>&s;<")
    edit(
        split / "Annotations" / "CSO0.xml",
        "<annotation>",
        f'<!DOCTYPE annotation [<!ENTITY s SYSTEM "{secret.as_uri()}">]><annotation>',
    )
    with pytest.raises(ValueError, match=r"CSO0\.xml: document types and entities are refused"):
        read_csist(split)


def test_row17_huge_annotation_is_refused_unread(split: Path) -> None:
    with (split / "Annotations" / "CSO0.xml").open("r+b") as file:
        file.truncate(2**34)  # sparse: reading it would take 16 GiB
    with pytest.raises(ValueError, match=r"CSO0\.xml: an annotation of 17179869184 bytes"):
        read_csist(split)


def test_row18_both_differences_are_listed(split: Path) -> None:
    (split / "cso_img" / "image_0.png").unlink()
    (split / "Annotations" / "CSO2.xml").unlink()
    says = r"images without annotation: 2; annotations without image: 0; .*an id: none"
    with pytest.raises(ValueError, match=says):
        read_csist(split)


def test_row18_long_differences_are_shortened(split: Path) -> None:
    for i in range(3, 25):
        shutil.copy(split / "cso_img" / "image_0.png", split / "cso_img" / f"image_{i}.png")
    with pytest.raises(ValueError, match=r"annotation: 3, 4, .*, 12 and 12 more; "):
        read_csist(split)


@pytest.mark.parametrize(
    ("folder", "name", "twin"),
    [
        ("Annotations", "CSO1.xml", "COS1.xml"),
        ("Annotations", "CSO1.xml", "CSO01.xml"),
        ("cso_img", "image_1.png", "image_001.png"),
        ("cso_img", "image_1.png", "image_1.npy"),
    ],
)
def test_row18_duplicate_ids_are_listed(split: Path, folder: str, name: str, twin: str) -> None:
    shutil.copy(split / folder / name, split / folder / twin)
    with pytest.raises(ValueError, match="files that share an id: ") as error:
        read_csist(split)
    assert name in str(error.value)
    assert twin in str(error.value)


def test_row18_file_without_id_is_named(split: Path) -> None:
    shutil.copy(split / "cso_img" / "image_1.png", split / "cso_img" / "extra.png")
    (split / "cso_img" / "Thumbs.db").write_bytes(b"")
    with pytest.raises(ValueError, match=r"extra\.png: expected a name of the form"):
        read_csist(split)
    (split / "cso_img" / "extra.png").unlink()
    assert len(read_csist(split).ids) == 3


def test_row18_pairs_go_by_id_not_by_listing(split: Path) -> None:
    for i, new in ((0, 10), (1, 9), (2, 100)):
        (split / "cso_img" / f"image_{i}.png").rename(split / "cso_img" / f"image_{new}.png")
        (split / "Annotations" / f"CSO{i}.xml").rename(split / "Annotations" / f"CSO{new}.xml")
    read = read_csist(split)
    assert read.ids.tolist() == [9, 10, 100]
    assert [len(t) for t in to_lists(read.targets)] == [0, 2, 1]
    assert read.names == ("image_9.png", "image_10.png", "image_100.png")


def test_row5_image_of_another_size_is_named(split: Path) -> None:
    Image.new("L", (4, 4)).save(split / "cso_img" / "image_1.png")
    with pytest.raises(ValueError, match=r"image_1\.png has pixels \(4, 4\) float32 up to 255"):
        read_csist(split)


def test_row19_broken_image_is_named(split: Path) -> None:
    path = split / "cso_img" / "image_1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"image_1\.png: "):
        read_csist(split)


def test_array_file_must_hold_one_frame(split: Path) -> None:
    (split / "cso_img" / "image_1.png").unlink()
    for i in (0, 2):
        (split / "cso_img" / f"image_{i}.png").unlink()
    for i in range(3):
        np.save(split / "cso_img" / f"image_{i}.npy", np.zeros((2, 9, 13)))
    with pytest.raises(ValueError, match="expected one frame per file, got 6 frames in 3 files"):
        read_csist(split)


def test_row14_missing_or_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cso_img: no such folder"):
        read_csist(tmp_path)
    for folder in ("cso_img", "Annotations"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="expected at least one image"):
        read_csist(tmp_path)


def test_row35_existing_split_is_refused_then_replaced(split: Path) -> None:
    (split / "notes.txt").write_text("mine")
    frame = np.full((1, 4, 4), 3)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        write_csist(split, frame, from_lists([[]]), sigma=0.5)
    assert len(read_csist(split).ids) == 3
    write_csist(split, frame, from_lists([[]]), sigma=0.5, force=True)
    assert read_csist(split).frames.tolist() == frame.tolist()
    assert sorted(p.name for p in split.iterdir()) == ["Annotations", "cso_img", "notes.txt"]


def test_row25_failed_write_leaves_the_old_split_alone(split: Path) -> None:
    frames = np.zeros((2, 4, 4))
    frames[1, 0, 0] = 0.5
    with pytest.raises(ValueError, match=r"image_1\.png: a PNG of 8 bits holds whole counts"):
        write_csist(split, frames, from_lists([[], []]), sigma=0.5, force=True)
    assert len(read_csist(split).ids) == 3
    assert sorted(p.name for p in split.iterdir()) == ["Annotations", "cso_img"]


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    frame = np.zeros((1, 4, 4))
    with pytest.raises(ValueError, match="got 1 frames and 2 target lists"):
        write_csist(tmp_path, frame, from_lists([[], []]), sigma=0.5)
    with pytest.raises(ValueError, match="expected finite positions"):
        write_csist(tmp_path, frame, from_lists([[(np.nan, 1, 1)]]), sigma=0.5)
    with pytest.raises(ValueError, match="sigma: expected a positive number, got nan"):
        write_csist(tmp_path, frame, from_lists([[]]), sigma=np.nan)
    with pytest.raises(ValueError, match="bits must be 8, 16 or None, got 12"):
        write_csist(tmp_path, frame, from_lists([[]]), sigma=0.5, bits=12)
    assert list(tmp_path.iterdir()) == []
