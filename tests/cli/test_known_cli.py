"""`dscsnet known`, `dscsnet info`, and `--known` on the verbs that unmix."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dscsnet_jax as dj
from dscsnet_jax.cli import info, main, progress, unmix
from dscsnet_jax.estimation import unmix as library
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import scene_prior
from dscsnet_jax.physics.preset import Sensor, presets

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """What is known of some sensor."""
    path = tmp_path / "sensor.json"
    sensor = Sensor(
        read_noise=2.0, pedestal=10.0, background=3.0, gain=4.0, saturation=4095.0, misfit=0.1
    )
    Known(0.48, sensor, scene_prior(intensity=(50, 250), separation=0.3)).to_json(path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Known]:
    """What `dscsnet unmix` tells the library, which answers by the quick method."""
    told: list[Known] = []

    def answer(frames: np.ndarray, known: Known, **_: Any) -> UnmixResult:
        told.append(known)
        return library.unmix(frames, method="grid")

    monkeypatch.setattr(unmix, "unmix", answer)
    return told


def test_a_preset_becomes_a_file_that_a_person_edits(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "sensor.json"
    assert main(["known", "show", "csist_noise", "--out", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"file: {path}"
    rows = {line.split()[0]: line.split()[1:] for line in shown[:-1]}
    assert rows["sensor.read_noise"] == ["5.0", "count"]
    assert rows["sensor.gain"] == ["not", "known"]
    assert Known.from_json(path).sensor == presets()["csist_noise"].sensor
    tree = json.loads(path.read_text())
    tree["sensor"]["read_noise"] = 3.5
    path.write_text(json.dumps(tree))
    assert main(["known", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: right\n"
    assert Known.from_json(path).sensor.read_noise == 3.5
    assert main(["known", "show", "csist", "--out", str(path)]) == 2
    assert "use force" in capsys.readouterr().err
    assert Known.from_json(path).sensor.read_noise == 3.5


def test_maps_are_shown_by_their_range(tmp_path: Path, capsys: Captured) -> None:
    noise = np.linspace(1, 3, 99).reshape(9, 11)
    Known(sensor=Sensor(read_noise=noise)).to_json(tmp_path / "a.json")
    assert main(["known", "show", str(tmp_path / "a.json")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "read_noise" in x)
    assert line.split(maxsplit=1)[1] == "9 x 11 numbers, 1 .. 3  count"


def test_the_psf_is_drawn(file: Path, tmp_path: Path, capsys: Captured) -> None:
    picture = tmp_path / "psf.png"
    assert main(["known", "show", str(file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["known", "check", str(file), "--plot", str(tmp_path / "psf.pdf")]) == 2
    assert "expected the suffix .png" in capsys.readouterr().err
    Known().to_json(tmp_path / "none.json")
    nothing = ["known", "show", str(tmp_path / "none.json"), "--plot", str(tmp_path / "b.png")]
    assert main(nothing) == 2
    assert "tells no PSF" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "version must be 1, got None"),
        ('{"version": 1, "sensor": {"gain": 0}}', "gain must be finite electrons per count above"),
        ('{"version": 1, "sensor": {"noise": 1}}', "sensor has no field 'noise'"),
        ('{"version": 1, "units": {"sensor.gain": "count"}}', "unit of sensor.gain must be"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "unmix"])
def test_row21_a_wrong_file_is_one_line_and_writes_nothing(
    verb: str, text: str, said: str, tmp_path: Path, capsys: Captured
) -> None:
    path, out = tmp_path / "sensor.json", tmp_path / "targets.csv"
    path.write_text(text)
    np.save(tmp_path / "a.npy", np.zeros((11, 11)))
    argv = ["unmix", str(tmp_path / "a.npy"), "--known", str(path), "--out", str(out)]
    assert main(["known", "check", str(path)] if verb == "check" else argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: " in error
    assert said in error
    assert not out.exists()


def test_row21_a_map_of_other_frames_is_refused(tmp_path: Path, capsys: Captured) -> None:
    np.save(tmp_path / "a.npy", np.zeros((11, 12)))
    Known(sensor=Sensor(read_noise=np.ones((9, 11)))).to_json(tmp_path / "s.json")
    argv = ["unmix", str(tmp_path / "a.npy"), "--known", str(tmp_path / "s.json")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "read_noise of frames (1, 11, 12) must have one of the shapes" in error
    assert "got (9, 11)" in error
    assert main([*argv[:-1], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_what_else_is_told_comes_before_the_file(
    file: Path, tmp_path: Path, calls: list[Known]
) -> None:
    np.save(tmp_path / "a.npy", np.zeros((11, 11)))
    argv = ["unmix", str(tmp_path / "a.npy"), "--known", str(file)]
    more = [
        [],
        ["--noise=5", "--sigma=0.6"],
        ["--pedestal=7"],
        ["--separation=0.5"],
        ["--prior=csist"],
        ["--prior=csist", "--intensity", "1", "9"],
        ["--saturation=inf", "--gain=2", "--misfit=0.2"],
        ["--prior=none"],
        ["--prior=none", "--separation=0.5"],
    ]
    for extra in more:
        assert main([*argv, *extra]) == 0
    assert main([*argv[:-1], "csist_noise"]) == 0
    plain, noise, pedestal, separation, prior, both, sensor, *none, preset = calls
    told = Known.from_json(file)
    assert plain == told
    assert noise == told.replace(psf=0.6, sensor=dataclasses.replace(told.sensor, read_noise=5.0))
    # The background in the file goes with its own pedestal.
    other = dataclasses.replace(told.sensor, pedestal=7.0, background=None)
    assert pedestal == told.replace(sensor=other)
    assert separation == told.replace(prior=scene_prior(intensity=(50, 250), separation=0.5))
    csist = presets()["csist"].known.prior
    assert prior == told.replace(prior=csist)
    assert both.prior.intensity.range == (1, 9)
    assert (both.prior.cluster_offset, both.prior.count) == (csist.cluster_offset, csist.count)
    assert sensor.sensor == dataclasses.replace(
        told.sensor, saturation=np.inf, gain=2.0, misfit=0.2
    )
    nothing = scene_prior(intensity=dj.AnyIntensity())
    assert none[0] == told.replace(prior=nothing)
    assert none[1] == told.replace(prior=nothing.replace(separation=0.5))
    assert preset == presets()["csist_noise"].known


def test_frames_that_lie_beside_are_not_overwritten(tmp_path: Path, capsys: Captured) -> None:
    """Large arrays go into an NPZ of the same name: it may be somebody's."""
    Known(sensor=Sensor(read_noise=np.ones((11, 11)))).to_json(tmp_path / "s.json")
    np.savez(tmp_path / "night.npz", frames=np.ones(3))
    before = (tmp_path / "night.npz").read_bytes()
    argv = ["known", "show", str(tmp_path / "s.json"), "--out", str(tmp_path / "night.json")]
    assert main(argv) == 2
    assert "night.npz" in capsys.readouterr().err
    assert (tmp_path / "night.npz").read_bytes() == before
    assert not (tmp_path / "night.json").exists()
    assert main([*argv, "--force"]) == 0
    assert Known.from_json(tmp_path / "night.json").sensor.read_noise.shape == (11, 11)


def test_numbers_of_each_frame_go_with_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Known], capsys: Captured
) -> None:
    monkeypatch.setattr(progress, "RUN", 2)
    np.save(tmp_path / "a.npy", np.zeros((5, 11, 11)))
    Known(sensor=Sensor(read_noise=np.arange(1.0, 6.0))).to_json(tmp_path / "s.json")
    argv = ["unmix", str(tmp_path / "a.npy"), "--known", str(tmp_path / "s.json")]
    assert main(argv) == 0
    assert [call.sensor.read_noise.tolist() for call in calls] == [[1, 2], [3, 4, 5]]
    np.save(tmp_path / "b.npy", np.zeros((5, 9, 9)))
    calls.clear()
    assert main([*argv[:2], str(tmp_path / "b.npy"), *argv[2:]]) == 2
    assert "read_noise of each frame" in capsys.readouterr().err
    assert not calls


def test_info_tells_what_a_report_needs(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    for word in ("dscsnet_jax 0", "jax ", "python 3", "devices: ", "compiled programs: "):
        assert word in told
    assert "weights varied_c3: dscsnet, 3 cells a pixel, PSF sigma" in told
    (tmp_path / "program").write_bytes(bytes(2**20))
    assert info._cache(str(tmp_path)).endswith(", 1 files, 1 MiB")
    assert info._cache(None).startswith("not kept")
