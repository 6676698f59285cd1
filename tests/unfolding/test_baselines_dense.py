"""LISTA, LIHT, LAMP, TiLISTA and SRCNN against their published blocks and classical methods.

Each `<method>_block.npz` holds one block of the published network: its weights, an input
and its own output. Vectors are columns there and rows here.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding.baselines import dense
from dscsnet_jax.unfolding.baselines.lamp import lamp_block
from dscsnet_jax.unfolding.baselines.liht import hard_threshold, liht_block
from dscsnet_jax.unfolding.baselines.lista import lista_block
from dscsnet_jax.unfolding.baselines.srcnn import enlarge
from dscsnet_jax.unfolding.baselines.tilista import selective_threshold, tilista_block
from dscsnet_jax.unfolding.network import num_parameters
from dscsnet_jax.unfolding.registry import Network, make_network

DENSE = ("lista", "liht", "lamp", "tilista")
SIDE, K = 5, 3
dense_methods = pytest.mark.parametrize("name", DENSE)

# Each program runs a few times, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
build = quick_jit(sensing_operator, static_argnames=("frame_size", "division"))


@cache
def operator() -> SensingOperator:
    """The operator of most tests."""
    return build(SIDE, division=3, psf=0.5)


@cache
def frames() -> np.ndarray:
    tables = [[(1.8, 2.1, 240.0), (2.3, 1.7, 225.0)], [(2.1, 2.4, 230.0)]]
    return np.asarray(render(from_lists(tables), frame_size=SIDE, psf=0.5))


def small(name: str, **fields: Any) -> Network:
    return make_network(name, frame_size=SIDE, iterations=K, **fields)


@cache
def untrained(network: Network) -> Any:
    return quick_jit(network.init)(jax.random.key(0), operator())


@cache
def program(network: Network) -> Callable[..., Any]:
    return quick_jit(partial(network.apply, unroll=1, trace=True))


@cache
def slopes_of(network: Network) -> Any:
    """Gradient of the untrained network's mean squared answer by the parameters."""

    def loss(params: Any, y: jax.Array, op: SensingOperator) -> jax.Array:
        return (network.apply(params, y, op, unroll=1).x ** 2).mean()

    slopes = quick_jit(jax.grad(loss))(untrained(network), frames(), operator())
    return jax.tree.map(np.asarray, slopes["iterations"])


def run(network: Network, params: Any) -> Any:
    return jax.tree.map(np.asarray, program(network)(params, frames(), operator()))


def with_leaf(params: Any, name: str, value: Any) -> Any:
    """The parameters with one leaf of all iterations set."""
    leaves = params["iterations"]
    return {"iterations": leaves | {name: np.full_like(leaves[name], value)}}


# --- the published blocks -----------------------------------------------------------------


lista, lamp = quick_jit(lista_block), quick_jit(lamp_block)
liht = quick_jit(liht_block, static_argnames="ramp")
tilista = quick_jit(tilista_block, static_argnames="compat")


def published(data_dir: Path, name: str) -> dict[str, np.ndarray]:
    """A fixture with vectors as rows; weights keep their axes, one-column ones are vectors."""
    found = np.load(data_dir / "baselines" / f"{name}_block.npz")
    turn = ("x", "y", "v", "x_out", "v_out")
    return {key: found[key].T if key in turn else found[key].squeeze() for key in found.files}


def test_lista_block_equals_the_published_one(data_dir: Path) -> None:
    f = published(data_dir, "lista")
    p = {"W": f["w.Ws"], "B": f["w.Bs"], "theta": f["w.soft_thr"]}
    x = lista(p, f["x"], f["y"])
    np.testing.assert_allclose(x, f["x_out"], rtol=0, atol=1e-5)


def test_liht_block_equals_the_published_one_with_compat_only(data_dir: Path) -> None:
    f = published(data_dir, "liht")
    p = {"W": f["w.W"], "B": f["w.B"], "theta": f["w.theta"]}
    x = liht(p, f["x"], f["y"])
    np.testing.assert_allclose(x, f["x_out"], rtol=0, atol=1e-5)
    ramped = liht(p, f["x"], f["y"], ramp=0.2)
    assert np.abs(ramped - f["x_out"]).max() > 0.01
    # The ramp lies below the threshold, so what the step keeps is kept as it is.
    kept = f["x_out"] != 0
    np.testing.assert_allclose(ramped[kept], f["x_out"][kept], rtol=0, atol=1e-5)


def test_lamp_block_equals_the_published_one(data_dir: Path) -> None:
    f = published(data_dir, "lamp")
    r = f["y"] - f["x"] @ f["phi"].T
    x, v = lamp({"B": f["w.B"], "lam": f["w.lam"]}, f["x"], f["v"], r)
    np.testing.assert_allclose(x, f["x_out"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(v, f["v_out"], rtol=0, atol=1e-5)


def test_tilista_block_equals_the_published_one(data_dir: Path) -> None:
    f = published(data_dir, "tilista")
    p = {"W": f["w.W"], "alpha": f["w.alpha"], "theta": f["w.theta"]}
    r = f["y"] - f["x"] @ f["phi"].T
    for compat in (False, True):  # they differ for negative thresholds only
        x = tilista(p, f["x"], r, f["percent"], compat=compat)
        np.testing.assert_allclose(x, f["x_out"], rtol=0, atol=1e-5)


def test_published_selection_is_made_frame_by_frame(data_dir: Path) -> None:
    f = published(data_dir, "tilista")
    p = {"W": f["w.W"], "alpha": f["w.alpha"], "theta": f["w.theta"]}
    r = f["y"] - f["x"] @ f["phi"].T
    for i in range(len(r)):
        x = tilista(p, f["x"][i : i + 1], r[i : i + 1], f["percent"])
        np.testing.assert_allclose(x[0], f["x_out"][i], rtol=0, atol=1e-5)


# --- untrained networks are the classical methods, written down plainly -------------------


def phi_of(op: SensingOperator) -> np.ndarray:
    """`Phi` column by column, from its action on one cell at a time."""
    cells = np.eye(int(np.prod(op.map_shape)), dtype=np.float32).reshape(-1, *op.map_shape)
    return np.asarray(quick_jit(SensingOperator.apply)(op, cells)).reshape(len(cells), -1).T


def soft(v: np.ndarray, theta: Any) -> np.ndarray:
    return np.sign(v) * np.maximum(np.abs(v) - theta, 0)


def ista(phi: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float, L: float) -> list[np.ndarray]:
    answers = []
    for _ in range(K):
        x = soft(x + phi.T @ (y - phi @ x) / L, lam / L)
        answers.append(x)
    return answers


def iht(phi: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float, L: float) -> list[np.ndarray]:
    """With the ramp: a line from (0.8 theta, 0) to (theta, theta)."""
    answers, theta = [], np.sqrt(2 * lam / L)
    for _ in range(K):
        x = x + phi.T @ (y - phi @ x) / L
        x = np.sign(x) * np.where(
            np.abs(x) < theta, np.interp(np.abs(x), [0.8 * theta, theta], [0, theta]), np.abs(x)
        )
        answers.append(x)
    return answers


def amp(phi: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float, L: float) -> list[np.ndarray]:
    answers, v = [], np.zeros_like(y)
    for _ in range(K):
        v = y - phi @ x + np.count_nonzero(x) / len(y) * v
        x = soft(x + phi.T @ v / L, lam * np.sqrt((v**2).mean()))
        answers.append(x)
    return answers


def selective_ista(
    phi: np.ndarray, y: np.ndarray, x: np.ndarray, lam: float, L: float
) -> list[np.ndarray]:
    answers = []
    for k in range(K):
        z = x + phi.T @ (y - phi @ x) / L
        share = min((k + 1) * 4.0, 9.0)
        chosen = np.abs(z) > max(lam / L, np.percentile(np.abs(z), 100 - share))
        x = np.where(chosen, z, soft(z, lam / L))
        answers.append(x)
    return answers


CLASSICAL: dict[str, tuple[Callable[..., list[np.ndarray]], dict[str, Any]]] = {
    "lista": (ista, {"lam": 40.0}),
    "liht": (iht, {"lam": 400.0}),
    "lamp": (amp, {}),
    "tilista": (selective_ista, {"lam": 40.0, "percent": 4.0, "percent_max": 9.0}),
}


@dense_methods
def test_untrained_network_is_the_classical_method(name: str) -> None:
    method, fields = CLASSICAL[name]
    network = small(name, **fields)
    answer = run(network, untrained(network))
    phi = phi_of(operator())
    L = np.linalg.norm(phi, 2) ** 2
    for i, y in enumerate(frames().reshape(len(frames()), -1).astype(float)):
        start = phi.T @ np.linalg.solve(phi @ phi.T + 0.1 * np.eye(len(y)), y)
        lam = fields.get("lam", 0.4)  # counts; LIHT's counts squared; LAMP's has no unit
        for k, x in enumerate(method(phi, y, start, lam, L)):
            assert 0 < np.count_nonzero(x) < x.size  # the threshold does something
            trace = answer.trace["x"][k, i].ravel()
            np.testing.assert_allclose(trace, x, rtol=0, atol=1e-4 * x.max())
    assert answer.trace["x"].shape == (K, len(frames()), 3 * SIDE, 3 * SIDE)
    np.testing.assert_array_equal(answer.trace["x"][-1], answer.x)


def test_vectors_run_row_by_row() -> None:
    op = build((3, 4), division=2, psf=np.array([0.5, 0.7], np.float32))
    phi = np.asarray(quick_jit(type(op).matrix)(op))
    np.testing.assert_allclose(phi, phi_of(op), rtol=0, atol=1e-6)
    x = np.random.default_rng(0).normal(size=(2, *op.map_shape)).astype(np.float32)
    vectors = dense.as_vectors(x)
    np.testing.assert_array_equal(vectors[:, 8:16], x[:, 1])  # the second of 6 rows of 8 cells
    np.testing.assert_array_equal(dense.as_maps(vectors, op), x)


# --- numbers of parameters ----------------------------------------------------------------

N, H = 11 * 11, 33 * 33
SIZES = {
    "lista": 16 * (H * H + H * N + H),  # 21.1 million, as published
    "liht": 16 * (H * H + H * N + H),  # 21.1 million
    "lamp": 16 * (H * N + H),  # 2.1 million
    "tilista": 16 * (H * N + H + 1),  # 2.1 million
    "srcnn": 64 * (9 * 9 + 1) + 32 * (64 + 1) + (32 * 5 * 5 + 1),  # the paper's 8,032 + biases
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters_on_the_benchmark(name: str) -> None:
    make = partial(sensing_operator, 11, division=3, psf=0.5)
    shapes = jax.eval_shape(make_network(name).init, jax.random.key(0), jax.eval_shape(make))
    assert num_parameters(shapes) == SIZES[name]


# --- thresholds and switches --------------------------------------------------------------


def test_hard_threshold_with_a_ramp_has_no_jump_and_moves_its_threshold() -> None:
    v = np.linspace(-2, 2, 4001, dtype=np.float32)
    hard = quick_jit(hard_threshold, static_argnames="ramp")
    step, ramped = (np.asarray(hard(v, np.ones(1, np.float32), ramp=s)) for s in (0.0, 0.5))
    assert np.abs(np.diff(step)).max() > 0.99
    assert np.abs(np.diff(ramped)).max() < 0.0021  # a slope of 2
    outside = (np.abs(v) < 0.5) | (np.abs(v) > 1)
    np.testing.assert_array_equal(ramped[outside], step[outside])

    @partial(quick_jit, static_argnames="ramp")
    def slope(theta: float, ramp: float) -> jax.Array:
        return jax.grad(lambda t: hard_threshold(jnp.float32(0.8), t, ramp))(theta)

    assert float(slope(1.0, ramp=0.5)) == pytest.approx(-1)  # -(1 - s) / s
    assert float(slope(1.0, ramp=0.0)) == 0


def test_liht_compat_changes_the_answer_and_stops_the_thresholds_gradient() -> None:
    ramped, step = (small("liht", lam=400.0, compat=compat) for compat in (False, True))
    change = run(step, untrained(step)).x - run(ramped, untrained(ramped)).x
    assert np.abs(change).max() > 0.1
    assert slopes_of(ramped)["theta"].any(1).all()
    assert not slopes_of(step)["theta"].any()
    assert slopes_of(step)["W"].any((1, 2)).all()


def test_tilista_compat_lets_negative_thresholds_enlarge() -> None:
    answers = {}
    for compat in (False, True):
        network = small("tilista", compat=compat)
        for theta in (-0.01, 0.0):
            answers[compat, theta] = run(network, with_leaf(untrained(network), "theta", theta)).x
    np.testing.assert_array_equal(answers[False, -0.01], answers[False, 0.0])
    np.testing.assert_array_equal(answers[True, 0.0], answers[False, 0.0])
    assert np.abs(answers[True, -0.01] - answers[False, -0.01]).max() > 1


@pytest.mark.parametrize(("name", "leaf"), [("lista", "theta"), ("liht", "theta"), ("lamp", "lam")])
def test_negative_thresholds_count_as_zero(name: str, leaf: str) -> None:
    network = small(name, **CLASSICAL[name][1])
    params = untrained(network)
    below, zero = (run(network, with_leaf(params, leaf, value)).x for value in (-0.5, 0.0))
    np.testing.assert_array_equal(below, zero)
    assert np.abs(run(network, params).x - zero).max() > 1


def test_selection_spares_the_largest_of_each_frame() -> None:
    v = np.random.default_rng(1).normal(size=(2, 200)) * [[1.0], [30.0]]
    select = quick_jit(selective_threshold)
    theta = np.full((1, 200), 0.5, np.float32)
    spared = np.asarray(select(v.astype(np.float32), theta, 10.0)) == v.astype(np.float32)
    assert spared.sum(1).tolist() == [20, 20]
    for frame, mask in zip(np.abs(v), spared, strict=True):
        assert frame[mask].min() > frame[~mask].max()
    # What is below its threshold is never spared, however few are above.
    assert not np.asarray(select(v.astype(np.float32), theta + 100, 10.0)).any()


def test_tied_tilista_has_one_matrix_that_all_iterations_move() -> None:
    tied, free = small("tilista", tied=True), small("tilista")
    one, many = untrained(tied), untrained(free)
    assert one["iterations"]["W"].shape == (1, 9 * SIDE**2, SIDE**2)
    assert one["iterations"]["theta"].shape == (K, 9 * SIDE**2)
    np.testing.assert_array_equal(run(tied, one).x, run(free, many).x)
    shared, parts = slopes_of(tied)["W"], slopes_of(free)["W"]
    atol = 1e-5 * np.abs(shared).max()
    np.testing.assert_allclose(shared[0], parts.sum(0), rtol=0, atol=atol)


# --- SRCNN --------------------------------------------------------------------------------


enlarged = quick_jit(enlarge, static_argnames="division")


@pytest.mark.parametrize("division", [2, 3])
def test_enlarged_frames_are_sampled_at_the_centres_of_cells(division: int) -> None:
    rows, cols = 3.0, -2.0
    y = rows * np.arange(8.0)[:, None] + cols * np.arange(9.0)[None]
    u = np.asarray(enlarged(y[None].astype(np.float32), division=division))[0]
    expected = (
        rows * np.asarray(grid.cell_centres(8, division))[:, None]
        + cols * np.asarray(grid.cell_centres(9, division))[None]
    )
    inner = (slice(2 * division, -2 * division),) * 2
    np.testing.assert_allclose(u[inner], expected[inner], rtol=0, atol=1e-4)


def correlate(u: np.ndarray, layer: Any) -> np.ndarray:
    """(rows, cols, in) -> (rows, cols, out), kernel by kernel."""
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    out = [
        sum(
            scipy.signal.correlate2d(u[..., i], kernel[..., i, o], mode="same")
            for i in range(u.shape[-1])
        )
        for o in range(len(bias))
    ]
    return np.stack(out, -1) + bias[None, None]


@pytest.mark.parametrize("middle", [1, 5])
def test_srcnn_is_three_convolutions_of_the_enlarged_frame(middle: int) -> None:
    network = make_network("srcnn", channels=4, middle_kernel=middle, intensity_scale=200.0)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda a: (a + 0.1 * rng.normal(size=a.shape)).astype(a.dtype), untrained(network)
    )
    answer = run(network, params)
    for i, u in enumerate(np.asarray(enlarged(frames(), division=3)) / 200):
        features = np.maximum(correlate(u[..., None], params["extract"]), 0)
        features = np.maximum(correlate(features, params["map"]), 0)
        expected = 200 * correlate(features, params["rebuild"])[..., 0]
        np.testing.assert_allclose(answer.x[i], expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(answer.trace["x"], answer.x[None])


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        *((name, {"frame_size": 0}, "frame_size must be at least 1, got 0") for name in DENSE),
        ("lista", {"iterations": 0}, "iterations must be at least 1, got 0"),
        ("lista", {"division": 0}, "division must be at least 1, got 0"),
        ("lamp", {"lam": -1.0}, "lam must be at least 0, got -1.0"),
        ("lamp", {"intensity_scale": 0.0}, "intensity_scale must be positive, got 0.0"),
        ("liht", {"ramp": 0.0}, r"ramp must be in \(0, 1\], got 0.0"),
        ("liht", {"ramp": 1.5}, r"ramp must be in \(0, 1\], got 1.5"),
        ("tilista", {"percent": -1.0}, "percent must be in 0 .. 100, got -1.0"),
        ("tilista", {"percent_max": 101.0}, "percent_max must be in 0 .. 100, got 101.0"),
        ("srcnn", {"channels": 1}, "channels must be at least 2, got 1"),
        ("srcnn", {"channels": 5}, "channels must be even, got 5"),
        ("srcnn", {"middle_kernel": 2}, "middle_kernel must be odd, got 2"),
        ("srcnn", {"division": 0}, "division must be at least 1, got 0"),
        ("srcnn", {"intensity_scale": -1.0}, "intensity_scale must be positive, got -1.0"),
    ],
)
def test_values_that_make_no_network_are_refused(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_network(name, **fields)
