"""dscsnet_jax: resolve closely spaced infrared point targets.

    import dscsnet_jax as dj

offers what `dir(dj)` lists, each loaded when it is first asked for: importing the package changes
no global state and touches no device. These names, their arguments and what they mean stay through
all releases of one major version (before 1.0: of one minor version); what else the rooms hold may
change.

Rooms, in the order the data walks through them: `physics` (grid, optics, scenes, sensor, limits),
`io`, `unfolding` (ADMM unfolded into DSCSNet), `inference` (one scene model: fit, evidence,
posterior), `maps` (frame to first targets), `estimation` (host side: `unmix`), `evaluation`
(scores), `training`, `cli`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "estimation.calibrate": ("Calibration", "calibrate"),
    "estimation.result": ("UnmixResult",),
    "estimation.unmix": ("Options", "unmix"),
    "evaluation.report": ("evaluate",),
    "inference.alike": ("Alike", "AnyIntensity"),
    "inference.evidence": ("log_evidence",),
    "inference.fit": ("fit",),
    "inference.intensity": ("Histogram", "LogNormal", "Uniform"),
    "inference.known": ("Known",),
    "inference.observation": ("observe",),
    "inference.prior": ("Poisson", "ScenePrior", "scene_prior"),
    "inference.sampler": ("sample",),
    "io.weights": ("load_weights",),
    "physics.optics": ("render", "sensing_operator"),
    "physics.psf": ("Gaussian",),
    "physics.psf_airy": ("airy",),
    "physics.psf_gaussians": ("GaussianMixture", "Moffat", "rotated_gaussian"),
    "physics.psf_tables": ("empirical",),
    "physics.sensor": ("Sensor",),
    "physics.scene": ("frame_keys", "get_preset", "simulate"),
    "physics.targets": ("Targets", "from_lists"),
    "unfolding.registry": ("make_network",),
    "unfolding.solvers": ("solve_lasso",),
}
_ROOM = {name: room for room, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_ROOM, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
