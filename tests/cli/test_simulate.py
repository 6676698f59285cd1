"""`dscsnet simulate` with conditions that vary from frame to frame."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dscsnet_jax.cli import main as run_command
from dscsnet_jax.cli import scoring, simulate
from dscsnet_jax.io.csist import read_csist
from dscsnet_jax.physics import scene

Captured = pytest.CaptureFixture[str]
NUM = 60


def light_preset(name: str, **changes: Any) -> scene.Preset:
    """One target a frame: the simulation compiles faster."""
    return scene.get_preset(name, max_targets=1, **changes)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(quick_compilation: None) -> Iterator[None]:
    """Keep nothing as well: the programs run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dscsnet_jax.cli._keep_compilations", lambda: None)
        patch.setattr(simulate, "get_preset", light_preset)
        yield


def test_varied_frames_are_written_unrounded_with_the_nominal_sigma(
    tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "set"
    argv = ["simulate", "--preset", "csist_varied", "--num", str(NUM), "--seed", "4"]
    assert run_command([*argv, "--out", str(folder)]) == 0
    assert f"{NUM} frames of csist_varied" in capsys.readouterr().out
    preset = light_preset("csist_varied")
    keys = scene.frame_keys(4, "test", np.arange(NUM))
    made = jax.device_get(jax.jit(partial(scene.simulate, preset))(keys))
    split = read_csist(folder)
    assert split.names[0] == "image_0.npy[0]"
    np.testing.assert_array_equal(split.frames, made.frames)
    assert (split.frames % 1 != 0).any()
    assert split.frames.min() < 0
    np.testing.assert_array_equal(split.targets.count, made.targets.count)
    assert (split.targets.count == 0).any()
    assert split.sigma == 0.5
    record = json.loads((folder / "simulation.json").read_text())
    assert record["sigma"] == 0.5
    assert record["variation"]["sigma"] == [0.4, 1.0]
    assert record["variation"]["read_noise"] == [-1.0, 10.0]
    assert simulate.recorded_preset(folder) == preset
    assert scoring.guide_row(split.targets, preset) == {}
    assert "varies optics and sensor from frame to frame" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sigma=0.6", "--read-noise=1", "--pedestal=3"])
def test_row20_options_without_effect_on_varied_frames_are_refused(
    option: str, tmp_path: Path, capsys: Captured
) -> None:
    argv = ["simulate", "--preset", "csist_varied", option, "--out", str(tmp_path / "set")]
    assert run_command(argv) == 2
    name = option[2:].partition("=")[0].replace("-", "_")
    assert f"{name} cannot be set" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_offset_is_the_old_name_of_the_pedestal(tmp_path: Path, capsys: Captured) -> None:
    """On the command line and in the record of a set made before."""
    for name in ("pedestal", "offset"):
        argv = ["simulate", "--num", "2", f"--{name}=3", "--out", str(tmp_path / name)]
        assert run_command(argv) == 0
    assert capsys.readouterr().err == "note: --offset is now --pedestal\n"
    for name in ("cso_img/image_0.png", simulate.RECORD):
        new, old = ((tmp_path / folder / name).read_bytes() for folder in ("pedestal", "offset"))
        assert new == old
    record = tmp_path / "offset" / simulate.RECORD
    preset = simulate.recorded_preset(tmp_path / "offset")
    assert preset.sensor.pedestal == 3
    record.write_text(record.read_text().replace('"pedestal"', '"offset"'))
    assert simulate.recorded_preset(tmp_path / "offset") == preset


def test_sets_without_variation_record_none(tmp_path: Path, capsys: Captured) -> None:
    argv = ["simulate", "--num", "2", "--frame-size", "5", "--out", str(tmp_path / "set")]
    assert run_command(argv) == 0
    assert "2 frames of csist " in capsys.readouterr().out
    assert json.loads((tmp_path / "set" / "simulation.json").read_text())["variation"] is None
    assert read_csist(tmp_path / "set").names == ("image_0.png", "image_1.png")
