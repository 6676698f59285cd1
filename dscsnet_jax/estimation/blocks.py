"""Blocks: run a function over many frames in pieces of one fixed shape.

One shape means one compiled program, whatever the number of frames, and the same
arithmetic for a frame wherever it stands: answers do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

BLOCK = 128
_PIXELS = 1 << 22


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

    The last block is filled up with copies of its first frame.

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

    answers = [function(part(i), *shared) for i in range(max(-(-length // size), 1))]
    return jax.tree.map(lambda *a: np.concatenate(a)[:length], *jax.device_get(answers))
