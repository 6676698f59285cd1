"""`dscsnet unmix`: frames in, a table of targets out."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from dscsnet_jax.cli import options, progress
from dscsnet_jax.cli.calibrate import learned
from dscsnet_jax.estimation.result import UnmixResult
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.catalog import (
    Catalog,
    concatenate,
    prepare_catalog,
    write_catalog,
)
from dscsnet_jax.io.frames import FrameStack, read_many
from dscsnet_jax.physics.sensor import PER_PIXEL

_ENOUGH = 50  # frames with targets, from which on what is not known is worth learning


def run(args: argparse.Namespace) -> int:
    """Read, unmix, write the catalog and print a summary."""
    known = options.known_of(args)
    if args.out:
        prepare_catalog(args.out, force=args.force)
    if args.frames_out:
        prepare_catalog(args.frames_out, force=args.force)
        if args.out and args.out.resolve() == args.frames_out.resolve():
            raise ValueError(f"--out and --frames-out are the same file: {args.out}")
    if args.out and args.learn:
        options.prepare_file(_beside(args.out), ".json", ".npz", force=args.force)
    with progress.stage("reading"):
        stacks = read_many(args.paths, mask_invalid=args.mask_invalid)
    if args.learn:
        taught = learned(stacks, known)
        known = taught.known
        print(taught.report(), file=sys.stderr)
        if args.out:
            known.to_json(_beside(args.out))
    told = [_known_of(stack, known, alone=len(stacks) == 1) for stack in stacks]
    of_stacks = [_pieces(stack, args) for stack in stacks]
    pieces = [piece for of_stack in of_stacks for piece in of_stack]
    some = [
        part
        for of_stack, known in zip(of_stacks, told, strict=True)
        for part in options.known_of_runs(known, of_stack)
    ]
    work = progress.tracked(list(zip(pieces, some, strict=True)), "unmixing")
    answers = [_answer(piece, of_piece, args) for piece, of_piece in work]
    catalog = concatenate(
        [answer.catalog(piece.names) for piece, answer in zip(pieces, answers, strict=True)]
    )
    to_learn = [] if args.learn else _to_learn(answers, known, len(stacks))
    summary = "\n".join([_summary(answers), *to_learn])
    if args.frames_out:
        of_frames = [a.frame_table(p.names) for p, a in zip(pieces, answers, strict=True)]
        write_catalog(args.frames_out, concatenate(of_frames), force=args.force)
        summary += f"\nframes: {args.frames_out}"
    if args.out:
        write_catalog(args.out, catalog, force=args.force)
        print(f"{summary}\ncatalog: {args.out}")
    else:
        _print_catalog(catalog)
        print(summary, file=sys.stderr)
    return 0


def _beside(catalog: Path) -> Path:
    """Where what was learned goes."""
    return catalog.with_suffix(".known.json")


def _pieces(stack: FrameStack, args: argparse.Namespace) -> list[FrameStack]:
    """Runs of frames to report progress by; all at once if they share a fit of the PSF."""
    size = len(stack.frames) if args.fit_psf else max(args.block or 1, progress.RUN)
    runs = progress.runs_of(stack.frames, max(size, 1))
    ends = np.cumsum([len(frames) for frames in runs]).tolist()
    return [
        FrameStack(stack.names[end - len(frames) : end], frames, stack.full_well)
        for frames, end in zip(runs, ends, strict=True)
    ]


def _known_of(stack: FrameStack, known: Known, *, alone: bool) -> Known:
    """What is known of a stack of frames; refused, before any work, if it is of others."""
    known.checked((len(stack), *stack.frames.shape[1:]))
    several = [n for n in PER_PIXEL if np.ndim(getattr(known.sensor, n)) in (1, 3)]
    if several and not alone:
        raise ValueError(f"{several[0]} of each frame: frames of one size and type are needed")
    return options.known_of_stack(known, stack)


def _answer(stack: FrameStack, known: Known, args: argparse.Namespace) -> UnmixResult:
    return unmix(
        stack.frames,
        known,
        max_targets=args.max_targets,
        mask_invalid=args.mask_invalid,
        **options.method_arguments(args, threshold=args.threshold),
    )


def _print_catalog(catalog: Catalog) -> None:
    """The CSV that `--out` would write."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "targets.csv")
        write_catalog(path, catalog)
        sys.stdout.write(path.read_text(encoding="utf-8"))


def _to_learn(answers: list[UnmixResult], known: Known, num_kinds: int) -> list[str]:
    """A line that says what `--learn` would tell, where frames of one kind are enough for it."""
    useful = sum(int((np.asarray(answer.targets.count) > 0).sum()) for answer in answers)
    missing = {
        "noise": known.sensor.read_noise,
        "PSF width": known.psf,
        "range of the intensities": known.prior.intensity,
        "probabilities of the counts": known.prior.count,
        "size of the clusters": known.prior.cluster_size,
    }
    names = ", ".join(name for name, value in missing.items() if value is None)
    if num_kinds > 1 or useful < _ENOUGH or not names:
        return []
    return [f"not told: {names}; with --learn these frames teach it"]


def _summary(answers: list[UnmixResult]) -> str:
    """Frames, targets, how many targets the frames have, and what was flagged."""
    counts = np.concatenate([np.asarray(answer.targets.count) for answer in answers])
    per_count = dict(enumerate(np.bincount(counts).tolist()))
    histogram = ", ".join(f"{n}: {frames}" for n, frames in per_count.items() if frames)
    flags = {
        "targets near the edge": sum(int(a.near_edge.sum()) for a in answers),
        "targets at saturated pixels": sum(int(a.saturated.sum()) for a in answers),
        "targets unresolved": sum(int(a.unresolved.sum()) for a in answers),
        "targets not converged": sum(int(a.not_converged.sum()) for a in answers),
        "targets in crowded groups": sum(int(a.crowded.sum()) for a in answers),
        "frames not explained by the noise": sum(int(a.unexplained.sum()) for a in answers),
        "frames truncated": sum(int(a.truncated.sum()) for a in answers),
        "frames with invalid pixels": sum(int(a.invalid.sum()) for a in answers),
    }
    lines = [
        f"{len(counts)} frames, {counts.sum()} targets, "
        f"{per_count.get(0, 0)} frames without targets",
        f"frames by number of targets: {histogram or 'none'}",
    ]
    lines += [f"{name}: {number}" for name, number in flags.items() if number]
    fitted = [a.psf_parameters for a in answers if a.psf_parameters]
    for parameters in fitted:
        told = ", ".join(f"{name} {v:.4f} +- {std:.4f}" for name, (v, std) in parameters.items())
        lines.append(f"PSF: {told}")
    return "\n".join(lines)
