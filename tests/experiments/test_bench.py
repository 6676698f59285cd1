"""Bench: a newcomer's file is seen in it, budgets are equal, and nothing is run twice."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import budget
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dscsnet_jax.estimation.unmix import Options, unmix
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.io.weights import load_weights
from dscsnet_jax.maps.readout import threshold_cells
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.targets import Targets
from dscsnet_jax.training.config import load_config, make_method
from dscsnet_jax.training.step import make_optimiser
from dscsnet_jax.unfolding import baselines, registry

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]
CONTRIBUTING, CONFIG = ROOT / "CONTRIBUTING.md", ROOT / "experiments/configs/csist_c3.py"
TINY = budget.SCALES["tiny"]["bench"]


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example of CONTRIBUTING.md as a file among the baselines; gone afterwards."""
    text = CONTRIBUTING.read_text("utf-8")
    block = re.search(
        r"<!-- method:begin -->\n```python\n(.*?)```\n<!-- method:end -->", text, re.DOTALL
    )
    assert block is not None
    home = tmp_path / "home"
    home.mkdir()
    (home / "gain.py").write_text(block[1], "utf-8")
    known = registry.network_names()
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(home)])
    importlib.invalidate_caches()
    yield "gain"
    monkeypatch.undo()
    sys.modules.pop(f"{baselines.__name__}.gain", None)
    vars(baselines).pop("gain", None)
    assert registry.network_names() == known


def run(workdir: Path, *methods: str) -> dict[str, Any]:
    bench.main(["--scale", "tiny", "--workdir", str(workdir), "--methods", *methods])
    return json.loads((workdir / "bench.json").read_text())


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of the fit off the grid, which compiles for long: the truth, as told here."""
    calls: list[dict[str, Any]] = []

    def told(frames: np.ndarray, known: Any, **how: Any) -> Any:
        if how.get("method") == "grid":
            return unmix(frames, known, **how)
        calls.append({"known": known, **how})
        return bench.argparse.Namespace(targets=scored_frames()[1])

    monkeypatch.setattr(bench, "unmix", told)
    return calls


def scored_frames(split: str = "test") -> tuple[np.ndarray, Targets]:
    return bench.scenes(scene.get_preset("csist"), 0, split, TINY.eval_frames)


def test_a_newcomers_file_is_a_row_of_the_table(
    newcomer: str,
    fitted: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = run(tmp_path, newcomer)
    row = table["rows"][newcomer]
    weights = load_weights(tmp_path / newcomer / "run" / "weights.safetensors")
    assert row["parameters"] == 1
    assert float(weights.params["a"]) != 1.0
    frames, truth = scored_frames()
    operator = sensing_operator(11, division=3, psf=0.5)
    x = registry.make_network(newcomer).apply(weights.params, jnp.asarray(frames), operator).x
    cells = threshold_cells(x, division=3, max_targets=64).targets
    assert row["mAP"] == pytest.approx(100 * evaluate(cells, truth).cso.mean, abs=0.01)
    assert row["mAP"] > 0
    known = scene.get_preset("csist").known
    grid = unmix(frames, known, method="grid", options=Options(weights))
    assert row["count"] == 100 * evaluate(grid.targets, truth).count_accuracy
    assert (row["off mAP"], row["off count"]) == (100, 100)
    (call,) = fitted
    assert call.pop("options").weights.metadata.method == newcomer
    assert call == {"known": known, "estimate": "map"}
    # Phi and its adjoint are two products each, with N x cN matrices.
    assert 0.02 < row["MFLOP/frame"] < 0.5
    assert row["frames/s forward"] > 0
    # Frames and maps of the batch at least.
    assert row["MB forward"] > bench.FORWARD_BATCH * (11**2 + 33**2) * 4 / 1e6
    text = (tmp_path / "bench.md").read_text()
    assert f"| gain | {row['mAP']:.2f} |" in text
    assert "8 frames of 11 x 11 pixels a run (2 steps of 4)" in text
    assert "--methods gain" in table["about"]["command"]

    monkeypatch.setattr(budget, "train", None)  # a second call trains nothing
    assert run(tmp_path, newcomer)["rows"] == table["rows"]
    assert len(fitted) == 1

    # What else CONTRIBUTING.md has it do: the training command, and the contract.
    config = load_config(CONFIG, [f"method={newcomer}"])
    network = make_method(config)
    assert network == registry.make_network(newcomer, division=config.scene.division)
    changed = np.concatenate([1e3 - 7 * frames[:1], frames[1:]])
    other = network.apply(weights.params, jnp.asarray(changed), operator).x
    assert (other[0] != x[0]).any()
    np.testing.assert_array_equal(other[1:], x[1:])


def test_a_solver_has_the_l1_weight_that_is_best_on_val(tmp_path: Path) -> None:
    row = run(tmp_path, "fista")["rows"]["fista"]
    lam = float(row["note"].split(",")[0].removeprefix("lam "))
    args = bench.argparse.Namespace(scale="tiny", set=[], seed=0, workdir=tmp_path)
    about = bench.make_bench(args)

    def score(split: str, lam: float) -> float:
        frames, truth = scored_frames(split)
        maps = bench.solve(about, "fista", frames, lam).x
        return bench.map_scores(np.asarray(maps), truth, about.preset)["mAP"]

    assert score("val", lam) == max(score("val", other) for other in bench.L1_WEIGHTS)
    assert row["mAP"] == pytest.approx(score("test", lam))


def test_all_methods_have_the_same_budget() -> None:
    configs = {}
    for name in registry.network_names():
        config = budget.run_config(name, TINY, seed=3, rate=1e-3).to_dict()
        weight = config["train"].pop("symmetry_weight")
        assert weight == (0.01 if name in WITH_INVERSE else 0.0), name
        configs[name] = {k: v for k, v in config.items() if k not in ("network", "method")}
    assert all(config == configs["dscsnet"] for config in configs.values())
    assert configs["dscsnet"]["scene"]["frame_size"] == 11


WITH_INVERSE = ("dscsnet", "dista_net", "fista_net", "ista_net", "ista_net_plus")


def test_what_is_set_wins() -> None:
    changes = ["train.symmetry_weight=0.5", "train.truth_width=0.0"]
    config = budget.run_config("ista_net", TINY, seed=0, rate=1e-3, overrides=changes)
    assert (config.train.symmetry_weight, config.train.truth_width) == (0.5, 0.0)
    with pytest.raises(ValueError, match=r"did you mean 'train\.truth_width'"):
        budget.run_config("ista_net", TINY, seed=0, rate=1e-3, overrides=["train.truth_witdh=1"])


def test_trials_make_the_steps_of_training() -> None:
    """A unit rate, scaled afterwards, is the rate itself."""
    config = budget.run_config("dscsnet", budget.SCALES["cpu"]["bench"], seed=0, rate=2e-3)
    steps = config.train.num_steps
    own = make_optimiser(num_steps=steps, **config.optimiser.to_dict())
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    ends = []
    for optimiser in (own, bench.scaled_optimiser(config, 2e-3)):
        params, state = start, optimiser.init(start)
        draws = np.random.default_rng(1)
        for _ in range(4):
            gradient = {"w": jnp.asarray(draws.normal(size=(3, 4)), jnp.float32)}
            updates, state = optimiser.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params["w"])
    assert np.abs(ends[0] - start["w"]).max() > 1e-5
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-6)


def test_the_rate_is_the_one_with_the_lowest_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = bench.argparse.Namespace(scale="tiny", set=[], seed=0, workdir=tmp_path)
    about = bench.dataclasses.replace(
        bench.make_bench(args), budget=bench.dataclasses.replace(TINY, rates=(1e-4, 5e-4, 2e-3))
    )
    asked: list[int] = []

    def tried(config: Any, rates: Any) -> Any:
        asked.append(config.train.num_steps)
        return {"0.0001": 3.0, "0.0005": 1.0, "0.002": 2.0}

    monkeypatch.setattr(bench, "tried", tried)
    assert bench.chosen_rate(about, "srcnn") == 5e-4
    assert bench.chosen_rate(about, "srcnn") == 5e-4
    assert asked == [1]


def test_a_diverged_method_is_a_row_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any) -> None:
        raise FloatingPointError("the loss is nan at step 1")

    monkeypatch.setattr(budget, "train", diverge)
    row = run(tmp_path, "srcnn")["rows"]["srcnn"]
    assert row == {"note": "diverged: the loss is nan at step 1"}
    assert "| srcnn | - |" in (tmp_path / "bench.md").read_text()


def test_a_stopped_run_stops_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = bench.argparse.Namespace(finished=False)
    monkeypatch.setattr(budget, "train", lambda *_: stopped)
    with pytest.raises(SystemExit, match="the same command goes on"):
        run(tmp_path, "srcnn", "lista")
    assert not (tmp_path / "srcnn" / "result.json").exists()


def test_results_of_another_budget_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a" / "result.json"
    assert budget.kept(path, {"seed": 0, "set": ()}, lambda: {"mAP": 1.0}) == {"mAP": 1.0}
    assert budget.kept(path, {"seed": 0, "set": ()}, lambda: {"mAP": 2.0}) == {"mAP": 1.0}
    with pytest.raises(ValueError, match="another run; choose another --workdir"):
        budget.kept(path, {"seed": 1, "set": ()}, lambda: {"mAP": 2.0})


def test_an_unknown_method_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--methods", "listta"])
    said = capsys.readouterr().err
    assert "'listta'" in said
    assert all(name in said for name in (*registry.network_names(), "fista", "greedy"))
