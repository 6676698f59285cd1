"""The command line: results on stdout, one clear line for errors, nothing half-written."""

import csv
import io
import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dscsnet_jax import cli
from dscsnet_jax.cli import VERBS, evaluate, main, progress, scoring, simulate, unmix
from dscsnet_jax.estimation import unmix as library
from dscsnet_jax.evaluation import report
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.csist import read_csist
from dscsnet_jax.io.frames import FrameStack, read_frames
from dscsnet_jax.maps.readout import threshold_cells
from dscsnet_jax.physics import limits, scene
from dscsnet_jax.training import loop

FRAMES = 48  # as many as the sample holds: one shape, one compilation
PEAKS, CELLS = "grid (peaks)", "grid (cells: reference rule)"
GRID = ["--method", "grid"]  # compiles fast; `test_offgrid_cli` has the default method
TINY = """
from dscsnet_jax.training.config import default_config

def get_config():
    config = default_config()
    config.train.num_steps, config.train.batch_size = 2, 4
    config.optimiser.warmup_steps = 1
    config.network.iterations, config.network.channels = 1, 4
    config.network.attention_channels = 4
    config.eval.num_frames = 4
    return config
"""

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def csist(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set made by the command line."""
    folder = tmp_path_factory.mktemp("data") / "csist"
    assert main(["simulate", "--num", str(FRAMES), "--seed", "3", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stack(csist: Path) -> Path:
    """The same frames as one array."""
    path = csist.parent / "stack.npy"
    np.save(path, read_csist(csist).frames)
    return path


def frames_of(preset: scene.Preset, seed: int, index: np.ndarray) -> scene.Scene:
    keys = scene.frame_keys(seed, "test", index)
    return jax.device_get(jax.jit(partial(scene.simulate, preset))(keys))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def never(*_: object, **__: object) -> None:
    raise AssertionError("the work must not start")


# simulate


def test_simulate_writes_the_frames_of_the_test_split(csist: Path) -> None:
    split = read_csist(csist)
    made = frames_of(scene.get_preset("csist"), 3, np.arange(FRAMES))
    np.testing.assert_array_equal(split.frames, made.frames)
    np.testing.assert_array_equal(split.targets.count, made.targets.count)
    record = json.loads((csist / "simulation.json").read_text())
    wanted = {"preset": "csist", "seed": 3, "split": "test", "num": FRAMES, "changes": {}}
    assert record.items() >= wanted.items()


def test_simulate_joins_batches_keeps_unrounded_counts_and_records_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "_BATCH", 5)
    argv = ["simulate", "--preset", "csist_float", "--read-noise", "2", "--num", "8"]
    assert main([*argv, "--out", str(tmp_path / "set")]) == 0
    preset = scene.get_preset("csist_float", read_noise=2.0)
    batches = [frames_of(preset, 0, np.arange(5) + start) for start in (0, 5)]
    split = read_csist(tmp_path / "set")
    np.testing.assert_array_equal(
        split.frames, np.concatenate([batch.frames for batch in batches])[:8]
    )
    counts = np.concatenate([batch.targets.count for batch in batches])[:8]
    np.testing.assert_array_equal(split.targets.count, counts)
    assert simulate.recorded_preset(tmp_path / "set") == preset


def test_row35_simulate_refuses_a_folder_in_use(
    csist: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(simulate, "simulated", never)
    assert main(["simulate", "--num", "2", "--out", str(csist)]) == 2
    assert str(csist) in capsys.readouterr().err
    assert len(read_csist(csist).frames) == FRAMES


@pytest.mark.parametrize(
    "wrong", ["--num=0", "--seed=-1", "--sigma=nan", "--read-noise=-1", "--frame-size=1.5"]
)
def test_row20_wrong_numbers_are_usage_errors(wrong: str, tmp_path: Path, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", "--out", str(tmp_path / "set"), wrong])
    assert stopped.value.code == 2
    assert f"argument {wrong.partition('=')[0]}: " in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


# evaluate


def test_evaluate_prints_and_writes_the_librarys_scores(
    csist: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "scores.json"
    argv = ["evaluate", "--data", str(csist), "--json", str(file), *GRID]
    assert main(argv) == 0
    table, stderr = capsys.readouterr()
    assert stderr == ""
    names = [PEAKS, CELLS, scoring.GUIDE]
    assert [line.split("  ")[0] for line in table.splitlines()[2:]] == names
    written = json.loads(file.read_text())
    split = read_csist(csist)
    preset = scene.get_preset("csist")
    maps = library.Options(return_maps=True)
    answer = library.unmix(split.frames, preset.known, method="grid", options=maps)
    expected = report.evaluate(answer.targets, split.targets).as_dict()
    for name in ("mAP", "AP05", "AP10", "AP15", "AP20", "AP25", "count_accuracy", "recall"):
        assert written[name] == pytest.approx(expected[name], abs=1e-9)
    cells = report.evaluate(threshold_cells(answer.maps, division=3).targets, split.targets)
    assert written["rows"][CELLS]["mAP"] == pytest.approx(100 * cells.cso.mean, abs=1e-9)
    make = jax.jit(partial(limits.preset_limit, preset=preset))  # found in the cache
    best = make(jax.random.key(0), split.targets)
    guide = report.evaluate(best, split.targets).as_dict()
    assert written["rows"][scoring.GUIDE]["mAP"] == pytest.approx(guide["mAP"], abs=0.1)
    assert written["psnr"] > 20

    assert main([*argv, "--readout=cells"]) == 2
    assert main([*argv, "--readout=cells", "--force"]) == 0
    reference = json.loads(file.read_text())
    assert reference["method"] == CELLS
    assert {k: v for k, v in reference.items() if k in ("mAP", "AP25", "detections")} == {
        k: v for k, v in written["rows"][CELLS].items() if k in ("mAP", "AP25", "detections")
    }


def test_evaluate_of_a_set_from_elsewhere_agrees_with_its_annotations(
    data_dir: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "scores.json"
    folder = data_dir / "csist_sample"
    argv = ["evaluate", "--data", str(folder), "--json", str(file), *GRID]
    assert main([*argv, "--weights", "csist_c3"]) == 0
    assert scoring.GUIDE not in capsys.readouterr().out
    scores = json.loads(file.read_text())
    assert scores["recall"] > 95
    assert scores["count_accuracy"] > 85


def test_row35_evaluate_keeps_an_existing_json(
    csist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(evaluate, "unmix", never)
    (tmp_path / "scores.json").write_text("mine")
    argv = ["evaluate", "--data", str(csist), "--json", str(tmp_path / "scores.json")]
    assert main(argv) == 2
    assert "scores.json" in capsys.readouterr().err
    assert (tmp_path / "scores.json").read_text() == "mine"


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"preset": "csist"}', '{"preset": "csist", "changes": {"sigma": 0.6}}']
)
def test_a_record_that_does_not_fit_is_refused(
    record: str, data_dir: Path, tmp_path: Path, capsys: Captured
) -> None:
    for name in ("cso_img", "Annotations"):
        (tmp_path / name).symlink_to(data_dir / "csist_sample" / name)
    (tmp_path / "simulation.json").write_text(record)
    assert main(["evaluate", "--data", str(tmp_path)]) == 2
    assert str(tmp_path / "simulation.json") in capsys.readouterr().err


def test_without_noise_there_is_no_limit_and_a_note(csist: Path, capsys: Captured) -> None:
    targets = read_csist(csist).targets
    assert scoring.guide_row(targets, scene.get_preset("csist_float")) == {}
    assert capsys.readouterr().err.startswith("no limit: without noise")


# unmix


def test_unmix_of_a_folder_gives_a_row_a_target(
    data_dir: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "targets.csv"
    folder = data_dir / "csist_sample" / "cso_img"
    assert main(["unmix", str(folder), "--out", str(out), *GRID]) == 0
    frames = read_frames(folder)
    known = Known(sensor=scene.Sensor(saturation=frames.full_well))
    answer = library.unmix(frames.frames, known, method="grid")
    count = np.asarray(answer.targets.count)
    summary, stderr = capsys.readouterr()
    assert stderr == ""
    assert summary.startswith(f"48 frames, {count.sum()} targets, 0 frames without targets\n")
    assert summary.endswith(f"catalog: {out}\n")
    rows = rows_of(out.read_text())
    assert [row["frame"] for row in rows] == np.repeat(frames.names, count).tolist()
    wanted = answer.targets.position[answer.targets.mask]
    found = [(float(row["row"]), float(row["col"])) for row in rows]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_unmix_without_out_prints_the_catalog_alone_on_stdout(
    stack: Path, capsys: Captured
) -> None:
    assert main(["unmix", str(stack), *GRID]) == 0
    stdout, stderr = capsys.readouterr()
    assert {row["frame"] for row in rows_of(stdout)} == {f"stack.npy[{i}]" for i in range(FRAMES)}
    assert stderr.startswith(f"{FRAMES} frames, ")


@pytest.mark.parametrize(
    ("fit_psf", "names"), [(False, [tuple("abc"), tuple("defgh")]), (True, [tuple("abcdefgh")])]
)
def test_pieces_keep_the_names_of_their_frames(
    fit_psf: bool, names: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "RUN", 2)
    frames = np.arange(8.0).reshape(8, 1, 1)
    stack = FrameStack(tuple("abcdefgh"), frames)
    pieces = unmix._pieces(stack, Namespace(fit_psf=fit_psf, block=3))
    assert [piece.names for piece in pieces] == names
    np.testing.assert_array_equal(np.concatenate([piece.frames for piece in pieces]), frames)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("row1_nan.npy", np.full((11, 11), np.nan, np.float32), "NaN"),
        ("row5_shape.npy", np.zeros((2, 2, 11, 11, 3), np.float32), "(2, 2, 11, 11, 3)"),
        ("row8_bool.npy", np.zeros((11, 11), bool), "bool"),
    ],
)
def test_bad_arrays_are_refused_by_name(
    name: str, array: np.ndarray, said: str, tmp_path: Path, capsys: Captured
) -> None:
    np.save(tmp_path / name, array)
    out = tmp_path / "out.csv"
    assert main(["unmix", str(tmp_path / name), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dscsnet unmix: error: ")
    assert error.count("\n") == 1
    assert name in error
    assert said in error
    assert not out.exists()


def test_row1_mask_invalid_flags_the_frame(stack: Path, tmp_path: Path, capsys: Captured) -> None:
    frames = np.load(stack)
    frames[1, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", frames)
    assert main(["unmix", str(tmp_path / "a.npy"), "--mask-invalid", *GRID]) == 0
    stdout, stderr = capsys.readouterr()
    assert "frames with invalid pixels: 1\n" in stderr
    flagged = {row["frame"] for row in rows_of(stdout) if "invalid" in row["status"]}
    assert flagged == {"a.npy[1]"}


def test_row19_colour_png_is_refused(tmp_path: Path, capsys: Captured) -> None:
    Image.new("RGB", (11, 11)).save(tmp_path / "colour.png")
    assert main(["unmix", str(tmp_path / "colour.png")]) == 2
    assert "colour.png" in capsys.readouterr().err


def test_row21_weights_of_another_psf(stack: Path, capsys: Captured) -> None:
    """The method `grid` refuses them; `dscsnet` goes on without, and says so."""
    wide = ["unmix", str(stack), "--sigma", "0.7", "--estimate", "map"]
    assert main([*wide, "--method", "grid"]) == 2
    error = capsys.readouterr().err
    assert "0.45 to 0.55" in error
    assert "0.7" in error
    assert main(wide) == 0
    told = capsys.readouterr()
    assert "note: " in told.err
    assert "starts from detection" in told.err
    assert "0.45 to 0.55" in told.err


@pytest.mark.parametrize("out", ["there.csv", "there.csv/a.csv", "new.txt"])
def test_row35_unmix_checks_its_output_before_the_work(
    out: str, stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(unmix, "read_many", never)
    (tmp_path / "there.csv").write_text("mine")
    assert main(["unmix", str(stack), "--out", str(tmp_path / out)]) == 2
    assert out in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["there.csv"]
    assert (tmp_path / "there.csv").read_text() == "mine"


# train


@pytest.mark.parametrize(
    ("override", "said"),
    [("train.num_stpes=3", "train.num_steps"), ("train.num_steps=many", "int"), ("x", "a.b=value")],
)
def test_row20_wrong_override_is_refused(
    override: str, said: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    argv = ["train", "--config", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--set", override]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_gives_weights_that_unmix_the_same_in_any_batches(
    stack: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    argv = ["train", "--config", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--set", "train.num_steps=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("mAP", "AP05", "AP10", "AP15", "AP20", "AP25"),
        "weights",
    ]
    weights = lines[-1].removeprefix("weights ")
    assert weights == str(tmp_path / "run" / "weights.safetensors")
    found = []
    for size in ("20", "48"):
        argv = ["unmix", str(stack), "--weights", weights, "--threshold=5", "--block", size]
        assert main([*argv, *GRID]) == 0
        found.append(rows_of(capsys.readouterr().out))
    assert len(found[0]) > 0
    assert [row["frame"] for row in found[0]] == [row["frame"] for row in found[1]]
    positions = [[float(row["row"]) for row in rows] for rows in found]
    np.testing.assert_allclose(*positions, atol=1e-4)


def test_row23_a_stopped_run_has_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    stopped = loop.TrainResult(step=2, finished=False, scores={}, weights=None)
    monkeypatch.setattr(loop, "train", lambda *_: stopped)
    (tmp_path / "tiny.py").write_text(TINY)
    argv = ["train", "--config", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--set", "train.num_steps=9"]) == 130
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "stopped after step 2 of 9" in stderr
    assert "the same command goes on" in stderr


# all verbs


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_has_an_example(verb: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"dscsnet {verb}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_and_wrong_usage_import_nothing_heavy(verb: str) -> None:
    code = (
        "import sys; from dscsnet_jax.cli import main\n"
        "try: main(sys.argv[1].split())\n"
        "except SystemExit as end: print(end.code, sys.modules.keys() & {'jax', 'numpy', 'rich'})"
    )
    for argument, said in (("--help", "0 set()"), ("--wrong", "2 set()")):
        argv = [sys.executable, "-c", code, f"{verb} {argument}"]
        shown = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines()[-1] == said


def test_the_front_page_names_all_verbs(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


def test_module_runs_as_a_program() -> None:
    argv = [sys.executable, "-m", "dscsnet_jax.cli", "--version"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("dscsnet 0.")


def test_unknown_verb_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["unmixx"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("bad thing"), 2, "dscsnet demo: error: bad thing\n"),
        (OSError(28, "No space left"), 2, "dscsnet demo: error: [Errno 28] No space left\n"),
        (ImportError("no Matplotlib"), 2, "dscsnet demo: error: no Matplotlib\n"),
        (FloatingPointError("the loss is nan"), 1, "dscsnet demo: error: the loss is nan\n"),
        (MemoryError(), 1, "dscsnet demo: error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "dscsnet demo: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("dscsnet_jax.cli.demo.run", fail)
    assert main(["demo"]) == code
    assert capsys.readouterr() == ("", said)


def test_debug_shows_the_traceback(tmp_path: Path, capsys: Captured) -> None:
    assert main(["unmix", "--debug", str(tmp_path / "none.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("dscsnet unmix: error: ")


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "full"), 2), (BrokenPipeError(), 141)])
def test_row25_output_that_is_not_written_is_no_success(
    error: OSError, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise error

        def fileno(self) -> int:
            return file.fileno()

    monkeypatch.setattr("dscsnet_jax.cli.demo.run", lambda _: 0)
    with (tmp_path / "stdout").open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert main(["demo"]) == code


def test_programs_are_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start need not compile them: they are there after a run in a new home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "import sys; from dscsnet_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["simulate", "--num", "1", "--out", str(tmp_path / "one")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    (folder,) = tmp_path.glob("dscsnet_jax")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("jit_simulate-*"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("XDG_CACHE_HOME", "a_file"), ("JAX_COMPILATION_CACHE_DIR", "the_users_own")],
)
def test_cache_is_left_alone(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv(name, str(tmp_path / value))
    before = jax.config.jax_compilation_cache_dir
    cli._keep_compilations()
    assert jax.config.jax_compilation_cache_dir == before
    assert [file.name for file in tmp_path.iterdir()] == ["a_file"]
