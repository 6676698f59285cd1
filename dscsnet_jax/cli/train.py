"""`dscsnet train`: train a network as a config file says, resuming if there is something."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dscsnet_jax.cli import STOPPED, options

EXAMPLE = options.examples(
    [
        "dscsnet train --config experiments/configs/csist_c3.py --workdir runs/csist_c3",
        "dscsnet train --config experiments/configs/csist_c3.py --workdir runs/c5 \\",
        "    --set scene.division=5 --set train.num_steps=2000",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--config", type=Path, required=True, help="Python file with get_config()")
    parser.add_argument(
        "--workdir", type=Path, required=True, help="the run's folder; an unfinished run goes on"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=V",
        help="change one field of the config; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Train and print the last scores and where the weights are."""
    from dscsnet_jax.training.config import load_config
    from dscsnet_jax.training.loop import train

    config = load_config(args.config, args.set)
    result = train(config, args.workdir)
    if not result.finished:
        print(
            f"dscsnet train: stopped after step {result.step} of {config.train.num_steps}, saved "
            f"in {args.workdir}; the same command goes on from there",
            file=sys.stderr,
        )
        return STOPPED
    for name, value in result.scores.items():
        print(f"{name} {'-' if value is None else format(value, '.2f')}")
    print(f"weights {result.weights}")
    return 0
