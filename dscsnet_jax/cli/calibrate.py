"""`dscsnet calibrate`: frames in, what they have in common out."""

from __future__ import annotations

import argparse

from dscsnet_jax.cli import options, progress
from dscsnet_jax.estimation.calibrate import Calibration, calibrate
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.frames import FrameStack, read_many


def run(args: argparse.Namespace) -> int:
    """Read, learn, write what was learned and print a report."""
    known = options.known_of(args)
    options.prepare_file(args.out, ".json", ".npz", force=args.force)  # arrays go beside it
    with progress.stage("reading"):
        stacks = read_many(args.paths, mask_invalid=True)
    taught = learned(stacks, known, seed=args.seed)
    taught.known.to_json(args.out)
    print(f"{taught.report()}\nfile: {args.out}")
    return 0


def learned(stacks: list[FrameStack], known: Known, *, seed: int = 0) -> Calibration:
    """What frames of one sensor teach."""
    if len(stacks) > 1:
        kinds = ", ".join(sorted({stack.kind for stack in stacks}))
        raise ValueError(f"frames of one size and type are needed to learn from, got {kinds}")
    with progress.stage("calibrating"):
        return calibrate(stacks[0].frames, options.known_of_stack(known, stacks[0]), seed=seed)
