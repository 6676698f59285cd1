"""`dscsnet calibrate`: frames in, what they have in common out."""

from __future__ import annotations

import argparse
from pathlib import Path

from dscsnet_jax.cli import options, progress
from dscsnet_jax.estimation.calibrate import Calibration, calibrate
from dscsnet_jax.estimation.observed import with_full_well
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.frames import FrameStack, read_many
from dscsnet_jax.io.outputs import prepare_output


def run(args: argparse.Namespace) -> int:
    """Read, learn, write what was learned and print a report."""
    known = options.known_of(args)
    prepare(args.out, force=args.force)
    with progress.stage("reading"):
        stacks = read_many(args.paths, mask_invalid=True)
    taught = learned(stacks, known, seed=args.seed)
    taught.known.to_json(args.out)
    print(f"{taught.report()}\nfile: {args.out}")
    return 0


def prepare(path: Path, *, force: bool) -> None:
    """Check, before the work starts, that what will be learned can be written."""
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: expected the suffix .json, got {path.suffix!r}")
    for suffix in (".json", ".npz"):  # large arrays go beside it
        prepare_output(path.with_suffix(suffix), force=force)


def learned(stacks: list[FrameStack], known: Known, *, seed: int = 0) -> Calibration:
    """What frames of one sensor teach."""
    if len(stacks) > 1:
        kinds = ", ".join(sorted({stack.kind for stack in stacks}))
        raise ValueError(f"frames of one size and type are needed to learn from, got {kinds}")
    known = (
        with_full_well(known, stacks[0].full_well) if stacks[0].full_well < float("inf") else known
    )
    with progress.stage("calibrating"):
        return calibrate(stacks[0].frames, known, seed=seed)
