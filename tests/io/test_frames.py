"""Frames: what is accepted, cast exactly, named and ordered; what is refused and how."""

import pickle
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image

from dscsnet_jax.io import formats
from dscsnet_jax.io.frames import as_frames, read_frames, read_many

RAMP = np.arange(15).reshape(3, 5)


def save_png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path, format="PNG")
    return path


def png_header(cols: int, rows: int, bits: int, colour: int) -> bytes:
    """A PNG of one header chunk and nothing else."""
    body = b"IHDR" + struct.pack(">IIBBBBB", cols, rows, bits, colour, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (1, 3, 5, 1)])
def test_row6_accepted_shapes_keep_rows_and_columns(shape: tuple[int, ...]) -> None:
    frames = as_frames(RAMP.reshape(shape).astype(np.float32))
    assert frames.shape == (1, 3, 5)
    np.testing.assert_array_equal(frames[0], RAMP)


def test_row6_batch_axis_is_the_first() -> None:
    batch = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(as_frames(batch), batch)
    np.testing.assert_array_equal(as_frames(batch[..., None]), batch)
    np.testing.assert_array_equal(as_frames(list(batch)), batch)
    np.testing.assert_array_equal(as_frames(jnp.asarray(batch)), batch)


@pytest.mark.parametrize("shape", [(), (5,), (3, 5, 1), (1, 3, 5, 2), (1, 1, 3, 5, 1), (2, 0, 5)])
def test_row5_wrong_shape_names_expected_and_given(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mine: expected .*got shape|mine: expected") as error:
        as_frames(np.zeros(shape), name="mine")
    assert str(shape) in str(error.value)


def test_row5_frames_of_different_sizes_in_one_list() -> None:
    with pytest.raises(ValueError, match="frames differ in size"):
        as_frames([np.zeros((3, 3)), np.zeros((4, 4))])


def test_empty_batch_is_a_batch() -> None:
    assert as_frames(np.zeros((0, 11, 11))).shape == (0, 11, 11)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        ("uint8", "float32"),
        ("int8", "float32"),
        ("uint16", "float32"),
        (">u2", "float32"),
        ("int16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        (">f4", "float32"),
        ("int32", "float64"),
        ("uint32", "float64"),
        ("int64", "float64"),
        ("float64", "float64"),
    ],
)
def test_row7_exact_cast_without_rescale(dtype: str, result: str) -> None:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        values = [[0.1, 65504.0]]
    else:
        top = min(np.iinfo(kind).max, 2**53)
        values = [[0, top]]
    raw = np.array(values, kind)
    frames = as_frames(raw)
    assert frames.dtype == np.dtype(result)
    assert frames.dtype.isnative
    assert [int(v) if kind.kind != "f" else v for v in frames[0, 0]] == raw[0].tolist()


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1])
def test_row7_integers_no_float_can_hold_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="cannot be cast exactly"):
        as_frames(np.array([[value]]))


@pytest.mark.parametrize(
    "array",
    [
        np.ones((3, 3), bool),
        np.ones((3, 3), object),
        np.ones((3, 3), complex),
        np.full((3, 3), "7"),
        np.ones((3, 3), np.longdouble),
        np.zeros((3, 3), [("a", float)]),
    ],
)
def test_row8_other_kinds_are_refused_by_name(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected integers or floats") as error:
        as_frames(array)
    assert str(array.dtype) in str(error.value)


def test_row8_masked_array_would_lose_its_mask() -> None:
    with pytest.raises(ValueError, match="masked array"):
        as_frames(np.ma.masked_less(np.eye(3), 0.5))


def test_row9_negative_pixels_are_kept() -> None:
    assert as_frames(np.full((2, 2), -3.5)).min() == -3.5
    assert as_frames(np.full((2, 2), -3, np.int16)).min() == -3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row1_invalid_pixel_names_frame_and_pixel(bad: float) -> None:
    batch = np.zeros((4, 3, 5), np.float32)
    batch[2, 1, 4] = bad
    with pytest.raises(ValueError, match=r"frame 2 .* row 1, column 4 \(1 in all\)"):
        as_frames(batch)
    kept = as_frames(batch, mask_invalid=True)
    np.testing.assert_array_equal(kept, batch)


def test_row1_invalid_pixel_in_a_file_names_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "night.npy", np.full((2, 3, 3), np.nan))
    with pytest.raises(ValueError, match=r"night\.npy: frame 0"):
        read_frames(tmp_path / "night.npy")
    assert np.isnan(read_frames(tmp_path / "night.npy", mask_invalid=True).frames).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tif", "PNG"])
def test_row7_images_are_read_as_stored(tmp_path: Path, suffix: str, dtype: type) -> None:
    top = np.iinfo(dtype).max
    array = np.array([[0, 1, 2], [top, top - 1, 128]], dtype)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(array).save(path, format="PNG" if suffix.lower() == "png" else "TIFF")
    stack = read_frames(path)
    assert stack.names == (f"image.{suffix}",)
    assert stack.frames.dtype == np.float32
    np.testing.assert_array_equal(stack.frames[0], array)


@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2"])
def test_row4_the_full_well_is_that_of_the_stored_type(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3, 3), kind))
    assert read_frames(tmp_path / "a.npy").full_well == np.iinfo(kind).max


@pytest.mark.parametrize("bits", [8, 16])
def test_png_round_trip_of_encode(tmp_path: Path, bits: int) -> None:
    frame = np.array([[0.0, 2.0**bits - 1], [7.0, 100.0]], np.float32)
    formats.encode(tmp_path / "a.png", frame, bits=bits)
    np.testing.assert_array_equal(read_frames(tmp_path / "a.png").frames[0], frame)


@pytest.mark.parametrize("value", [256.0, -1.0, 0.5, np.nan])
def test_encode_refuses_what_a_png_cannot_hold(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"a\.png: a PNG of 8 bits holds whole counts in 0\.\.255"):
        formats.encode(tmp_path / "a.png", np.full((2, 2), value), bits=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64"]
)
def test_tiff_stack_of_any_number_is_exact(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        stack = rng.normal(size=(4, 5, 6)).astype(dtype)
    else:
        info = np.iinfo(dtype)
        stack = rng.integers(info.min, info.max, (4, 5, 6), dtype, endpoint=True)
    tifffile.imwrite(tmp_path / "s.tiff", stack, photometric="minisblack")
    read = read_frames(tmp_path / "s.tiff")
    assert read.names == tuple(f"s.tiff[{i}]" for i in range(4))
    assert read.frames.dtype == np.promote_types(dtype, np.float32)
    np.testing.assert_array_equal(read.frames, stack)


def test_tiff_beyond_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "d.tif", np.eye(4), photometric="minisblack")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"d\.tif: .*dscsnet_jax\[catalog\]"):
        read_frames(tmp_path / "d.tif")


@pytest.mark.parametrize("photometric", ["miniswhite", "rgb"])
def test_row19_tiff_that_is_not_plain_grey_is_refused(tmp_path: Path, photometric: str) -> None:
    array = np.zeros((4, 5, 3) if photometric == "rgb" else (4, 5), np.uint16)
    tifffile.imwrite(tmp_path / "c.tif", array, photometric=photometric)
    with pytest.raises(ValueError, match=r"c\.tif: expected grey TIFF pages"):
        read_frames(tmp_path / "c.tif")


def test_tiff_pages_of_different_sizes_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "p.tif") as writer:
        for side in (4, 5):
            writer.write(np.zeros((side, side), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"p\.tif: the pages differ in size"):
        read_frames(tmp_path / "p.tif")


def test_row19_png_cut_anywhere_is_refused(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (11, 11), np.uint8)
    whole = save_png(tmp_path / "whole.png", array).read_bytes()
    cut = tmp_path / "cut.png"
    # Without the checksum of the end mark, the last four bytes, nothing is lost.
    for length in range(len(whole) - 4):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.png: "):
            read_frames(cut)
    cut.write_bytes(whole[:-4])
    np.testing.assert_array_equal(read_frames(cut).frames[0], array)


def test_row19_flipped_bit_of_a_png_is_refused(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (11, 11), np.uint8)
    path = save_png(tmp_path / "flip.png", array)
    whole = path.read_bytes()
    for at in range(16, len(whole) - 12, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"flip\.png: "):
            read_frames(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_row19_png_that_is_not_grey_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: expected a grey PNG of 8 or 16 bits, got"):
        read_frames(tmp_path / "c.png")


def test_row19_two_and_four_bit_png_would_be_rescaled(tmp_path: Path) -> None:
    for bits in (2, 4):
        (tmp_path / "b.png").write_bytes(png_header(4, 4, bits, 0))
        with pytest.raises(ValueError, match=rf"b\.png: .*got grey of {bits} bits"):
            read_frames(tmp_path / "b.png")


def test_row19_animated_png_is_refused(tmp_path: Path) -> None:
    first, second = (Image.new("L", (4, 4), level) for level in (0, 9))
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=r"a\.png: an animated PNG is refused"):
        read_frames(tmp_path / "a.png")


def test_row19_png_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000, 8, 0))
    with pytest.raises(ValueError, match=r"bomb\.png: an image of 100000 x 100000 pixels"):
        read_frames(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("side", "says"), [(8193, "8193 x 8193"), (10_000, ""), (60_000, "")])
def test_row19_tiff_bomb_is_refused_by_its_header(tmp_path: Path, side: int, says: str) -> None:
    path = tmp_path / "bomb.tif"
    Image.new("L", (4, 4)).save(path)
    raw = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", raw, 4)
    for entry in range(struct.unpack_from("<H", raw, start)[0]):
        at = start + 2 + 12 * entry
        if struct.unpack_from("<H", raw, at)[0] in (256, 257):
            struct.pack_into("<HII", raw, at + 2, 4, 1, side)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"bomb\.tif: .*{says}"):
        read_frames(path)


def test_row19_tiff_stack_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_MAX_STACK_PIXELS", 50)
    for dtype in (np.uint8, np.float64):
        tifffile.imwrite(tmp_path / "s.tif", np.zeros((4, 4, 4), dtype), photometric="minisblack")
        with pytest.raises(ValueError, match=r"s\.tif: a stack of more than 50 pixels"):
            read_frames(tmp_path / "s.tif")


def test_row19_npz_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_MAX_ARCHIVE_BYTES", 1000)
    np.savez_compressed(tmp_path / "z.npz", np.zeros((10, 11, 11)))
    with pytest.raises(ValueError, match=r"z\.npz: an archive that expands to \d+ bytes"):
        read_frames(tmp_path / "z.npz")


def test_row19_content_must_match_the_suffix(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "npy", "npz"):
        path = tmp_path / f"fake.{suffix}"
        path.write_bytes(b"GIF89a, really")
        with pytest.raises(ValueError, match=rf"fake\.{suffix}: "):
            read_frames(path)


def test_row30_object_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([[None]]), allow_pickle=True)
    np.savez(tmp_path / "o.npz", np.array([[None]]))
    for name in ("o.npy", "o.npz"):
        with pytest.raises(ValueError, match=rf"{name}: .*[Oo]bject arrays"):
            read_frames(tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "pt", "pkl", "PICKLE"])
def test_row30_pickle_is_refused_by_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(pickle.dumps(np.zeros((3, 3))))
    with pytest.raises(ValueError, match=r"pickles .* are refused"):
        read_frames(path)


def test_row30_pickle_in_npy_clothes_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    path.write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(ValueError, match=r"w\.npy: not an NPY file \(pickles are refused\)"):
        read_frames(path)


def test_truncated_npy_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.zeros((2, 11, 11)))
    whole = path.read_bytes()
    for length in (3, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"t\.npy: "):
            read_frames(path)


def test_array_files_are_named_by_index(tmp_path: Path) -> None:
    batch = np.arange(24.0).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", batch)
    np.savez(tmp_path / "a.npz", frames=batch, other=np.zeros(3))
    np.save(tmp_path / "one.npy", batch[0])
    assert read_frames(tmp_path / "a.npy").names == ("a.npy[0]", "a.npy[1]")
    assert read_frames(tmp_path / "one.npy").names == ("one.npy[0]",)
    archive = read_frames(tmp_path / "a.npz")
    assert archive.names == ("a.npz[0]", "a.npz[1]")
    np.testing.assert_array_equal(archive.frames, batch)


def test_npz_without_a_clear_choice_lists_its_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 3)), y=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"a\.npz: expected one array .*'x', 'y'"):
        read_frames(tmp_path / "a.npz")


def test_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for level in (10, 9, 100, 1):
        save_png(tmp_path / f"f{level}.png", np.full((3, 3), level, np.uint8))
    (tmp_path / "readme.txt").write_text("not a frame")
    (tmp_path / "._f1.png").write_text("not a frame")
    stack = read_frames(tmp_path)
    assert stack.names == ("f1.png", "f9.png", "f10.png", "f100.png")
    assert stack.frames[:, 0, 0].tolist() == [1, 9, 10, 100]


def test_folder_without_frames_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cso_img").mkdir()
    with pytest.raises(ValueError, match="the folder holds no frames"):
        read_frames(tmp_path)


def test_sizes_are_grouped_without_losing_order(tmp_path: Path) -> None:
    for name, side in (("a", 3), ("b", 3), ("c", 4), ("d", 3)):
        save_png(tmp_path / f"{name}.png", np.full((side, side), ord(name), np.uint8))
    np.save(tmp_path / "e.npy", np.full((2, 3, 3), 1.5))
    stacks = read_many([tmp_path])
    assert [s.names for s in stacks] == [
        ("a.png", "b.png"),
        ("c.png",),
        ("d.png",),
        ("e.npy[0]", "e.npy[1]"),
    ]
    assert [s.frames[0, 0, 0] for s in stacks] == [ord("a"), ord("c"), ord("d"), 1.5]
    assert [len(s) for s in stacks] == [2, 1, 1, 2]
    with pytest.raises(
        ValueError, match=r"one size and type, got \(3, 3\) float32 up to 255 counts, .*\(4, 4\)"
    ):
        read_frames(tmp_path)


def test_same_name_in_two_folders_is_told_apart(tmp_path: Path) -> None:
    for folder, level in (("x", 1), ("y", 2)):
        (tmp_path / folder).mkdir()
        save_png(tmp_path / folder / "f.png", np.full((3, 3), level, np.uint8))
    (stack,) = read_many([tmp_path / "y", tmp_path / "x" / "f.png"])
    assert stack.names == (f"{tmp_path}/y/f.png", f"{tmp_path}/x/f.png")
    assert stack.frames[:, 0, 0].tolist() == [2, 1]


def test_file_given_twice_is_an_error(tmp_path: Path) -> None:
    path = save_png(tmp_path / "f.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"given more than once: .*f\.png"):
        read_many([path, tmp_path])


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
        read_frames(tmp_path / "none.png")
    (tmp_path / "f.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"f\.jpg: expected one of \.png, .* got '\.jpg'"):
        read_frames(tmp_path / "f.jpg")
    with pytest.raises(ValueError, match="at least one file or folder"):
        read_many([])
