"""Lanes: arrays whose last axis is the vector lanes of the processor, one window each."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

_Any = TypeVar("_Any", bound=Callable[..., Any])


def lanes_last(function: _Any) -> _Any:
    """Let a function's arrays be aligned at their last axes, whatever the user has set.

    Numbers of windows broadcast over pixels and chains, which come in front of them.
    """

    @functools.wraps(function)
    def aligned(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return cast(_Any, aligned)


def to_lanes(tree: Any) -> Any:
    """Windows of arrays (B, ...) as the last axis."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), tree)


def from_lanes(tree: Any) -> Any:
    """The way back."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), tree)


def behind(array: np.ndarray | jax.Array, ndim: int) -> jax.Array:
    """The array with axes of length 1 behind, `ndim` in all."""
    return jnp.asarray(array).reshape(*array.shape, *(1,) * (ndim - array.ndim))


def materialised(some: jax.Array, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, written to memory.

    The compiler would work out cheap terms again for each of their uses, which are many. What
    crosses the border of a branch is kept. It is always taken: `some`, a bool, is below 2.
    """
    never = functools.partial(zeros_of, function)
    return jax.lax.cond(some.astype(jnp.int32) < 2, function, never, *args)


def zeros_of(function: Callable[..., Any], *args: Any) -> Any:
    """Zeros in the shapes of `function(*args)`, which is not run."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def largest(terms: jax.Array) -> jax.Array:
    """The largest along the first axis.

    The derivative of a maximum asks which term equals it; a term worked out twice may not.
    """
    number = jnp.arange(terms.shape[0]).reshape(-1, *(1,) * (terms.ndim - 1))
    return jnp.where(number == jnp.argmax(terms, 0)[None], terms, 0).sum(0)


def sum_leading(terms: jax.Array) -> jax.Array:
    """Sum over the leading axis; written out where windows are the last one.

    The compiler's own reduction over it takes one lane at a time.
    """
    return terms.sum(0) if terms.ndim < 3 else sum_of(terms[i] for i in range(terms.shape[0]))


def sum_of(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays, one after the other."""
    return functools.reduce(operator.add, terms)
