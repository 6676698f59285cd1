"""`dscsnet import-weights`: the weights written are those of the checkpoint."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dscsnet_jax.cli import import_weights
from dscsnet_jax.cli import main as run_command
from dscsnet_jax.io.torch_checkpoint import read_state
from dscsnet_jax.io.weights import Geometry, load_weights
from dscsnet_jax.maps.network import network_of
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.unfolding.baselines.ista_net import IstaNet, IstaNetConfig
from dscsnet_jax.unfolding.registry import make_network

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no compilations: nothing here runs twice."""
    monkeypatch.setattr("dscsnet_jax.cli._keep_compilations", lambda: None)


@pytest.fixture
def argv(data_dir: Path, tmp_path: Path) -> list[str]:
    """Import of the small checkpoint."""
    checkpoint, out = data_dir / "ista_net_tiny.pth", tmp_path / "w.safetensors"
    return ["import-weights", str(checkpoint), "--method", "ista_net", "--out", str(out)]


def test_a_checkpoint_becomes_weights_with_their_geometry(
    argv: list[str], data_dir: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run_command([*argv, "--sigma", "0.6", "--division", "2", "--frame-size", "5"]) == 0
    assert "ista_net: 724 parameters" in capsys.readouterr().out
    weights = load_weights(tmp_path / "w.safetensors")
    assert weights.metadata.geometry == Geometry((5, 5), 2, (0.6, 0.6))
    assert weights.metadata.training == {"imported_from": "ista_net_tiny.pth"}
    wanted = IstaNetConfig(division=2, iterations=2, channels=4, intensity_scale=1.0)
    assert network_of(weights) == IstaNet(wanted)
    state = read_state(data_dir / "ista_net_tiny.pth")
    iterations = weights.params["iterations"]
    for k in range(2):
        kernel = state[f"fcs.{k}.conv2_backward"]
        np.testing.assert_array_equal(
            iterations["backward2"][k][..., 0], kernel[0].transpose(1, 2, 0)
        )
        np.testing.assert_array_equal(iterations["step"][k], state[f"fcs.{k}.lambda_step"][0])


def test_the_initial_matrix_goes_with_the_weights(argv: list[str], tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(100, 25)).astype(np.float32)
    np.save(tmp_path / "q.npy", matrix)
    more = ["--division", "2", "--frame-size", "5", "--initial-matrix", str(tmp_path / "q.npy")]
    assert run_command([*argv, *more]) == 0
    weights = load_weights(tmp_path / "w.safetensors")
    assert weights.metadata.config["start"] == "matrix"
    stored = weights.params["start"]["matrix"]
    np.testing.assert_array_equal(stored[3, 1], matrix[:, 16].reshape(10, 10))


def test_the_branch_weight_is_that_of_dista_net(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run_command([*argv, "--branch-weight", "0.5"]) == 2
    assert "--branch-weight is of dista_net, not of ista_net" in capsys.readouterr().err
    argv[argv.index("ista_net")] = "dista_net"
    layout: Any = make_network("dista_net", channels=2, hidden=3).layout  # type: ignore[attr-defined]
    monkeypatch.setattr(import_weights, "read_state", lambda _: dista_state(layout))
    assert run_command([*argv, "--branch-weight", "0.5", "--frame-size", "2"]) == 0
    config = load_weights(tmp_path / "w.safetensors").metadata.config
    assert (config["branch_weight"], config["frame_size"], config["hidden"]) == (0.5, 2, 3)


def dista_state(layout: Any) -> dict[str, np.ndarray]:
    """One iteration of 2 features for frames of 2 x 2 pixels."""
    shapes = {
        "lambda_step": (1,),
        "conv1_forward": (2, 1, 3, 3),
        "conv2_forward": (2, 2, 3, 3),
        "conv1_backward": (2, 2, 3, 3),
        "conv2_backward": (1, 2, 3, 3),
        "w1": (3, 36),
        "w2": (9, 3),
        "att.convl": (2, 1, 3, 3),
        "att.conv0_s": (1, 2, 1, 1),
        "att.conv1_s": (1, 2, 1, 1),
        "att.conv_squeeze": (2, 2, 3, 3),
        "att.conv_m": (2, 1, 1, 1),
    }
    state = {}
    for name in layout.inner():
        shape = shapes[name.removesuffix(".weight").removesuffix(".bias")]
        state[f"fcs.0.{name}"] = np.ones(shape[:1] if name.endswith(".bias") else shape)
    return state


def test_row30_nothing_is_written_of_a_file_that_is_refused(
    argv: list[str], tmp_path: Path, capsys: Captured
) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"\x80\x02.")
    assert run_command([argv[0], str(bad), *argv[2:]]) == 2
    assert "bad.pth: not in the zip format" in capsys.readouterr().err
    argv[argv.index("ista_net")] = "ista_net_plus"
    assert run_command(argv) == 2
    message = "ista_net_tiny.pth: the checkpoint is of ista_net, not of ista_net_plus"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("w.*"))


def test_each_argument_is_blamed_for_its_own_fault(
    argv: list[str], tmp_path: Path, capsys: Captured
) -> None:
    np.save(tmp_path / "q.npy", np.ones((3, 3), np.float32))
    assert run_command([*argv, "--initial-matrix", str(tmp_path / "q.npy")]) == 2
    said = capsys.readouterr().err
    assert "q.npy: the initial matrix: expected shape (1089, 121), got (3, 3)" in said
    assert "ista_net_tiny.pth" not in said
    argv[argv.index("ista_net")] = "dista_net"
    assert run_command([*argv, "--branch-weight", "1.5"]) == 2
    said = capsys.readouterr().err
    assert "branch_weight must be in 0..1, got 1.5" in said
    assert "ista_net_tiny.pth" not in said


def test_existing_weights_are_replaced_by_force_only(
    argv: list[str], tmp_path: Path, capsys: Captured
) -> None:
    assert run_command(argv) == 0
    before = (tmp_path / "w.safetensors").read_bytes()
    assert run_command(argv) == 2
    assert "w.safetensors exists" in capsys.readouterr().err
    assert run_command([*argv, "--force"]) == 0
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_imported_weights_run(argv: list[str], tmp_path: Path) -> None:
    assert run_command([*argv, "--frame-size", "4"]) == 0
    weights = load_weights(tmp_path / "w.safetensors")
    network = network_of(weights)
    y = jax.ShapeDtypeStruct((1, 4, 4), np.float32)
    operator = jax.eval_shape(lambda: sensing_operator(4, division=3, psf=0.5))
    assert jax.eval_shape(network.apply, weights.params, y, operator).x.shape == (1, 12, 12)
