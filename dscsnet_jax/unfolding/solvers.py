"""Solvers: ISTA, FISTA and ADMM for the lasso, to a tolerance, differentiable at the answer.

The problem is that of `admm`, without learned parts,

    min over x of P(x) = 1/2 ||Phi x - y||^2 + lam ||x||_1     (x >= 0 if so asked).

Every iterate comes with a proof of its quality: a point `nu` of the dual problem

    max over nu of D(nu) = <nu, y> - 1/2 ||nu||^2   subject to   |Phi^T nu| <= lam
                                                    (Phi^T nu <= lam for x >= 0)

bounds the optimum from below, so `P(x) - P(x*) <= P(x) - D(nu)`, the duality gap. The
answer is differentiated by its optimality condition (`_optimum`), never through the
iterations: memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dscsnet_jax.physics.optics import SensingOperator
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.admm import Iterate

_FAILED = 1e-3  # relative residual above which a linear solve has failed
_SWEEPS = 10  # conjugate gradient steps per pixel; exact arithmetic needs at most one


class LassoSolution(NamedTuple):
    """Answer of `solve_lasso`; what is per frame has the leading axes (...,) of `y`.

    Attributes:
      x: (..., cN, cM) sub-pixel map, counts; zeros are exact.
      iterations: (...,) taken, integers.
      objective: (...,) `P(x)`, squared counts.
      gap: (...,) duality gap: the objective is at most this far above the optimum.
      relative_gap: (...,) the gap as a share of the objective.
      primal: (...,) residual of the last iteration, counts: `||x - z||` for ADMM,
        `||x - v||` for ISTA and FISTA, whose step goes from `v` to `x`. It is 0 at the
        optimum, and inf where no iteration was taken.
      dual: (...,) likewise: `rho ||z - z_previous||` for ADMM, `L ||x - v||` for the
        others, where `P` has a subgradient at `x` that is not longer.
      converged: (...,) bool: the relative gap is within the tolerance.
    """

    x: jax.Array
    iterations: jax.Array
    objective: jax.Array
    gap: jax.Array
    relative_gap: jax.Array
    primal: jax.Array
    dual: jax.Array
    converged: jax.Array


def solve_lasso(
    y: jax.Array,
    operator: SensingOperator,
    *,
    lam: ArrayLike,
    method: str = "fista",
    nonneg: bool = True,
    tolerance: ArrayLike = 1e-4,
    max_iterations: ArrayLike = 10_000,
    start: jax.Array | None = None,
    rho: ArrayLike = 0.1,
    eta: ArrayLike = 1.6,
) -> LassoSolution:
    """Minimise `1/2 ||Phi x - y||^2 + lam ||x||_1` to a tolerance on the duality gap.

    A frame stops by itself, on convergence or when its gap is no longer finite, so its
    answer is the same, bit for bit, whatever the other frames of the batch hold (batches of
    another size round their products differently). Rounding limits the
    relative gap: in float32, where `lam` is 0.3 % of the brightest pixel, 1e-4 is reached
    and 1e-5 often is not (the floor grows as pixel over `lam`); float64 reaches 1e-12.
    ISTA is here for comparison: it takes tens of thousands of iterations where FISTA and
    ADMM take thousands.

    The answer is differentiable, forward and reverse, with respect to `y`, `lam` and the
    operator's responses (so also the PSF's `sigma`). On the support S of x, with its signs
    s, the optimum obeys `Phi_S^T (Phi x - y) + lam s = 0`, hence

        Phi_S^T Phi_S dx_S = d_params [Phi_S^T (y - Phi x) - lam s],    dx elsewhere 0.

    The derivative is that of the support found, so it is no better than the support. At
    the default tolerance in float32 it is mostly within a few per cent, but altogether
    wrong for a frame whose support is one cell off: for digits use float64 and 1e-8 or
    less. Where a cell is about to enter or leave the support there is no derivative, only
    that of one side. The objective is differentiable likewise; iterations, gaps, residuals
    and status are constants.

    Args:
      y: (..., N, M) frames, counts.
      operator: the sensing operator.
      lam: non-negative l1 weight, counts; a scalar or one per frame (...,).
      method: `fista` (with restart), `ista` or `admm`.
      nonneg: intensities are not negative.
      tolerance: largest relative gap at convergence. Where the objective itself is below
        `tolerance ||y||^2 / 2` (a fit without residual, `lam = 0`), the gap is compared
        with that instead.
      max_iterations: bound on the iterations of each frame.
      start: (..., cN, cM) map to start from, counts; None: zero. Not differentiated.
      rho: positive penalty of ADMM; the other methods need none.
      eta: multiplier step of ADMM, in (0, 1.618).

    Returns:
      A `LassoSolution`, in the precision of frames and operator.

    Raises:
      ValueError: if the method is unknown, `lam` is negative, or frames or start do not
        have the operator's shapes; and on differentiation if a frame has not converged.
        Inside `jax.jit` or `jax.vmap`, where nothing can be raised, the derivative of
        such a frame is NaN instead: look at `converged`.

    Example:
      >>> from dscsnet_jax.physics.optics import sensing_operator
      >>> x = jnp.zeros((1, 15, 15)).at[0, 7, 7].set(100.0)
      >>> y = sensing_operator(5, division=3, psf=0.5).apply(x)
      >>> def brightest(sigma):
      ...     operator = sensing_operator(5, division=3, psf=sigma)
      ...     return solve_lasso(y, operator, lam=5.0).x.max()
      >>> value, slope = jax.jit(jax.value_and_grad(brightest))(0.5)
      >>> round(float(value), 1), bool(slope > 0)
      (81.0, True)

    References:
      A. Beck and M. Teboulle, SIAM J. Imaging Sci. 2 (2009) 183; B. O'Donoghue and
      E. Candes, Found. Comput. Math. 15 (2015) 715; S. Boyd et al., Distributed
      optimization and statistical learning via ADMM, 2011, 6.4; Q. Bertrand et al.,
      JMLR 23 (2022) 149, implicit differentiation of the lasso.
    """
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(_METHODS)}")
    admm.check_frame_shape(y, operator)
    batch = y.shape[:-2]
    dtype = admm.precision(y, operator)
    y, lam = y.astype(dtype), jnp.asarray(lam, dtype)
    if lam.shape not in ((), batch):
        raise ValueError(f"lam must be a scalar or of shape {batch}, got {lam.shape}")
    if not isinstance(lam, jax.core.Tracer) and bool((lam < 0).any()):
        raise ValueError(f"lam must not be negative, got {lam}")
    expected = (*batch, *operator.map_shape)
    if start is not None and start.shape != expected:
        raise ValueError(f"start must have the shape {expected}, got {start.shape}")
    lam = jnp.broadcast_to(lam, batch)[..., None, None]
    if start is not None:
        start = start.astype(dtype)
    controls = (start, *(jnp.asarray(a, dtype) for a in (tolerance, rho, eta)), max_iterations)
    constants = jax.lax.stop_gradient((y, operator, lam, *controls))
    solution = _iterate(*constants, method=method, nonneg=nonneg)
    x = _optimum(solution.x, solution.converged, y, operator, lam)
    objective = _objective(x, y - operator.apply(x), lam)
    return solution._replace(x=x, objective=objective)


# --- the iterations -------------------------------------------------------------------


class _Problem(NamedTuple):
    """What all iterations share; `lam` is (..., 1, 1)."""

    y: jax.Array
    operator: SensingOperator
    lam: jax.Array
    nonneg: bool
    rho: jax.Array
    eta: jax.Array


class _Candidate(NamedTuple):
    """A map, its residual `y - Phi x` and `correlation = Phi^T (y - Phi x)`."""

    x: jax.Array
    residual: jax.Array
    correlation: jax.Array


class _Momentum(NamedTuple):
    """Extrapolated point `v` of FISTA, its correlation, and the count `t` (..., 1, 1).

    The residuals (...,) are those of the last iteration, here and in `_Alternation`.
    """

    v: jax.Array
    correlation: jax.Array
    t: jax.Array
    primal: jax.Array
    dual: jax.Array


class _Alternation(NamedTuple):
    """ADMM's iterate, and residuals (...,)."""

    iterate: Iterate
    primal: jax.Array
    dual: jax.Array


class _State(NamedTuple):
    """The loop's state: every leaf has the frames' leading axes."""

    candidate: _Candidate
    memory: Any
    objective: jax.Array
    gap: jax.Array
    relative_gap: jax.Array
    iterations: jax.Array
    active: jax.Array


@partial(jax.jit, static_argnames=("method", "nonneg"))
def _iterate(
    y: jax.Array,
    operator: SensingOperator,
    lam: jax.Array,
    start: jax.Array | None,
    tolerance: jax.Array,
    rho: jax.Array,
    eta: jax.Array,
    max_iterations: ArrayLike,
    *,
    method: str,
    nonneg: bool,
) -> LassoSolution:
    """Iterate until every frame has converged or used up its iterations."""
    problem = _Problem(y, operator, lam, nonneg, rho, eta)
    begin, advance = _METHODS[method]

    def judge(candidate: _Candidate, memory: Any, iterations: jax.Array) -> _State:
        objective, gap, relative = _certify(candidate, problem, tolerance)
        active = (relative > tolerance) & jnp.isfinite(gap) & (iterations < max_iterations)
        return _State(candidate, memory, objective, gap, relative, iterations, active)

    def step(state: _State) -> _State:
        candidate, memory = advance(problem, state.candidate, state.memory)
        return _where(state.active, judge(candidate, memory, state.iterations + 1), state)

    if start is None:
        x = jnp.zeros((*y.shape[:-2], *operator.map_shape), y.dtype)
    else:
        x = jnp.maximum(start, 0) if nonneg else start
    none = jnp.zeros(y.shape[:-2], int)
    first = judge(_evaluate(x, problem), begin(problem, x, start is None), none)
    last = jax.lax.while_loop(lambda state: state.active.any(), step, first)
    return LassoSolution(
        x=last.candidate.x,
        iterations=last.iterations,
        objective=last.objective,
        gap=last.gap,
        relative_gap=last.relative_gap,
        primal=last.memory.primal,
        dual=last.memory.dual,
        converged=last.relative_gap <= tolerance,
    )


def _where(active: jax.Array, new: _State, old: _State) -> _State:
    """`new` for the frames that are active: what has converged is left alone, bit for bit."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(active, tuple(range(active.ndim, a.ndim))), a, b)

    return jax.tree.map(choose, new, old)


def _total(a: jax.Array, keepdims: bool = False) -> jax.Array:
    return a.sum((-2, -1), keepdims=keepdims)


def _evaluate(x: jax.Array, problem: _Problem) -> _Candidate:
    residual = problem.y - problem.operator.apply(x)
    return _Candidate(x, residual, problem.operator.adjoint(residual))


def _objective(x: jax.Array, residual: jax.Array, lam: jax.Array) -> jax.Array:
    return _total(residual**2) / 2 + _total(lam * jnp.abs(x))


def _certify(
    candidate: _Candidate, problem: _Problem, tolerance: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Objective, duality gap and relative gap, each (...,).

    With `nu` feasible the gap is a sum of terms none of which is negative,

        P(x) - D(nu) = 1/2 ||r - nu||^2 + sum_i (lam |x_i| - (Phi^T nu)_i x_i),    r = y - Phi x

    and so keeps its digits where the difference of P and D would lose them.
    """
    x, r, correlation = candidate
    lam, operator = problem.lam, problem.operator
    if problem.nonneg:
        # nu = r - tau: lowered until Phi^T nu <= lam; unlike scaling it serves lam = 0.
        weight = jnp.broadcast_to(operator.adjoint(jnp.ones_like(r)), x.shape)
        tau = jnp.maximum((correlation - lam) / weight, 0).max((-2, -1), keepdims=True)
        short, along = jnp.broadcast_to(tau, r.shape), correlation - tau * weight
    else:
        # nu = s r: scaled until |Phi^T nu| <= lam.
        worst = jnp.abs(correlation).max((-2, -1), keepdims=True)
        s = jnp.where(worst > lam, lam / jnp.where(worst > lam, worst, 1), 1)
        short, along = (1 - s) * r, s * correlation
    gap = _total(short**2) / 2 + _total(lam * jnp.abs(x) - along * x)
    gap = jnp.maximum(gap, 0)
    objective = _objective(x, r, lam)
    scale = jnp.maximum(objective, tolerance * _total(problem.y**2) / 2)
    relative = jnp.where(scale == 0, gap, gap / jnp.where(scale == 0, 1, scale))
    return objective, gap, relative


def _begin_gradient(problem: _Problem, x: jax.Array, _: bool) -> _Momentum:
    t = jnp.ones((*problem.y.shape[:-2], 1, 1), x.dtype)
    unknown = _unknown(problem)
    return _Momentum(x, _evaluate(x, problem).correlation, t, unknown, unknown)


def _proximal_gradient(
    problem: _Problem, before: _Candidate, momentum: _Momentum, *, accelerated: bool
) -> tuple[_Candidate, _Momentum]:
    """One iteration of FISTA, or of ISTA.

    x' = prox_{lam/L ||.||_1}(v + Phi^T (y - Phi v) / L),     L = ||Phi||^2
    t' = (1 + sqrt(1 + 4 t^2)) / 2,      v' = x' + (t - 1)/t' (x' - x)

    with t = 1 again where the step turns back, `<v - x', x' - x> > 0`.
    """
    v, correlation, t, *_ = momentum
    # A rounded L may lie below the true one, where the step would be too long.
    length = (1 - 8 * jnp.finfo(v.dtype).eps) / problem.operator.norm() ** 2
    stepped = v + length * correlation
    x = admm.soft_threshold(stepped, length * problem.lam, nonneg=problem.nonneg)
    after = _evaluate(x, problem)
    primal = jnp.sqrt(_total((x - v) ** 2))
    residuals = {"primal": primal, "dual": primal / length}
    if not accelerated:
        return after, _Momentum(x, after.correlation, t, **residuals)
    move = x - before.x
    t = jnp.where(_total((v - x) * move, keepdims=True) > 0, 1, t)
    following = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    beta = (t - 1) / following
    # Phi^T (y - Phi v) is affine in v: extrapolating it saves the operator's products.
    turned = after.correlation + beta * (after.correlation - before.correlation)
    return after, _Momentum(x + beta * move, turned, following, **residuals)


def _begin_admm(problem: _Problem, x: jax.Array, cold: bool) -> _Alternation:
    """At an optimum `rho u = Phi^T (y - Phi x)`, within the bounds of the dual problem."""
    y, operator, lam, nonneg, rho, _ = problem
    unknown = _unknown(problem)
    if cold:
        return _Alternation(admm.zero_start(y, operator, rho), unknown, unknown)
    correlation = _evaluate(x, problem).correlation
    u = jnp.minimum(correlation, lam) if nonneg else jnp.clip(correlation, -lam, lam)
    u = u / rho
    r, _ = admm.reconstruction_step(y, x, u, operator, rho)
    return _Alternation(Iterate(x=r, z=x, u=u), unknown, unknown)


def _unknown(problem: _Problem) -> jax.Array:
    """Residual (...,) before the first iteration; NaN would stop `jax_debug_nans`."""
    return jnp.full(problem.y.shape[:-2], jnp.inf, problem.y.dtype)


def _alternate(
    problem: _Problem, _: _Candidate, memory: _Alternation
) -> tuple[_Candidate, _Alternation]:
    """One iteration of ADMM; its sparse variable is the candidate."""
    y, operator, lam, nonneg, rho, eta = problem
    iterate, residuals = admm.lasso_step(
        memory.iterate, y, operator, rho=rho, lam=lam, eta=eta, nonneg=nonneg
    )
    return _evaluate(iterate.z, problem), _Alternation(iterate, **residuals)


_METHODS: dict[str, tuple[Callable, Callable]] = {
    "fista": (_begin_gradient, partial(_proximal_gradient, accelerated=True)),
    "ista": (_begin_gradient, partial(_proximal_gradient, accelerated=False)),
    "admm": (_begin_admm, _alternate),
}


# --- the derivative of the answer -----------------------------------------------------


@jax.custom_jvp
def _optimum(
    x: jax.Array, converged: jax.Array, y: jax.Array, operator: SensingOperator, lam: jax.Array
) -> jax.Array:
    """`x`, differentiated as the minimiser that it is."""
    return x


@_optimum.defjvp
def _optimum_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    _, converged, *parameters = primals
    # Only outside `jit` is the status known; there refusing beats answering NaN.
    if not isinstance(converged, jax.core.Tracer) and not bool(converged.all()):
        raise ValueError(
            f"the derivative is refused: {int((~converged).sum())} of {converged.size} frames "
            "have not converged; raise max_iterations or tolerance, or use float64"
        )
    x = _optimum(*primals)
    tangent = _tangent(x, tuple(parameters), tuple(tangents[2:]))
    # A product, not a choice: only that is NaN in reverse mode too.
    return x, tangent * jnp.where(converged, 1, jnp.nan).astype(x.dtype)[..., None, None]


@jax.jit
def _tangent(x: jax.Array, parameters: tuple, tangents: tuple) -> jax.Array:
    """`dx` of the support's equation for given tangents of y, operator and lam."""
    support = (x != 0).astype(x.dtype)

    def descent(y: jax.Array, operator: SensingOperator, lam: jax.Array) -> jax.Array:
        # Phi_S^T (y - Phi x) - lam s, zero at the optimum
        return support * (operator.adjoint(y - operator.apply(x)) - lam * jnp.sign(x))

    _, change = jax.jvp(descent, parameters, tangents)
    return _solve_on_support(parameters[1], support, change)


def _solve_on_support(operator: SensingOperator, support: jax.Array, b: jax.Array) -> jax.Array:
    """`(Phi_S^T Phi_S)^-1 b`, zero off the support.

    By conjugate gradients in the space of maps: no matrix is formed, whatever the size of
    frame and support, and no batched LAPACK is called (see `inference.spd`). Neighbouring
    cells are nearly collinear (condition 1e3 to 1e6 for thirds of a pixel): float64 keeps
    ten digits and more, float32 two or three.
    """

    def normal(v: jax.Array) -> jax.Array:
        return support * operator.adjoint(operator.apply(support * v)) + (1 - support) * v

    most = _SWEEPS * operator.frame_shape[0] * operator.frame_shape[1]
    solve = partial(_conjugate_gradients, max_iterations=most)
    return jax.lax.custom_linear_solve(normal, b, solve, symmetric=True)


def _conjugate_gradients(
    linear: Callable[[jax.Array], jax.Array], b: jax.Array, *, max_iterations: int
) -> jax.Array:
    """Solve each frame's system; NaN where that fails (a singular one without solution)."""
    dot = partial(_total, keepdims=True)
    norm = dot(b * b)
    least = jnp.finfo(b.dtype).eps ** 2 * norm

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k, v, r, p, square = state
        active = square > least
        product = linear(p)
        alpha = jnp.where(active, square / jnp.where(active, dot(p * product), 1), 0)
        v, r = v + alpha * p, r - alpha * product
        new = jnp.where(active, dot(r * r), square)
        p = jnp.where(active, r + new / jnp.where(active, square, 1) * p, p)
        return k + 1, v, r, p, new

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < max_iterations) & (state[-1] > least).any()

    first: tuple[jax.Array, ...] = (jnp.zeros((), int), jnp.zeros_like(b), b, b, norm)
    _, v, *_ = jax.lax.while_loop(unfinished, step, first)
    error = b - linear(v)
    return jnp.where(dot(error * error) <= _FAILED**2 * norm, v, jnp.nan)
