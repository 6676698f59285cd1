"""ADMM: proximal maps, the three pure steps, and `unfold`, the only scan.

The problem is

    min over x of 1/2 ||Phi x - y||^2 + lam ||z||_1   subject to   z = x

with scaled multiplier `u` and penalty `rho`. One iteration is

    z <- prox_{lam/rho ||.||_1}(x + u)                       auxiliary step
    u <- u + eta (x - z)                                     multiplier step
    x <- argmin 1/2 ||Phi x - y||^2 + rho/2 ||x - z + u||^2  reconstruction step

ADMM is a cycle; this one is entered with the reconstruction step for z = u = 0, so
that the answer is the `x` made with every parameter of every iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics.optics import SensingOperator


class Iterate(NamedTuple):
    """State of ADMM.

    Attributes:
      x: (B, cN, cM) reconstruction.
      z: (B, cN, cM) auxiliary, sparse variable.
      u: (B, cN, cM) scaled multiplier.
      history: auxiliary variables of all iterations, (K, B, cN, cM), or None.
    """

    x: jax.Array
    z: jax.Array
    u: jax.Array
    history: jax.Array | None = None


class Unfolded(NamedTuple):
    """Answer of an unfolded method.

    Attributes:
      x: (B, cN, cM) sub-pixel map, counts.
      trace: what was recorded in every iteration, stacked along a leading K axis; None
        unless asked for.
    """

    x: jax.Array
    trace: Any = None


def soft_threshold(v: jax.Array, theta: ArrayLike, *, nonneg: bool = False) -> jax.Array:
    """Proximal map of `theta ||.||_1`: `sign(v) max(|v| - theta, 0)`.

    Args:
      v: any shape.
      theta: non-negative threshold, a scalar or of the shape of `v`.
      nonneg: add the constraint that the result is not negative.

    Returns:
      The shape of `v`.

    Example:
      >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
      [-2.0, 0.0, 1.0]
    """
    if nonneg:
        return jnp.maximum(v - theta, 0)
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - theta, 0)


def shrink(v: jax.Array, weight: ArrayLike, *, nonneg: bool = False) -> jax.Array:
    """Proximal map of `weight/2 ||.||_2^2`: `v / (1 + weight)`.

    The smoothness term of earlier ADMM networks, kept for the ablation of the strict l1.

    Example:
      >>> shrink(jnp.array([3.0]), 0.5).tolist()
      [2.0]
    """
    shrunk = v / (1 + jnp.asarray(weight))
    return jnp.maximum(shrunk, 0) if nonneg else shrunk


_PROXIMAL = {"l1": soft_threshold, "l2": shrink}


def reconstruction_step(
    y: jax.Array, z: jax.Array, u: jax.Array, operator: SensingOperator, rho: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """`r = argmin 1/2 ||Phi r - y||^2 + rho/2 ||r - z + u||^2`, exactly.

    Args:
      y: (..., N, M) frame.
      z: (..., cN, cM) auxiliary variable.
      u: (..., cN, cM) scaled multiplier.
      operator: the sensing operator.
      rho: positive penalty.

    Returns:
      `r` (..., cN, cM) and the residual `y - Phi r` (..., N, M).
    """
    return operator.data_step(y, z - u, rho)


def gradient_step(
    y: jax.Array, iterate: Iterate, operator: SensingOperator, rho: ArrayLike, step: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """One gradient step on the reconstruction step's objective, instead of its minimiser.

    `r = x - step (Phi^T (Phi x - y) + rho (x - z + u))`.

    Args:
      y: (..., N, M) frame.
      iterate: the current `x`, `z`, `u`.
      operator: the sensing operator.
      rho: positive penalty.
      step: positive step length; stable below `2 / (||Phi||^2 + rho)`.

    Returns:
      `r` (..., cN, cM) and the residual `y - Phi r` (..., N, M).
    """
    x, z, u, _ = iterate
    slope = operator.adjoint(operator.apply(x) - y) + rho * (x - z + u)
    r = x - step * slope
    return r, y - operator.apply(r)


def auxiliary_step(
    x: jax.Array,
    u: jax.Array,
    *,
    rho: ArrayLike,
    lam: ArrayLike,
    penalty: str = "l1",
    nonneg: bool = True,
) -> jax.Array:
    """`z = prox_{lam/rho P}(x + u)` with `P` the strict l1 norm (or 1/2 l2^2).

    Args:
      x: (..., cN, cM) reconstruction.
      u: (..., cN, cM) scaled multiplier.
      rho: positive penalty.
      lam: non-negative weight of `P`.
      penalty: `l1` (soft threshold) or `l2` (`rho (x + u) / (rho + lam)`).
      nonneg: intensities are not negative.

    Returns:
      `z` (..., cN, cM).

    Raises:
      ValueError: if the penalty is unknown.

    Example:
      >>> auxiliary_step(jnp.array([2.0]), jnp.array([0.0]), rho=2.0, lam=1.0).tolist()
      [1.5]
    """
    if penalty not in _PROXIMAL:
        raise ValueError(f"unknown penalty {penalty!r}; choose one of {', '.join(_PROXIMAL)}")
    return _PROXIMAL[penalty](x + u, lam / jnp.asarray(rho), nonneg=nonneg)


def multiplier_step(x: jax.Array, z: jax.Array, u: jax.Array, eta: ArrayLike) -> jax.Array:
    """`u + eta (x - z)`.

    Example:
      >>> multiplier_step(jnp.array([2.0]), jnp.array([1.5]), jnp.array([0.0]), 1.0).tolist()
      [0.5]
    """
    return u + eta * (x - z)


_State = TypeVar("_State")


def unfold(
    step: Callable[[_State, Any], tuple[_State, Any]],
    start: _State,
    parameters: Any,
    *,
    unroll: int | bool = 1,
    remat: bool = False,
    trace: bool = False,
) -> tuple[_State, Any]:
    """Run `step` over parameters stacked along a leading K axis: the only scan.

    Args:
      step: `(iterate, parameters of one iteration) -> (iterate, record)`, pure; ADMM's
        iterate is an `Iterate`, other methods have their own.
      start: first iterate.
      parameters: pytree whose leaves have a leading axis of length K.
      unroll: iterations per loop body; `True` unrolls all. Convolutions inside a loop
        body are slow on CPU, so unroll fully there.
      remat: recompute each iteration in the backward pass; memory no longer grows
        with the size of an iteration times K.
      trace: stack and return the records.

    Returns:
      The last iterate, and the records (leading axis K) or None.
    """
    body = jax.checkpoint(step) if remat else step

    def record(iterate: _State, parameters_k: Any) -> tuple[_State, Any]:
        following, seen = body(iterate, parameters_k)
        return following, (seen if trace else None)

    return jax.lax.scan(record, start, parameters, unroll=unroll)


def default_unroll() -> int | bool:
    """Full unrolling on CPU, none on accelerators (jax-ml/jax issue 12868)."""
    return jax.default_backend() == "cpu" or 1


def zero_start(y: jax.Array, operator: SensingOperator, rho: ArrayLike) -> Iterate:
    """Enter the cycle: the reconstruction step for z = u = 0."""
    zero = jnp.zeros((*y.shape[:-2], *operator.map_shape), precision(y, operator))
    x, _ = reconstruction_step(y, zero, zero, operator, rho)
    return Iterate(x=x, z=zero, u=zero)


def lasso_step(
    iterate: Iterate,
    y: jax.Array,
    operator: SensingOperator,
    *,
    rho: ArrayLike,
    lam: ArrayLike,
    eta: ArrayLike,
    nonneg: bool = True,
) -> tuple[Iterate, dict[str, jax.Array]]:
    """One iteration of classical ADMM for the lasso, composed of the three steps.

    Args:
      iterate: the last one.
      y: (..., N, M) frames, counts.
      operator: the sensing operator.
      rho: positive penalty.
      lam: l1 weight, counts.
      eta: multiplier step.
      nonneg: intensities are not negative.

    Returns:
      The next iterate, and `primal` = ||x - z|| and `dual` = rho ||z - z_previous|| (...,).
    """
    z = auxiliary_step(iterate.x, iterate.u, rho=rho, lam=lam, nonneg=nonneg)
    u = multiplier_step(iterate.x, z, iterate.u, eta)
    x, _residual = reconstruction_step(y, z, u, operator, rho)
    residuals = {
        "primal": jnp.linalg.norm(iterate.x - z, axis=(-2, -1)),
        "dual": rho * jnp.linalg.norm(z - iterate.z, axis=(-2, -1)),
    }
    return Iterate(x=x, z=z, u=u), residuals


def admm_lasso(
    y: jax.Array,
    operator: SensingOperator,
    *,
    rho: ArrayLike = 0.1,
    lam: ArrayLike = 1.0,
    eta: ArrayLike = 1.0,
    num_iterations: int = 100,
    nonneg: bool = True,
    unroll: int | bool = 1,
    trace: bool = False,
) -> Unfolded:
    """Classical ADMM for the lasso: the unfolded iteration without learned parts.

    Args:
      y: (..., N, M) frames, counts.
      operator: the sensing operator.
      rho: positive penalty.
      lam: l1 weight, counts.
      eta: multiplier step, in (0, 1.618).
      num_iterations: `K`.
      nonneg: intensities are not negative.
      unroll: see `unfold`.
      trace: record the residuals of `lasso_step`.

    Returns:
      `Unfolded` whose `x` is the sparse variable's last value, (..., cN, cM) counts.

    Raises:
      ValueError: if the frames do not have the operator's shape.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> op = sensing_operator(5, division=3, psf=0.5)
      >>> x = jnp.zeros((15, 15)).at[7, 7].set(100.0)
      >>> z = admm_lasso(op.apply(x), op, lam=0.1, num_iterations=200).x
      >>> bool(z.argmax() == x.argmax())
      True

    References:
      Boyd et al., Distributed optimization and statistical learning via ADMM, 2011, 6.4.
    """
    check_frame_shape(y, operator)
    # Numbers of another precision would change that of the iterate, which a scan refuses.
    rho, lam, eta = (jnp.asarray(a, precision(y, operator)) for a in (rho, lam, eta))

    def step(iterate: Iterate, _: Any) -> tuple[Iterate, Any]:
        return lasso_step(iterate, y, operator, rho=rho, lam=lam, eta=eta, nonneg=nonneg)

    start = zero_start(y, operator, rho)
    last, seen = unfold(step, start, jnp.arange(num_iterations), unroll=unroll, trace=trace)
    return Unfolded(x=last.z, trace=seen)


def precision(y: jax.Array, operator: SensingOperator) -> Any:
    """Floating-point type that frames are worked on in: that of frames and operator.

    Frames may be whole counts.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> precision(jnp.zeros((5, 5), int), sensing_operator(5, division=3, psf=0.5))
      dtype('float32')
    """
    return jnp.result_type(y, operator.response_row)


def cast(tree: Any, dtype: Any) -> Any:
    """Every leaf of a pytree as a strongly typed array of one type.

    Example:
      >>> cast({"rho": 0.5}, jnp.float32)["rho"].dtype
      dtype('float32')
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def check_frame_shape(y: jax.Array, operator: SensingOperator) -> None:
    """Raise ValueError unless the last two axes of `y` are the operator's frame."""
    if y.shape[-2:] != operator.frame_shape:
        raise ValueError(
            f"frames must end in the operator's shape {operator.frame_shape}, got {y.shape}"
        )
