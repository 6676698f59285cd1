"""Published: parameters of published PyTorch checkpoints, by their names, as ours.

A checkpoint is a flat dict of arrays: `fcs.0.conv1_forward` is the first iteration's, the
kernels are (out, in, rows, cols). Each method's file says in a `Layout` which is which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding.baselines import PUBLISHED
from dscsnet_jax.unfolding.registry import Network, make_network

_WRAPPERS = ("module.", "model.", "generator.", "_orig_mod.")
_BLOCK = re.compile(r"(fcs\.(\d+)|bb)\.(.+)")
_SHOWN = 6

State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Names of a method's arrays in its published checkpoints.

    Attributes:
      method: its name here.
      blocks: name in an iteration (`fcs.K.`) by our path below `iterations`.
      outside: name outside of the iterations by our path.
      sizes: name in an iteration, of an array with the size of a field of the
        configuration as its first axis, by that field.
      cells: name in an iteration, of the array with the cells of the map as its second
        axis; empty: the method is for frames of any size.
      unused: names in an iteration that the published network holds and does not use.
      shared: all iterations hold the same arrays, which are stored once more as `bb`.
    """

    method: str
    blocks: Mapping[str, str]
    sizes: Mapping[str, str]
    outside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cells: str = ""
    unused: frozenset[str] = frozenset()
    shared: bool = False

    def inner(self) -> frozenset[str]:
        """All names in an iteration."""
        return frozenset(self.blocks.values()) | self.unused

    def names(self, iterations: int) -> set[str]:
        """All names in a checkpoint."""
        homes = [f"fcs.{k}" for k in range(iterations)] + ["bb"] * self.shared
        return {f"{home}.{n}" for home in homes for n in self.inner()} | {*self.outside.values()}


def import_state(
    method: str,
    state: State,
    operator: SensingOperator,
    *,
    initial: np.ndarray | None = None,
    **fields: Any,
) -> tuple[Network, dict[str, Any]]:
    """Network and parameters of a published checkpoint; see `conv.ConvBaseline.from_torch`.

    Raises:
      ValueError: if the method has no published checkpoints, or the checkpoint does not fit.
    """
    if method not in PUBLISHED:
        raise ValueError(f"{method} has no PyTorch checkpoints; {', '.join(PUBLISHED)} have")
    cls: Any = type(make_network(method))
    return cls.from_torch(state, operator, initial=initial, **fields)


def unwrapped(state: State) -> State:
    """Names without what wrappers of a network put in front of all of them.

    Example:
      >>> list(unwrapped({"module.generator.fcs.0.w1.bias": np.ones(1)}))
      ['fcs.0.w1.bias']
    """
    for wrapper in _WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return unwrapped({name.removeprefix(wrapper): a for name, a in state.items()})
    return state


def sizes(layout: Layout, state: State) -> dict[str, int]:
    """Iterations and other sizes that a checkpoint shows.

    Raises:
      ValueError: if names are missing or unknown; the message names them, or the method
        that they belong to.
    """
    iterations = _iterations(state)
    wanted = layout.names(max(iterations, 1))
    missing, unknown = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unknown:
        _refuse_other_method(layout, state)
        parts = [f"lacks {_some(missing)}"] * bool(missing)
        parts += [f"has unknown {_some(unknown)}"] * bool(unknown)
        raise ValueError(f"not a checkpoint of {layout.method}: it {' and '.join(parts)}")
    first = {field: state[f"fcs.0.{name}"] for field, name in layout.sizes.items()}
    for field, array in first.items():
        if not array.ndim:
            name = layout.sizes[field]
            raise ValueError(f"fcs.0.{name}: expected an array, got a single number")
    return {"iterations": iterations, **{field: len(array) for field, array in first.items()}}


def check_frame_size(layout: Layout, state: State, operator: SensingOperator) -> None:
    """Refuse a checkpoint that is bound to frames of another size than the operator's.

    Raises:
      ValueError: naming both sizes.
    """
    if not layout.cells:
        return
    array = state[f"fcs.0.{layout.cells}"]
    (rows, cols), c = operator.frame_shape, operator.division
    # Arrays of other ranks are refused by name, in `read`.
    if array.ndim == 2 and array.shape[1] != rows * cols * c**2:
        side = array.shape[1] ** 0.5 / c
        raise ValueError(
            f"the checkpoint is for frames of {side:.3g} x {side:.3g} pixels, the operator's have "
            f"{rows} x {cols}, both of {c} x {c} cells a pixel"
        )


def read(layout: Layout, state: State, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters from a checkpoint whose names are right.

    Args:
      layout: names of the arrays.
      state: the checkpoint.
      shapes: nested dict of what `init` makes, or of its shapes.

    Returns:
      Nested dict of float32 arrays, those of the iterations with a leading axis.

    Raises:
      ValueError: if a shape is wrong, a number not finite, or iterations differ that are
        to be the same; the message names the array.
    """
    flat: dict[str, np.ndarray] = {}
    homes = [f"fcs.{k}." for k in range(_iterations(state))]
    for ours, name in layout.blocks.items():
        path = f"iterations/{ours}"
        shape = _leaf(shapes, path).shape[1:]
        copies = [_converted(f"{home}{name}", state, shape) for home in homes]
        if layout.shared:
            _check_same(name, homes, [*copies, _converted(f"bb.{name}", state, shape)])
        flat[path] = np.stack(copies[:1] if layout.shared else copies)
    for ours, name in layout.outside.items():
        flat[ours] = _converted(name, state, _leaf(shapes, ours).shape)
    return _nested(flat)


def matrix(initial: np.ndarray, operator: SensingOperator) -> np.ndarray:
    """Published initial matrix (cN cM, N M) as ours, (N, M, cN, cM) in single precision.

    Raises:
      ValueError: if the operator has another shape, or a number is not finite.
    """
    frame, cells = operator.frame_shape, operator.map_shape
    wanted = (cells[0] * cells[1], frame[0] * frame[1])
    _check_array("the initial matrix", initial, wanted)
    return np.ascontiguousarray(np.float32(initial).T).reshape(*frame, *cells)


def _refuse_other_method(layout: Layout, state: State) -> None:
    for name in PUBLISHED:
        cls: Any = type(make_network(name))
        if state and state.keys() == cls.layout.names(_iterations(state)):
            raise ValueError(f"the checkpoint is of {name}, not of {layout.method}")


def _iterations(state: State) -> int:
    """One more than the highest number of an iteration."""
    found = (_BLOCK.fullmatch(name) for name in state)
    # A name can claim any number; there are no more iterations than arrays.
    numbers = [int(m[2][:9]) for m in found if m and m[2]]
    return min(max(numbers, default=-1) + 1, len(state))


def _converted(name: str, state: State, shape: tuple[int, ...]) -> np.ndarray:
    """One array in our order of axes, after a check of its shape in theirs."""
    array = state[name]
    if len(shape) == 4:
        _check_array(name, array, (shape[3], shape[2], *shape[:2]))
        return array.astype(np.float32).transpose(2, 3, 1, 0)
    if len(shape) == 2:
        _check_array(name, array, shape[::-1])
        return array.astype(np.float32).T
    _check_array(name, array, shape or (1,))
    return array.astype(np.float32).reshape(shape)


def _check_array(name: str, array: np.ndarray, wanted: tuple[int, ...]) -> None:
    if array.shape != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, got {array.shape}")
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite real numbers")


def _check_same(name: str, homes: Iterable[str], copies: list[np.ndarray]) -> None:
    for home, copy in zip([*homes, "bb."], copies, strict=True):
        if not np.array_equal(copy, copies[0]):
            raise ValueError(f"{home}{name} differs from fcs.0.{name}: they are one array")


def _leaf(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for part in path.split("/"):
        node = node[part]
    return node


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
