"""`dscsnet calibrate` and `unmix --learn`: what was learned is written, told and used."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dscsnet_jax.cli import calibrate, main, unmix
from dscsnet_jax.estimation import unmix as library
from dscsnet_jax.estimation.calibrate import Calibration
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.targets import from_lists

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    path = tmp_path / "stack.npy"
    np.save(path, np.random.default_rng(0).normal(10, 2, (8, 11, 11)).astype(np.float32))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Known]:
    """What was known before, as the library is told; it learns the noise."""
    calls: list[Known] = []

    def learn(frames: np.ndarray, known: Known, *, seed: int) -> Calibration:
        calls.append(known)
        sensor = dataclasses.replace(known.sensor, read_noise=2.25)
        taught = dataclasses.replace(known, sensor=sensor)
        parameters = {"read_noise": (2.25, 0.01), "width": (0.5, float("inf"))}
        return Calibration(taught, parameters, 12.0, 3.0, 0.25, len(frames))

    monkeypatch.setattr(calibrate, "calibrate", learn)
    return calls


def test_a_file_and_a_report_come_out(
    frames: Path, asked: list[Known], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "sensor.json"
    argv = ["calibrate", str(frames), "--out", str(out), "--fix", "sigma=0.6"]
    assert main([*argv, "--fix", "intensity=50,250", "--separation", "0.3"]) == 0
    assert asked == [Known(0.6, prior=scene_prior(intensity=(50, 250), separation=0.3))]
    taught = Known.from_json(out)
    assert (taught.sensor.read_noise, taught.psf.sigma) == (2.25, 0.6)
    first, noise, width, *_, other, file = capsys.readouterr().out.splitlines()
    assert first == "learned from 8 frames"
    assert noise.split() == ["read", "noise", "2.25", "+-", "0.01", "counts"]
    assert "do not tell" in width
    assert other == "frames of another kind: 25 %"
    assert file == f"file: {out}"
    assert main(argv) == 2
    assert "sensor.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--fix", "sigma"], "NAME=VALUE"),
        (["--fix", "colour=3"], "sigma, noise"),
        (["--fix", "intensity=3"], "LOW,HIGH"),
        (["--fix", "sigma=-1"], "above 0"),
    ],
)
def test_what_cannot_be_fixed_is_a_usage_error(
    wrong: list[str], named: str, frames: Path, asked: list[Known], capsys: Captured
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", str(frames), "--out", "a.json", *wrong])
    assert named in capsys.readouterr().err
    assert not asked


def test_outputs_and_sizes_are_checked_before_the_work(
    frames: Path, asked: list[Known], tmp_path: Path, capsys: Captured
) -> None:
    assert main(["calibrate", str(frames), "--out", str(tmp_path / "a.csv")]) == 2
    assert ".json" in capsys.readouterr().err
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((8, 9, 9)))
    assert main(["calibrate", str(frames), str(other), "--out", str(tmp_path / "a.json")]) == 2
    assert "(9, 9)" in capsys.readouterr().err
    assert not asked
    assert not (tmp_path / "a.json").exists()


def test_unmix_learns_first(
    frames: Path,
    asked: list[Known],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    told: list[Known] = []

    def answer(frames: np.ndarray, known: Known, **_: object) -> UnmixResult:
        told.append(known)
        return library.unmix(frames, method="grid")

    monkeypatch.setattr(unmix, "unmix", answer)
    out = tmp_path / "targets.csv"
    argv = ["unmix", str(frames), "--learn", "--out", str(out)]
    assert main(argv) == 0
    assert [known.sensor.read_noise for known in told] == [2.25]
    assert Known.from_json(tmp_path / "targets.known.json").sensor.read_noise == 2.25
    assert "learned from 8 frames" in capsys.readouterr().err
    out.unlink()
    assert main(argv) == 2  # what was learned before is kept
    assert "targets.known.json" in capsys.readouterr().err
    assert len(told) == 1


def test_what_learning_would_tell_is_said_from_enough_frames_up(
    asked: list[Known], tmp_path: Path, capsys: Captured
) -> None:
    frames = np.random.default_rng(0).normal(10, 2, (50, 11, 11))
    frames += np.asarray(render(from_lists([[(5.0, 5.2, 400.0)]] * 50), frame_size=11, psf=0.5))
    path = tmp_path / "stack.npy"
    np.save(path, frames.astype(np.float32))
    argv = ["unmix", str(path), "--method", "grid", "--noise", "2"]
    assert main([*argv, "--out", str(tmp_path / "a.csv")]) == 0
    said = "not told: PSF width, range of the intensities, probabilities of the counts"
    assert said in capsys.readouterr().out
    assert main([*argv, "--learn", "--out", str(tmp_path / "learned.csv")]) == 0
    assert "not told" not in capsys.readouterr().out
    assert asked  # what they did not teach is not offered again
    np.save(path, frames[:40].astype(np.float32))
    assert main([*argv, "--out", str(tmp_path / "b.csv")]) == 0
    assert "not told" not in capsys.readouterr().out
