"""Weights: exact round trip with their geometry; any damage is told, pickles are refused."""

import json
import pickle
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import dscsnet_jax
from dscsnet_jax.io.weights import (
    Geometry,
    Metadata,
    check_geometry,
    geometry_of,
    load_weights,
    packaged_weights,
    save_weights,
)
from dscsnet_jax.physics.optics import sensing_operator

ABOUT = Metadata(
    method="dscsnet",
    config={"channels": 48, "K": 4, "threshold": "attention", "tied": False},
    geometry=Geometry((11, 11), 3, (0.5, 0.5)),
    score={"mAP": 0.1 + 0.2, "AP25": 99.6},
    training={"seed": 0, "notes": "ünï"},
)


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "steps": {
            "conv": {"kernel": rng.normal(size=(4, 3, 3, 2)).astype(np.float32)},
            "rho": jnp.asarray([0.1, -np.inf, 3.0], jnp.float32),
        },
        "scale": np.asarray(0.5, np.float64),
        "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "half": np.ones((0, 2), np.float16),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Saved weights."""
    save_weights(tmp_path / "w.safetensors", params(), ABOUT)
    return tmp_path / "w.safetensors"


def test_round_trip_is_exact(path: Path) -> None:
    weights = load_weights(path)
    assert weights.metadata == ABOUT
    assert weights.metadata.package_version == dscsnet_jax.__version__
    assert jax.tree.structure(weights.params) == jax.tree.structure(params())
    for got, expected in zip(
        jax.tree.leaves(weights.params), jax.tree.leaves(params()), strict=True
    ):
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)


def test_names_in_the_file_are_paths(path: Path) -> None:
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == [
            "half",
            "scale",
            "steps/conv/kernel",
            "steps/rho",
            "turned",
        ]
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["geometry"] == {"frame_size": [11, 11], "division": 3, "sigma": [0.5, 0.5]}
    assert sorted(p.name for p in path.parent.iterdir()) == ["w.json", "w.safetensors"]


def test_row24_truncated_weights_are_told(path: Path) -> None:
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.safetensors: truncated or altered"):
            load_weights(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"w\.safetensors: truncated or altered"):
        load_weights(path)


def test_row24_any_flipped_bit_of_the_tensors_is_told(path: Path) -> None:
    whole = path.read_bytes()
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"w\.safetensors: truncated or altered"):
            load_weights(path)


def test_row24_damaged_metadata_is_told(path: Path) -> None:
    side = path.with_suffix(".json")
    whole = side.read_bytes()
    for length in (0, 1, 50, len(whole) - 3):
        side.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.json: not metadata of weights"):
            load_weights(path)
    side.write_text(whole.decode().replace('"division": 3', '"division": 7'))
    with pytest.raises(ValueError, match=r"w\.json: truncated or altered"):
        load_weights(path)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format_version": 1}', "[" * 100_000])
def test_row24_other_json_is_told(path: Path, text: str) -> None:
    path.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"w\.json: not metadata of weights"):
        load_weights(path)


def test_row29_newer_format_is_refused(path: Path) -> None:
    side = path.with_suffix(".json")
    side.write_text(side.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"w\.json: .*format version 1 expected, got 2"):
        load_weights(path)


def test_missing_files_are_named(path: Path) -> None:
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"w\.json: no such file"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match=r"v\.safetensors: no such file"):
        load_weights(path.with_name("v.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".ckpt", ".PTH"])
def test_row30_pickle_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"pickles .* are refused"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"pickles .* are refused"):
        save_weights(path, params(), ABOUT, force=True)


def test_row30_other_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the suffix \.safetensors, got '\.npz'"):
        load_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("taken", ["w.safetensors", "w.json"])
def test_row35_existing_weights_are_refused_without_force(path: Path, taken: str) -> None:
    other = "w.json" if taken == "w.safetensors" else "w.safetensors"
    (path.parent / other).unlink()
    before = (path.parent / taken).read_bytes()
    with pytest.raises(FileExistsError, match=taken):
        save_weights(path, {"a": np.ones(1)}, ABOUT)
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [(taken, before)]
    save_weights(path, {"a": np.ones(1)}, ABOUT, force=True)
    assert load_weights(path).params["a"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "the tree is empty"),
        ({"a": {}}, "a/ is empty"),
        ({"a/b": np.ones(1)}, "keys of text without '/'"),
        ({"a": {3: np.ones(1)}}, "got a/3"),
        ({"a": [np.ones(1)]}, "a: expected an array of numbers, got list"),
        ({"a": np.array([None])}, "a: expected an array of numbers, got object"),
        ({"a": 3.0}, "a: expected an array of numbers, got float"),
    ],
)
def test_parameters_that_cannot_be_stored_are_named(tmp_path: Path, tree: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        save_weights(tmp_path / "w.safetensors", tree, ABOUT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), np.float32(1), {1, 2}])
def test_metadata_must_be_plain(tmp_path: Path, value: object) -> None:
    about = Metadata("dscsnet", {}, ABOUT.geometry, score={"mAP": value})
    with pytest.raises(ValueError, match=r"metadata for .*w\.safetensors: expected plain JSON"):
        save_weights(tmp_path / "w.safetensors", params(), about)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [11, 20, (9, 13)])
@pytest.mark.parametrize("sigma", [0.5, (0.5, 0.5), np.float32(0.5)])
def test_row21_same_geometry_at_any_size_is_accepted(size: Any, sigma: Any) -> None:
    check_geometry(ABOUT, sensing_operator(size, division=3, psf=sigma))


@pytest.mark.parametrize(
    ("division", "sigma", "says"),
    [
        (5, 0.5, r"trained for division 3, sigma \(0\.5, 0\.5\); .* division 5, sigma \(0\.5"),
        (3, 0.51, r"trained for division 3, sigma \(0\.5, 0\.5\); .* division 3, sigma \(0\.5"),
        (3, (0.5, 0.6), r"sigma \(0\.5, 0\.6"),
    ],
)
def test_row21_other_geometry_is_refused_naming_both(division: int, sigma: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_geometry(ABOUT, sensing_operator(11, division=division, psf=sigma))


def test_row21_geometry_survives_the_file_in_single_precision(tmp_path: Path) -> None:
    operator = sensing_operator((9, 13), division=5, psf=(0.6, 0.7))
    about = Metadata("dscsnet", {}, geometry_of(operator))
    save_weights(tmp_path / "w.safetensors", {"a": np.ones(1)}, about)
    stored = load_weights(tmp_path / "w.safetensors").metadata
    assert stored.geometry.frame_size == (9, 13)
    assert stored.geometry.division == 5
    check_geometry(stored, operator)
    declared = Metadata("dscsnet", {}, Geometry((11, 11), 5, (0.6, 0.7)))
    check_geometry(declared, operator)


def test_packaged_weights_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "files", lambda package: tmp_path / package)
    with pytest.raises(FileNotFoundError, match="no packaged weights 'csist_c3'; available: none"):
        packaged_weights()
    home = tmp_path / "dscsnet_jax" / "pretrained"
    save_weights(home / "csist_c3.safetensors", params(), ABOUT)
    assert load_weights(packaged_weights()).metadata == ABOUT
    with pytest.raises(FileNotFoundError, match=r"no packaged weights '\.\./x'; .*: csist_c3$"):
        packaged_weights("../x")


def test_packaged_folder_is_part_of_the_package() -> None:
    assert (resources.files("dscsnet_jax") / "pretrained" / "__init__.py").is_file()
