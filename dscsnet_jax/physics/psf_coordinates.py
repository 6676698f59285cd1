"""PSF coordinates: the free parameters of any PSF as one vector without bounds, and back.

A class of PSFs says in `free`, a class attribute, how each of its fields is free:

- `log`: positive numbers, by their logarithms;
- `linear`: any numbers;
- `degrees`: angles, in radians;
- `square`: numbers of at least 0 that count by their squares, as lengths of blurs do;
- `above_one`: numbers above 1, by the logarithm of what is above;
- `shares`: relative positive numbers, by the logarithms of their ratios to the first.

What is not named is fixed. Of a class without `free` all numbers are, as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.physics.psf import Psf, floating

_LEAST = 1e-6  # of a square: at 0 a root has no derivative


class Coordinates(NamedTuple):
    """Free parameters of a PSF.

    Attributes:
      names: (P,) of the parameters, as `sigma` or `sigma[1]`.
      values: (P,) their coordinates, without bounds.
      psf: the PSF of other coordinates (P,); it can be differentiated.
    """

    names: tuple[str, ...]
    values: jax.Array
    psf: Callable[[jax.Array], Any]

    def errors(self, covariance: np.ndarray) -> dict[str, tuple[float, float]]:
        """Values of the parameters and their standard deviations, by the coordinates' (P, P)."""

        def told(x: jax.Array) -> jax.Array:
            return _told(self.psf(x), self.names)

        slope = np.asarray(jax.jacfwd(told)(self.values), float)
        tells = np.isfinite(np.diagonal(covariance))
        own = np.where(tells[:, None] & tells, covariance, 0)
        std = np.sqrt(np.diagonal(slope @ own @ slope.T))
        std = np.where(tells, std, np.inf)
        columns = self.names, np.asarray(told(self.values)), std
        return {name: (float(v), float(s)) for name, v, s in zip(*columns, strict=True)}


def coordinates(psf: Psf) -> Coordinates:
    """The free parameters of a PSF.

    Raises:
      ValueError: if it has none.

    Example:
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> at = coordinates(Gaussian(np.array([0.5, 0.6], np.float32)))
      >>> print(*at.names, at.psf(at.values + 1).sigma.round(2))
      sigma[0] sigma[1] [1.36 1.63]
    """
    parts = []  # field, kind, shape, names, coordinates
    for name, kind in _free(psf).items():
        value = floating(getattr(psf, name))
        flat = value.reshape(-1)
        if kind == "shares":
            numbers = range(1, flat.size)
            there = jnp.log(flat[1:] / flat[0])
        else:
            numbers = range(flat.size)
            there = _FORWARD[kind](flat)
        names = [name if value.ndim == 0 else f"{name}[{i}]" for i in numbers]
        parts.append((name, kind, value.shape, names, there))
    if not sum(len(part[3]) for part in parts):
        raise ValueError(f"a PSF of class {type(psf).__name__} has no free parameters")
    ends = np.cumsum([len(part[3]) for part in parts])[:-1]

    def rebuilt(values: jax.Array) -> Any:
        changed = {}
        for (name, kind, shape, _, _), part in zip(parts, jnp.split(values, ends), strict=True):
            if kind == "shares":
                ratio = jnp.concatenate([jnp.zeros(1, part.dtype), part])
                changed[name] = jax.nn.softmax(ratio).reshape(shape)
            else:
                changed[name] = _BACK[kind](part).reshape(shape)
        return dataclasses.replace(psf, **changed)  # type: ignore[type-var]

    every = tuple(name for part in parts for name in part[3])
    return Coordinates(every, jnp.concatenate([part[4] for part in parts]), rebuilt)


_FORWARD: dict[str, Callable[[jax.Array], jax.Array]] = {
    "log": jnp.log,
    "degrees": jnp.deg2rad,
    "square": lambda x: jnp.maximum(x**2, 4 * _LEAST),
    "linear": lambda x: x,
    "above_one": lambda x: jnp.log(x - 1),
}
_BACK: dict[str, Callable[[jax.Array], jax.Array]] = {
    "log": jnp.exp,
    "degrees": jnp.rad2deg,
    "square": lambda x: jnp.sqrt(jnp.maximum(x, _LEAST)),
    "linear": lambda x: x,
    "above_one": lambda x: 1 + jnp.exp(x),
}


def _free(psf: Any) -> dict[str, str]:
    """How the fields of a PSF that have numbers are free."""
    leaves = [f.name for f in dataclasses.fields(psf) if f.metadata.get("pytree_node", True)]
    kinds = getattr(type(psf), "free", dict.fromkeys(leaves, "linear"))
    return {name: kind for name, kind in kinds.items() if getattr(psf, name) is not None}


def _told(psf: Any, names: tuple[str, ...]) -> jax.Array:
    """(P,) parameters of a PSF by their names; shares are those of a sum of 1."""
    values = []
    for name in names:
        field, _, index = name.partition("[")
        value = floating(getattr(psf, field)).reshape(-1)
        values.append(value[int(index[:-1]) if index else 0])
    return jnp.stack(values)
