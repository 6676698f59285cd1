"""`dscsnet known`: what is known of optics, sensor and scene: a table, a check, a file to edit."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from dscsnet_jax.cli import options
from dscsnet_jax.evaluation.plot import plot_psf
from dscsnet_jax.inference import known_file
from dscsnet_jax.inference.known import Known
from dscsnet_jax.io.outputs import replacing
from dscsnet_jax.physics.psf import as_psf

_WIDE = 8  # numbers of a list that are shown


def run(args: argparse.Namespace) -> int:
    """Show or check it, draw its PSF, write it as a file."""
    if args.plot is not None:
        options.prepare_file(args.plot, ".png", force=args.force)
    if args.out is not None:  # large arrays go beside it
        options.prepare_file(args.out, ".json", ".npz", force=args.force)
    presets = options.known_presets()
    known = presets[args.name].known if args.name in presets else Known.from_json(args.name)
    if args.plot is not None and known.psf is None:
        raise ValueError(f"{args.name} tells no PSF that could be drawn")
    if args.action == "check":
        print(f"{args.name}: right")
    else:
        print("\n".join(table(known)))
    if args.out is not None:
        known.to_json(args.out)
        print(f"file: {args.out}")
    if args.plot is not None:
        with replacing(args.plot) as unfinished:
            plot_psf(as_psf(known.psf)).savefig(unfinished, format="png")
        print(f"picture: {args.plot}")
    return 0


def table(known: Known) -> list[str]:
    """Lines of fields, values and units; what is not known is said to be so.

    Example:
      >>> from dscsnet_jax.physics.preset import presets
      >>> table(presets()["csist_noise"].known)[:4]
      ['psf.kind              gaussian', 'psf.sigma             0.5    pixel',
       'sensor.read_noise     5.0    count', 'sensor.pedestal       10.0   count']
    """
    psf = None if known.psf is None else as_psf(known.psf)
    tree = known_file.told(psf, known.sensor, known.prior)
    units = tree["units"]
    rows = [
        (name, _text(value), units.get(name, ""))
        for where in ("psf", "sensor", "prior")
        for name, value in _flat(where, tree[where])
    ]
    wide, long = (max(len(row[i]) for row in rows) for i in (0, 1))
    long = min(long, 20)
    return [f"{name:<{wide}}  {text:<{long}}  {unit}".rstrip() for name, text, unit in rows]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Dotted names and values."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, item in value.items() for pair in _flat(f"{name}.{key}", item)]


def _text(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, str | bool):
        return str(value)
    array = np.asarray(value)
    if array.ndim == 0:
        return f"{array.item():.6g}" if array.dtype.kind == "f" and array % 1 else str(array.item())
    if array.size <= _WIDE:
        return np.array2string(array, precision=4, separator=", ").replace("\n", "")
    return f"{' x '.join(map(str, array.shape))} numbers, {array.min():.4g} .. {array.max():.4g}"
