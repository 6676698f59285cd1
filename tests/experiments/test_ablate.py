"""Ablation: its numbers are those of the runs, and nothing is run twice."""

import json
from pathlib import Path
from typing import Any

import ablate
import budget
import numpy as np
import pytest

from dscsnet_jax.io.weights import Geometry, Metadata, save_weights
from dscsnet_jax.training.loop import TrainResult

pytestmark = pytest.mark.usefixtures("quick_compilation")
PLAIN = ["train.symmetry_weight=0.0"]  # or else each network is traced for its left inverse


class Trainer:
    """In place of `train`: leaves what a run leaves, with scores of its own for each run."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []

    def __call__(self, config: Any, workdir: Path) -> TrainResult:
        self.runs.append((config.network.auxiliary, config.seed))
        workdir.mkdir(parents=True)
        speeds = [(1, 2.0), (2, 10.0), (3, 30.0)]
        lines = [{"step": n, "loss": 0.5, "frames_per_second": speed} for n, speed in speeds]
        lines.append({"step": 3, "val_mAP": 1.0})
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = Metadata(
            "dscsnet", {}, Geometry((5, 5), 3, (0.5, 0.5)), training={"parameters": 1234}
        )
        save_weights(workdir / "weights.safetensors", {"a": np.ones(1)}, about)
        values = np.random.default_rng(len(self.runs)).uniform(0, 50, len(ablate.SCORES))
        scores = dict(zip(ablate.SCORES, values.tolist(), strict=True))
        return TrainResult(3, True, scores, workdir / "weights.safetensors")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(budget, "train", made)
    return made


def run(workdir: Path, *more: str) -> dict[str, Any]:
    ablate.main(["--scale", "tiny", "--workdir", str(workdir), *more])
    return json.loads((workdir / "ablate.json").read_text())


def test_rows_are_mean_and_deviation_of_the_seeds(
    tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, "--variants", "l2")["rows"]
    assert trainer.runs == [("l1", 0), ("l1", 1), ("l2", 0), ("l2", 1)]
    assert list(rows) == ["dscsnet", "l2"]
    for name, row in rows.items():
        values = [
            json.loads((tmp_path / name / f"seed_{seed}" / "result.json").read_text())["result"]
            for seed in (0, 1)
        ]
        for score in ablate.SCORES:
            a, b = (value[score] for value in values)
            assert row[score] == pytest.approx((a + b) / 2)
            assert row[f"{score} std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert row["runs"] == values
        assert row["parameters"] == 1234
        assert row["frames/s training"] == 20
    assert rows["l2"]["gain"] == pytest.approx(rows["l2"]["mAP"] - rows["dscsnet"]["mAP"])
    text = (tmp_path / "ablate.md").read_text()
    assert text in capsys.readouterr().out
    row = rows["l2"]
    assert f"| l2 | auxiliary = l2 | 2 | {row['mAP']:.2f} | {row['mAP std']:.2f} |" in text
    assert "channels=4" in text
    assert (tmp_path / "ablate.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_goes_on_where_the_first_was(tmp_path: Path, trainer: Trainer) -> None:
    first = run(tmp_path, "--variants", "dscsnet")
    more = run(tmp_path, "--variants", "l2")
    assert len(trainer.runs) == 4
    assert more["rows"]["dscsnet"] == first["rows"]["dscsnet"]
    assert run(tmp_path, "--variants", "l2")["rows"] == more["rows"]
    assert len(trainer.runs) == 4
    with pytest.raises(ValueError, match="another run; choose another --workdir"):
        run(tmp_path, "--set", "network.channels=8")


def test_a_diverged_run_shows_as_a_note() -> None:
    good = {"mAP": 3.0, "training_fps": 9.0, "parameters": 1, "device": "x"}
    good |= dict.fromkeys(("AP05", "AP10", "AP15", "AP20", "AP25"), 1.0)
    row = ablate.summary("l2", [good, {"note": "diverged: loss"}], [good, good])
    assert row["note"] == "diverged: loss"
    assert "mAP" not in row
    assert "gain" not in ablate.summary("l2", [good, good], [good, {"note": "diverged"}])
    assert ablate.summary("l2", [good, good], [good | {"mAP": 1.0}] * 2)["gain"] == 2.0


def test_every_variant_changes_one_field_of_the_full_network() -> None:
    small = budget.SCALES["tiny"]["ablate"]
    configs = {}
    for name, change in ablate.VARIANTS.items():
        fields = {f"network.{k}": v for k, v in change.items()}
        config = budget.run_config(
            "dscsnet", small, seed=0, rate=1e-3, fields=fields, overrides=PLAIN
        )
        configs[name] = config.to_dict()["network"]
    full = configs.pop("dscsnet")
    assert full["iterations"] == ablate.DEPTH
    for name, network in configs.items():
        assert sum(network[k] != full[k] for k in full) == 1, name
    depths = {network["iterations"] for network in [full, *configs.values()]}
    assert depths == set(range(1, 9))


def test_an_unknown_variant_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ablate.main(["--variants", "l3"])
    said = capsys.readouterr().err
    assert "'l3'" in said
    assert all(name in said for name in ablate.VARIANTS)


def test_the_picture_tells_switches_from_depths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []
    bars = ablate.bars

    def seen(rows: Any) -> Any:
        answer = bars(rows)
        drawn.append(answer[0])
        return answer

    monkeypatch.setattr(ablate, "bars", seen)
    scores = {"dscsnet": 4.0, "l2": 3.0, "K8": 5.0, "K1": 1.0}
    ablate.draw({k: {"mAP": v, "mAP std": None} for k, v in scores.items()}, tmp_path / "a")
    np.testing.assert_array_equal(drawn[0], [4.0, 3.0])
    np.testing.assert_array_equal(drawn[1], [1.0, 4.0, 5.0])
