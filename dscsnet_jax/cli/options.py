"""Options that several verbs share, and how they become arguments of the library."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dscsnet_jax.estimation import ESTIMATES, METHODS, READOUTS
from dscsnet_jax.io.outputs import prepare_output
from dscsnet_jax.physics.preset import Preset, presets

if TYPE_CHECKING:
    from dscsnet_jax.inference.known import Known
    from dscsnet_jax.inference.prior import ScenePrior
    from dscsnet_jax.io.frames import FrameStack

_CHANGES = ("division", "frame_size", "sigma", "read_noise", "pedestal")
# Fields of the sensor and the flags that set them.
_SENSOR = {
    "read_noise": "noise",
    "pedestal": "pedestal",
    "background": "background",
    "saturation": "saturation",
    "gain": "gain",
    "misfit": "misfit",
}
_LEVEL = ("pedestal", "background")


def add_preset(parser: argparse.ArgumentParser, choices: Iterable[str] = ()) -> None:
    """Which scenes to simulate; all presets, or some."""
    parser.add_argument(
        "--preset", default="csist", choices=sorted(choices or presets()), help="default: csist"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the scenes (default 0)")


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Changes to the preset."""
    parser.add_argument("--division", type=positive, help="cells per pixel side of the truth map")
    parser.add_argument("--frame-size", type=positive, help="detector pixels per side")
    parser.add_argument("--sigma", type=length, help="PSF standard deviation, pixels")
    parser.add_argument("--read-noise", type=counts, help="standard deviation of noise, counts")
    parser.add_argument("--pedestal", type=counts, help="electronic offset, counts")
    parser.add_argument("--offset", type=counts, dest="pedestal", action=_Renamed)


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """The changes to the preset that were asked for."""
    return {k: getattr(args, k) for k in _CHANGES if getattr(args, k) is not None}


def add_method(parser: argparse.ArgumentParser) -> None:
    """How to unmix."""
    parser.add_argument(
        "--method",
        default="dscsnet",
        choices=METHODS,
        help="dscsnet: network, then off the grid (default); grid: the network's map alone; "
        "greedy: no network, one target after the other",
    )
    parser.add_argument(
        "--estimate",
        default="mean",
        choices=ESTIMATES,
        help="mean: of the posterior (default); map: the best fit, faster",
    )
    parser.add_argument(
        "--readout",
        default="peaks",
        choices=READOUTS,
        help="peaks: one target a peak, at its centroid (default); cells, for the method grid: "
        "the benchmark's reference rule, every cell above the threshold",
    )
    parser.add_argument("--weights", help="a .safetensors file, or the name of packaged weights")
    parser.add_argument(
        "--block", type=positive, help="windows computed together; default: by the device"
    )
    parser.add_argument("--batch-size", type=positive, dest="block", action=_Renamed)


def add_prior(parser: argparse.ArgumentParser) -> None:
    """What is known of the scenes."""
    parser.add_argument(
        "--prior",
        choices=[*sorted(known_presets()), "none"],
        help="what the scenes of this preset have in common: range of intensities, least "
        "distance, cluster size and number of targets; default: a cluster's targets are alike "
        "within a factor and near to each other; none: not even that",
    )
    parser.add_argument(
        "--intensity", type=counts, nargs=2, metavar=("LOW", "HIGH"), help="range, counts"
    )
    parser.add_argument("--separation", type=counts, help="least distance of targets, pixels")
    parser.add_argument(
        "--cluster-size", type=length, help="side of the square that holds a cluster, pixels"
    )
    parser.add_argument("--extent", type=length, dest="cluster_size", action=_Renamed)


def add_fixed(parser: argparse.ArgumentParser) -> None:
    """What is not to be learned, in one word each."""
    parser.add_argument(
        "--fix",
        action="append",
        type=fixed,
        metavar="NAME=VALUE",
        help="keep what is known instead of learning it: another way to write the options below, "
        "sigma=0.5 or intensity=50,250",
    )


def add_sensor(parser: argparse.ArgumentParser, *, fits: bool = True) -> None:
    """What is known of optics and sensor; what is not given is estimated."""
    parser.add_argument(
        "--known",
        metavar="FILE|PRESET",
        help="what is known: a file of `dscsnet known`, or all of a preset's frames; the options "
        "below, and those of the scene, come before it",
    )
    parser.add_argument(
        "--sigma", type=length, help="PSF standard deviation, pixels; default: the weights'"
    )
    if fits:
        parser.add_argument(
            "--fit-psf",
            action="store_true",
            help="fit the parameters of the PSF, for all frames together",
        )
    parser.add_argument("--noise", type=counts, help="standard deviation of the read noise, counts")
    parser.add_argument(
        "--pedestal", type=number, help="electronic offset under every pixel, counts; default: 0"
    )
    parser.add_argument(
        "--background",
        type=number,
        help="light under every pixel, counts, with shot noise if a gain is given; default: "
        "estimated, as what is above the pedestal",
    )
    parser.add_argument(
        "--saturation",
        type=full_well,
        help="full well of the sensor, counts, or inf; default: that of 8 or 16 bit images",
    )
    parser.add_argument("--gain", type=length, help="electrons per count of the shot noise")
    parser.add_argument(
        "--misfit",
        type=counts,
        help="error of a pixel's light from targets, by that light: of a PSF that is not quite "
        "right, 0.1 for a tenth; default: none",
    )


def known_presets() -> dict[str, Preset]:
    """Presets whose frames are all of one kind."""
    return {name: preset for name, preset in presets().items() if preset.variation is None}


def method_arguments(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Arguments of `estimation.unmix.unmix`: how; `more` goes into its `Options`."""
    from dscsnet_jax.estimation.unmix import Options

    names = ("readout", "weights", "block", "fit_psf")
    options = Options(**{name: getattr(args, name) for name in names}, **more)
    return {"method": args.method, "estimate": args.estimate, "options": options}


def known_of(args: argparse.Namespace, base: Known | None = None) -> Known:
    """What is known: that of `--known`, or else of `base`, changed by what else is given."""
    from dscsnet_jax.inference.known import Known

    for name, value in getattr(args, "fix", None) or ():
        setattr(args, name, value)
    known = Known() if base is None else base
    if args.known is not None:
        presets = known_presets()
        named = args.known in presets
        known = presets[args.known].known if named else Known.from_json(args.known)
    sensor = {name: getattr(args, flag) for name, flag in _SENSOR.items()}
    sensor = {name: value for name, value in sensor.items() if value is not None}
    if sensor.keys() & set(_LEVEL):  # the other one, of something else, does not go with it
        sensor = dict.fromkeys(_LEVEL) | sensor
    return dataclasses.replace(
        known,
        psf=known.psf if args.sigma is None else args.sigma,
        sensor=dataclasses.replace(known.sensor, **sensor),
        prior=_prior(args, known.prior),
    )


def known_of_stack(known: Known, stack: FrameStack) -> Known:
    """What is known of frames of one type, with the full well of the type, if it has one."""
    from dscsnet_jax.estimation.observed import with_full_well

    return with_full_well(known, stack.full_well) if math.isfinite(stack.full_well) else known


def known_of_runs(known: Known, runs: Iterable[Sized]) -> Iterator[Known]:
    """What is known of runs of frames that follow each other: of each frame's own, theirs."""
    first = 0
    for run in runs:
        yield known.of_frames(first, first + len(run))
        first += len(run)


def _prior(args: argparse.Namespace, base: ScenePrior) -> ScenePrior:
    """What is known of the scene: that of `--prior`, or else of `base`, changed as asked for."""
    from dscsnet_jax.inference.alike import AnyIntensity
    from dscsnet_jax.inference.prior import preset_prior, scene_prior

    names = ("intensity", "separation", "cluster_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.prior == "none":
        base = scene_prior(intensity=AnyIntensity())
    elif args.prior is not None:
        base = preset_prior(presets()[args.prior])
    if not given:
        return base
    whole = {name: getattr(base, name) for name in (*names, "count", "places")}
    # The place of the square goes with its size; what is near by itself has neither.
    whole["cluster_offset"] = None if "cluster_size" in given else base.cluster_offset
    whole["spread"] = None if given.keys() & {"separation", "cluster_size"} else base.spread
    return scene_prior(**whole | given)


class _Renamed(argparse.Action):
    """An option's old name: it is hidden from the help, and says once what the new one is."""

    def __init__(self, option_strings: Sequence[str], dest: str, **given: Any) -> None:
        super().__init__(option_strings, dest, help=argparse.SUPPRESS, **given)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take the value for the new name."""
        if getattr(namespace, self.dest) is None:
            name = self.dest.replace("_", "-")
            print(f"note: {option_string} is now --{name}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Permission to replace files."""
    parser.add_argument("--force", action="store_true", help="replace existing output")


def fixed(text: str) -> tuple[str, Any]:
    """A name and its value, of `NAME=VALUE`, as the option of that name takes it.

    Example:
      >>> fixed("sigma=0.5"), fixed("intensity=50,250")
      (('sigma', 0.5), ('intensity', [50.0, 250.0]))
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or name not in _FIXED:
        raise argparse.ArgumentTypeError(f"NAME=VALUE with one of {', '.join(_FIXED)}, got {text}")
    if name != "intensity":
        return name, _FIXED[name](value)
    ends = [_FIXED[name](end) for end in value.split(",")]
    if len(ends) != 2:
        raise argparse.ArgumentTypeError(f"intensity=LOW,HIGH, got {text}")
    return name, ends


def prepare_file(path: Path, suffix: str, *beside: str, force: bool) -> None:
    """Check, before the work starts, that a file and those beside it can be written."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: expected the suffix {suffix}, got {path.suffix!r}")
    prepare_output(path, force=force)
    for other in beside:
        prepare_output(path.with_suffix(other), force=force)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return int(_at_least(1, int(text)))


def seed(text: str) -> int:
    """A whole number that JAX takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in 0..2^32-1, got {text}")
    return value


def length(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return value


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def full_well(text: str) -> float:
    """A number above 0, or inf."""
    return math.inf if text == "inf" else length(text)


def counts(text: str) -> float:
    """A finite number of at least 0."""
    value = _at_least(0, float(text))
    if value == math.inf:
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def _at_least(least: float, value: float) -> float:
    if not value >= least:  # NaN as well
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def examples(*lines: str) -> str:
    """The examples at the end of a verb's help."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


_FIXED: dict[str, Callable[[str], Any]] = {
    "sigma": length,
    "noise": counts,
    "pedestal": number,
    "background": number,
    "saturation": full_well,
    "gain": length,
    "misfit": counts,
    "intensity": counts,
    "separation": counts,
    "cluster_size": length,
}
