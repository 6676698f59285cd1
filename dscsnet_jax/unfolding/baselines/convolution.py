"""Convolution: convolutions of sub-pixel maps and features, with gradients fast on CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def convolve(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Convolution with a zero border.

    Args:
      x: (B, H, W, C) features.
      kernel: (odd, odd, C, D).
      bias: (D,) or None.

    Returns:
      (B, H, W, D).

    Example:
      >>> convolve(jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1)))[0, :, 1, 0].tolist()
      [6.0, 9.0, 6.0]
    """
    if kernel.shape[:2] == (1, 1):
        answer = x @ kernel[0, 0]
    elif jax.default_backend() == "cpu":
        answer = _cpu_convolve(x, kernel)
    else:
        answer = _convolve(x, kernel)
    return answer if bias is None else answer + bias[None, None, None]


def pair(x: jax.Array, first: tuple[Any, ...], second: tuple[Any, ...]) -> jax.Array:
    """`second(relu(first(x)))`: the form of all transforms and their left inverses.

    Args:
      x: (B, H, W, C) features.
      first: its (kernel,) or (kernel, bias).
      second: its (kernel,) or (kernel, bias).

    Returns:
      (B, H, W, D).
    """
    return convolve(nn.relu(convolve(x, *first)), *second)


def neighbours(x: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """Views of (B, H, W, C) shifted to each place of a kernel (rows, cols), row by row."""
    rows, cols = x.shape[1:3]
    reach = [((side - 1) // 2, side // 2) for side in shape]
    padded = jnp.pad(x, ((0, 0), *reach, (0, 0)))
    places = np.ndindex(*shape)
    return [padded[:, i : i + rows, j : j + cols] for i, j in places]


def draw_kernels(key: jax.Array, sizes: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """3 x 3 kernels by name, from (features in, features out), as published (Xavier).

    Example:
      >>> kernels = draw_kernels(jax.random.key(0), {"a": (1, 4), "b": (4, 500)})
      >>> kernels["a"].shape, round(float(kernels["b"].std() / (2 / 9 / 504) ** 0.5), 1)
      ((3, 3, 1, 4), 1.0)
    """
    drawn = draw(jax.random.normal, key, {name: (3, 3, *size) for name, size in sizes.items()})
    return {name: (2 / 9 / sum(sizes[name])) ** 0.5 * kernel for name, kernel in drawn.items()}


def draw(
    distribution: Callable[..., jax.Array], key: jax.Array, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.Array]:
    """Float32 arrays by name of `distribution(key, shape, dtype)`, all drawn at once.

    In another type the same key would draw other numbers. One generator for all of them
    compiles in a fraction of the time of one for each.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()
    parts = jnp.split(distribution(key, (ends[-1],), jnp.float32), ends[:-1])
    return {n: a.reshape(shape) for (n, shape), a in zip(shapes.items(), parts, strict=True)}


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


@jax.custom_jvp
def _cpu_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve(x, kernel)


@_cpu_convolve.defjvp
def _cpu_convolve_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, change) = primals, tangents
    # Transposed, these products are the gradient by the kernel. XLA's own is a convolution
    # whose kernel is as large as the map: on CPU it takes four times as long as the
    # convolution itself, they take twice.
    products = [
        view.reshape(-1, view.shape[-1]) @ change[place]
        for place, view in zip(
            np.ndindex(*change.shape[:2]), neighbours(x, change.shape[:2]), strict=True
        )
    ]
    by_kernel = sum(products).reshape(*x.shape[:3], -1)
    return _cpu_convolve(x, kernel), _convolve(dx, kernel) + by_kernel
