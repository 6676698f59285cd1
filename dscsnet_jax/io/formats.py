"""Formats: one file to one array of counts (PNG, TIFF, NPY, NPZ), and back.

Nothing is rescaled, inverted or guessed: a file that does not hold plain grey levels
or numbers is refused, by name. Sizes are checked before pixels are decompressed.
"""

from __future__ import annotations

import importlib
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

_MAX_IMAGE_PIXELS = 2**26
_MAX_STACK_PIXELS = 2**30
_MAX_ARCHIVE_BYTES = 2**32
_PICKLES = frozenset({".pkl", ".pickle", ".pth", ".pt", ".ckpt", ".joblib"})
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
# TIFF tags, and the (bits, sample format) pairs that Pillow returns without loss.
_BITS, _PHOTOMETRIC, _SAMPLES, _FORMAT = 258, 262, 277, 339
_PILLOW_EXACT = frozenset({(8, 1), (16, 1), (32, 3)})
_BLACK_IS_ZERO = 1


def decode(path: Path) -> tuple[np.ndarray, bool]:
    """Read the array a file holds, as stored.

    Args:
      path: a file whose suffix is one of `SUFFIXES` (any case).

    Returns:
      The array and whether the file is one image, (N, M), rather than an array or stack.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is refused or broken; the message names it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as home:
      ...     encode(Path(home, "a.png"), np.eye(2), bits=8)
      ...     decode(Path(home, "a.png"))
      (array([[1, 0],
             [0, 1]], dtype=uint8), True)
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    refuse_pickle(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected one of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    with _naming(path):
        return reader(path)


def refuse_pickle(path: Path) -> None:
    """Raise a `ValueError` if the suffix is that of a pickle, which can run any code.

    Example:
      >>> refuse_pickle(Path("model.pth"))
      Traceback (most recent call last):
      ValueError: model.pth: pickles (.pth) are refused: loading one can run any code
    """
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(f"{path}: pickles ({suffix}) are refused: loading one can run any code")


def encode(path: Path, frame: np.ndarray, *, bits: int | None) -> None:
    """Write one frame exactly: PNG of 8 or 16 bits, or NPY.

    Args:
      path: the file to write.
      frame: (N, M) counts; for PNG whole numbers in 0 .. 2^bits - 1.
      bits: 8 or 16 for PNG, None for NPY (floating point kept as it is).

    Raises:
      ValueError: if the frame cannot be stored without loss.
    """
    if bits is None:
        np.save(path, frame, allow_pickle=False)
        return
    if bits not in (8, 16):
        raise ValueError(f"{path}: bits must be 8, 16 or None, got {bits!r}")
    top = 2**bits - 1
    if not (np.all(frame == np.round(frame)) and np.all((frame >= 0) & (frame <= top))):
        raise ValueError(
            f"{path}: a PNG of {bits} bits holds whole counts in 0..{top}, the frame has "
            f"values in {np.min(frame):g}..{np.max(frame):g}; bits=None stores any number"
        )
    Image.fromarray(frame.astype(np.uint8 if bits == 8 else np.uint16)).save(path, format="PNG")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into one `ValueError` that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def _check_pixels(rows: int, cols: int) -> None:
    """Refuse a decompression bomb by the size its header claims."""
    if rows * cols > _MAX_IMAGE_PIXELS:
        raise ValueError(
            f"an image of {rows} x {cols} pixels is refused (more than {_MAX_IMAGE_PIXELS})"
        )


def _read_png(path: Path) -> tuple[np.ndarray, bool]:
    """An 8- or 16-bit grey PNG; the header is judged before Pillow sees the file."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or not head.startswith(_PNG_SIGNATURE):
        raise ValueError("not a PNG file, or a truncated one")
    cols, rows, bits, colour = struct.unpack(">IIBB", head[16:])
    if colour != 0 or bits not in (8, 16):
        # Pillow would stretch 2- and 4-bit levels to 0..255.
        name = _PNG_COLOURS.get(colour, "unknown")
        raise ValueError(f"expected a grey PNG of 8 or 16 bits, got {name} of {bits} bits")
    _check_pixels(rows, cols)
    with Image.open(path, formats=["PNG"]) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("an animated PNG is refused: store a stack as TIFF or NPY")
        # Pillow skips the checksums when it decodes, and verifying ends its file.
        image.verify()
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image), True


def _read_tiff(path: Path) -> tuple[np.ndarray, bool]:
    """A grey TIFF: one page is an image, several are a stack."""
    try:
        pages = _pillow_pages(path)
    except UnidentifiedImageError:
        pages = None
    if pages is None:
        pages = _tifffile_pages(path)
    shapes = sorted({page.shape for page in pages})
    if len(shapes) > 1:
        raise ValueError(f"the pages differ in size: {shapes}")
    return (pages[0], True) if len(pages) == 1 else (np.stack(pages), False)


def _pillow_pages(path: Path) -> list[np.ndarray] | None:
    """The pages as Pillow reads them; None if it would lose precision."""
    pages, pixels = [], 0
    with Image.open(path, formats=["TIFF"]) as image:
        for page in ImageSequence.Iterator(image):
            tags = page.tag_v2  # type: ignore[attr-defined]
            bits, samples = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
            _check_tiff_page((page.height, page.width), samples, tags.get(_PHOTOMETRIC))
            if (bits[0], tags.get(_FORMAT, (1,))[0]) not in _PILLOW_EXACT:
                return None
            pixels = _add_pixels(pixels, page.height * page.width)
            pages.append(np.asarray(page))
    return pages


def _tifffile_pages(path: Path) -> list[np.ndarray]:
    """The pages as tifffile reads them: float64, signed and 32-bit samples."""
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError as error:
        raise ValueError(
            "Pillow reads TIFF of 8 and 16 bits and float32 only; for the rest install "
            "tifffile: pip install 'dscsnet_jax[catalog]'"
        ) from error
    pages, pixels = [], 0
    with tifffile.TiffFile(path) as stack:
        for page in stack.pages:
            _check_tiff_page(page.shape, page.samplesperpixel, page.photometric)
            pixels = _add_pixels(pixels, page.size)
            pages.append(page.asarray())
    return pages


def _check_tiff_page(shape: tuple[int, ...], samples: int, photometric: int | None) -> None:
    """One sample per pixel, black is zero, not a bomb."""
    if samples != 1 or photometric != _BLACK_IS_ZERO or len(shape) != 2:
        raise ValueError(
            "expected grey TIFF pages (1 sample per pixel, black is zero), got "
            f"{samples} samples, photometric {photometric}, shape {tuple(shape)}"
        )
    _check_pixels(*shape)


def _add_pixels(pixels: int, more: int) -> int:
    """Running total of a stack, refused when it passes the limit."""
    if pixels + more > _MAX_STACK_PIXELS:
        raise ValueError(f"a stack of more than {_MAX_STACK_PIXELS} pixels is refused")
    return pixels + more


def _read_npy(path: Path) -> tuple[np.ndarray, bool]:
    """A plain numeric NPY array."""
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("not an NPY file (pickles are refused)")
    return np.load(path, allow_pickle=False), False


def _read_npz(path: Path) -> tuple[np.ndarray, bool]:
    """The array named `frames` of an NPZ archive, or its only one."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _MAX_ARCHIVE_BYTES:
        raise ValueError(f"an archive that expands to {size} bytes is refused; use NPY")
    with np.load(path, allow_pickle=False) as arrays:
        name = "frames" if "frames" in arrays.files else arrays.files[0] if arrays.files else ""
        if name != "frames" and len(arrays.files) != 1:
            raise ValueError(f"expected one array or one named 'frames', got {arrays.files}")
        return arrays[name], False


_READERS: dict[str, Callable[[Path], tuple[np.ndarray, bool]]] = {
    ".png": _read_png,
    ".tif": _read_tiff,
    ".tiff": _read_tiff,
    ".npy": _read_npy,
    ".npz": _read_npz,
}
SUFFIXES = tuple(_READERS)
