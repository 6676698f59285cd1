"""Csist: the on-disk layout of the published CSIST-100K set, read and written.

A split is a folder with one image and one annotation per frame, paired by id:

    cso_img/image_<id>.png        8 or 16 bit grey counts
    Annotations/CSO<id>.xml       (older files: COS<id>.xml)

`xc` is the row and `yc` the column, pixel centres on integers. Frames that a PNG
cannot hold without loss (unrounded counts) are stored in the same place as
`image_<id>.npy`, one (N, M) array each: an extension of this project.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

from dscsnet_jax.io.formats import encode
from dscsnet_jax.io.frames import as_frames, read_many
from dscsnet_jax.io.outputs import prepare_output
from dscsnet_jax.physics.targets import Targets, from_lists, to_lists

IMAGES, ANNOTATIONS = "cso_img", "Annotations"
_IMAGE_NAME = re.compile(r"image_([0-9]+)\.(?:png|npy)")
_ANNOTATION_NAME = re.compile(r"(?:CSO|COS)([0-9]+)\.xml")
_MAX_XML_BYTES = 2**20
_SHOWN = 10
_FIELDS = ("xc", "yc", "brightness")


@dataclass(frozen=True, eq=False)
class CsistSplit:
    """One split of a data set in the published layout, in order of the ids.

    Attributes:
      ids: (B,) int64 ids of the frames.
      names: per frame the name `read_frames` gives it.
      frames: (B, N, M) counts; float32 from PNG.
      targets: float64 `Targets`, (B, K, ...), row and col in pixels, counts.
      sigma: PSF standard deviation of all frames, pixels.
      full_well: counts at which the frames' type saturates, inf if it does not.
    """

    ids: np.ndarray
    names: tuple[str, ...]
    frames: np.ndarray
    targets: Targets
    sigma: float
    full_well: float = float("inf")


def write_csist(
    root: str | Path,
    frames: np.ndarray,
    targets: Targets,
    *,
    sigma: float,
    bits: int | None = 8,
    first_id: int = 0,
    force: bool = False,
) -> None:
    """Write frames and targets in the published layout.

    Everything is written beside and moved into place at the end. `force` replaces the
    two folders of an earlier split and touches nothing else in `root`.

    Args:
      root: folder of the split; created, or empty unless `force`.
      frames: (B, N, M) counts, as `as_frames` accepts them.
      targets: `Targets` of the same B; row and col in pixels.
      sigma: PSF standard deviation, pixels.
      bits: 8 or 16 for PNG of whole counts; None for NPY of any counts.
      first_id: id of the first frame; the others follow.
      force: replace an existing split.

    Raises:
      FileExistsError: if `root` is not empty and `force` is false.
      OSError: if `root` cannot be written.
      ValueError: if B differs, or a frame or target cannot be stored without loss.

    Example:
      >>> y = np.full((1, 11, 11), 3.0, np.float32)
      >>> with tempfile.TemporaryDirectory() as home:
      ...     write_csist(home, y, from_lists([[(5.0, 6.5, 240.0)]]), sigma=0.5)
      ...     split = read_csist(home)
      >>> split.names, split.sigma, bool((split.frames == y).all()), to_lists(split.targets)
      (('image_0.png',), 0.5, True, [array([[  5. ,   6.5, 240. ]])])
    """
    root = prepare_output(root, force=force, folder=True)
    frames = as_frames(frames)
    tables = to_lists(targets)
    if len(tables) != len(frames) or not tables:
        raise ValueError(
            f"expected as many frames as target lists, at least one, got {len(frames)} frames "
            f"and {len(tables)} target lists"
        )
    if not all(np.isfinite(table).all() for table in tables):
        raise ValueError("targets: expected finite positions and intensities")
    if not 0 < float(sigma) < math.inf:
        raise ValueError(f"sigma: expected a positive number, got {sigma}")
    suffix = "npy" if bits is None else "png"
    with tempfile.TemporaryDirectory(dir=root, prefix=".csist-") as staging:
        for folder in (IMAGES, ANNOTATIONS):
            Path(staging, folder).mkdir()
        for number, (frame, table) in enumerate(zip(frames, tables, strict=True), first_id):
            encode(Path(staging, IMAGES, f"image_{number}.{suffix}"), frame, bits=bits)
            text = _annotation_xml(f"CSO{number}", frame.shape, float(sigma), table)
            Path(staging, ANNOTATIONS, f"CSO{number}.xml").write_text(text, encoding="utf-8")
        for folder in (IMAGES, ANNOTATIONS):
            if (root / folder).exists():
                shutil.rmtree(root / folder)
            Path(staging, folder).rename(root / folder)


def _annotation_xml(name: str, shape: tuple[int, ...], sigma: float, table: np.ndarray) -> str:
    """One annotation; every number keeps all its digits."""
    lines = [
        '<?xml version="1.0" ?>',
        "<annotation>",
        f"\t<filename>{name}</filename>",
        "\t<size>",
        f"\t\t<width>{shape[1]}</width>",
        f"\t\t<height>{shape[0]}</height>",
        "\t\t<depth>1</depth>",
        "\t</size>",
        f"\t<sigma>{sigma!r}</sigma>",
    ]
    for target in table.tolist():
        values = zip(_FIELDS, target, strict=True)
        lines += [
            "\t<object>",
            "\t\t<name>Target</name>",
            "\t\t<coordinate>",
            *(f"\t\t\t<{field}>{value!r}</{field}>" for field, value in values),
            "\t\t</coordinate>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def read_csist(root: str | Path, *, one_based: bool = False) -> CsistSplit:
    """Read a split in the published layout; images and annotations are paired by id.

    Args:
      root: the folder that holds `cso_img` and `Annotations`.
      one_based: the annotations count pixels from 1 (some published files do).

    Returns:
      The `CsistSplit`.

    Raises:
      FileNotFoundError: if a folder is missing.
      ValueError: if ids do not pair up, or a file is broken, refused or at odds with the
        others; the message names the files and the field.
    """
    root = Path(root)
    images = _by_id(root, IMAGES, _IMAGE_NAME)
    annotations = _by_id(root, ANNOTATIONS, _ANNOTATION_NAME)
    _check_pairs(root, images, annotations)
    ids = sorted(images)
    stacks = read_many([images[i][0] for i in ids])
    if len(stacks) > 1:
        odd = stacks[1]
        raise ValueError(
            f"{root / IMAGES}: {odd.names[0]} has pixels {odd.kind}, "
            f"the frames before it {stacks[0].kind}"
        )
    names, frames = stacks[0].names, stacks[0].frames
    if len(names) != len(ids):
        raise ValueError(
            f"{root / IMAGES}: expected one frame per file, got {len(names)} frames "
            f"in {len(ids)} files"
        )
    tables, sigmas = [], []
    for i in ids:
        table, sigma = _read_annotation(annotations[i][0], frames.shape[1:])
        tables.append(table - np.array([1.0, 1.0, 0.0]) if one_based else table)
        sigmas.append(sigma)
        if sigma != sigmas[0]:
            raise ValueError(f"{annotations[i][0]}: sigma is {sigma}, before it {sigmas[0]}")
    targets, well = from_lists(tables), stacks[0].full_well
    return CsistSplit(np.array(ids), names, frames, targets, sigmas[0], well)


def _by_id(root: Path, folder: str, pattern: re.Pattern[str]) -> dict[int, list[Path]]:
    """The files of a folder by id; names that look like data but carry no id are refused."""
    home = root / folder
    if not home.is_dir():
        raise FileNotFoundError(f"{home}: no such folder; {root} must hold {IMAGES}, {ANNOTATIONS}")
    found: dict[int, list[Path]] = {}
    for file in sorted(home.iterdir()):
        match = pattern.fullmatch(file.name)
        if match:
            found.setdefault(int(match[1]), []).append(file)
        elif file.suffix.lower() in (".png", ".npy", ".xml") and not file.name.startswith("."):
            raise ValueError(f"{file}: expected a name of the form {pattern.pattern}")
    return found


def _check_pairs(
    root: Path, images: dict[int, list[Path]], annotations: dict[int, list[Path]]
) -> None:
    """Exactly one image and one annotation per id."""
    if not images and not annotations:
        raise ValueError(f"{root}: expected at least one image and its annotation, got none")
    twice = [
        path.name
        for files in (*images.values(), *annotations.values())
        if len(files) > 1
        for path in files
    ]
    faults: dict[str, list] = {
        "images without annotation": sorted(images.keys() - annotations.keys()),
        "annotations without image": sorted(annotations.keys() - images.keys()),
        "files that share an id": twice,
    }
    if any(faults.values()):
        told = "; ".join(f"{what}: {_shorten(which)}" for what, which in faults.items())
        raise ValueError(f"{root}: {told}")


def _shorten(items: list) -> str:
    """The first few items of a list and how many more there are."""
    shown = ", ".join(map(str, items[:_SHOWN])) or "none"
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"


def _read_annotation(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The (n, 3) table of row, col, brightness and the sigma of one annotation."""
    tree = _parse(path)
    size = (_number(path, tree, "size/height"), _number(path, tree, "size/width"))
    if size != shape:
        raise ValueError(
            f"{path}: field size/height, size/width: expected {tuple(shape)} as in the image, "
            f"got {size}"
        )
    sigma = _number(path, tree, "sigma")
    if sigma <= 0:
        raise ValueError(f"{path}: field sigma: expected a positive number, got {sigma}")
    rows = [
        [_number(path, node, f"coordinate/{f}", f"object[{i}]/") for f in _FIELDS]
        for i, node in enumerate(tree.findall("object"), 1)
    ]
    return np.array(rows, float).reshape(-1, 3), sigma


def _parse(path: Path) -> Element:
    """The root of an annotation; document types and huge files are refused unread."""
    size = path.stat().st_size
    if size > _MAX_XML_BYTES:
        raise ValueError(f"{path}: an annotation of {size} bytes is refused ({_MAX_XML_BYTES} max)")
    try:
        tree = ElementTree.fromstring(path.read_bytes(), forbid_dtd=True)
    except DefusedXmlException as error:
        raise ValueError(f"{path}: document types and entities are refused") from error
    except (ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: malformed XML ({error})") from error
    if tree.tag != "annotation":
        raise ValueError(f"{path}: expected the root element annotation, got {tree.tag}")
    return tree


def _number(path: Path, node: Element, field: str, where: str = "") -> float:
    """The finite number in a field."""
    text = node.findtext(field)
    if text is None:
        raise ValueError(f"{path}: field {where}{field} is missing")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: field {where}{field}: expected a number, got {text.strip()!r}")
    return value
