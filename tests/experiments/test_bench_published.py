"""Bench: a published network's scores are those of the weights it wrote; it trains once."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import bench
import budget
import jax
import numpy as np
import pytest

from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.evaluation.report import evaluate
from dscsnet_jax.io.weights import load_weights
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.targets import Targets, from_lists
from dscsnet_jax.unfolding.registry import make_network

RATES = (2e-3, 5e-4)
TINY = dataclasses.replace(budget.SCALES["tiny"]["bench"], rates=RATES)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods in the order they are trained; costs, and the fit behind, are not measured."""
    methods: list[str] = []
    train = budget.train

    def counted(config: Any, workdir: Path) -> Any:
        methods.append(config.method)
        return train(config, workdir)

    def told(frames: np.ndarray, known: Any, **how: Any) -> Any:
        if how.get("method") == "grid":
            return unmix(frames, known, **how)
        return Namespace(targets=scored_frames()[1])

    monkeypatch.setattr(budget, "train", counted)
    monkeypatch.setattr(bench, "unmix", told)
    monkeypatch.setattr(bench, "forward_cost", lambda *_: {})
    monkeypatch.setattr(bench, "training_cost", lambda *_: {})
    monkeypatch.setitem(budget.SCALES, "tiny", {"bench": TINY})
    return methods


def scored_frames() -> tuple[np.ndarray, Targets]:
    preset = scene.get_preset("csist")
    test = bench.simulated(preset, seed=0, split="test", num=TINY.eval_frames)
    return np.asarray(test.frames), test.targets


def run(workdir: Path) -> dict[str, Any]:
    options = ["--scale", "tiny", "--methods", "srcnn"]
    bench.main([*options, "--workdir", str(workdir)])
    return json.loads((workdir / "bench.json").read_text())["rows"]["srcnn"]


def cells_of(x: np.ndarray) -> list[tuple[float, float, float]]:
    """The reference rule by hand: every cell >= 50 counts, at its centre."""
    rows, cols = np.nonzero(x >= 50)
    return [((i - 1) / 3, (j - 1) / 3, x[i, j]) for i, j in zip(rows, cols, strict=True)]


def test_scores_are_those_of_the_written_weights_which_are_trained_once(
    tmp_path: Path, trained: list[str]
) -> None:
    row = run(tmp_path)
    assert trained == ["srcnn"]
    weights = load_weights(tmp_path / "srcnn" / "run" / "weights.safetensors")
    assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    frames, truth = scored_frames()
    network = make_network("srcnn", **weights.metadata.config)
    operator = sensing_operator(11, division=3, psf=0.5)
    maps = np.asarray(jax.jit(network.apply)(weights.params, frames, operator).x)
    scores = evaluate(from_lists([cells_of(x) for x in maps]), truth).cso.as_dict()
    for name in ("mAP", "AP05", "AP10", "AP15", "AP20", "AP25"):
        # Single precision decides between detections of nearly the same intensity.
        assert row[name] == pytest.approx(scores[name], abs=0.01), name
    assert row["mAP"] > 0

    # The rate is that of the lower loss of two short runs, and that of the run.
    trials = json.loads((tmp_path / "srcnn" / "rates.json").read_text())["result"]
    assert list(trials) == [f"{rate:g}" for rate in RATES]
    best = min(trials, key=lambda rate: trials[rate])
    config = json.loads((tmp_path / "srcnn" / "run" / "config.json").read_text())
    assert config["optimiser"]["learning_rate"] == float(best)
    assert row["note"] == f"rate {best}"

    # Stopped after training: the row is made again, the run is not.
    (tmp_path / "srcnn" / "result.json").unlink()
    assert run(tmp_path) == row
    assert trained == ["srcnn"]
