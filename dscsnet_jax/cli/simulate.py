"""`dscsnet simulate`: a set of frames with their truth, in the CSIST layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dscsnet_jax
from dscsnet_jax.cli import options, progress
from dscsnet_jax.io.csist import write_csist
from dscsnet_jax.io.outputs import prepare_output, replacing
from dscsnet_jax.physics.scene import Preset, Scene, frame_keys, get_preset, simulate

RECORD = "simulation.json"
_BATCH = 2000
_RENAMED = {"offset": "pedestal"}  # in records of before


def run(args: argparse.Namespace) -> int:
    """Simulate and write."""
    changes = options.changes(args)
    preset = get_preset(args.preset, **changes)
    prepare_output(args.out, force=args.force, folder=True)
    scene = simulated(preset, seed=args.seed, split=args.split, num=args.num)
    record = args.out / RECORD
    record.unlink(missing_ok=True)  # it must never describe other frames
    # Only some frames of a varied preset are digital, and one set has one kind of file.
    digital = preset.sensor.quantised and preset.variation is None
    with progress.stage("writing"):
        write_csist(
            args.out,
            np.asarray(scene.frames),
            scene.targets,
            sigma=preset.sigma,  # type: ignore[arg-type]
            bits=8 if digital else None,
            force=args.force,
        )
    about = {
        "preset": args.preset,
        "changes": changes,
        "seed": args.seed,
        "split": args.split,
        "num": args.num,
        "frame_size": preset.frame_size,
        "division": preset.division,
        "sigma": preset.sigma,  # nominal, where it varies
        "variation": dataclasses.asdict(preset.variation) if preset.variation else None,
        "package_version": dscsnet_jax.__version__,
    }
    with replacing(record) as partial_record:
        partial_record.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    number = int(scene.targets.count.sum())
    print(f"{args.num} frames of {args.preset} with {number} targets in {args.out}")
    return 0


def simulated(preset: Preset, *, seed: int, split: str, num: int) -> Scene:
    """The first `num` frames of a split, batch by batch, as NumPy arrays."""
    size = min(num, _BATCH)
    make = jax.jit(partial(simulate, preset))
    batches = [
        jax.device_get(make(frame_keys(seed, split, start + jnp.arange(size))))
        for start in progress.tracked(range(0, num, size), "simulating")
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num], *batches)


def recorded_preset(folder: Path) -> Preset | None:
    """The preset that `simulate` made a set of; None if it did not make it.

    Raises:
      ValueError: if its record cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        changes = {_RENAMED.get(name, name): value for name, value in about["changes"].items()}
        return get_preset(about["preset"], **changes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a record of dscsnet simulate ({error})") from error
