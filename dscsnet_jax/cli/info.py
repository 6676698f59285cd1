"""`dscsnet info`: versions, devices, cache and weights: what a report of a fault needs."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path

import jax

import dscsnet_jax
from dscsnet_jax.io.weights import load_weights, packaged

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def run(args: argparse.Namespace) -> int:
    """Print a line for each thing."""
    del args
    settings = jax.config.values
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
    devices = ", ".join(f"{d.device_kind} ({d.platform} {d.id})" for d in jax.devices())
    lines = [
        f"dscsnet_jax {dscsnet_jax.__version__}",
        f"python {platform.python_version()} on {platform.platform()}",
        versions,
        f"devices: {devices}; processes: {jax.process_count()}",
        f"float64: {'on' if settings['jax_enable_x64'] else 'off'}",
        f"compiled programs: {_cache(settings['jax_compilation_cache_dir'])}",
    ]
    for name, path in packaged().items():
        about = load_weights(path).metadata
        sigma = sorted(set(about.training.get("sigma") or about.geometry.sigma))
        what = f"{about.method}, {about.geometry.division} cells a pixel"
        lines.append(f"weights {name}: {what}, PSF sigma {' to '.join(map(str, sigma))} pixels")
    print("\n".join(lines))
    return 0


def _cache(folder: str | None) -> str:
    """Where compiled programs are kept, and how much of them there is."""
    if not folder:
        return "not kept (no folder can be written)"
    sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
    return f"{folder}, {len(sizes)} files, {sum(sizes) / 2**20:.0f} MiB"
