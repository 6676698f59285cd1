"""Torch checkpoints: genuine files read to the last bit, hostile ones refused unexecuted.

The `.pth` files of `tests/data` were written by `torch.save` of PyTorch 2.13.
"""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from dscsnet_jax.io import torch_checkpoint
from dscsnet_jax.io.torch_checkpoint import read_initial_matrix, read_state

# --- what torch.save writes, by hand ------------------------------------------------------------


def value(plain: Any) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(plain, protocol=2)[2:-1]


def name(full: str) -> bytes:
    """Opcodes that push what a dotted name stands for."""
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def call(full: str, *arguments: bytes) -> bytes:
    """Opcodes that call it."""
    return name(full) + b"(" + b"".join(arguments) + b"tR"


def storage(size: Any, kind: str = "torch.FloatStorage", key: Any = "0") -> bytes:
    parts = [value("storage"), name(kind), value(key), value("cpu"), value(size)]
    return b"(" + b"".join(parts) + b"tQ"


def tensor(where: bytes, shape: Any, strides: Any, offset: Any = 0) -> bytes:
    parts = [value(offset), value(shape), value(strides), value(False)]
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", where, *parts, hooks)


def mapping(**items: bytes) -> bytes:
    body = b"".join(value(key) + item for key, item in items.items())
    return call("collections.OrderedDict") + b"(" + body + b"u"


def write(path: Path, content: bytes, *storages: bytes, **options: Any) -> Path:
    """An archive of that pickle and those numbers."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        for key, numbers in enumerate(storages):
            archive.writestr(f"archive/data/{key}", numbers)
    return path


NUMBERS = np.arange(6, dtype="<f4")
GOOD = tensor(storage(6), (2, 3), (3, 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.pth"


# --- reading ------------------------------------------------------------------------------------


def test_a_state_dict_of_torch_is_read_to_the_last_bit(data_dir: Path) -> None:
    state = read_state(data_dir / "ista_net_tiny.pth")
    assert len(state) == 12
    assert state["fcs.1.conv2_forward"].shape == (4, 4, 3, 3)
    for key, array in state.items():
        # The formula that made the file.
        wanted = np.sin(np.arange(array.size) * 0.37 + sum(map(ord, key))) / 4
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array.ravel(), wanted.astype(np.float32))


def test_all_kinds_and_views_of_torch_are_read(data_dir: Path) -> None:
    state = read_state(data_dir / "torch_kinds.pth")
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    wanted = {
        "turned": a.T,
        "part": a[1:3, 2:4],
        "half": a.astype(np.float16),
        "bfloat16": a,
        "double": a.astype(float),
        "long": a.astype(int),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(2.5),
        "expanded": np.broadcast_to(a[:, :1], (4, 5)),
        "parameter": a,
        "bool": a > 3,
    }
    assert list(state) == list(wanted)
    for key, array in wanted.items():
        np.testing.assert_array_equal(state[key], array, strict=True, err_msg=key)
        assert state[key].flags.writeable


def test_the_state_dict_is_taken_out_of_a_training_checkpoint(data_dir: Path) -> None:
    """Beside it lie logs of mmengine, numbers of NumPy and the state of the optimizer."""
    state = read_state(data_dir / "torch_training.pth")
    assert {key: array.tolist() for key, array in state.items()} == {
        "weight": [[1.0, 2.0]],
        "bias": [3.0],
    }


def test_a_file_made_here_is_read(path: Path) -> None:
    part = tensor(storage(6), (2,), (3,), offset=1)
    write(path, mapping(whole=GOOD, part=part), NUMBERS.tobytes())
    state = read_state(path)
    np.testing.assert_array_equal(state["whole"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(state["part"], [1, 4])


# --- code ---------------------------------------------------------------------------------------


class Hostile:
    """Makes a pickle that runs a command where it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_row30_a_command_in_a_pickle_is_refused_by_name_and_not_run(path: Path) -> None:
    marker = path.with_name("run")
    write(path, value(Hostile(f"touch {marker}")))
    with pytest.raises(ValueError, match=rf"state.pth: the pickle calls {os.name}\.system, which"):
        read_state(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "full",
    [
        "builtins.eval",
        "builtins.getattr",
        "subprocess.Popen",
        "torch.load",
        "torch._utils._rebuild_xla_tensor",
        "torch.ComplexFloatStorage",
        "torch.nn.modules.conv.Conv2d",
        "collections.Counter",
        "numpyro.load",
        "dscsnet_jax.io.weights.load_weights",
    ],
)
def test_row30_every_other_name_is_refused(path: Path, full: str) -> None:
    write(path, mapping(a=GOOD, b=call(full, value("1"))), NUMBERS.tobytes())
    with pytest.raises(ValueError, match=rf"state.pth: the pickle calls {full}, .* weights_only"):
        read_state(path)


def test_row30_what_is_skipped_is_not_called(path: Path) -> None:
    marker = path.with_name("run")
    code = f"open({str(marker)!r}, 'w').close()"
    evil = call("numpy.testing.runstring", value(code), value({}))
    write(path, mapping(state_dict=mapping(a=GOOD), log=evil), NUMBERS.tobytes())
    assert list(read_state(path)) == ["a"]
    assert not marker.exists()
    write(path, mapping(a=GOOD, log=evil), NUMBERS.tobytes())
    with pytest.raises(ValueError, match="expected tensors by name, got something else as 'log'"):
        read_state(path)


@pytest.mark.parametrize(
    "full",
    [
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
        "torch.Size",
    ],
)
def test_row30_a_pickle_cannot_change_what_reads_it(path: Path, full: str) -> None:
    change = name(full) + value((None, {"function": "other", "load": "other"})) + b"b"
    write(path, mapping(a=GOOD, b=change), NUMBERS.tobytes())
    with pytest.raises(ValueError, match=r"state.pth: "):
        read_state(path)
    write(path, mapping(a=GOOD), NUMBERS.tobytes())
    assert list(read_state(path)) == ["a"]


def test_row30_types_of_numbers_are_no_functions(path: Path) -> None:
    write(path, mapping(a=call("torch.FloatStorage", value(3))))
    with pytest.raises(ValueError, match="treats a type of numbers as a function"):
        read_state(path)


# --- damage -------------------------------------------------------------------------------------


def test_row24_a_truncated_file_is_told_wherever_it_ends(data_dir: Path, path: Path) -> None:
    whole = (data_dir / "ista_net_tiny.pth").read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"state.pth: "):
            read_state(path)


def test_row24_a_flipped_bit_is_told(data_dir: Path, path: Path) -> None:
    whole = bytearray((data_dir / "ista_net_tiny.pth").read_bytes())
    with zipfile.ZipFile(data_dir / "ista_net_tiny.pth") as archive:
        numbers = archive.read("ista_net_tiny/data/2")
    whole[whole.index(numbers) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"state.pth: Bad CRC-32"):
        read_state(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor(storage(6), (7,), (1,)), "reaches beyond its 6 numbers"),
        (tensor(storage(6), (2, 3), (4, 1)), "reaches beyond its 6 numbers"),
        (tensor(storage(6), (3,), (1,), offset=4), "reaches beyond its 6 numbers"),
        (tensor(storage(6), (2,), (-1,), offset=5), "whole numbers, not negative, got -1"),
        (tensor(storage(6), (2,), (1,), offset=-1), "whole numbers, not negative, got -1"),
        (tensor(storage(6), (-2,), (1,)), "whole numbers, not negative, got -2"),
        (tensor(storage(6), (2.0,), (1,)), "whole numbers, not negative, got 2.0"),
        (tensor(storage(6), [2], (1,)), r"expected a tuple of whole numbers, got \[2\]"),
        (tensor(storage(6), (2, 3), (1,)), r"shape \(2, 3\) and strides \(1,\) do not fit"),
        (tensor(storage(6), (2**20, 2**20), (0, 0)), "bytes of arrays are refused"),
        (tensor(storage(7), (2,), (1,)), "expected 7 numbers, the file has 6"),
        (tensor(storage(6, "torch.DoubleStorage"), (2,), (1,)), "6 numbers, the file has 3"),
        (tensor(storage(6, key="9"), (2,), (1,)), "no item named 'archive/data/9'"),
        (tensor(storage(6, key="../1"), (2,), (1,)), "no item named"),
        (tensor(storage(-6), (2,), (1,)), "not negative, got -6"),
        (tensor(storage(6, "torch.Size"), (2,), (1,)), "a storage of a type that is not known"),
        (tensor(value(6), (2,), (1,)), "a tensor without storage"),
        (value(6), "expected tensors by name, got something else as 'bad'"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(
    path: Path, bad: bytes, message: str
) -> None:
    write(path, mapping(good=GOOD, bad=bad), NUMBERS.tobytes())
    with pytest.raises(ValueError, match=f"state.pth: .*{message}"):
        read_state(path)


def test_many_large_views_of_a_small_storage_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_checkpoint, "_MAX_ARRAY_BYTES", 100)
    views = {f"v{n}": tensor(storage(6), (3, 3), (0, 0)) for n in range(2)}
    write(path, mapping(**views), NUMBERS.tobytes())
    assert len(read_state(path)) == 2
    views["v2"] = views["v0"]
    write(path, mapping(**views), NUMBERS.tobytes())
    with pytest.raises(ValueError, match="v2: more than 100 bytes of arrays are refused"):
        read_state(path)


def test_a_pickle_of_many_bytes_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_checkpoint, "_MAX_PICKLE_BYTES", 100)
    write(path, mapping(a=GOOD), NUMBERS.tobytes())
    with pytest.raises(ValueError, match=r"archive/data.pkl: \d+ bytes, more than 100"):
        read_state(path)


@pytest.mark.parametrize("content", [value([1]), value({}), value({"state_dict": 3})])
def test_a_pickle_without_tensors_by_name_is_refused(path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="expected a dict of tensors by name"):
        read_state(write(path, content))


# --- other kinds of files -----------------------------------------------------------------------


def test_row30_the_old_format_is_refused_with_a_way_out(path: Path) -> None:
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"more")
    with pytest.raises(ValueError, match=r"not in the zip format .*plain pickles and refused.*NEW"):
        read_state(path)


def test_other_archives_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"a zip archive, but not one of torch\.save"):
        read_state(path)
    write(path, mapping(a=GOOD), NUMBERS.tobytes(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"archive/data.pkl: compressed"):
        read_state(path)


def test_big_endian_numbers_are_refused(path: Path) -> None:
    write(path, mapping(a=GOOD), NUMBERS.tobytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="expected byte order little, got b'big'"):
        read_state(path)


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    for read in (read_state, read_initial_matrix):
        with pytest.raises(FileNotFoundError, match=r"state\.pth: no such file"):
            read(path)


# --- the initial matrix -------------------------------------------------------------------------


def test_the_initial_matrix_is_read_from_matlab_and_numpy(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 4))
    savemat(tmp_path / "q.mat", {"Qinit": matrix, "other": 1})
    np.save(tmp_path / "q.npy", matrix)
    for file in ("q.mat", "q.npy"):
        np.testing.assert_array_equal(read_initial_matrix(tmp_path / file), matrix)


def test_files_without_an_initial_matrix_are_refused(tmp_path: Path) -> None:
    savemat(tmp_path / "q.mat", {"other": np.ones((2, 2))})
    (tmp_path / "broken.mat").write_bytes(b"MATLAB 7.3 MAT-file" + bytes(200))
    np.save(tmp_path / "objects.npy", np.array([[None]], dtype=object), allow_pickle=True)
    for file in ("q.mat", "broken.mat", "objects.npy"):
        with pytest.raises(ValueError, match=f"{file}: not a MATLAB file of version 7 with Qinit"):
            read_initial_matrix(tmp_path / file)
    np.save(tmp_path / "vector.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"vector.npy: expected a matrix .*got shape \(3,\)"):
        read_initial_matrix(tmp_path / "vector.npy")
