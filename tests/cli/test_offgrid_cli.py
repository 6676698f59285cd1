"""The command line's default method, off the grid, and the options that tell it what is known.

The programs off the grid take long to compile. Frames of at most two targets and one prior
keep them to one of each kind, which the tests share, with few of the compiler's optimisations.
"""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from dscsnet_jax.cli import demo, evaluate, main, options, scoring, simulate, unmix
from dscsnet_jax.estimation import limit, psf_fit
from dscsnet_jax.estimation import unmix as library
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.evaluation import report
from dscsnet_jax.inference.intensity import Uniform
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.prior import preset_prior
from dscsnet_jax.inference.tempered import Tempered, tempered
from dscsnet_jax.io.csist import read_csist
from dscsnet_jax.physics import scene

FRAMES = 16
MEAN, CELLS = "dscsnet (mean)", "grid (cells: reference rule)"

Captured = pytest.CaptureFixture[str]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache", "quick_compilation")]


def light_preset(name: str, **changes: Any) -> scene.Preset:
    """At most two targets a frame."""
    return scene.get_preset(name, max_targets=2, **changes)


@pytest.fixture
def few_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets, and the priors told by them, of few targets."""
    for module in (demo, simulate):
        monkeypatch.setattr(module, "get_preset", light_preset)
    light = {name: light_preset(name) for name in ("csist", "csist_noise")}
    monkeypatch.setattr(options, "presets", lambda: light)


@pytest.fixture(scope="module")
def csist(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of at most two targets a frame."""
    folder = tmp_path_factory.mktemp("offgrid") / "csist"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "get_preset", light_preset)
        assert main(["simulate", "--num", str(FRAMES), "--seed", "7", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the verbs ask of the library, which answers by the quick method."""
    calls: list[dict[str, Any]] = []

    def answer(frames: np.ndarray, known: Known, **how: Any) -> UnmixResult:
        calls.append({"known": known, **how})
        return library.unmix(frames, method="grid", options=library.Options(return_maps=True))

    for module in (evaluate, unmix):
        monkeypatch.setattr(module, "unmix", answer)
    return calls


def never(*_: object, **__: object) -> None:
    raise AssertionError("the work must not start")


# scores


@pytest.mark.usefixtures("few_targets")
def test_limit_is_printed_and_written_beside_the_scores(
    csist: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few particles and moves: they take their time."""

    @jax.jit
    def few(given: tuple[Any, Any], told: Known, seed: jax.Array) -> Tempered:
        return tempered(*given, told, jax.random.key(seed), num_particles=128, num_moves=8)

    monkeypatch.setattr(limit, "_run", few)
    file = tmp_path / "scores.json"
    assert main(["evaluate", "--data", str(csist), "--limit", "--json", str(file)]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    *table, summary = stdout.splitlines()
    names = [MEAN, CELLS, scoring.GUIDE, scoring.LIMITS["given"]]
    assert [line.split("  ")[0] for line in table[2:]] == names
    written = json.loads(file.read_text())
    assert written["method"] == MEAN
    assert list(written["rows"]) == names[1:]
    split, known = read_csist(csist), light_preset("csist").known
    answer = library.unmix(split.frames, known)
    best = limit.bayes_limit(split.frames, known, count=split.targets.count)
    pairs = [(written, answer), (written["rows"][scoring.LIMITS["given"]], best)]
    for scores, found in pairs:
        expected = report.evaluate(found.targets, split.targets).as_dict()
        for name in ("mAP", "AP05", "AP25", "position_rmse", "intensity_rmse"):
            assert scores[name] == pytest.approx(expected[name], abs=1e-9)
    assert written["mAP"] > 90
    assert 0 < written["rows"][scoring.LIMITS["given"]]["position_rmse"] < 0.05
    match = re.fullmatch(
        re.escape(MEAN) + r": (\S+) points of CSO-mAP below the limit, "
        r"position RMSE (\S+) times its",
        summary,
    )
    assert match is not None
    reference = written["rows"][scoring.LIMITS["given"]]
    assert float(match[1]) == pytest.approx(reference["mAP"] - written["mAP"], abs=0.006)
    ratio = written["position_rmse"] / reference["position_rmse"]
    assert float(match[2]) == pytest.approx(ratio, abs=0.0006)


@pytest.mark.parametrize("record", [None, {"preset": "csist_varied", "changes": {}}])
def test_limit_is_refused_where_the_scenes_are_not_known(
    record: dict[str, Any] | None,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.setattr(evaluate, "unmix", never)
    for name in ("cso_img", "Annotations"):
        (tmp_path / name).symlink_to(data_dir / "csist_sample" / name)
    if record is not None:
        (tmp_path / "simulation.json").write_text(json.dumps(record))
    assert main(["evaluate", "--data", str(tmp_path), "--limit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dscsnet evaluate: error: --limit needs a set of one preset")
    assert str(tmp_path) in error


def test_evaluate_uses_the_record_unless_it_is_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(scoring, "guide_row", lambda *_: {})
    argv = ["simulate", "--preset", "csist_noise", "--read-noise", "3", "--num", "2"]
    folder = tmp_path / "noisy"
    assert main([*argv, "--out", str(folder)]) == 0
    argv = ["evaluate", "--data", str(folder)]
    for more in (
        [],
        ["--noise=4", "--separation=0.2"],
        ["--blind"],
        ["--pedestal=7"],
        ["--background=10", "--gain=2"],
    ):
        assert main([*argv, *more]) == 0
    record, changed, blind, offset, light = (call["known"] for call in asked)
    known = scene.get_preset("csist_noise", read_noise=3.0).known
    sensor = known.sensor
    assert (sensor.read_noise, sensor.pedestal, sensor.background) == (3, 10, 0)
    assert record == known
    assert changed.sensor == dataclasses.replace(sensor, read_noise=4.0)
    told = ("intensity", "cluster_size", "cluster_offset", "count", "places")
    assert [getattr(changed.prior, n) for n in told] == [getattr(known.prior, n) for n in told]
    assert changed.prior.separation == 0.2
    # Saturation is that of the type of the images: nobody need tell.
    assert blind == Known(0.5, scene.Sensor(saturation=255.0))
    # Of the level all is told or nothing: what the record has of it goes with its own other part.
    none = dataclasses.replace(sensor, pedestal=None, background=None)
    assert offset.sensor == dataclasses.replace(none, pedestal=7.0)
    assert light.sensor == dataclasses.replace(none, background=10.0, gain=2.0)


# unmix


@pytest.mark.usefixtures("few_targets")
def test_unmix_writes_errors_and_statuses(csist: Path, tmp_path: Path, capsys: Captured) -> None:
    out, of_frames = tmp_path / "targets.csv", tmp_path / "frames.csv"
    argv = ["unmix", str(csist / "cso_img"), "--out", str(out), "--frames-out", str(of_frames)]
    assert main([*argv, "--prior", "csist", "--noise", "0", "--background", "0"]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    with of_frames.open() as file:
        frames = {row["frame"]: row for row in csv.DictReader(file)}
    assert len(frames) == FRAMES
    truth = read_csist(csist).targets
    by_frame = [[row for row in rows if row["frame"] == f"image_{i}.png"] for i in range(FRAMES)]
    assert [len(found) for found in by_frame] == truth.count.tolist()
    flags = {"near_edge", "saturated", "unresolved", "not_converged", "unexplained"}
    assert all(set(row["status"].split("|")) <= flags | {"ok"} for row in rows)
    for number, found in enumerate(by_frame):
        frame = frames[f"image_{number}.png"]
        assert int(frame["count"]) == len(found) != int(frame["runner_up"])
        assert float(frame["probability"]) > 0.99
        said = {flag for row in found for flag in row["status"].split("|")} - {"ok"}
        assert set(frame["status"].split("|")) - {"ok"} == said
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    assert sum(row["status"] == "ok" for row in rows) > len(rows) / 2
    std = np.array([[float(row[f"{k}_std"]) for k in ("row", "col", "intensity")] for row in rows])
    assert np.isfinite(std).all()
    assert std.min() > 0
    assert np.median(std[:, :2]) < 0.02  # rounding alone disturbs these frames
    # Each true target lies within some standard deviations of one that was found.
    for found, place, mask in zip(by_frame, truth.position, truth.mask, strict=True):
        at, error = (
            np.array([[float(row[k]) for k in keys] for row in found])
            for keys in (("row", "col"), ("row_std", "col_std"))
        )
        z = np.abs(at[:, None] - place[mask]) / error[:, None]
        assert z.max(-1).min(0).max() < 6
    summary = capsys.readouterr().out
    assert summary.startswith(f"{FRAMES} frames, {len(rows)} targets, 0 frames without targets\n")
    assert main([*argv, "--force", "--frames-out", str(out)]) == 2
    assert "--out and --frames-out are the same file" in capsys.readouterr().err


def test_the_width_of_the_psf_is_fitted_to_all_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    widths: list[np.ndarray] = []

    def fit_psf(*args: Any, **options: Any) -> psf_fit.PsfFit:
        answer = psf_fit.fit_psf(*args, **options)
        widths.append(np.asarray(answer.known.psf.sigma))
        return answer

    def alone(name: str, **changes: Any) -> scene.Preset:
        return scene.get_preset(name, max_targets=1, **changes)

    monkeypatch.setattr(library, "fit_psf", fit_psf)
    monkeypatch.setattr(simulate, "get_preset", alone)  # of a blend it is not clear what is wide
    folder = tmp_path / "wide"
    argv = ["simulate", "--preset", "csist_noise", "--sigma", "0.55", "--read-noise", "2"]
    assert main([*argv, "--num", "8", "--out", str(folder)]) == 0
    capsys.readouterr()
    argv = ["unmix", str(folder / "cso_img"), "--method", "greedy", "--estimate", "map"]
    # So near that no target is taken for two, which would be windows of another shape.
    argv += ["--sigma", "0.53", "--noise", "2", "--pedestal", "10"]
    assert main([*argv, "--fit-psf"]) == 0
    stdout, stderr = capsys.readouterr()
    (width,) = widths
    assert width.shape == ()  # one that is told is one that is fitted
    np.testing.assert_allclose(width, 0.55, atol=0.005)
    rows = list(csv.DictReader(stdout.splitlines()))
    assert {row["frame"] for row in rows} == {f"image_{i}.png" for i in range(8)}
    assert stderr.startswith(f"8 frames, {len(rows)} targets, 0 frames without targets\n")


@pytest.mark.parametrize("method", ["dscsnet", "greedy"])
def test_light_of_the_sky_is_told_with_its_shot_noise(
    method: str, tmp_path: Path, capsys: Captured
) -> None:
    """Its scatter makes no targets; the same level as a pedestal has none to explain it."""
    sky = np.random.default_rng(0).poisson(4 * 100.0, (FRAMES, 11, 11)) / 4
    np.save(tmp_path / "sky.npy", np.float32(sky))
    argv = ["unmix", str(tmp_path / "sky.npy"), "--method", method, "--estimate=map"]
    argv += ["--noise=0", "--gain=4"]
    assert main([*argv, "--background=100"]) == 0
    stdout, stderr = capsys.readouterr()
    assert len(stdout.splitlines()) == 1
    assert stderr.startswith(f"{FRAMES} frames, 0 targets, {FRAMES} frames without targets\n")
    assert "not explained" not in stderr


def test_options_reach_the_library(
    csist: Path, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    argv = ["unmix", str(csist / "cso_img")]
    assert main(argv) == 0
    assert main([*argv, "--prior", "csist"]) == 0
    assert main([*argv, "--prior", "csist", "--cluster-size", "1"]) == 0
    sensor = ["--sigma=0.48", "--noise=2", "--pedestal", "-5", "--background=3", "--gain=4"]
    sensor.append("--saturation=inf")
    scenes = ["--intensity", "50", "250", "--separation=0.3", "--cluster-size=1"]
    how = ["--estimate=map", "--fit-psf", "--weights=csist_c3", "--max-targets=3"]
    assert main([*argv, *sensor, *scenes, *how]) == 0
    plain, known, elsewhere, full = (call["known"] for call in asked)
    assert plain == Known(sensor=scene.Sensor(saturation=255.0))  # of 8-bit images
    assert asked[0].items() >= {"method": "dscsnet", "estimate": "mean"}.items()
    assert asked[0]["options"] == library.Options()
    preset = scene.get_preset("csist")
    assert known.prior == preset_prior(preset)
    assert (elsewhere.prior.cluster_size, elsewhere.prior.cluster_offset) == (1, None)
    assert (elsewhere.prior.count, elsewhere.prior.places) == (
        known.prior.count,
        known.prior.places,
    )
    assert full.psf == 0.48
    assert full.sensor == scene.Sensor(2, -5, 3, 4, saturation=math.inf)
    assert asked[3].items() >= {"estimate": "map", "max_targets": 3}.items()
    assert asked[3]["options"] == library.Options(weights="csist_c3", fit_psf=True)
    prior = full.prior
    assert (prior.intensity, prior.separation, prior.cluster_size) == (Uniform(50, 250), 0.3, 1)


def test_extent_is_the_old_name_of_the_cluster_size(
    csist: Path, asked: list[dict[str, Any]], capsys: Captured
) -> None:
    argv = ["unmix", str(csist / "cso_img"), "--prior", "csist"]
    assert main([*argv, "--cluster-size=1.5"]) == 0
    assert "note" not in capsys.readouterr().err
    assert main([*argv, "--extent", "1.5"]) == 0
    assert main([*argv, "--extent", "2", "--extent=1.5"]) == 0
    said = "note: --extent is now --cluster-size\n"
    assert capsys.readouterr().err.count(said) == 2  # once a call
    new, old, twice = (call["known"].prior for call in asked)
    assert new.cluster_size == 1.5
    assert new == old == twice
    with pytest.raises(SystemExit):
        main(["unmix", "--help"])
    text = capsys.readouterr().out
    assert "--cluster-size" in text
    assert "--extent" not in text


@pytest.mark.parametrize(
    "wrong",
    [
        *("--noise=-1", "--pedestal=inf", "--background=nan", "--saturation=0", "--gain=0"),
        *("--cluster-size=0", "--extent=0", "--sigma=-0.5"),
    ],
)
def test_row20_wrong_numbers_of_the_sensor_are_usage_errors(wrong: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["unmix", "frames.npy", wrong])
    assert stopped.value.code == 2
    assert f"argument {wrong.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--intensity", "250", "220"], ("250", "220")),
        (["--readout=cells"], ("'cells'", "'grid'")),
        (["--weights=csist"], ("'csist'", "csist_c3", "varied_c3")),
        (["--weights=none.safetensors"], ("none.safetensors",)),
    ],
)
def test_row20_options_that_cannot_be_are_refused(
    argv: list[str], said: tuple[str, ...], csist: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "targets.csv"
    assert main(["unmix", str(csist / "cso_img"), "--out", str(out), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dscsnet unmix: error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in said)
    assert not out.exists()


# demo


@pytest.mark.usefixtures("few_targets")
def test_demo_scores_beside_the_guide_and_draws(tmp_path: Path, capsys: Captured) -> None:
    picture = tmp_path / "demo.png"
    argv = ["demo", "--num", str(FRAMES), "--seed", "7", "--out", str(picture)]
    assert main(argv) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    first, header, _, *rows, last = stdout.splitlines()
    assert first.startswith(f"{FRAMES} test frames of csist unmixed in ")
    assert "frames/s on " in first
    assert header.split()[:2] == ["method", "mAP"]
    names = [MEAN, CELLS, scoring.GUIDE]
    assert [row.split("  ")[0] for row in rows] == names
    ours, cells, *best = (
        float(row.removeprefix(name).split()[0]) for name, row in zip(names, rows, strict=True)
    )
    assert ours > 90 > cells
    assert min(best) > 90
    assert last == f"picture: {picture}"
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        assert np.asarray(image.convert("L")).std() > 10
    before = picture.read_bytes()
    assert main(argv) == 2
    assert picture.read_bytes() == before
