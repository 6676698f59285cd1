"""Convolutional baselines: one block against the published one's answers, then the whole."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding.baselines import (
    PUBLISHED,
    conv,
    convolution,
    dista_net,
    fista_net,
    ista_net,
    ista_net_plus,
    published,
)
from dscsnet_jax.unfolding.network import num_parameters
from dscsnet_jax.unfolding.registry import make_network, network_names

every_method = pytest.mark.parametrize("name", PUBLISHED)
SIDE, SCALE = 4, 250.0
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
State = dict[str, np.ndarray]


@cache
def operator(side: int = SIDE, division: int = 3) -> SensingOperator:
    make = quick_jit(sensing_operator, static_argnames=("frame_size", "division"))
    return make(side, division=division, psf=0.5)


@cache
def small(name: str, **fields: Any) -> Any:
    own = {"frame_size": SIDE, "hidden": 3} if name == "dista_net" else {}
    return make_network(name, **{"iterations": 3, "channels": 4, **own, **fields})


@cache
def parameters(name: str) -> Any:
    """Parameters none of which has a special value."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.float32(a * rng.normal(1, 0.1, a.shape) + rng.normal(0, 0.01, a.shape)),
        quick_jit(small(name).init)(jax.random.key(0), operator()),
    )


@cache
def frames() -> np.ndarray:
    tables = [[(1.4, 1.6, 240.0), (1.8, 2.0, 225.0)], [(2.1, 0.9, 249.0)]]
    return np.asarray(render(from_lists(tables), frame_size=SIDE, psf=0.5), np.float32)


@cache
def program(name: str, **fields: Any) -> Callable[..., Any]:
    """`apply`, compiled fast."""
    return quick_jit(partial(small(name, **fields).apply, unroll=1))


def state_of(name: str) -> State:
    """A checkpoint of `parameters`, as PyTorch would store it."""
    layout, params = small(name).layout, parameters(name)

    def theirs(array: np.ndarray) -> np.ndarray:
        turned = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
        return np.ascontiguousarray(array.transpose(turned)) if turned else np.atleast_1d(array)

    def leaf(tree: Any, path: str) -> np.ndarray:
        for part in path.split("/"):
            tree = tree[part]
        return np.asarray(tree)

    state = {name: theirs(leaf(params, path)) for path, name in layout.outside.items()}
    for k in range(small(name).config.iterations):
        at = 0 if layout.shared else k
        block = {
            t: theirs(leaf(params["iterations"], ours)[at]) for ours, t in layout.blocks.items()
        }
        block |= {name: np.full(2, np.nan, np.float32) for name in layout.unused}
        state |= {f"fcs.{k}.{t}": a for t, a in block.items()}
        state |= {f"bb.{t}": a for t, a in block.items()} if layout.shared else {}
    return state


# --- one block of the published networks ---------------------------------------------------------


def fixture(data_dir: Path, name: str) -> tuple[dict[str, np.ndarray], State]:
    """Inputs and answers of a published block, and its weights as a checkpoint."""
    with np.load(data_dir / "baselines" / f"{name}_block.npz") as file:
        stored = dict(file)
    weights = {k.removeprefix("w."): v for k, v in stored.items() if k.startswith("w.")}
    return stored, {f"fcs.0.{k}": v for k, v in weights.items()}


def gradient_point(stored: dict[str, np.ndarray], step: float) -> np.ndarray:
    """`x - step Phi^T (Phi x - y)` with the fixture's dense matrix, as maps."""
    x, y, phi = (stored[name].astype(float) for name in ("x", "y", "phi"))
    r = x - step * (x @ phi.T - y) @ phi
    side = round(phi.shape[1] ** 0.5)
    return r.reshape(-1, side, side).astype(np.float32)


def first(params: Any) -> Any:
    """Parameters of the first iteration."""
    return jax.tree.map(lambda a: a[0], params["iterations"])


def assert_published(answer: jax.Array, stored: np.ndarray) -> None:
    error = np.abs(np.asarray(answer).reshape(stored.shape) - stored).max()
    assert error < 1e-5 * np.abs(stored).max()


@pytest.mark.parametrize(
    ("name", "cls", "block"),
    [
        ("ista_net", ista_net.IstaNet, ista_net.block),
        ("ista_net_plus", ista_net_plus.IstaNetPlus, ista_net_plus.block),
    ],
)
def test_ista_blocks_equal_the_published_ones(
    data_dir: Path, name: str, cls: Any, block: Callable[..., Any]
) -> None:
    stored, state = fixture(data_dir, name)
    network, params = cls.from_torch(state, operator(11, 1))
    assert network.config.channels == 32
    p = first(params)
    assert p["step"] == 0.5
    x, error = block(p, gradient_point(stored, 0.5))
    assert_published(x, stored["x_out"])
    assert_published(error if error.ndim == 3 else error.transpose(0, 3, 1, 2), stored["sym"])


def test_fista_block_equals_the_published_one(data_dir: Path) -> None:
    stored, state = fixture(data_dir, "fista_net")
    state |= {name.replace("fcs.0", "bb"): a for name, a in state.items()}
    state |= {name: np.zeros(1, np.float32) for name in fista_net.LAYOUT.outside.values()}
    _, params = fista_net.FistaNet.from_torch(state, operator(11))
    step, theta = (np.log1p(np.exp(stored[name].item())) for name in ("mu", "theta"))
    x, _ = fista_net.block(first(params), gradient_point(stored, step), theta)
    assert_published(x, stored["x_out"])


def test_dista_block_equals_the_published_one_at_batch_1(data_dir: Path) -> None:
    stored, state = fixture(data_dir, "dista")
    network, params = dista_net.DistaNet.from_torch(state, operator(11, 1))
    assert (network.config.channels, network.config.hidden) == (64, 256)
    r = gradient_point(stored, 0.5)
    before = stored["x"].reshape(r.shape)
    x, error = dista_net.block(first(params), before, r, branch_weight=0.7)
    assert_published(x, stored["x_out"])
    assert_published(error, stored["sym"])
    other, _ = dista_net.block(first(params), before, r, branch_weight=0.5)
    assert np.abs(other - x).max() > 1e-3


# --- all iterations ------------------------------------------------------------------------------


@cache
def block(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`(p, map before the gradient step, r) -> (x, error)`, compiled."""
    if name == "dista_net":
        return quick_jit(partial(dista_net.block, branch_weight=0.7))
    own = {"ista_net": ista_net.block, "ista_net_plus": ista_net_plus.block}[name]
    return quick_jit(lambda p, _, r: own(p, r))


def by_hand(name: str, y: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps and errors of all iterations, with the dense operator and a plain loop."""
    params, cfg = parameters(name), small(name).config
    row = np.asarray(operator().response_row[0], float)
    phi = np.kron(row, row)
    shape = (len(y), 3 * SIDE, 3 * SIDE)
    y = y.reshape(len(y), -1).astype(float)
    x = v = y @ np.linalg.solve(phi @ phi.T + 0.01 * np.eye(SIDE**2), phi)
    maps, errors = [], []
    for k in range(cfg.iterations):
        p = jax.tree.map(lambda a, k=k: a[0 if name == "fista_net" else k], params["iterations"])
        step = p.get("step")
        if name == "fista_net":
            s = {n: float(value) for n, value in params["schedule"].items()}

            def positive(what: str, at: int, s: dict[str, float] = s) -> float:
                return np.log1p(np.exp(s[f"{what}_slope"] * at + s[f"{what}_offset"]))

            step = positive("step", k)
        r = (v - step * (v @ phi.T - y) @ phi).reshape(shape).astype(np.float32)
        if name == "fista_net":
            following, error = quick_jit(fista_net.block)(p, r, positive("threshold", k))
            following = np.asarray(following, float).reshape(len(y), -1)
            rho = 1 - positive("momentum", 0) / positive("momentum", k)
            v = following + rho * (following - x)
            x = following
        else:
            before = x.reshape(shape).astype(np.float32)
            following, error = block(name)(p, before, r)
            x = v = np.asarray(following, float).reshape(len(y), -1)
        maps.append(x.reshape(shape))
        errors.append((np.asarray(error) ** 2).reshape(len(y), -1).mean(1))
    return maps, errors


@every_method
def test_network_equals_its_iterations_by_hand(name: str) -> None:
    net = small(name)
    answer = quick_jit(partial(net.apply, trace=True, unroll=1))(
        parameters(name), frames(), operator()
    )
    maps, errors = by_hand(name, frames() / SCALE)
    size = SCALE * np.abs(maps).max()
    np.testing.assert_allclose(answer.x, SCALE * maps[-1], rtol=0, atol=2e-5 * size)
    for k, (x, error) in enumerate(zip(maps, errors, strict=True)):
        np.testing.assert_allclose(answer.trace["x"][k], SCALE * x, rtol=0, atol=2e-5 * size)
        np.testing.assert_allclose(answer.trace["symmetry"][k], error, rtol=1e-3)


@every_method
def test_the_intensity_scale_is_the_unit_of_the_network(name: str) -> None:
    apply = program(name)
    twice = program(name, intensity_scale=2 * SCALE)
    x = apply(parameters(name), frames(), operator()).x
    np.testing.assert_allclose(twice(parameters(name), 2 * frames(), operator()).x, 2 * x, 1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    # Published: 0.171, 0.337 and 2.179 million; FISTA-Net's 74,599 (0.074 million) count
    # four convolutions of 32 x 32 x 9 + 32 that it never uses.
    [
        ("ista_net", 171_090),
        ("ista_net_plus", 336_978),
        ("fista_net", 74_599 - 4 * 9_248),
        ("dista_net", 2_179_104),
    ],
)
def test_default_networks_have_the_published_size(name: str, count: int) -> None:
    init = make_network(name).init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), operator(11)))
    assert num_parameters(shapes) == count


# --- the start -----------------------------------------------------------------------------------


def test_start_by_matrix_is_the_least_squares_start_at_first() -> None:
    dense = small("ista_net_plus", start="matrix")
    drawn = quick_jit(dense.init)(jax.random.key(0), operator())
    assert drawn["start"]["matrix"].shape == (SIDE, SIDE, 3 * SIDE, 3 * SIDE)
    params = {**parameters("ista_net_plus"), "start": drawn["start"]}
    x = program("ista_net_plus", start="matrix")(params, frames(), operator()).x
    other = program("ista_net_plus")(params, frames(), operator()).x
    np.testing.assert_allclose(x, other, rtol=0, atol=1e-4 * np.abs(x).max())
    doubled = {**params, "start": {"matrix": 2 * drawn["start"]["matrix"]}}
    changed = program("ista_net_plus", start="matrix")(doubled, frames(), operator()).x
    assert np.abs(changed - x).max() > 0.1 * np.abs(x).max()
    with pytest.raises(ValueError, match=r"start matrix is for frames of 4 x 4 .* have 5 x 5"):
        dense.apply(params, np.zeros((1, 5, 5), np.float32), operator(5))


def test_published_initial_matrix_is_applied_row_by_row() -> None:
    rng = np.random.default_rng(1)
    initial = rng.normal(size=((3 * SIDE) ** 2, SIDE**2))
    _, params = small("ista_net").from_torch(state_of("ista_net"), operator(), initial=initial)
    net = small("ista_net", start="matrix")
    x = net._start(params, frames(), operator())
    wanted = frames().reshape(2, -1) @ initial.T
    np.testing.assert_allclose(x, wanted.reshape(x.shape), rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match=r"initial matrix: expected shape \(144, 16\), got"):
        small("ista_net").from_torch(state_of("ista_net"), operator(), initial=initial.T)


# --- DISTA-Net's dynamic kernels -----------------------------------------------------------------


def test_each_map_is_filtered_by_its_own_kernel() -> None:
    rng = np.random.default_rng(2)
    r, kernels = (rng.normal(size=(3, *s)).astype(np.float32) for s in ((5, 7), (3, 3)))
    answer = dista_net.filtered(r, kernels)
    for one, kernel, map_ in zip(answer, kernels, r, strict=True):
        padded = np.pad(map_, 1)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        np.testing.assert_allclose(one, (windows * kernel).sum((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("x64")  # some of the gradient's sums nearly cancel
def test_compat_cuts_the_gradient_of_the_dynamic_kernels_and_nothing_else() -> None:
    params, y, phi = jax.tree.map(
        lambda a: jnp.asarray(a, float), (parameters("dista_net"), frames(), operator())
    )
    params = jax.tree.map(lambda a: a[:1], params)

    def evaluate(compat: bool) -> tuple[np.ndarray, Any]:
        network = small("dista_net", iterations=1, compat=compat)

        def loss(params: Any) -> jax.Array:
            return (network.apply(params, y, phi).x ** 2).sum()

        return quick_jit(jax.value_and_grad(loss))(params)

    (value, gradient), (same, cut) = evaluate(False), evaluate(True)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    gradient, cut = gradient["iterations"], cut["iterations"]
    for layer in ("hidden", "kernel"):
        assert all(np.any(a) for a in jax.tree.leaves(gradient.pop(layer)))
        assert not any(np.any(a) for a in jax.tree.leaves(cut.pop(layer)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), cut, gradient)


# --- convolutions --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (1, 1, 3, 2), (5, 3, 1, 2)])
def test_gradients_of_a_convolution_are_those_of_xla(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 6, 5, shape[2])).astype(np.float32)
    kernel = rng.normal(size=shape).astype(np.float32)
    slope = rng.normal(size=(2, 6, 5, shape[3])).astype(np.float32)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)

    answers = []
    for function in (plain, convolution.convolve):
        value, pull = jax.vjp(function, jnp.asarray(x), jnp.asarray(kernel))
        answers.append((value, *pull(jnp.asarray(slope))))
    for ours, xla in zip(*answers, strict=True):
        np.testing.assert_allclose(ours, xla, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (1, 1, 3, 2), (5, 3, 1, 2)])
def test_forward_mode_of_a_convolution_equals_differences(
    x64: None, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(4)
    points, tangents = (
        tuple(rng.normal(size=s) for s in ((2, 6, 5, shape[2]), shape)) for _ in range(2)
    )
    value, slope = jax.jvp(convolution.convolve, points, tangents)
    ends = [
        convolution.convolve(*(p + h * t for p, t in zip(points, tangents, strict=True)))
        for h in (-1, 1)
    ]
    # Of a bilinear function the central difference is exact at any step.
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(value, convolution.convolve(*points))


def test_forward_mode_by_the_psf_equals_differences_and_reverse_mode(x64: None) -> None:
    network, y = small("ista_net", iterations=2), frames().astype(float)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda a: 0.4 * rng.normal(size=a[:2].shape), parameters("ista_net"))
    params["iterations"] |= {"step": np.full(2, 0.1), "threshold": np.full(2, 0.01)}
    weight = rng.normal(size=(len(y), 3 * SIDE, 3 * SIDE))

    def answer(sigma: jax.Array) -> jax.Array:
        seen = sensing_operator(SIDE, division=3, psf=sigma)
        return (weight * network.apply(params, y, seen, unroll=1).x).sum()

    @quick_jit
    def slopes(sigma: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        value, forward = jax.jvp(answer, (sigma,), (jnp.ones(()),))
        return value, forward, jax.grad(answer)(sigma)

    sigma, h = 0.5, 1e-5
    _, forward, backward = slopes(sigma)
    ahead, behind = (float(slopes(sigma + d)[0]) for d in (h, -h))
    assert abs(forward) > 1
    np.testing.assert_allclose(forward, (ahead - behind) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(backward, forward, rtol=1e-10)


# --- published checkpoints -----------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("prefix", ["", "module.generator."])
def test_a_checkpoint_becomes_the_network_it_was_made_from(name: str, prefix: str) -> None:
    state = {prefix + key: array for key, array in state_of(name).items()}
    network, params = small(name).from_torch(state, operator())
    assert network == small(name, intensity_scale=1.0)
    jax.tree.map(np.testing.assert_array_equal, params, parameters(name))


@every_method
@pytest.mark.parametrize("other", PUBLISHED)
def test_a_checkpoint_of_another_method_is_refused_with_both_names(name: str, other: str) -> None:
    if name != other:
        with pytest.raises(ValueError, match=f"the checkpoint is of {other}, not of {name}$"):
            published.import_state(name, state_of(other), operator())


def test_methods_without_published_checkpoints_are_refused() -> None:
    have = (name for name in network_names() if hasattr(type(make_network(name)), "layout"))
    assert tuple(have) == PUBLISHED
    with pytest.raises(ValueError, match="dscsnet has no PyTorch checkpoints; dista_net, "):
        published.import_state("dscsnet", {}, operator())


@every_method
def test_missing_and_unknown_arrays_are_named(name: str) -> None:
    state = state_of(name)
    key = next(k for k in state if k.startswith("fcs.1."))
    del state[key]
    state["head.bias"] = np.zeros(1)
    pattern = f"not a checkpoint of {name}: it lacks {key} and has unknown head.bias$"
    with pytest.raises(ValueError, match=pattern):
        published.import_state(name, state, operator())
    with pytest.raises(ValueError, match=rf"not a checkpoint of {name}: it lacks "):
        published.import_state(name, {}, operator())


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("fcs.1.conv2_forward", np.zeros((4, 4, 5, 5)), r"shape \(4, 4, 3, 3\), got \(4, 4, 5, 5"),
        ("fcs.2.lambda_step", np.zeros(2), r"expected shape \(1,\), got \(2,\)"),
        ("fcs.1.soft_thr", np.full(1, np.nan), "expected finite real numbers"),
        ("fcs.1.soft_thr", np.ones(1, int), "expected finite real numbers"),
        ("fcs.0.conv1_forward", np.asarray(1.0), "expected an array, got a single number"),
    ],
)
def test_wrong_arrays_are_refused_by_name(key: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: .*{message}"):
        small("ista_net").from_torch({**state_of("ista_net"), key: array}, operator())


def test_row21_a_checkpoint_for_frames_of_another_size_is_refused() -> None:
    state = state_of("dista_net")
    for other, wanted in ((operator(5), "4 x 4 .* have 5 x 5"), (operator(4, 5), "2.4 .* 4 x 4")):
        with pytest.raises(ValueError, match=f"for frames of {wanted}, both of . x . cells"):
            small("dista_net").from_torch(state, other)
    # A single array of another size is no other geometry.
    state["fcs.1.w1.weight"] = np.zeros((3, 225), np.float32)
    with pytest.raises(ValueError, match=r"w1.weight: expected shape \(3, 144\), got \(3, 225\)"):
        small("dista_net").from_torch(state, operator())


def test_fista_iterations_that_differ_are_refused() -> None:
    state = state_of("fista_net")
    state["fcs.2.conv_G.bias"] = state["fcs.2.conv_G.bias"] + 1
    with pytest.raises(ValueError, match=r"fcs\.2\.conv_G\.bias differs from fcs\.0\.conv_G\.b"):
        small("fista_net").from_torch(state, operator())


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("ista_net", "iterations", 0, "iterations must be at least 1"),
        ("ista_net_plus", "channels", 0, "channels must be at least 1"),
        ("fista_net", "division", 0, "division must be at least 1"),
        ("ista_net", "start", "zero", "start must be one of least_squares, matrix, got 'zero'"),
        ("ista_net", "intensity_scale", 0.0, "intensity_scale must be positive"),
        ("dista_net", "channels", 1, "channels must be at least 2"),
        ("dista_net", "frame_size", 0, "frame_size must be at least 1"),
        ("dista_net", "hidden", 0, "hidden must be at least 1"),
        ("dista_net", "branch_weight", 1.5, r"branch_weight must be in 0\.\.1, got 1.5"),
    ],
)
def test_impossible_hyper_parameters_are_refused(
    name: str, field: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_network(name, **{field: value})


def test_least_squares_start_explains_the_frame() -> None:
    x = conv.least_squares(frames(), operator())
    np.testing.assert_allclose(operator().apply(x), frames(), rtol=0, atol=2)
