"""Plain JSON with arrays beside it: what is written is read, and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dscsnet_jax.io.plain import read_plain, write_plain


def same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            same(a[name], b[name])
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, strict=a.size > 64)
    else:
        assert a == b
        assert type(a) is type(b)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tree = {
        "text": "pixel",
        "none": None,
        "flag": True,
        "whole": 3,
        "number": 0.1 + 0.2,
        "endless": math.inf,
        "few": rng.uniform(size=5),
        "rows": np.array([[1.0, math.inf], [0.1, 2.0]]),
        "deep": {"er": {"many": rng.normal(size=(9, 9)).astype("f4"), "mask": np.eye(12) > 0}},
    }
    write_plain(tmp_path / "a.json", tree)
    same(tree, read_plain(tmp_path / "a.json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz"]
    text = (tmp_path / "a.json").read_text()
    json.loads(text)  # strict JSON: no Infinity
    assert '"rows": [[1.0, "inf"], [0.1, 2.0]],' in text  # a list on a line


def test_scalars_of_arrays_are_numbers(tmp_path: Path) -> None:
    write_plain(tmp_path / "a.json", {"a": np.float32(0.1), "b": np.array(2)})
    read = read_plain(tmp_path / "a.json")
    assert read == {"a": float(np.float32(0.1)), "b": 2}
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "expected an object"),
        ('{"a": [1, "b"]}', "a must be a list of numbers"),
        ('{"a": {"b": [[1, 2], [3]]}}', "a.b must be a list of numbers"),
        ('{"a": {"file": "../b.npz", "name": "a", "sha256": ""}}', "a must be in a file beside it"),
        ('{"a": {"file": "b.npz", "name": "a", "sha256": ""}}', "which is missing"),
        ('{"a": {"file": 1, "name": "a", "sha256": ""}}', "as text"),
        ('{"a":' * 100_000, "deeply"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_plain(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_row27_arrays_that_were_damaged_or_mixed_up_are_refused(tmp_path: Path) -> None:
    one, two = (tmp_path / name for name in ("one.json", "two.json"))
    write_plain(one, {"a": np.arange(100.0)})
    write_plain(two, {"a": np.arange(100.0) + 1})
    kept = (tmp_path / "one.npz").read_bytes()
    (tmp_path / "one.npz").write_bytes((tmp_path / "two.npz").read_bytes())
    with pytest.raises(ValueError, match="not what was written with this file"):
        read_plain(one)
    for damaged in (kept[:-30], b"", b"PK" + kept[2:90]):
        (tmp_path / "one.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read from"):
            read_plain(one)
    flipped = bytearray(kept)
    flipped[len(kept) // 2] ^= 8
    (tmp_path / "one.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"cannot be read from|not what was written"):
        read_plain(one)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "one.npz", a=np.load(tmp_path / "objects.npy", allow_pickle=True))
    with pytest.raises(ValueError, match="cannot be read from"):
        read_plain(one)


def test_binary_files_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a JSON file"):
        read_plain(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "none.json")
