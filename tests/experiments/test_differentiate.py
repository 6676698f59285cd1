"""Differentiating through the solver: each example's derivative against an independent value."""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding.admm import admm_lasso
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig
from dscsnet_jax.unfolding.solvers import solve_lasso

PLACE = Path(__file__).parents[2] / "experiments" / "differentiate"
# Attention takes long to compile, and its derivatives are tested with the network.
SMALL = NetworkConfig(iterations=3, channels=4, threshold="scalar")
CENTRES = {"rho": -2.3, "lam": -6.2, "eta": 0.5, "theta": -4.0}  # of raw parameters; others 0

# Each program runs a few times, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def example(name: str) -> ModuleType:
    """The script, under a name of its own: one of them is called as a module of Python's."""
    spec = importlib.util.spec_from_file_location(f"differentiate_{name}", PLACE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


psf_gradient, sensitivity, lambda_grid, hessian_vector, trace = map(
    example, ("psf_gradient", "sensitivity", "lambda_grid", "hessian_vector", "trace")
)


NETWORK = DSCSNet(SMALL)


@cache
def geometry() -> tuple[int, int, float]:
    """Side, division and width that all examples share."""
    found = {(m.SIDE, m.DIVISION, m.SIGMA) for m in (psf_gradient, lambda_grid, trace)}
    (shared,) = found | {(hessian_vector.SIDE, hessian_vector.DIVISION, hessian_vector.SIGMA)}
    return shared


@cache
def operator() -> SensingOperator:
    """The examples' operator in float64."""
    side, division, sigma = geometry()
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        build = quick_jit(lambda s: sensing_operator(side, division=division, psf=s))
        return jax.tree.map(np.asarray, build(sigma))


@cache
def parameters() -> Any:
    """Random parameters of `NETWORK` in float64, none at a special value."""
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return CENTRES.get(path[-1].key, 0.0) + 0.2 * rng.normal(size=shape.shape)

    structure = jax.eval_shape(NETWORK.init, jax.random.key(0), operator())
    return jax.tree_util.tree_map_with_path(leaf, structure)


# --- the width of the PSF ---------------------------------------------------------------


def differences(value_and_slope: Callable, at: float, step: float) -> float:
    high, low = (float(value_and_slope(at + d)[0]) for d in (step, -step))
    return (high - low) / (2 * step)


def small_network() -> Callable[[jax.Array, SensingOperator], jax.Array]:
    params = parameters()
    return lambda y, operator: NETWORK.apply(params, y, operator, unroll=1).x


@pytest.mark.parametrize("method", ["lasso", "network"])
def test_slope_by_sigma_is_that_of_differences(x64: None, method: str) -> None:
    first, second = psf_gradient.exposures(3)
    run = psf_gradient.lasso if method == "lasso" else small_network()
    loss = partial(psf_gradient.prediction_loss, first=first, second=second, method=run)
    both = quick_jit(jax.value_and_grad(loss))
    slope = float(both(0.55)[1])
    assert abs(slope) > 1
    np.testing.assert_allclose(slope, differences(both, 0.55, 1e-5), rtol=1e-3)


def test_sigma_is_calibrated_from_unlabelled_frames(x64: None) -> None:
    y, _ = psf_gradient.exposures(8, seed=1)
    guess = 1.1 * psf_gradient.SIGMA
    start = quick_jit(psf_gradient.starts)(y, guess)
    loss = partial(psf_gradient.evidence_loss, y=y, start=start)
    both = quick_jit(jax.value_and_grad(loss))
    np.testing.assert_allclose(both(guess)[1], differences(both, guess, 1e-5), rtol=1e-5)
    found = psf_gradient.calibrate(lambda s: both(s)[1], guess)
    assert abs(found / psf_gradient.SIGMA - 1) < 0.01
    # The optimum, and no other root of the slope.
    assert all(both(found + d)[0] > both(found)[0] for d in (-0.02, 0.02))


# --- sensitivity ------------------------------------------------------------------------


def test_sensitivity_gives_the_covariance_and_foretells_a_bad_pixel(x64: None) -> None:
    start = from_lists([sensitivity.PAIR])
    clean = render(start, frame_size=sensitivity.SIDE, psf=sensitivity.SIGMA)[0]
    measure = quick_jit(sensitivity.sensitivity)
    s, fit = measure(clean, start)
    covariance = np.asarray(fit.covariance[0])
    scale = np.sqrt(np.diagonal(covariance))
    scale = scale[:, None] * scale
    propagated = sensitivity.propagated(s) / scale
    np.testing.assert_allclose(propagated, covariance / scale, rtol=0, atol=1e-6)
    assert abs((covariance / scale)[0, 3]) > 0.05  # the two targets are not independent
    step = 0.01

    def refitted(by: float) -> jax.Array:
        targets = measure(clean.at[2, 3].add(by), start)[1].targets
        return jnp.append(targets.position[0], targets.intensity[0][:, None], axis=-1).ravel()

    moved = (refitted(step) - refitted(-step)) / (2 * step)
    np.testing.assert_allclose(s[:, 2, 3], moved, rtol=1e-3, atol=1e-6)


def test_perturbed_parameters_leave_the_special_values(x64: None) -> None:
    start = {"bias": np.zeros(50, np.float32), "kernel": np.ones((5, 5), np.float32)}
    moved = hessian_vector.perturbed(start)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(moved))
    assert (moved["bias"] != 0).all()
    np.testing.assert_allclose(moved["kernel"].mean(), 1, atol=0.1)


# --- grids of hyper-parameters ----------------------------------------------------------


def test_lasso_path_in_one_program_is_that_of_single_solves(x64: None) -> None:
    y = lambda_grid.frames()[1:3]
    lams = jnp.array([5.0, 20.0, 50.0, 1e4])
    path = quick_jit(lambda_grid.lasso_path)(lams, y, operator())
    assert path.x.shape == (4, 2, *operator().map_shape)
    assert path.converged.all()
    cells = lambda_grid.sparsity(path.x)
    assert (cells[0] > cells[2]).all()
    np.testing.assert_array_equal(cells[3], 0)  # above the largest correlation nothing is left
    assert (np.diff(path.objective, axis=0) > 0).all()
    single = quick_jit(lambda lam: solve_lasso(y, operator(), lam=lam))
    for k in (0, 2):
        alone = single(lams[k])
        np.testing.assert_allclose(path.objective[k], alone.objective, rtol=1e-9)
        np.testing.assert_allclose(path.x[k], alone.x, atol=1e-5)


def test_score_of_a_map_of_the_true_cells_counts_cell_centres() -> None:
    truth = from_lists([[(2.0, 3.0, 240.0)], [(4.0 + 1 / 3, 2.0, 230.0)]])
    side = lambda_grid.SIDE * lambda_grid.DIVISION
    x = jnp.zeros((2, side, side)).at[0, 7, 10].set(240.0).at[1, 14, 7].set(230.0)
    assert lambda_grid.score(x, truth) == 100
    assert lambda_grid.score(jnp.roll(x, 1, axis=-1), truth) == 0


def test_multiplier_path_is_that_of_single_runs_and_needs_the_multiplier(x64: None) -> None:
    y, etas = lambda_grid.frames()[:2], jnp.array([0.0, 1.0])
    path = partial(lambda_grid.multiplier_path, num_iterations=50)
    maps = quick_jit(path)(etas, y, operator(), 10.0)
    single = quick_jit(partial(admm_lasso, num_iterations=50))
    alone = single(y, operator(), lam=10.0, eta=1.0).x
    np.testing.assert_allclose(maps[1], alone, atol=1e-8)
    assert maps[1].max() > 50
    np.testing.assert_array_equal(maps[0], 0)  # the threshold lam / rho is 100 counts


# --- Hessian-vector products ------------------------------------------------------------


def test_hessian_vector_product_is_that_of_differences_and_remat_saves_memory(x64: None) -> None:
    _, y, truth = hessian_vector.problem()
    params = parameters()
    vector = hessian_vector.direction(params)
    loss = partial(hessian_vector.map_loss, network=NETWORK, operator=operator(), y=y, truth=truth)
    spared, plain = partial(loss, remat=True), partial(loss, remat=False)
    products = [
        quick_jit(partial(hessian_vector.hessian_vector, loss)).lower(params, vector).compile()
        for loss in (spared, plain)
    ]
    slope = quick_jit(jax.grad(plain))
    expected = hessian_vector.by_differences(
        lambda p: jax.device_get(slope(p)), params, vector, 1e-5
    )
    for product in products:
        assert hessian_vector.distance(jax.device_get(product(params, vector)), expected) < 1e-5
    memory = [hessian_vector.temporary_bytes(product) for product in products]
    assert memory[0] < 0.9 * memory[1]


def test_distance_is_relative_to_the_second() -> None:
    a, b = {"p": jnp.array([3.0, 0.0]), "q": jnp.array(4.0)}, {"p": jnp.zeros(2), "q": jnp.ones(())}
    np.testing.assert_allclose(hessian_vector.distance(a, b), 18**0.5, rtol=1e-6)


# --- traces -----------------------------------------------------------------------------


def test_traces_of_admm_and_solver_are_of_their_iterates_and_reach_the_solution(
    x64: None,
) -> None:
    lam, length = trace.LAM, 60
    y = quick_jit(partial(render, frame_size=trace.SIDE, psf=trace.SIGMA))(from_lists(trace.SCENES))
    optimum = quick_jit(partial(solve_lasso, lam=lam, tolerance=1e-8, max_iterations=50_000))(
        y, operator()
    )
    args = (y, operator(), lam, optimum.x)
    alternating = quick_jit(partial(trace.trace_admm, num_iterations=length))(*args)
    unfolded = quick_jit(partial(admm_lasso, lam=lam, rho=0.1, eta=1.6, num_iterations=length))
    z = np.asarray(unfolded(y, operator()).x)
    residual = np.asarray(operator().apply(z)) - np.asarray(y)
    objective = (residual**2).sum((1, 2)) / 2 + lam * np.abs(z).sum((1, 2))
    away = np.sqrt(((z - optimum.x) ** 2).sum((1, 2)) / (optimum.x**2).sum((1, 2)))
    np.testing.assert_allclose(alternating.objective[-1], objective, rtol=1e-9)
    np.testing.assert_array_equal(alternating.sparsity[-1], (z > 0).sum((1, 2)))
    np.testing.assert_allclose(alternating.distance[-1], away, rtol=1e-7)
    stepping = quick_jit(partial(trace.trace_solver, num_iterations=length))(*args)
    stopped = quick_jit(partial(solve_lasso, lam=lam, tolerance=0.0))
    for k in (1, 7, length):
        alone = stopped(y, operator(), max_iterations=k)
        np.testing.assert_allclose(stepping.objective[k - 1], alone.objective, rtol=1e-9)
    best = np.asarray(optimum.objective)
    for seen in (alternating, stepping):
        assert (np.asarray(seen.objective) >= best * (1 - 1e-7)).all()
        assert (seen.distance[-1] < 0.7 * seen.distance[0]).all()
    np.testing.assert_allclose(stepping.objective[-1], best, rtol=0.05)


def test_trace_of_a_network_ends_at_its_answer(x64: None) -> None:
    params = parameters()
    y = render(from_lists(trace.SCENES), frame_size=trace.SIDE, psf=trace.SIGMA)
    goal = jnp.ones((2, *operator().map_shape))

    @quick_jit
    def both() -> tuple:
        seen = trace.trace_network(NETWORK, params, y, operator(), trace.LAM, goal)
        x = NETWORK.apply(params, y, operator()).x
        return seen, trace.measure(x, y, operator(), trace.LAM, goal)

    seen, last = both()
    assert seen.objective.shape == (SMALL.iterations, 2)
    for numbers, expected in zip(seen, last, strict=True):
        np.testing.assert_allclose(numbers[-1], expected, rtol=1e-9)
    assert (np.diff(seen.distance, axis=0) != 0).all()
