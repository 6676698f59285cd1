"""`dscsnet demo`: simulate, unmix, score beside the limit, and draw a picture."""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from dscsnet_jax.cli import progress, scoring
from dscsnet_jax.cli.simulate import simulated
from dscsnet_jax.estimation.unmix import Options, unmix
from dscsnet_jax.evaluation.plot import plot_unmixing
from dscsnet_jax.evaluation.report import format_table
from dscsnet_jax.io.outputs import prepare_output, replacing
from dscsnet_jax.physics.scene import get_preset


def run(args: argparse.Namespace) -> int:
    """Run the whole chain on the packaged weights."""
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: expected the suffix .png, got {args.out.suffix!r}")
    prepare_output(args.out, force=args.force)
    preset = get_preset(args.preset)
    scene = simulated(preset, seed=args.seed, split="test", num=args.num)
    frames, truth = np.asarray(scene.frames), scene.targets
    known = preset.known
    with progress.stage("compiling"):
        unmix(frames, known)
    with progress.stage("unmixing"):
        start = time.perf_counter()
        answer = unmix(frames, known, options=Options(return_maps=True))
        seconds = time.perf_counter() - start
    name = scoring.label("dscsnet", "mean", "peaks")
    with progress.stage("scoring"):
        rows = scoring.method_rows(
            name, answer.targets, answer.maps, truth, num_pixels=preset.frame_size
        )
        rows |= scoring.guide_row(truth, preset)
    print(
        f"{args.num} test frames of {preset.name} unmixed in {seconds:.2f} s "
        f"({args.num / seconds:.0f} frames/s on {jax.devices()[0].device_kind})"
    )
    print(format_table(rows))
    with progress.stage("drawing"), replacing(args.out) as unfinished:
        figure = plot_unmixing(
            frames,
            answer.maps,
            truth,
            answer.targets,
            division=preset.division,
            std=answer.std[..., :2],
        )
        figure.savefig(unfinished, format="png")
    print(f"picture: {args.out}")
    return 0
