"""`dscsnet train`: train a network as a config file says, resuming if there is something."""

from __future__ import annotations

import argparse
import sys

from dscsnet_jax.cli import STOPPED


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
