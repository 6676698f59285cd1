"""`dscsnet evaluate`: scores of a method on a set in the CSIST layout, beside the limit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dscsnet_jax.cli import options, progress, scoring
from dscsnet_jax.cli.simulate import RECORD, recorded_preset
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.evaluation.report import format_table, join_batches
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.csist import CsistSplit, read_csist
from dscsnet_jax.io.outputs import prepare_output, replacing
from dscsnet_jax.physics.preset import Preset, Sensor


def run(args: argparse.Namespace) -> int:
    """Unmix, score, print the table and write the JSON."""
    if args.json:
        prepare_output(args.json, force=args.force)
    with progress.stage("reading"):
        split = read_csist(args.data, one_based=args.one_based)
    preset = _preset_of(args.data, split)
    well = split.full_well if np.isfinite(split.full_well) else None
    known = Known(split.sigma, Sensor(saturation=well))
    if preset is not None and preset.variation is None and not args.blind:
        known = preset.known
    if args.limit and (preset is None or preset.variation is not None):
        raise ValueError(f"--limit needs a set of one preset made by simulate, got {args.data}")
    known = options.known_of(args, known)
    how = options.method_arguments(args, return_maps=True)
    size = len(split.frames) if args.fit_psf else max(args.block or 1, progress.RUN)
    known.checked(split.frames.shape)
    runs = progress.runs_of(split.frames, max(size, 1))
    work = list(zip(runs, options.known_of_runs(known, runs), strict=True))
    answers = [unmix(frames, some, **how) for frames, some in progress.tracked(work, "unmixing")]
    name = scoring.label(args.method, args.estimate, args.readout)
    with progress.stage("scoring"):
        maps = [answer.maps for answer in answers if answer.maps is not None]
        rows = scoring.method_rows(
            name,
            join_batches(answer.targets for answer in answers),
            np.concatenate(maps) if maps else None,
            split.targets,
            num_pixels=split.frames.shape[1],
            confidence=scoring.ranked(answers),
        )
        if preset is not None and preset.variation is None:
            rows |= scoring.guide_row(split.targets, preset)
    if args.limit and preset is not None:
        with progress.stage("limit"):
            rows |= scoring.limit_row(split.frames, split.targets, preset.known, args.limit)
    print(format_table(rows))
    if args.limit:
        print(scoring.against_limit(rows, name, args.limit))
    if args.json:
        scores = {name: row.as_dict() for name, row in rows.items()}
        text = json.dumps({**scores.pop(name), "method": name, "rows": scores}, indent=2)
        with replacing(args.json) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return 0


def _preset_of(folder: Path, split: CsistSplit) -> Preset | None:
    """The preset recorded beside the frames, if there is one and it fits them."""
    preset = recorded_preset(folder)
    if preset is not None:
        recorded = (preset.frame_size, preset.frame_size, preset.sigma)
        found = (*split.frames.shape[1:], split.sigma)
        if recorded != found:
            raise ValueError(
                f"{folder / RECORD}: tells of rows, columns, sigma {recorded}, the frames have "
                f"{found}; without the file they are evaluated without the limit"
            )
    return preset
