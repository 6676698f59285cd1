"""Ablation: DSCSNet with one switch changed at a time, and with K = 1 .. 8 iterations.

    python experiments/ablate.py --scale cpu
    python experiments/ablate.py --scale tiny --variants dscsnet l2 --out table

Each variant is trained with the same budget (see `budget.py`) from several seeds; a seed
draws the parameters, the training frames and the scored frames, the same for all variants.
The table has the mean and the standard deviation (of the sample) over the seeds of the
CSO-mAP of the map by the reference rule on the `val` split, on which nothing is chosen;
`gain` is the mean over the seeds of the difference to `dscsnet`, which has K = 4. The
picture shows the same, and CSO-mAP against K.

Interrupted, the same command goes on where it was; finished runs are not run again.
Commands with other `--variants` may share a workdir.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from budget import SCALES, Result, head, parse, run_config, trained, write_table
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dscsnet_jax.io.outputs import replacing

FULL = "dscsnet"
DEPTH = 4  # K of the full network
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "l2": {"auxiliary": "l2"},
    "convolutional": {"threshold": "convolutional"},
    "scalar": {"threshold": "scalar"},
    "no-history": {"history": False},
    "fixed-multiplier": {"multiplier": "fixed"},
    "no-multiplier": {"multiplier": "off"},
    "gradient": {"x_step": "gradient"},
    "tied": {"tied": True},
    "subpixel": {"transform_resolution": "subpixel"},
    **{f"K{k}": {"iterations": k} for k in range(1, 9) if k != DEPTH},
}
TITLE = "Ablation: DSCSNet, one switch at a time, preset csist, c = 3"
RATE = 2e-3
SCORES = ("mAP", "AP05", "AP10", "AP15", "AP20", "AP25")
COLUMNS = {
    "change": "",
    "seeds": "d",
    "mAP": ".2f",
    "mAP std": ".2f",
    "gain": "+.2f",
    "AP10": ".2f",
    "AP15": ".2f",
    "AP25": ".2f",
    "parameters": ",",
    "frames/s training": ",.0f",
    "note": "",
}


def runs_of(variant: str, args: argparse.Namespace) -> list[Result]:
    """Results of a variant's runs, seed by seed."""
    budget = SCALES[args.scale]["ablate"]
    network = {**budget.network, **VARIANTS[variant]}
    fields = {f"network.{name}": value for name, value in network.items()}
    results = []
    for seed in range(args.seed, args.seed + budget.seeds):
        config = run_config(FULL, budget, seed=seed, rate=RATE, fields=fields, overrides=args.set)
        results.append(trained(config, args.workdir / variant / f"seed_{seed}"))
    return results


def summary(variant: str, runs: Sequence[Result], full: Sequence[Result]) -> Result:
    """One line of the table, of the runs of a variant and those of the full network."""
    change = ", ".join(f"{k} = {v}" for k, v in VARIANTS[variant].items()) or "none"
    row: Result = {"change": change, "seeds": len(runs), "runs": list(runs)}
    failed = [run["note"] for run in runs if "note" in run]
    if failed:
        return row | {"note": failed[0]}
    for key in SCORES:
        values = [run[key] for run in runs]
        row |= {key: float(np.mean(values)), f"{key} std": deviation(values)}
    if variant != FULL and all("mAP" in run for run in full):
        gains = [run["mAP"] - other["mAP"] for run, other in zip(runs, full, strict=True)]
        row |= {"gain": float(np.mean(gains)), "gain std": deviation(gains)}
    speed = float(np.median([run["training_fps"] for run in runs]))
    last = {key: runs[-1][key] for key in ("parameters", "device")}
    return row | last | {"frames/s training": speed}


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for a single run, of which it is not known."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def draw(rows: Mapping[str, Result], out: Path) -> None:
    """CSO-mAP of each variant, and against K, with one standard deviation, as `OUT.png`."""
    scored = {name: row for name, row in rows.items() if "mAP" in row}
    depth = {
        VARIANTS[name].get("iterations", DEPTH): row
        for name, row in scored.items()
        if name == FULL or "iterations" in VARIANTS[name]
    }
    switches = {name: row for name, row in scored.items() if "iterations" not in VARIANTS[name]}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    value, error = bars(switches.values())
    left.errorbar(value, range(len(value)), xerr=error, fmt="o", capsize=3)
    left.set_yticks(range(len(value)), list(switches))
    left.invert_yaxis()
    left.set_xlabel("CSO-mAP of the map")
    value, error = bars(depth[k] for k in sorted(depth))
    right.errorbar(sorted(depth), value, yerr=error, fmt="o-", capsize=3)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("unfolded iterations K")
    right.set_ylabel("CSO-mAP of the map")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with replacing(out.with_suffix(".png")) as partial:
        figure.savefig(partial, format="png", dpi=150)


def bars(rows: Iterable[Result]) -> tuple[list[float], list[float]]:
    """Means and standard deviations; 0 where they are not known."""
    pairs = [(row["mAP"], row["mAP std"] or 0.0) for row in rows]
    return [mean for mean, _ in pairs], [std for _, std in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the variants; write table and picture after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=VARIANTS,
        metavar="VARIANT",
        help=f"beside {FULL}; default: all: {', '.join(VARIANTS)}",
    )
    args = parse(parser, argv, "ablate")
    full = runs_of(FULL, args)
    rows: dict[str, Result] = {}
    for variant in dict.fromkeys([FULL, *args.variants]):
        runs = full if variant == FULL else runs_of(variant, args)
        rows[variant] = summary(variant, runs, full)
        about = head(TITLE, args, SCALES[args.scale]["ablate"], rows)
        text = write_table(args.out, about, rows, COLUMNS)
        draw(rows, args.out)
    print(text)


if __name__ == "__main__":
    main()
