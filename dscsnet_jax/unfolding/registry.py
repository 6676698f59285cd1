"""Registry: every learned method by name, behind one contract.

A method is one file that decorates its class with `register`; those in `baselines/` are
found by themselves. Training, weights, bench and contract tests know methods by name only.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding.admm import Unfolded

_PLACES = ("dscsnet_jax.unfolding.network", "dscsnet_jax.unfolding.baselines")


class Network(Protocol):
    """What every learned method is: hyper-parameters and an init/apply pair.

    Hashable (a frozen dataclass), so that it can be a static argument of `jit`.

    Attributes:
      config: frozen dataclass of hyper-parameters, with `division` among them. Methods
        that are bound to one size of frames have a `frame_size` there, too.
    """

    def __hash__(self) -> int: ...

    @property
    def config(self) -> Any:
        """Hyper-parameters."""

    def init(self, key: jax.Array, operator: SensingOperator) -> dict[str, Any]:
        """Draw parameters, a nested dict of arrays."""

    def apply(
        self,
        params: dict[str, Any],
        y: jax.Array,
        operator: SensingOperator,
        *,
        noise: jax.Array | None = None,
        scale: jax.Array | None = None,
        unroll: int | bool | None = None,
        remat: bool = False,
        trace: bool = False,
    ) -> Unfolded:
        """Unmix frames (B, N, M) into sub-pixel maps (B, cN, cM), counts.

        The trace holds `x` (K, B, cN, cM), counts, and, for transforms with a learned
        left inverse, `symmetry` (K, B).
        """

    def scale(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Counts (B,) that the network sees as 1."""


_CLASSES: dict[str, type] = {}
_C = TypeVar("_C", bound=type)


def register(name: str) -> Callable[[_C], _C]:
    """Make a class known as the method `name`; without arguments it has its defaults.

    Raises:
      ValueError: if another class has that name.
    """

    def add(cls: _C) -> _C:
        known = _CLASSES.setdefault(name, cls)
        if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
            raise ValueError(f"method {name!r} is {known.__module__}.{known.__qualname__} already")
        return cls

    return add


def network_names() -> tuple[str, ...]:
    """Names of all learned methods, DSCSNet first.

    Example:
      >>> network_names()[0]
      'dscsnet'
    """
    for place in _PLACES:
        module = importlib.import_module(place)
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{place}.{found.name}")
    return tuple(sorted(_CLASSES, key=lambda name: (name != "dscsnet", name)))


def default_fields(name: str) -> dict[str, Any]:
    """Hyper-parameters of a method with their defaults.

    Raises:
      ValueError: for an unknown method; names the known ones.

    Example:
      >>> default_fields("dscsnet")["iterations"]
      4
    """
    return dataclasses.asdict(_class(name)().config)


def make_network(name: str, **fields: Any) -> Network:
    """A method by name, with some of its hyper-parameters set.

    Args:
      name: one of `network_names()`.
      **fields: hyper-parameters; the others have their defaults.

    Raises:
      ValueError: for an unknown method or hyper-parameter (names the known ones), or a
        value that the method refuses.

    Example:
      >>> make_network("dscsnet", channels=8).config.channels
      8
      >>> make_network("dscsnet", channel=8)
      Traceback (most recent call last):
      ValueError: dscsnet has no hyper-parameter 'channel'; did you mean 'channels'?
    """
    known = default_fields(name)
    for field in fields:
        if field not in known:
            raise ValueError(f"{name} has no hyper-parameter {field!r}{suggestion(field, known)}")
        expected, value = type(known[field]), fields[field]
        plain = isinstance(value, (int, float) if expected is float else expected)
        if not plain or isinstance(value, bool) != (expected is bool):
            raise ValueError(
                f"{name}: hyper-parameter {field!r} is of type {expected.__name__}, got {value!r}"
            )
    cls = _class(name)
    return cls(type(cls().config)(**fields))


def is_frame_bound(network: Network) -> bool:
    """Whether the network's parameters fit frames of one size only.

    Example:
      >>> is_frame_bound(make_network("dscsnet")), is_frame_bound(make_network("lista"))
      (False, True)
    """
    config = network.config
    return hasattr(config, "frame_size") or getattr(config, "start", None) == "matrix"


def suggestion(word: str, known: Any) -> str:
    """What to add to an error about an unknown word: the nearest known one, or all.

    Example:
      >>> suggestion("listta", ["lista", "lamp"])
      "; did you mean 'lista'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _class(name: str) -> type:
    names = network_names()
    if name not in names:
        raise ValueError(f"unknown method {name!r}; the known ones are {', '.join(names)}")
    return _CLASSES[name]
