"""Batching: run a function over many frames in pieces of one fixed shape.

One shape means one compiled program, whatever the number of frames, and the same
arithmetic for a frame wherever it stands: answers do not depend on the batch, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import numpy as np

# Of a block on CPU and on an accelerator: pixels and most frames; windows.
_PIXELS, _FRAMES, _WINDOWS = (1 << 12, 1 << 22), (16, 256), (32, 1024)
_told: ContextVar[int | None] = ContextVar("told", default=None)
# JAX's settings that a `with` sets for one thread only.
_SETTINGS: dict[str, Callable[[Any], contextlib.AbstractContextManager]] = {
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_device": jax.default_device,
    "jax_disable_jit": jax.disable_jit,
    "jax_debug_nans": jax.debug_nans,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_threefry_partitionable": jax.threefry_partitionable,
}
# Of each function, the shapes of arguments that it has been compiled for.
_compiled: weakref.WeakKeyDictionary[Callable[..., Any], set[Any]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def block_of(width: int | None) -> Iterator[None]:
    """Blocks of at most so many frames, and of so many windows; None: what suits the device.

    Raises:
      ValueError: for less than one.
    """
    if width is not None and width < 1:
        raise ValueError(f"block must be at least 1, got {width}")
    before = _told.set(width)
    try:
        yield
    finally:
        _told.reset(before)


def frames_per_block(shape: tuple[int, ...]) -> int:
    """Whole frames of a shape that go into a block, whatever their number.

    Few on CPU, where a lone frame costs as much as a block.

    Example:
      >>> frames_per_block((1 << 12, 1 << 12))
      1
    """
    pixels = max(int(np.prod(shape)), 1)
    return int(np.clip(_here(_PIXELS) // pixels, 1, _told.get() or _here(_FRAMES)))


def windows_per_block(*, of_chains: bool = False) -> int:
    """Windows that go into a block, whatever their number; half as many where each has chains.

    Example:
      >>> with block_of(5):
      ...     windows_per_block()
      5
    """
    width = _told.get() or _here(_WINDOWS)
    return -(-width // 2) if of_chains else width


def _here(values: tuple[int, int]) -> int:
    return values[jax.default_backend() != "cpu"]


def in_blocks(function: Callable[..., Any], batched: Any, *shared: Any, size: int) -> Any:
    """`function(batched, *shared)`, block by block along the leading axis.

    The last block is filled up with copies of its first frame. On CPU a block's program is
    small and keeps one core busy, so as many run at a time as there are cores.

    Args:
      function: of a pytree with leading axes of `size`, to one with such axes.
      batched: pytree of arrays with one leading axis, of any length.
      shared: further arguments, the same for all blocks.
      size: frames in a block.

    Returns:
      NumPy arrays of the whole length.

    Example:
      >>> in_blocks(lambda a: 2 * a, np.arange(5), size=2).tolist()
      [0, 2, 4, 6, 8]
    """
    batched = jax.tree.map(np.asarray, batched)
    length = len(jax.tree.leaves(batched)[0])

    def part(block: int) -> Any:
        index = np.arange(block * size, (block + 1) * size)
        index = np.where(index < length, index, block * size)
        if length:
            return jax.tree.map(lambda a: a[index], batched)
        # Nobody asks for the answer of no frames, only for its shape.
        return jax.tree.map(lambda a: np.zeros((size, *a.shape[1:]), a.dtype), batched)

    number = max(-(-length // size), 1)
    workers = min(number, _cores()) if jax.default_backend() == "cpu" else 1
    settings = {name: getattr(jax.config, name) for name in _SETTINGS}
    # What is new is compiled by the first block alone, for the others.
    alone = int(_is_new(function, part(0), shared, tuple(settings.values())))
    if workers == 1:
        answers = jax.device_get([function(part(i), *shared) for i in range(number)])
    else:

        def work(block: int) -> Any:
            with _set(settings):
                return jax.device_get(function(part(block), *shared))

        answers = [work(block) for block in range(alone)]
        with ThreadPoolExecutor(workers) as pool:
            answers += pool.map(work, range(alone, number))
    return jax.tree.map(lambda *a: np.concatenate(a)[:length], *answers)


def take_rows(tree: Any, index: np.ndarray) -> Any:
    """Some rows of every array of a pytree, as NumPy arrays.

    Example:
      >>> take_rows({"a": np.arange(4)}, np.array([2, 0]))["a"].tolist()
      [2, 0]
    """
    return jax.tree.map(lambda a: np.asarray(a)[index], tree)


def put_rows(tree: Any, index: np.ndarray, rows: Any) -> Any:
    """The arrays of a pytree with some rows replaced.

    Example:
      >>> put_rows({"a": np.arange(4)}, np.array([2, 0]), {"a": np.array([7, 8])})["a"].tolist()
      [8, 1, 7, 3]
    """

    def put(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        new = np.array(a)
        new[index] = b
        return new

    return jax.tree.map(put, tree, rows)


def _is_new(function: Callable[..., Any], *given: Any) -> bool:
    """Whether a function has not yet met arguments of these shapes."""
    while isinstance(function, partial):
        given = (*given, function.args, function.keywords)
        function = function.func
    leaves, structure = jax.tree.flatten(given)
    kinds = tuple((a.shape, a.dtype) if hasattr(a, "shape") else a for a in leaves)
    known = _compiled.setdefault(function, set())
    new = (structure, kinds) not in known
    known.add((structure, kinds))
    return new


@contextlib.contextmanager
def _set(settings: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(_SETTINGS[name](value))
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
