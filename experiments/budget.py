"""Budget: what `bench.py` and `ablate.py` share: budgets, one resumable run, tables.

All runs of a comparison see the same number of frames, drawn from the same seed, and have
the same AdamW schedule (linear warm-up over a tenth of the steps, then a cosine to a
hundredth), clipping and truth maps; the parameters of the last step are scored. Where the
transform has a learned left inverse, its error is weighed by 0.01, as published.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dscsnet_jax.io.outputs import replacing
from dscsnet_jax.io.weights import load_weights
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.training import config as configs
from dscsnet_jax.training.loop import train
from dscsnet_jax.unfolding.registry import Network

BASE = Path(__file__).parent / "configs" / "csist_c3.py"
FRAME_SIZE = 11
SYMMETRY_WEIGHT = 0.01
LOG_LINES = 20

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each run of a comparison may spend.

    Attributes:
      num_steps: steps of a run.
      batch_size: frames a step.
      eval_frames: frames that are scored.
      rates: peak learning rates to choose from.
      solver_iterations: most that a classical solver takes for a frame.
      frame_size: pixels per side in training; scored on 11 x 11.
      seeds: runs of each variant, each with other parameters and frames.
      network: hyper-parameters of all variants of the ablation.
    """

    num_steps: int
    batch_size: int
    eval_frames: int
    rates: tuple[float, ...] = (2e-3,)
    solver_iterations: int = 10_000
    frame_size: int = FRAME_SIZE
    seeds: int = 1
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """One line for the head of a table."""
        size = f"{self.frame_size} x {self.frame_size} pixels"
        fields = ", ".join(f"{name}={value}" for name, value in self.network.items())
        return (
            f"{self.num_steps * self.batch_size:,} frames of {size} a run ({self.num_steps} steps "
            f"of {self.batch_size}), {self.eval_frames} frames of {FRAME_SIZE} x {FRAME_SIZE} "
            f"scored{', ' + fields if fields else ''}"
        )


_RATES = (5e-4, 2e-3, 8e-3)
_SMALL = {"channels": 24, "attention_channels": 12}
SCALES: dict[str, dict[str, Budget]] = {
    # For tests: everything runs, nothing is learned.
    "tiny": {
        "bench": Budget(2, 4, 8, solver_iterations=20),
        "ablate": Budget(
            2, 4, 8, frame_size=5, seeds=2, network={"channels": 4, "attention_channels": 4}
        ),
    },
    # Under an hour each on two CPU cores.
    "cpu": {
        "bench": Budget(150, 16, 500, rates=_RATES, solver_iterations=1000),
        "ablate": Budget(300, 32, 500, frame_size=7, seeds=3, network=_SMALL),
    },
    # About an hour for the slowest method, or for a variant with all its seeds, on two cores.
    "hour": {
        "bench": Budget(1500, 64, 2000, rates=_RATES),
        "ablate": Budget(3000, 128, 2000, frame_size=7, seeds=3),
    },
    # For an accelerator.
    "full": {
        "bench": Budget(20_000, 256, 10_000, rates=_RATES),
        "ablate": Budget(10_000, 256, 10_000, seeds=5),
    },
}


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, name: str
) -> argparse.Namespace:
    """Parse a script's own options and those that both scripts have."""
    parser.add_argument("--scale", default="cpu", choices=SCALES, help="budget (default cpu)")
    parser.add_argument("--workdir", type=Path, default=Path("runs") / name, help="folder of runs")
    parser.add_argument("--out", type=Path, help="table without suffix; default: in the workdir")
    parser.add_argument("--seed", type=int, default=0, help="(first) seed (default 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=V", help="change a field of all configs"
    )
    args = parser.parse_args(argv)
    args.out = args.out or args.workdir / name
    args.command = shlex.join(
        ["python", f"experiments/{name}.py", *(sys.argv[1:] if argv is None else argv)]
    )
    keep_compilations(args.workdir)
    return args


def keep_compilations(workdir: Path) -> None:
    """Keep compiled programs in the workdir unless a folder is set, so that resuming is fast."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "programs"))


def run_config(
    method: str,
    budget: Budget,
    *,
    seed: int,
    rate: float,
    fields: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> ConfigDict:
    """Config of one run; `overrides` (`a.b=v`) win."""
    steps = budget.num_steps
    own = {
        "method": method,
        "seed": seed,
        "scene.frame_size": budget.frame_size,
        "optimiser.learning_rate": rate,
        "optimiser.warmup_steps": steps // 10,
        "train.num_steps": steps,
        "train.batch_size": budget.batch_size,
        "train.log_every": max(1, steps // LOG_LINES),
        "train.eval_every": steps,
        "train.checkpoint_every": max(1, steps // 10),
        "eval.num_frames": budget.eval_frames,
        **(fields or {}),
    }
    config = configs.load_config(BASE, [*(f"{k}={v}" for k, v in own.items()), *overrides])
    if not any(text.startswith("train.symmetry_weight") for text in overrides):
        learned = has_left_inverse(configs.make_method(config), config.scene.frame_size)
        config.train.symmetry_weight = SYMMETRY_WEIGHT * learned
    return config


@functools.cache
def has_left_inverse(network: Network, frame_size: int) -> bool:
    """Whether the network's trace holds the error of a learned left inverse."""

    def trace() -> Any:
        operator = sensing_operator(frame_size, division=network.config.division, psf=0.5)
        params = network.init(jax.random.key(0), operator)
        frames = jnp.zeros((1, *operator.frame_shape))
        return network.apply(params, frames, operator, trace=True).trace

    return "symmetry" in (jax.eval_shape(trace) or {})


def kept(path: Path, about: Mapping[str, Any], make: Callable[[], Result]) -> Result:
    """The result in a file, or what `make` answers, which is kept there.

    Raises:
      ValueError: if the file holds the result of something else.
    """
    about = json.loads(json.dumps(about))
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        if stored["about"] != about:
            raise ValueError(f"{path} is the result of another run; choose another --workdir")
        return dict(stored["result"])
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"about": about, "result": result})
    return result


def trained(config: ConfigDict, workdir: Path) -> Result:
    """Train, or go on with it: scores of the `val` split, loss, speed, size, device.

    Returns:
      The result, kept in `workdir`; `{"note": ...}` alone if the loss became infinite.

    Raises:
      SystemExit: if a signal stopped the run; it is saved.
      ValueError: if `workdir` holds another run.
    """
    return kept(workdir / "result.json", config.to_dict(), lambda: _train(config, workdir))


def _train(config: ConfigDict, workdir: Path) -> Result:
    try:
        result = train(config, workdir)
    except FloatingPointError as error:
        return {"note": f"diverged: {error}"}
    if not result.finished:
        raise SystemExit(f"stopped, saved in {workdir}; the same command goes on from there")
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    log = [line for line in map(json.loads, lines) if "loss" in line]
    rates = [line["frames_per_second"] for line in log]
    return {
        **result.scores,
        "loss": log[-1]["loss"],
        # The first of several holds the compilation.
        "training_fps": statistics.median(rates[1:] or rates),
        "parameters": load_weights(workdir / "weights.safetensors").metadata.training["parameters"],
        "device": device(),
    }


def device() -> str:
    """What computes here."""
    devices = jax.local_devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind} ({os.cpu_count()} CPU cores), jax {jax.__version__}"


def head(
    title: str, args: argparse.Namespace, budget: Budget, rows: Mapping[str, Result]
) -> dict[str, Any]:
    """What stands above a table."""
    devices = sorted({row["device"] for row in rows.values() if "device" in row})
    return {
        "title": title,
        "command": f"`{args.command}`",
        "device": "; ".join(devices),
        "date": datetime.date.today().isoformat(),
        "budget": budget.text(),
    }


def write_table(
    out: Path, about: Mapping[str, Any], rows: Mapping[str, Result], columns: Mapping[str, str]
) -> str:
    """Write `OUT.json` with all there is and `OUT.md` with some columns.

    Args:
      out: path without suffix.
      about: the head.
      rows: by name; what a row lacks shows as `-`.
      columns: key -> format of the value (`.2f`; empty for text).

    Returns:
      The Markdown.
    """
    text = markdown(about, rows, columns)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"about": about, "rows": rows})
    with replacing(out.with_suffix(".md")) as partial:
        partial.write_text(text, "utf-8")
    return text


def markdown(
    about: Mapping[str, Any], rows: Mapping[str, Result], columns: Mapping[str, str]
) -> str:
    """Head and rows as Markdown."""
    lines = [f"# {about['title']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "title"]
    table = [["", *columns], ["---", *("---:" if fmt else "---" for fmt in columns.values())]]
    for name, row in rows.items():
        table.append([name, *(_cell(row.get(key), fmt) for key, fmt in columns.items())])
    return "\n".join([*lines, "", *(f"| {' | '.join(line)} |" for line in table)]) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write plain values, all or nothing."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _cell(value: Any, fmt: str) -> str:
    return "-" if value is None else format(value, fmt)
