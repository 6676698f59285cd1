"""Arguments of each verb; nothing here imports JAX, so that `dscsnet VERB --help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from dscsnet_jax.cli import options
from dscsnet_jax.physics.preset import SPLITS
from dscsnet_jax.unfolding.baselines import PUBLISHED


def simulate(parser: argparse.ArgumentParser) -> None:
    """Which frames, how many, and where to."""
    parser.epilog = options.examples(
        "dscsnet simulate --preset csist --num 1000 --seed 0 --out data/csist",
        "dscsnet simulate --preset csist_float --read-noise 2 --num 500 --out data/noisy",
    )
    options.add_preset(parser)
    options.add_changes(parser)
    parser.add_argument(
        "--num", type=options.positive, default=1000, help="number of frames (default 1000)"
    )
    parser.add_argument("--split", default="test", choices=sorted(SPLITS), help="default: test")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options.add_force(parser)


def train(parser: argparse.ArgumentParser) -> None:
    """What to train, and where."""
    parser.epilog = options.examples(
        "dscsnet train --config experiments/configs/csist_c3.py --workdir runs/csist_c3",
        "dscsnet train --config experiments/configs/csist_c3.py --workdir runs/c5 \\",
        "    --set scene.division=5 --set train.num_steps=2000",
    )
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


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Which set, how to unmix it, and what to score beside it."""
    parser.epilog = options.examples(
        "dscsnet simulate --num 1000 --out data/csist",
        "dscsnet evaluate --data data/csist --json scores.json",
        "dscsnet evaluate --data data/csist --limit --estimate map",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cso_img/ and Annotations/"
    )
    options.add_method(parser)
    options.add_sensor(parser)
    options.add_prior(parser)
    parser.add_argument(
        "--blind",
        action="store_true",
        help="do not use what simulate recorded of scenes and sensor",
    )
    parser.add_argument(
        "--limit",
        nargs="?",
        const="given",
        choices=("given", "unknown"),
        help="score the best possible posterior beside it, the number of targets given (default) "
        "or unknown (sets made by simulate; some 0.2 s a frame and number)",
    )
    parser.add_argument("--json", type=Path, help="write the scores to this file")
    parser.add_argument(
        "--one-based", action="store_true", help="the annotations count pixels from 1"
    )
    options.add_force(parser)


def unmix(parser: argparse.ArgumentParser) -> None:
    """Which frames, how to unmix them, and what is known of them."""
    parser.epilog = options.examples(
        "dscsnet unmix frames/ --out targets.csv",
        "dscsnet unmix frames/ --known sensor.json --out targets.csv",
        "dscsnet unmix frames/ --prior csist --noise 0 --out targets.csv",
        "dscsnet unmix stack.npy a.png b.tif --mask-invalid",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="PNG, TIFF, NPY or NPZ files, or folders of them",
    )
    options.add_method(parser)
    parser.add_argument(
        "--out", type=Path, help=".csv, .ecsv or .parquet; default: CSV on standard output"
    )
    parser.add_argument(
        "--frames-out",
        type=Path,
        help="a table of the frames to write as well: count, its probability, the runner-up, noise",
    )
    options.add_sensor(parser)
    options.add_prior(parser)
    parser.add_argument(
        "--threshold", type=options.counts, help="least energy of a target read out, counts"
    )
    parser.add_argument("--max-targets", type=options.positive, help="most targets of a frame")
    parser.add_argument(
        "--learn",
        action="store_true",
        help="learn first from all frames what sensor and scenes they have in common, as `dscsnet "
        "calibrate` does; what was learned is written beside the catalog, OUT.known.json",
    )
    parser.add_argument(
        "--mask-invalid", action="store_true", help="leave NaN and Inf pixels out, flag the frame"
    )
    options.add_force(parser)


def calibrate(parser: argparse.ArgumentParser) -> None:
    """Which frames, and what is known already."""
    parser.epilog = options.examples(
        "dscsnet calibrate frames/ --out sensor.json",
        "dscsnet calibrate frames/ --fix sigma=0.5 --fix noise=2 --out sensor.json",
        "dscsnet unmix frames/ --known sensor.json --out targets.csv",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="PNG, TIFF, NPY or NPZ files, or folders of them: frames of one size",
    )
    parser.add_argument("--out", type=Path, required=True, help="a .json file to write")
    parser.add_argument(
        "--seed", type=options.seed, default=0, help="of the choice among many frames"
    )
    options.add_fixed(parser)
    options.add_sensor(parser, fits=False)
    options.add_prior(parser)
    options.add_force(parser)


def known(parser: argparse.ArgumentParser) -> None:
    """Which file or preset, and what to do with it."""
    parser.epilog = options.examples(
        "dscsnet known show csist_noise --out sensor.json",
        "dscsnet known check sensor.json",
        "dscsnet known show sensor.json --plot psf.png",
    )
    parser.add_argument(
        "action", choices=("show", "check"), help="show: a table with units; check: is it right?"
    )
    parser.add_argument("name", metavar="FILE|PRESET", help="a .json file, or a preset's name")
    parser.add_argument("--plot", type=Path, help="picture of the PSF to write, .png")
    parser.add_argument("--out", type=Path, help="write it as a .json file, to be edited")
    options.add_force(parser)


def info(parser: argparse.ArgumentParser) -> None:
    """Nothing to say."""
    parser.epilog = options.examples("dscsnet info")


def import_weights(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and what it was trained for."""
    parser.epilog = options.examples(
        "dscsnet import-weights dista.pth --method dista_net --initial-matrix Q_3.mat "
        "--out dista.safetensors",
    )
    parser.add_argument("checkpoint", type=Path, metavar="FILE.pth", help="a file of torch.save")
    parser.add_argument("--method", required=True, choices=PUBLISHED, help="whose weights they are")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    parser.add_argument(
        "--sigma", type=options.length, default=0.5, help="PSF width, pixels (default 0.5)"
    )
    parser.add_argument(
        "--division", type=options.positive, default=3, help="cells per pixel side (default 3)"
    )
    parser.add_argument(
        "--frame-size", type=options.positive, default=11, help="pixels per side (default 11)"
    )
    parser.add_argument(
        "--initial-matrix",
        type=Path,
        metavar="Q.mat",
        help="the published initial matrix, which checkpoints lack: a MATLAB file with Qinit, "
        "or .npy; without it the start is another than the weights were trained for",
    )
    parser.add_argument(
        "--branch-weight",
        type=options.counts,
        help="dista_net: weight of the static branch, which checkpoints lack (default 0.7)",
    )
    options.add_force(parser)


def demo(parser: argparse.ArgumentParser) -> None:
    """Which frames, and the picture."""
    parser.epilog = options.examples(
        "dscsnet demo", "dscsnet demo --num 2000 --out picture.png --force"
    )
    options.add_preset(parser, options.known_presets())
    parser.add_argument(
        "--num", type=options.positive, default=200, help="number of frames (default 200)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo.png"), help="picture to write (default demo.png)"
    )
    options.add_force(parser)
