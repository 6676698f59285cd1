"""Solvers: optimum against independent solvers, certificate, freezing, implicit derivative."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike
from scipy.optimize import nnls
from sklearn.linear_model import Lasso

from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding import admm, solvers
from dscsnet_jax.unfolding.solvers import LassoSolution, solve_lasso

SHAPE, DIVISION = (5, 6), 3
LAM = np.array([2.0, 3.0, 1.0])  # of the three frames of `scenes`

# Each program runs a few times, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
build = quick_jit(sensing_operator, static_argnames=("frame_size", "division"))
compiled = quick_jit(solve_lasso, static_argnames=("method", "nonneg"))


def solve(
    y: jax.Array,
    operator: SensingOperator,
    *,
    lam: ArrayLike,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
    rho: float = 0.1,
    eta: float = 1.6,
    **options: Any,
) -> LassoSolution:
    """`solve_lasso` with arguments of one form, so that few programs serve all tests."""
    lam = jnp.broadcast_to(jnp.asarray(lam, operator.response_row.dtype), y.shape[:1])
    controls = {"tolerance": tolerance, "max_iterations": max_iterations, "rho": rho, "eta": eta}
    options = {"method": "fista", "nonneg": True, **options}
    return compiled(y, operator, lam=lam, **controls, **options)


@cache
def doubles(shape: tuple[int, int], division: int) -> SensingOperator:
    """The operator in float64, as NumPy arrays, also where it is asked for inside `jit`."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return jax.tree.map(np.asarray, build(shape, division=division, psf=0.5))


def operator_of(shape: tuple[int, int] = SHAPE, division: int = DIVISION) -> SensingOperator:
    """The operator in the precision of the test."""
    return jax.tree.map(lambda a: jnp.asarray(a, float), doubles(shape, division))


def dense(operator: SensingOperator) -> np.ndarray:
    """`Phi` as a matrix on row-major maps."""
    return np.asarray(operator.matrix())


def flat(a: jax.Array) -> np.ndarray:
    """(..., rows, cols) -> (..., rows * cols), as NumPy."""
    return np.asarray(a).reshape(*a.shape[:-2], -1)


@cache
def counts(shape: tuple[int, int]) -> np.ndarray:
    """Three noisy frames: one target, a close pair, nothing but noise."""
    tables = [[(2.2, 1.9, 240.0)], [(1.8, 2.0, 230.0), (2.3, 2.6, 245.0)], []]
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        draw = quick_jit(partial(render, frame_size=shape, psf=0.5))
        clean = np.asarray(draw(from_lists(tables)))
    return clean + 3 * np.random.default_rng(4).normal(size=clean.shape)


def scenes(operator: SensingOperator) -> jax.Array:
    """`counts` in the precision of the test."""
    return jnp.asarray(counts(operator.frame_shape), float)


def objective_of(matrix: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float) -> float:
    return float(((matrix @ x - y) ** 2).sum() / 2 + lam * np.abs(x).sum())


def independent(matrix: np.ndarray, y: np.ndarray, lam: float, nonneg: bool) -> np.ndarray:
    """The minimiser by scikit-learn's coordinate descent, or SciPy's active set."""
    if lam == 0:
        return nnls(matrix, y)[0]
    model = Lasso(
        alpha=lam / len(y), positive=nonneg, fit_intercept=False, tol=1e-9, max_iter=200_000
    )
    return model.fit(matrix, y).coef_


# --- the optimum ----------------------------------------------------------------------

PROBLEMS: dict[str, tuple[tuple[int, int], int, bool]] = {
    "c = 3": ((5, 6), 3, True),
    "c = 3, signed": ((5, 6), 3, False),
    "c = 5": ((4, 5), 5, True),
    "c = 2, signed": ((7, 6), 2, False),
}


@pytest.mark.parametrize("method", ["fista", "admm"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_optimum_is_that_of_an_independent_solver(x64: None, name: str, method: str) -> None:
    shape, division, nonneg = PROBLEMS[name]
    operator = operator_of(shape, division)
    y, matrix = scenes(operator), dense(operator)
    answer = solve(
        y, operator, lam=LAM, method=method, nonneg=nonneg, tolerance=1e-8, max_iterations=50_000
    )
    assert answer.converged.all()
    for k, (frame, x) in enumerate(zip(flat(y), flat(answer.x), strict=True)):
        value = objective_of(matrix, frame, x, LAM[k])
        best = objective_of(matrix, frame, independent(matrix, frame, LAM[k], nonneg), LAM[k])
        np.testing.assert_allclose(value, best, rtol=1e-6)
        np.testing.assert_allclose(answer.objective[k], value, rtol=1e-12)
        assert not nonneg or x.min() >= 0
    assert nonneg or answer.x.min() < 0


def test_ista_reaches_the_same_optimum_more_slowly(x64: None) -> None:
    operator = operator_of((7, 6), 2)
    y, matrix = scenes(operator), dense(operator)
    fast, slow = (
        solve(y, operator, lam=10.0, method=m, tolerance=1e-6, max_iterations=100_000)
        for m in ("fista", "ista")
    )
    assert slow.converged.all()
    assert (slow.iterations[:2] > 2 * fast.iterations[:2]).all()
    for frame, x in zip(flat(y), flat(slow.x), strict=True):
        best = objective_of(matrix, frame, independent(matrix, frame, 10.0, True), 10.0)
        np.testing.assert_allclose(objective_of(matrix, frame, x, 10.0), best, rtol=1e-5)


def test_ista_and_fista_take_their_textbook_steps(x64: None) -> None:
    operator = operator_of()
    y, matrix = scenes(operator)[:1], dense(operator)
    frame, length = flat(y)[0], 1 / np.linalg.norm(matrix, 2) ** 2
    for method in ("ista", "fista"):
        x = v = np.zeros(matrix.shape[1])
        t, restarts = 1.0, 0
        for k in range(1, 201):
            stepped = v - length * matrix.T @ (matrix @ v - frame)
            before, x = x, np.maximum(stepped - 2.0 * length, 0)
            moved = np.linalg.norm(x - v)
            if method == "fista" and (v - x) @ (x - before) > 0:
                t, restarts = 1.0, restarts + 1
            following = (1 + np.sqrt(1 + 4 * t**2)) / 2
            v = x + (t - 1) / following * (x - before) if method == "fista" else x
            t = following
            if k in (1, 2, 3, 200):
                answer = solve(y, operator, lam=2.0, method=method, max_iterations=k)
                np.testing.assert_allclose(flat(answer.x)[0], x, rtol=0, atol=1e-8)
                assert answer.iterations.tolist() == [k]
                np.testing.assert_allclose(answer.primal, moved, rtol=1e-6)
                np.testing.assert_allclose(answer.dual, moved / length, rtol=1e-6)
        assert restarts > 0 or method == "ista"


def test_admm_is_the_unfolded_iteration(x64: None) -> None:
    operator = operator_of()
    y = scenes(operator)
    unfolded = admm.admm_lasso(y, operator, lam=2.0, rho=0.2, eta=1.2, num_iterations=7, trace=True)
    answer = solve(y, operator, lam=2.0, method="admm", rho=0.2, eta=1.2, max_iterations=7)
    assert answer.iterations.tolist() == [7, 7, 7]
    np.testing.assert_allclose(answer.x, unfolded.x, rtol=0, atol=1e-11)
    np.testing.assert_allclose(answer.primal, unfolded.trace["primal"][-1], rtol=1e-11)
    np.testing.assert_allclose(answer.dual, unfolded.trace["dual"][-1], rtol=1e-11)


def test_without_a_penalty_the_answer_is_least_squares(x64: None) -> None:
    operator = operator_of((7, 6), 2)
    y, matrix = scenes(operator), dense(operator)
    answer = solve(y, operator, lam=0.0, tolerance=1e-8, max_iterations=50_000)
    assert answer.converged.all()
    for frame, x in zip(flat(y), flat(answer.x), strict=True):
        best = objective_of(matrix, frame, independent(matrix, frame, 0.0, True), 0.0)
        np.testing.assert_allclose(objective_of(matrix, frame, x, 0.0), best, rtol=1e-6)
    # Signed maps fit any frame: no residual is left to compare the gap with.
    fit = solve(y, operator, lam=0.0, nonneg=False, tolerance=1e-3, max_iterations=50_000)
    assert fit.converged.all()
    residual = np.linalg.norm(flat(operator.apply(fit.x) - y), axis=-1)
    assert (residual <= 1e-3 * np.linalg.norm(flat(y), axis=-1)).all()


def test_default_tolerance_is_within_reach_of_float32() -> None:
    operator = operator_of()
    y, matrix = scenes(operator), np.float64(dense(operator))
    answer = solve(y, operator, lam=LAM.astype(np.float32))
    assert answer.x.dtype == jnp.float32
    assert answer.converged.all()
    assert (answer.relative_gap <= 1e-4).all()
    for k, (frame, x) in enumerate(zip(np.float64(flat(y)), flat(answer.x), strict=True)):
        best = objective_of(matrix, frame, independent(matrix, frame, LAM[k], True), LAM[k])
        assert objective_of(matrix, frame, np.float64(x), LAM[k]) <= best * (1 + 1.2e-4)


# --- the certificate ------------------------------------------------------------------


@pytest.mark.parametrize("nonneg", [True, False])
@pytest.mark.parametrize("count", [0, 3, 60])
def test_gap_is_that_of_a_feasible_dual_point(x64: None, count: int, nonneg: bool) -> None:
    operator = operator_of()
    y, matrix = scenes(operator), dense(operator)
    answer = solve(y, operator, lam=LAM, nonneg=nonneg, max_iterations=count)
    for k, (frame, x) in enumerate(zip(flat(y), flat(answer.x), strict=True)):
        residual = frame - matrix @ x
        slope = matrix.T @ residual
        if nonneg:
            shift = ((slope - LAM[k]) / matrix.sum(0)).max()
            nu = residual - max(shift, 0)
            assert (matrix.T @ nu <= LAM[k] + 1e-9).all()
        else:
            nu = residual * min(1, LAM[k] / np.abs(slope).max())
            assert (np.abs(matrix.T @ nu) <= LAM[k] + 1e-9).all()
        value = objective_of(matrix, frame, x, LAM[k])
        gap = value - (frame @ nu - nu @ nu / 2)
        np.testing.assert_allclose(answer.gap[k], gap, rtol=1e-9)
        np.testing.assert_allclose(answer.relative_gap[k], gap / value, rtol=1e-9)
        best = objective_of(matrix, frame, independent(matrix, frame, LAM[k], nonneg), LAM[k])
        assert value - best <= gap + 1e-6 * best


def test_frames_of_no_signal_are_solved_before_they_start(x64: None) -> None:
    operator = operator_of()
    y = scenes(operator).at[2].set(0)
    least = float(np.abs(np.asarray(operator.adjoint(y[0]))).max())
    answer = solve(y, operator, lam=np.array([1.01 * least, 1.0, 0.0]))
    assert answer.iterations[jnp.array([0, 2])].tolist() == [0, 0]
    assert answer.converged.all()
    assert not answer.x[jnp.array([0, 2])].any()
    assert answer.relative_gap[2] == 0
    for residual in (answer.primal, answer.dual):
        assert jnp.isinf(residual).tolist() == [True, False, True]


@pytest.mark.parametrize("method", ["ista", "fista"])
def test_dual_residual_bounds_the_least_subgradient(x64: None, method: str) -> None:
    operator = operator_of()
    y, matrix = scenes(operator), dense(operator)
    early, late = (solve(y, operator, lam=LAM, method=method, max_iterations=k) for k in (3, 300))
    for answer in (early, late):
        for frame, x, lam, dual in zip(flat(y), flat(answer.x), LAM, answer.dual, strict=True):
            slope = matrix.T @ (matrix @ x - frame) + lam
            least = np.linalg.norm(np.where(x > 0, slope, np.minimum(slope, 0)))
            assert 0 < least <= dual
    assert (late.dual < 0.1 * early.dual).all()


@pytest.mark.parametrize("method", ["fista", "admm"])
def test_residuals_vanish_at_the_optimum(x64: None, method: str) -> None:
    operator = operator_of()
    run = partial(solve, scenes(operator), operator, lam=LAM, method=method)
    early = run(max_iterations=3)
    last = run(tolerance=1e-8, max_iterations=50_000)
    assert (last.primal < 1e-3 * early.primal).all()
    assert (last.dual < 1e-3 * early.dual).all()


# --- batches and starts ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["fista", "admm"])
def test_row01_frame_is_not_touched_by_its_batch(method: str) -> None:
    operator = operator_of()
    y = scenes(operator)
    run = partial(solve, operator=operator, lam=10.0, method=method, tolerance=1e-3)
    together = run(y)
    for others in (0.0, jnp.nan, 1000.0):
        changed = run(jnp.full_like(y, others).at[1].set(y[1]))
        for got, expected in zip(changed, together, strict=True):
            np.testing.assert_array_equal(got[1], expected[1])
        if jnp.isnan(others):
            assert changed.converged.tolist() == [False, True, False]
            assert changed.iterations[0] == 0
    assert len(set(together.iterations.tolist())) == 3
    alone = run(y[1:2])
    np.testing.assert_allclose(alone.x[0], together.x[1], rtol=0, atol=0.01)


@pytest.mark.parametrize("method", ["fista", "admm"])
def test_warm_start_saves_iterations(x64: None, method: str) -> None:
    operator = operator_of()
    y = scenes(operator)
    run = partial(solve, y, operator, method=method, max_iterations=100_000)
    cold = run(lam=2.0, tolerance=1e-9)
    near = run(lam=2.1, tolerance=1e-9, start=cold.x)
    far = run(lam=2.1, tolerance=1e-9)
    assert (near.iterations < far.iterations).all()
    np.testing.assert_allclose(near.x, far.x, rtol=0, atol=1e-3 * float(far.x.max()))
    again = run(lam=2.0, tolerance=2e-9, start=cold.x)
    assert again.iterations.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(again.x, cold.x)
    assert run(lam=2.0, start=-cold.x, max_iterations=0).x.max() == 0


def test_row07_whole_counts_give_the_answer_of_the_same_floats() -> None:
    operator = operator_of()
    y = jnp.round(jnp.maximum(scenes(operator), 0)).astype(jnp.uint8)
    whole = solve(y, operator, lam=10.0, tolerance=1e-3)
    floats = solve(y.astype(jnp.float32), operator, lam=10.0, tolerance=1e-3)
    np.testing.assert_array_equal(whole.x, floats.x)


def test_what_cannot_be_solved_is_refused() -> None:
    operator = operator_of()
    y = jnp.zeros((3, 5, 6))
    with pytest.raises(ValueError, match="unknown method 'newton'; choose one of fista, ista, ad"):
        solve_lasso(y, operator, lam=1.0, method="newton")
    with pytest.raises(ValueError, match="lam must not be negative"):
        solve_lasso(y, operator, lam=-1.0)
    with pytest.raises(ValueError, match=r"scalar or of shape \(3,\), got \(2,\)"):
        solve_lasso(y, operator, lam=jnp.ones(2))
    with pytest.raises(ValueError, match=r"start must have the shape \(3, 15, 18\)"):
        solve_lasso(y, operator, lam=1.0, start=jnp.zeros((15, 18)))
    with pytest.raises(ValueError, match=r"operator's shape \(5, 6\), got \(3, 6, 5\)"):
        solve_lasso(jnp.zeros((3, 6, 5)), operator, lam=1.0)


# --- the derivative -------------------------------------------------------------------

WEIGHT = np.random.default_rng(7).normal(size=(1, 15, 18))
DIRECTION = np.random.default_rng(8).normal(size=(3, 5, 6))


def probe(
    theta: jax.Array, nonneg: bool, method: str = "fista"
) -> tuple[jax.Array, tuple[jax.Array, LassoSolution]]:
    """A number (3,) per frame of its map, twice, and the answer.

    `theta` moves lam, sigma (row, col), the frames and the operator.
    """
    operator = sensing_operator(SHAPE, division=DIVISION, psf=theta[1:3])
    operator = operator.replace(response_col=operator.response_col * (1 + theta[4]))
    y = scenes(operator_of()) + theta[3] * jnp.asarray(DIRECTION)
    answer = solve_lasso(
        y,
        operator,
        lam=theta[0],
        nonneg=nonneg,
        method=method,
        tolerance=1e-13,
        max_iterations=100_000,
    )
    number = (answer.x * WEIGHT).sum((-2, -1))
    return number, (number, answer)


THETA = np.array([2.0, 0.5, 0.52, 0.0, 0.0])
STEP = 1e-5
reverse = quick_jit(
    jax.grad(lambda theta, nonneg, method: probe(theta, nonneg, method)[0].sum()),
    static_argnums=(1, 2),
)


@cache
def neighbourhood(nonneg: bool) -> tuple[jax.Array, tuple[jax.Array, LassoSolution]]:
    """Jacobian (11, 3, 5), numbers (11, 3), answers: at THETA, then + STEP e_i, then - STEP e_i."""
    around = THETA + STEP * np.concatenate([np.zeros((1, 5)), np.eye(5), -np.eye(5)])
    forward = jax.jacfwd(partial(probe, nonneg=nonneg), has_aux=True)
    return quick_jit(jax.vmap(forward))(around)


@pytest.mark.parametrize("nonneg", [True, False])
def test_derivative_equals_finite_differences(x64: None, nonneg: bool) -> None:
    slopes, (numbers, answer) = neighbourhood(nonneg)
    assert answer.converged.all()
    support = np.asarray(answer.x != 0)  # the derivative is that of one support
    assert (support == support[0]).all()
    assert support[0].any((-2, -1)).all()
    differences = (numbers[1:6] - numbers[6:]) / (2 * STEP)
    np.testing.assert_allclose(slopes[0].T, differences, rtol=1e-5)
    backward = reverse(THETA, nonneg, "fista")
    np.testing.assert_allclose(backward, slopes[0].sum(0), rtol=1e-8)


def test_derivative_does_not_depend_on_the_method(x64: None) -> None:
    slopes = [reverse(THETA, True, method) for method in ("fista", "admm")]
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-8)


def test_derivative_by_lam_is_the_closed_form(x64: None) -> None:
    operator = operator_of()
    y, matrix = scenes(operator), dense(operator)

    def answer(lam: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = solve_lasso(
            y, operator, lam=lam, nonneg=False, tolerance=1e-12, max_iterations=100_000
        )
        return solution.x, solution.objective

    slopes = quick_jit(lambda lam: jax.jvp(answer, (lam,), (jnp.ones(3),)))
    (x, _), (slope, envelope) = slopes(jnp.asarray(LAM))
    for values, got in zip(flat(x), flat(slope), strict=True):
        support = values != 0
        columns = matrix[:, support]
        expected = -np.linalg.solve(columns.T @ columns, np.sign(values[support]))
        np.testing.assert_allclose(got[support], expected, rtol=1e-8)
        assert not got[~support].any()
    # The optimum's value changes with lam as its l1 norm does (envelope theorem).
    np.testing.assert_allclose(envelope, np.abs(flat(x)).sum(-1), rtol=1e-8)


def test_second_derivative_equals_finite_differences_of_the_first(x64: None) -> None:
    def loss(theta: jax.Array) -> jax.Array:
        return (probe(theta, True)[0] ** 2).sum()

    row = np.eye(5)[1]
    _, curvature = quick_jit(lambda theta: jax.jvp(jax.grad(loss), (theta,), (row,)))(THETA)
    slopes, (numbers, _) = neighbourhood(True)
    gradients = 2 * jnp.einsum("tf,tfi->ti", numbers, slopes)
    expected = (gradients[2] - gradients[7]) / (2 * STEP)
    np.testing.assert_allclose(curvature, expected, rtol=1e-5)


def test_memory_of_the_derivative_does_not_grow_with_the_iterations() -> None:
    y, operator = scenes(operator_of()), operator_of()

    def solved(lam: jax.Array, count: int) -> jax.Array:
        return solve_lasso(y, operator, lam=lam, max_iterations=count).x

    def unfolded(lam: jax.Array, count: int) -> jax.Array:
        return admm.admm_lasso(y, operator, lam=lam, num_iterations=count).x

    def temporary(answer: Callable[..., jax.Array], count: int) -> int:
        slope = quick_jit(jax.grad(lambda lam: answer(lam, count).sum()))
        return slope.lower(1.0).compile().memory_analysis().temp_size_in_bytes

    assert temporary(solved, 10_000) == temporary(solved, 10) > 0
    assert temporary(unfolded, 100) > 5 * temporary(unfolded, 10)  # what would grow is seen


def total_of(
    lam: jax.Array, scale: ArrayLike = 1.0, **options: Any
) -> tuple[jax.Array, LassoSolution]:
    """Sums (3,) of the maps after a few iterations; the third frame is zero."""
    y = scale * scenes(operator_of()).at[2].set(0)
    answer = solve_lasso(y, operator_of(), lam=lam, max_iterations=20, **options)
    return answer.x.sum((-2, -1)), answer


@pytest.mark.parametrize("method", ["fista", "admm"])
def test_row34_derivative_is_refused_without_convergence(method: str) -> None:
    lam = jnp.ones(3)
    run = partial(total_of, method=method)
    _, answer = run(lam)
    assert answer.converged.tolist() == [False, False, True]
    assert answer.iterations.tolist() == [20, 20, 0]
    assert (answer.relative_gap[:2] > 1e-4).all()
    assert (answer.gap[:2] > 0).all()
    assert (answer.primal[:2] > 0).all()
    assert (answer.dual[:2] > 0).all()
    with pytest.raises(ValueError, match="refused: 2 of 3 frames have not converged"):
        jax.grad(lambda lam: run(lam)[0].sum())(lam)
    with pytest.raises(ValueError, match="refused: 2 of 3 frames have not converged"):
        jax.jvp(lambda lam: run(lam)[0], (lam,), (lam,))


def test_row34_inside_jit_the_derivative_is_nan_and_the_status_tells() -> None:
    slope, answer = quick_jit(jax.jacrev(total_of, has_aux=True))(jnp.ones(3))
    assert answer.converged.tolist() == [False, False, True]
    assert jnp.isnan(jnp.diagonal(slope)[:2]).all()
    assert slope[2, 2] == 0


def test_row02_zero_frame_has_a_finite_gradient() -> None:
    for slope in jax.grad(lambda *a: total_of(*a)[0].sum(), (0, 1))(jnp.ones(3), 0.0):
        assert not slope.any()


def test_singular_system_without_solution_gives_nan(x64: None) -> None:
    weights = jnp.array([2.0, 1.0, 0.0])[:, None, None]
    right = jnp.array([[[4.0, 0.0]], [[3.0, 0.0]], [[0.0, 5.0]]])
    first = jnp.array([1.0, 0.0])[None, None, :]
    solve = partial(solvers._conjugate_gradients, lambda v: weights * first * v)
    got = quick_jit(partial(solve, max_iterations=10))(right)
    assert got[:2].tolist() == [[[2.0, 0.0]], [[3.0, 0.0]]]
    assert jnp.isnan(got[2]).all()
