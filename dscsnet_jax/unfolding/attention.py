"""Attention: self-attention of each detector pixel to the pixels around it.

Every pixel attends to the pixels within `radius` rows and columns, whatever the size
of the frame, so the cost grows with the frame's area and the answer does not depend
on where the frame was cut. Frames are cut into blocks of queries with a halo of keys;
a frame that is one block needs no halo.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_NEVER = -1e9  # a logit without weight; finite, so that no gradient becomes NaN


def local_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, block: int = 11
) -> jax.Array:
    """Softmax attention within a square neighbourhood, with relative position bias.

    Args:
      q: (B, N, M, heads, D) queries.
      k: (B, N, M, heads, D) keys.
      v: (B, N, M, heads, D) values.
      bias: (heads, 2r+1, 2r+1) added to the logits by relative position; its size sets
        the radius `r`. Pixels further away or outside the frame get no weight.
      block: largest side of a block of queries, pixels; changes speed, not the answer.

    Returns:
      (B, N, M, heads, D).

    Example:
      >>> q = jnp.ones((1, 3, 3, 1, 2))
      >>> float(local_attention(q, q, q, jnp.zeros((1, 3, 3))).mean())
      1.0
    """
    rows, cols = q.shape[1:3]
    radius = bias.shape[-1] // 2
    cut = [_cut(side, block, radius) for side in (rows, cols)]
    q_blocks = _blocks(q, [(side, count, 0) for side, count, _ in cut])
    k_blocks, v_blocks = _blocks(k, cut), _blocks(v, cut)
    index, near = _relative(tuple(cut), radius)
    # Bias and mask in one array and one sum: the logits are the largest array here.
    penalty = jnp.where(near[None], bias.reshape(len(bias), -1)[:, index], _NEVER)[None, None]
    if any(count > 1 for _, count, _ in cut):
        inside = _blocks(jnp.ones((1, rows, cols, 1, 1), bool), cut)[..., 0, 0]
        penalty = jnp.where(inside[:, :, None, None, :], penalty, _NEVER)
    logits = jnp.einsum("bgqhd,bgkhd->bghqk", q_blocks / q.shape[-1] ** 0.5, k_blocks) + penalty
    weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    # The sum of the weights comes out of the same product as the mixed values.
    one = jnp.ones_like(v_blocks[..., :1])
    mixed = jnp.einsum("bghqk,bgkhd->bgqhd", weight, jnp.concatenate([v_blocks, one], -1))
    mixed = mixed[..., :-1] / mixed[..., -1:]
    return _join(mixed, cut)[:, :rows, :cols]


def _cut(side: int, block: int, radius: int) -> tuple[int, int, int]:
    """Block side, number of blocks and halo for one axis of the frame."""
    if side <= block:
        return side, 1, 0
    count = -(-side // block)
    return -(-side // count), count, radius


def _blocks(a: jax.Array, cut: list[tuple[int, int, int]]) -> jax.Array:
    """(B, N, M, h, D) -> (B, blocks, pixels of a block and its halo, h, D)."""
    for axis, (side, count, halo) in zip((1, 3), cut, strict=True):
        missing = side * count - a.shape[axis]
        pad = [(0, 0)] * a.ndim
        pad[axis] = (halo, halo + missing)
        a = jnp.pad(a, pad)
        starts = [slice(i * side, (i + 1) * side + 2 * halo) for i in range(count)]
        pick = (slice(None),) * axis
        a = jnp.stack([a[(*pick, s)] for s in starts], axis)
    batch, block_rows, in_rows, block_cols, in_cols, *rest = a.shape
    a = jnp.swapaxes(a, 2, 3)
    return a.reshape(batch, block_rows * block_cols, in_rows * in_cols, *rest)


def _join(a: jax.Array, cut: list[tuple[int, int, int]]) -> jax.Array:
    """Put blocks without halo together again: the inverse of `_blocks`."""
    (rows, row_blocks, _), (cols, col_blocks, _) = cut
    batch, _, _, *rest = a.shape
    a = jnp.swapaxes(a.reshape(batch, row_blocks, col_blocks, rows, cols, *rest), 2, 3)
    return a.reshape(batch, row_blocks * rows, col_blocks * cols, *rest)


@functools.lru_cache(maxsize=64)
def _relative(cut: tuple[tuple[int, int, int], ...], radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Index into the flat bias for each (query, key), and whether the key is near enough."""
    offsets = []
    for side, _, halo in cut:
        query = np.arange(side)
        key = np.arange(side + 2 * halo) - halo
        offsets.append(key[None, :] - query[:, None])
    row, col = (o.astype(np.int32) for o in offsets)
    row_q, row_k = row.shape
    col_q, col_k = col.shape
    shape = (row_q, col_q, row_k, col_k)
    row = np.broadcast_to(row[:, None, :, None], shape).reshape(row_q * col_q, row_k * col_k)
    col = np.broadcast_to(col[None, :, None, :], shape).reshape(row_q * col_q, row_k * col_k)
    near = (np.abs(row) <= radius) & (np.abs(col) <= radius)
    width = 2 * radius + 1
    index = np.where(near, (row + radius) * width + col + radius, 0)
    return index, near
