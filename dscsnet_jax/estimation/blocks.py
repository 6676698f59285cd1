"""Blocks: run a function over many frames in pieces of one fixed shape.

One shape means one compiled program, whatever the number of frames, and the same
arithmetic for a frame wherever it stands: answers do not depend on the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

BLOCK = 128
_PIXELS = 1 << 22
# JAX's settings that a `with` sets for one thread only.
_SETTINGS: dict[str, Callable[[Any], contextlib.AbstractContextManager]] = {
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_device": jax.default_device,
    "jax_disable_jit": jax.disable_jit,
    "jax_debug_nans": jax.debug_nans,
}


def frames_per_block(shape: tuple[int, ...]) -> int:
    """Whole frames of a shape that go into a block: fewer large ones.

    Example:
      >>> frames_per_block((11, 11)), frames_per_block((1024, 1024))
      (128, 4)
    """
    pixels = int(np.prod(shape))
    return int(np.clip(_PIXELS // max(pixels, 1), 1, BLOCK))


def in_blocks(function: Callable[..., Any], batched: Any, *shared: Any, size: int = BLOCK) -> Any:
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
    # The first block alone: what it compiles serves the others.
    answers = [jax.device_get(function(part(0), *shared))]
    if workers == 1:
        answers += jax.device_get([function(part(i), *shared) for i in range(1, number)])
    else:
        settings = {name: getattr(jax.config, name) for name in _SETTINGS}

        def work(block: int) -> Any:
            with _set(settings):
                return jax.device_get(function(part(block), *shared))

        with ThreadPoolExecutor(workers) as pool:
            answers += pool.map(work, range(1, number))
    return jax.tree.map(lambda *a: np.concatenate(a)[:length], *answers)


def take_rows(tree: Any, index: np.ndarray) -> Any:
    """Some rows of every array of a pytree, as NumPy arrays.

    Example:
      >>> take_rows({"a": np.arange(4)}, np.array([2, 0]))["a"].tolist()
      [2, 0]
    """
    return jax.tree.map(lambda a: np.asarray(a)[index], tree)


@contextlib.contextmanager
def _set(settings: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(_SETTINGS[name](value))
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
