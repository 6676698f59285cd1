"""ADMM: proximal maps, the pure steps, the scan and the lasso against independent answers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding import admm
from dscsnet_jax.unfolding.admm import Iterate

VALUES = np.array([-4.2, -1.0, -0.3, 0.0, 0.2, 0.9, 3.7])
STEP = 1e-4
GRID = np.arange(-5.0, 5.0 + STEP / 2, STEP)


# Each program runs once or twice, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick_jit
def build(sigma: float = 0.5) -> SensingOperator:
    """The operator of all tests, in one compilation: 5 x 6 pixels of 3 x 3 cells."""
    return sensing_operator((5, 6), division=3, psf=sigma)


def dense(operator: SensingOperator) -> np.ndarray:
    """`Phi` as a matrix on row-major maps."""
    return np.asarray(operator.matrix())


def flat(a: jax.Array) -> np.ndarray:
    """(..., rows, cols) -> (..., rows * cols), as NumPy."""
    return np.asarray(a).reshape(*a.shape[:-2], -1)


def random_state(operator: SensingOperator, batch: int = 2) -> tuple[jax.Array, Iterate]:
    """A frame and an iterate of tens of counts."""
    rng = np.random.default_rng(3)
    y = jnp.asarray(100 * rng.normal(size=(batch, *operator.frame_shape)))
    x, z, u = jnp.asarray(100 * rng.normal(size=(3, batch, *operator.map_shape)))
    return y, Iterate(x, z, u)


# --- proximal maps: the minimiser found by trying every value of a fine grid ----------


def grid_minimiser(penalty: Callable[[np.ndarray], np.ndarray], nonneg: bool) -> np.ndarray:
    """argmin over z of `penalty(z) + (z - v)^2 / 2` for each of `VALUES`."""
    z = GRID[GRID > -STEP / 2] if nonneg else GRID
    objective = penalty(z)[None, :] + (z[None, :] - VALUES[:, None]) ** 2 / 2
    return z[objective.argmin(1)]


@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("theta", [0.0, 0.25, 1.3])
def test_soft_threshold_minimises_its_objective(x64: None, theta: float, nonneg: bool) -> None:
    expected = grid_minimiser(lambda z: theta * np.abs(z), nonneg)
    got = admm.soft_threshold(jnp.asarray(VALUES), theta, nonneg=nonneg)
    np.testing.assert_allclose(got, expected, rtol=0, atol=STEP)


@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_shrink_minimises_its_objective(x64: None, weight: float, nonneg: bool) -> None:
    expected = grid_minimiser(lambda z: weight / 2 * z**2, nonneg)
    got = admm.shrink(jnp.asarray(VALUES), weight, nonneg=nonneg)
    np.testing.assert_allclose(got, expected, rtol=0, atol=STEP)


def test_soft_threshold_takes_one_threshold_per_element(x64: None) -> None:
    theta = np.linspace(0.0, 2.0, len(VALUES))
    got = admm.soft_threshold(jnp.asarray(VALUES), jnp.asarray(theta))
    each = [float(admm.soft_threshold(v, t)) for v, t in zip(VALUES, theta, strict=True)]
    np.testing.assert_array_equal(got, each)


@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_auxiliary_step_minimises_its_share_of_the_lagrangian(
    x64: None, penalty: str, nonneg: bool
) -> None:
    rho, lam = 0.7, 0.4
    weigh = {"l1": np.abs, "l2": lambda z: z**2 / 2}[penalty]
    expected = grid_minimiser(lambda z: lam / rho * weigh(z), nonneg)
    x = jnp.asarray(VALUES) - 0.3
    u = jnp.full(x.shape, 0.3)
    got = admm.auxiliary_step(x, u, rho=rho, lam=lam, penalty=penalty, nonneg=nonneg)
    np.testing.assert_allclose(got, expected, rtol=0, atol=STEP)


def test_auxiliary_step_refuses_an_unknown_penalty() -> None:
    with pytest.raises(ValueError, match="unknown penalty 'l0'; choose one of l1, l2"):
        admm.auxiliary_step(jnp.ones(1), jnp.ones(1), rho=1.0, lam=1.0, penalty="l0")


# --- reconstruction and multiplier ----------------------------------------------------


@pytest.mark.parametrize("rho", [0.01, 0.8])
def test_reconstruction_step_equals_a_dense_solve(x64: None, rho: float) -> None:
    operator = build()
    y, (_, z, u, _) = random_state(operator)
    matrix = dense(operator)
    normal = matrix.T @ matrix + rho * np.eye(matrix.shape[1])
    expected = np.linalg.solve(normal, (flat(y) @ matrix + rho * flat(z - u)).T).T
    r, residual = admm.reconstruction_step(y, z, u, operator, rho)
    np.testing.assert_allclose(flat(r), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(flat(residual), flat(y) - expected @ matrix.T, rtol=0, atol=1e-9)


def test_gradient_step_descends_along_the_gradient_of_the_objective(x64: None) -> None:
    operator = build()
    y, iterate = random_state(operator)
    matrix, rho, step = jnp.asarray(dense(operator)), 0.3, 0.05

    def objective(x: jax.Array) -> jax.Array:
        misfit = x.reshape(2, -1) @ matrix.T - y.reshape(2, -1)
        return (misfit**2).sum() / 2 + rho / 2 * ((x - iterate.z + iterate.u) ** 2).sum()

    expected = iterate.x - step * jax.grad(objective)(iterate.x)
    r, residual = admm.gradient_step(y, iterate, operator, rho, step)
    np.testing.assert_allclose(r, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(residual, y - operator.apply(expected), rtol=0, atol=1e-10)


def test_gradient_steps_lead_to_the_exact_reconstruction(x64: None) -> None:
    operator = build()
    y, iterate = random_state(operator)
    exact, _ = admm.reconstruction_step(y, iterate.z, iterate.u, operator, 0.5)
    step = 1 / (float(operator.norm()) ** 2 + 0.5)

    def descend(_: int, x: jax.Array) -> jax.Array:
        return admm.gradient_step(y, iterate._replace(x=x), operator, 0.5, step)[0]

    # The distance to the answer shrinks by 1 - 0.5 step, or more, in each step.
    count, first = 600, float(jnp.linalg.norm(iterate.x - exact))
    found = jax.lax.fori_loop(0, count, descend, iterate.x)
    atol = first * (1 - 0.5 * step) ** count + 1e-11
    np.testing.assert_allclose(found, exact, rtol=0, atol=atol)


def test_multiplier_step_keeps_the_data_gradient_balanced(x64: None) -> None:
    """Where x minimises the reconstruction step, `Phi^T (y - Phi x) = rho (u + x - z)`."""
    operator = build()
    y, (_, z, u, _) = random_state(operator)
    x, residual = admm.reconstruction_step(y, z, u, operator, 0.2)
    following = admm.multiplier_step(x, z, u, 1.0)
    np.testing.assert_allclose(0.2 * following, operator.adjoint(residual), rtol=0, atol=1e-9)


def test_multiplier_step_scales_with_eta() -> None:
    x, z, u = jnp.array([3.0]), jnp.array([1.0]), jnp.array([10.0])
    assert [float(admm.multiplier_step(x, z, u, eta)[0]) for eta in (0.0, 0.5, 1.0)] == [
        10.0,
        11.0,
        12.0,
    ]


# --- unfold ---------------------------------------------------------------------------


def toy_step(iterate: Iterate, p: dict[str, jax.Array]) -> tuple[Iterate, jax.Array]:
    """A non-linear step that uses and changes every field."""
    x = jnp.tanh(iterate.x @ p["w"]) + p["b"] * iterate.u
    z = iterate.z + x
    return Iterate(x, z, iterate.u - 0.1 * z), x.sum()


def toy_problem() -> tuple[Iterate, dict[str, jax.Array]]:
    """Start and parameters of 5 toy steps."""
    rng = np.random.default_rng(0)
    start = Iterate(*jnp.asarray(rng.normal(size=(3, 2, 4, 4))))
    return start, {
        "w": jnp.asarray(rng.normal(size=(5, 4, 4))),
        "b": jnp.asarray(rng.normal(size=5)),
    }


def test_unfold_equals_a_python_loop(x64: None) -> None:
    start, parameters = toy_problem()
    iterate, records = start, []
    for k in range(5):
        iterate, seen = toy_step(iterate, {name: value[k] for name, value in parameters.items()})
        records.append(float(seen))
    last, trace = admm.unfold(toy_step, start, parameters, trace=True)
    for got, expected in zip(last[:3], iterate[:3], strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(trace, records, rtol=0, atol=1e-13)
    assert admm.unfold(toy_step, start, parameters)[1] is None


def toy_loss(parameters: dict[str, jax.Array], start: Iterate, **options: Any) -> jax.Array:
    """A scalar of all fields of the last iterate."""
    last, _ = admm.unfold(toy_step, start, parameters, **options)
    return (last.x * last.u + last.z**2).sum()


@pytest.mark.parametrize("options", [{"unroll": True}, {"unroll": 2}, {"remat": True}], ids=str)
def test_unroll_and_remat_change_neither_value_nor_gradient(
    x64: None, options: dict[str, Any]
) -> None:
    start, parameters = toy_problem()
    value, gradient = quick_jit(jax.value_and_grad(toy_loss))(parameters, start)
    changed = partial(toy_loss, **options)
    other, slope = quick_jit(jax.value_and_grad(changed))(parameters, start)
    np.testing.assert_allclose(other, value, rtol=1e-13)
    for name in gradient:
        np.testing.assert_allclose(slope[name], gradient[name], rtol=1e-11)


def test_unroll_and_remat_reach_the_compiler() -> None:
    start, parameters = toy_problem()

    def program(**options: Any) -> str:
        return str(jax.make_jaxpr(partial(toy_loss, **options))(parameters, start))

    assert "unroll=1" in program()
    assert "unroll=2" in program(unroll=2)
    assert "remat" in program(remat=True) or "checkpoint" in program(remat=True)
    assert "remat" not in program()
    assert "checkpoint" not in program()


# --- the classical solver -------------------------------------------------------------


lasso = partial(quick_jit, static_argnames=("num_iterations", "nonneg", "trace"))(admm.admm_lasso)


def scenes(operator: SensingOperator) -> jax.Array:
    """Three noisy frames: one target, a close pair, nothing but noise."""
    tables = [[(2.2, 1.9, 240.0)], [(1.8, 2.0, 230.0), (2.3, 2.4, 245.0)], []]
    clean = render(from_lists(tables), frame_size=operator.frame_shape, psf=0.5)
    noise = np.random.default_rng(4).normal(size=clean.shape)
    return clean + jnp.asarray(noise, clean.dtype)


def lasso_objective(matrix: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float) -> float:
    return float(((matrix @ x - y) ** 2).sum() / 2 + lam * np.abs(x).sum())


def fista(matrix: np.ndarray, y: np.ndarray, lam: float, nonneg: bool) -> np.ndarray:
    """Accelerated proximal gradient, written for this test."""
    length = 1 / np.linalg.norm(matrix, 2) ** 2
    x = v = np.zeros(matrix.shape[1])
    momentum = 1.0
    for _ in range(4000):
        w = v - length * (matrix.T @ (matrix @ v - y))
        clipped = np.maximum(np.abs(w) - lam * length, 0) * np.sign(w)
        before, x = x, np.maximum(clipped, 0) if nonneg else clipped
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        v = x + (momentum - 1) / following * (x - before)
        momentum = following
    return x


def duality_gap(
    matrix: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float, nonneg: bool
) -> float:
    """How far `x` may be from the lasso's optimum: 0 only there, whoever found it."""
    residual = y - matrix @ x
    slope = matrix.T @ residual
    worst = slope.max() if nonneg else np.abs(slope).max()
    dual = residual * min(1.0, lam / max(worst, 1e-300))
    bound = (y @ y - (y - dual) @ (y - dual)) / 2
    return lasso_objective(matrix, y, x, lam) - float(bound)


@pytest.mark.parametrize(
    ("lam", "nonneg", "eta"), [(2.0, True, 1.0), (2.0, False, 1.0), (10.0, True, 1.5)]
)
def test_admm_lasso_reaches_the_optimum(x64: None, lam: float, nonneg: bool, eta: float) -> None:
    operator = build()
    y, matrix = scenes(operator), dense(operator)
    answer = lasso(y, operator, lam=lam, eta=eta, num_iterations=2000, nonneg=nonneg, trace=True)
    for frame, x in zip(flat(y), flat(answer.x), strict=True):
        objective = lasso_objective(matrix, frame, x, lam)
        other = lasso_objective(matrix, frame, fista(matrix, frame, lam, nonneg), lam)
        assert duality_gap(matrix, frame, x, lam, nonneg) < 1e-9 * objective
        np.testing.assert_allclose(objective, other, rtol=1e-6)
        assert not nonneg or x.min() >= 0
    for residual in answer.trace.values():
        assert residual.shape == (2000, 3)
        assert (residual[-1] < 1e-6 * (1 + residual[0])).all()


def test_admm_lasso_answer_is_sparse() -> None:
    operator = build()
    x = lasso(scenes(operator), operator, lam=10.0, num_iterations=300).x
    # The soft threshold's exact zeros: most cells of a frame with one or two targets.
    assert ((x == 0).mean((-2, -1)) > 0.9).all()
    assert (x[:2].max((-2, -1)) > 0).all()


def test_admm_lasso_trace_holds_the_residuals_of_every_iteration(x64: None) -> None:
    operator = build()
    y, rho, lam, eta = scenes(operator), 0.2, 3.0, 1.2
    x, z, u = np.asarray(admm.zero_start(y, operator, rho).x), 0.0, np.zeros((3, 15, 18))
    primal, dual = [], []
    for _ in range(6):
        before, z = z, np.maximum(x + u - lam / rho, 0)
        u = u + eta * (x - z)
        primal.append(np.sqrt(((x - z) ** 2).sum((1, 2))))
        dual.append(rho * np.sqrt(((z - before) ** 2).sum((1, 2))))
        x = np.asarray(
            admm.reconstruction_step(y, jnp.asarray(z), jnp.asarray(u), operator, rho)[0]
        )
    answer = lasso(y, operator, rho=rho, lam=lam, eta=eta, num_iterations=6, trace=True)
    np.testing.assert_allclose(answer.x, z, rtol=0, atol=1e-10)
    np.testing.assert_allclose(answer.trace["primal"], primal, rtol=0, atol=1e-9)
    np.testing.assert_allclose(answer.trace["dual"], dual, rtol=0, atol=1e-9)


def test_zero_start_is_the_ridge_solution(x64: None) -> None:
    operator = build()
    y, _ = random_state(operator)
    matrix = dense(operator)
    normal = matrix.T @ matrix + 0.3 * np.eye(matrix.shape[1])
    start = admm.zero_start(y, operator, 0.3)
    expected = np.linalg.solve(normal, (flat(y) @ matrix).T).T
    np.testing.assert_allclose(flat(start.x), expected, rtol=0, atol=1e-9)
    assert not start.z.any()
    assert not start.u.any()


def test_row02_zero_frame_gives_a_zero_map_and_finite_gradients() -> None:
    operator = build()

    def total(y: jax.Array, rho: jax.Array) -> jax.Array:
        return admm.admm_lasso(y, operator, rho=rho, num_iterations=5).x.sum()

    zero = jnp.zeros((1, 5, 6))
    assert not lasso(zero, operator, num_iterations=5).x.any()
    for slope in quick_jit(jax.grad(total, (0, 1)))(zero, jnp.array(0.1)):
        assert jnp.isfinite(slope).all()


def test_row05_frames_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"operator's shape \(5, 6\), got \(2, 6, 5\)"):
        admm.admm_lasso(jnp.zeros((2, 6, 5)), build())


def test_row07_whole_counts_give_the_answer_of_the_same_floats() -> None:
    operator = build()
    y = jnp.round(jnp.maximum(scenes(operator), 0)).astype(jnp.uint8)
    whole = lasso(y, operator, num_iterations=5).x
    np.testing.assert_array_equal(whole, lasso(y.astype(jnp.float32), operator, num_iterations=5).x)


def test_default_unroll_is_full_on_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert admm.default_unroll() is True
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert admm.default_unroll() == 1
    assert admm.default_unroll() is not True
