"""Contracts: what every learned method keeps, one table over all of them.

Every registered method is under contract by itself, as small as `SMALL` makes it; variants
of DSCSNet are named here.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig
from dscsnet_jax.unfolding.registry import (
    Network,
    default_fields,
    make_network,
    network_names,
)

SMALL: dict[str, Any] = {"iterations": 2, "channels": 8, "attention_channels": 4}
SIDE = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "dscsnet": {},
    "l2 auxiliary, no multiplier": {"auxiliary": "l2", "multiplier": "off"},
    "convolutional, fixed multiplier": {"threshold": "convolutional", "multiplier": "fixed"},
    "scalar, signed": {"threshold": "scalar", "nonneg": False},
    "gradient x-step, no history": {"x_step": "gradient", "history": False},
    "tied": {"tied": True},
    "frame by frame": {"normalise": "frame"},
    "subpixel": {"transform_resolution": "subpixel"},
    "c = 4, two heads": {"division": 4, "attention_heads": 2},
    "c = 5, scalar": {"division": 5, "threshold": "scalar"},
    "c = 7, subpixel, convolutional": {
        "division": 7,
        "transform_resolution": "subpixel",
        "threshold": "convolutional",
        "channels": 2,
    },
}
NETWORKS: dict[str, Network] = {
    name: DSCSNet(NetworkConfig(**{**SMALL, **changes})) for name, changes in VARIANTS.items()
}
# FISTA-Net's momentum is zero at first and not used at last: it acts from 3 iterations on.
LARGER: dict[str, dict[str, Any]] = {"fista_net": {"iterations": 3}}
PEERS = [name for name in network_names() if name != "dscsnet"]


def small(name: str) -> Network:
    """A registered method in its smallest useful form."""
    known = default_fields(name)
    wanted = {**SMALL, "frame_size": SIDE, **LARGER.get(name, {})}
    return make_network(name, **{k: v for k, v in wanted.items() if k in known})


NETWORKS |= {name: small(name) for name in PEERS}
# Methods with dense matrices are bound to the size of frames they are made for.
OF_ONE_SIZE = [name for name in NETWORKS if hasattr(NETWORKS[name].config, "frame_size")]
OF_ANY_SIZE = [name for name in NETWORKS if name not in OF_ONE_SIZE]
any_size = pytest.mark.parametrize("name", OF_ANY_SIZE)
every_network = pytest.mark.parametrize("name", NETWORKS)
few_networks = pytest.mark.parametrize("name", ["dscsnet", "subpixel"])

# Each program runs a few times, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
build = quick_jit(sensing_operator, static_argnames=("frame_size", "division"))


def softplus_inverse(value: float) -> float:
    return float(np.log(np.expm1(value)))


# Where the raw parameters are drawn around; zero for all others.
CENTRES = {
    "rho": softplus_inverse(0.1),
    "lam": softplus_inverse(0.002),
    "eta": softplus_inverse(0.8),
    "step": softplus_inverse(0.1),
    "theta": -4.0,
}


def operator_of(name: str, frame_size: int | tuple[int, int] = SIDE) -> SensingOperator:
    return build(frame_size, division=NETWORKS[name].config.division, psf=0.5)


def shape_of_operator(name: str, frame_size: int | tuple[int, int]) -> Any:
    """Its shapes alone, where nothing is computed."""
    division = NETWORKS[name].config.division
    make = partial(sensing_operator, frame_size, division=division, psf=0.5)
    return jax.eval_shape(make)


@cache
def structure(name: str, frame_size: int | tuple[int, int] = SIDE) -> Any:
    """Shapes of the parameters as `init` makes them on frames of this size."""
    operator = shape_of_operator(name, frame_size)
    return jax.eval_shape(NETWORKS[name].init, jax.random.key(0), operator)


@cache
def parameters(name: str) -> Any:
    """Random parameters of the network's structure: no leaf at a special value."""
    rng = np.random.default_rng(0)
    if name in PEERS:
        drawn = NETWORKS[name].init(jax.random.key(0), operator_of(name))
        return jax.tree.map(
            lambda a: np.asarray(
                a * rng.normal(1, 0.1, a.shape) + rng.normal(0, 0.01, a.shape), np.float32
            ),
            drawn,
        )

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [entry.key for entry in path]
        noise = rng.normal(size=shape.shape)
        if names[-1] == "kernel":
            return np.asarray(noise / np.sqrt(np.prod(shape.shape[1:-1])), np.float32)
        centre = next((CENTRES[n] for n in names if n in CENTRES), 0.0)
        return np.asarray(centre + 0.1 * noise, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, structure(name))


@cache
def frames() -> np.ndarray:
    """Three frames of 2, 3 and 1 targets."""
    tables = [
        [(2.4, 2.6, 240.0), (2.8, 3.0, 225.0)],
        [(2.3, 2.2, 230.0), (2.9, 2.3, 245.0), (2.5, 3.0, 221.0)],
        [(3.1, 1.9, 249.0)],
    ]
    return np.asarray(render(from_lists(tables), frame_size=SIDE, psf=0.5), np.float32)


@cache
def program(name: str) -> Callable[..., Any]:
    """Compiled `(params, y, operator) -> (maps, gradient of a loss by the parameters)`."""

    def loss(params: Any, y: jax.Array, operator: SensingOperator) -> tuple[jax.Array, jax.Array]:
        x = NETWORKS[name].apply(params, y, operator, unroll=1).x
        return ((x / 250 - 1) ** 2).mean(), x

    def both(params: Any, y: jax.Array, operator: SensingOperator) -> tuple[jax.Array, Any]:
        (_, x), gradient = jax.value_and_grad(loss, has_aux=True)(params, y, operator)
        return x, gradient

    return quick_jit(both)


def evaluate(name: str, y: np.ndarray) -> tuple[np.ndarray, Any]:
    """Maps and gradient, as NumPy."""
    answer = program(name)(parameters(name), y, operator_of(name))
    return jax.tree.map(np.asarray, answer)


def leaves(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def assert_finite(maps: np.ndarray, gradient: Any) -> None:
    assert np.isfinite(maps).all()
    for path, leaf in leaves(gradient):
        assert np.isfinite(leaf).all(), path


# --- one frame of a batch has nothing to do with the others -------------------------------


@every_network
def test_batch_gives_the_answers_of_single_frames(name: str) -> None:
    batch, _ = evaluate(name, frames())
    alone = quick_jit(partial(NETWORKS[name].apply, unroll=1))
    for i in range(len(batch)):
        x = alone(parameters(name), frames()[i : i + 1], operator_of(name)).x[0]
        # Another batch size may sum in another order: rounding of single precision.
        np.testing.assert_allclose(x, batch[i], rtol=0, atol=1e-5 * np.abs(batch[i]).max())


@every_network
def test_other_frames_do_not_matter_to_the_last_bit(name: str) -> None:
    before, _ = evaluate(name, frames())
    changed = frames().copy()
    changed[0] = 1e3 - 7 * changed[0]
    after, _ = evaluate(name, changed)
    assert (after[0] != before[0]).any()
    np.testing.assert_array_equal(after[1:], before[1:])


# --- gradients --------------------------------------------------------------------------------


@every_network
def test_gradient_reaches_every_leaf(name: str) -> None:
    maps, gradient = evaluate(name, frames())
    assert_finite(maps, gradient)
    for path, leaf in leaves(gradient):
        assert leaf.any(), path
        if leaf.ndim > 1 and "history" not in path:
            # Also every iteration's share; the first has no history to weigh.
            assert leaf.reshape(len(leaf), -1).any(1).all(), path


@every_network
def test_row02_zero_frames_are_finite_with_finite_gradients(name: str) -> None:
    assert_finite(*evaluate(name, np.zeros_like(frames())))


@every_network
def test_row03_constant_frames_are_finite_with_finite_gradients(name: str) -> None:
    for level in (1.0, 255.0):
        assert_finite(*evaluate(name, np.full_like(frames(), level)))


@pytest.mark.parametrize("name", ["dscsnet", "gradient x-step, no history"])
def test_gradient_by_the_psf_equals_finite_differences(x64: None, name: str) -> None:
    network, y = NETWORKS[name], frames().astype(float)
    params = jax.tree.map(lambda p: p.astype(float), parameters(name))
    weight = np.random.default_rng(2).normal(size=(len(y), SIDE * 3, SIDE * 3))

    @quick_jit
    def both(sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        def answer(sigma: jax.Array) -> jax.Array:
            operator = sensing_operator(SIDE, division=3, psf=sigma)
            return (weight * network.apply(params, y, operator, unroll=1).x).sum()

        return jax.value_and_grad(answer)(sigma)

    sigma, h = np.array([0.5, 0.55]), 1e-5
    _, slope = both(sigma)
    for axis in range(2):
        ahead, behind = (float(both(sigma + d * np.eye(2)[axis])[0]) for d in (h, -h))
        np.testing.assert_allclose(slope[axis], (ahead - behind) / (2 * h), rtol=1e-6)


# --- any frame size ----------------------------------------------------------------------------


@any_size
def test_weights_run_on_frames_of_any_size(name: str) -> None:
    network = NETWORKS[name]
    assert structure(name, (5, 16)) == structure(name)
    for shape in ((5, 5), (16, 16), (64, 64), (5, 16)):
        operator = shape_of_operator(name, shape)
        y = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        x = jax.eval_shape(network.apply, structure(name), y, operator).x
        assert x.shape == (2, *(side * network.config.division for side in shape))


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_row21_frames_of_another_size_are_refused(name: str) -> None:
    other = operator_of(name, 7)
    message = f"is for frames of {SIDE} x {SIDE} pixels only, the operator's have 7 x 7"
    with pytest.raises(ValueError, match=message):
        NETWORKS[name].init(jax.random.key(0), other)
    with pytest.raises(ValueError, match=message):
        NETWORKS[name].apply(parameters(name), jnp.zeros((1, 7, 7)), other)


@few_networks
def test_a_target_looks_the_same_on_frames_of_other_sizes(name: str) -> None:
    """Far from all borders the map does not know how large the frame is."""
    network, params = NETWORKS[name], parameters(name)

    def around_the_target(shape: tuple[int, int]) -> np.ndarray:
        row, col = (side // 2 for side in shape)
        y = render(from_lists([[(row + 0.2, col - 0.3, 240.0)]]), frame_size=shape, psf=0.5)
        answer = quick_jit(partial(network.apply, unroll=1))(params, y, operator_of(name, shape))
        return np.asarray(answer.x)[0, 3 * row - 3 : 3 * row + 6, 3 * col - 3 : 3 * col + 6]

    # Two iterations see 14 pixels through transform and threshold, 15 with the read pixel.
    square = around_the_target((36, 36))
    assert square.max() > 20
    np.testing.assert_allclose(around_the_target((64, 37)), square, rtol=0, atol=1e-3)


def array_sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every array a program makes, in its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


@any_size
def test_memory_grows_with_the_area_of_the_frame(name: str) -> None:
    """No array of N^4 entries, in the answer or in its gradient."""
    network = NETWORKS[name]

    def largest(side: int) -> int:
        def loss(params: Any, y: jax.Array, operator: SensingOperator) -> jax.Array:
            return network.apply(params, y, operator, unroll=1).x.sum()

        y = jax.ShapeDtypeStruct((1, side, side), jnp.float32)
        operator = shape_of_operator(name, side)
        traced = jax.make_jaxpr(jax.grad(loss))(structure(name), y, operator)
        return max(array_sizes(traced.jaxpr))

    # 22 and 66 pixels are cut into whole attention blocks, so the law is exact.
    assert largest(66) <= 9 * largest(22)
    # A dense operator alone would hold 9 x 64^4 entries.
    assert largest(64) < 64**4


# --- one program for any number of frames ------------------------------------------------------


@every_network
def test_exports_with_a_symbolic_batch_size(name: str) -> None:
    operator, noise = operator_of(name), np.linspace(0.5, 2, 5, dtype=np.float32)
    y = np.concatenate([frames(), frames()[:2] / 2])

    def maps(params: Any, y: jax.Array, noise: jax.Array) -> jax.Array:
        return NETWORKS[name].apply(params, y, operator, noise=noise, unroll=1).x

    (batch,) = jax.export.symbolic_shape("b")
    any_y, any_noise = (
        jax.ShapeDtypeStruct((batch, *a.shape[1:]), jnp.float32) for a in (y, noise)
    )
    exported = jax.export.export(jax.jit(maps))(parameters(name), any_y, any_noise)
    direct = np.asarray(quick_jit(maps)(parameters(name), y, noise))
    for size in (1, 5):
        found = quick_jit(exported.call)(parameters(name), y[:size], noise[:size])
        atol = 1e-5 * np.abs(direct).max()
        np.testing.assert_allclose(found, direct[:size], rtol=0, atol=atol)


# --- determinism ---------------------------------------------------------------------------------


@every_network
def test_row32_same_input_twice_is_bit_identical(name: str) -> None:
    first, second = evaluate(name, frames()), evaluate(name, frames().copy())
    jax.tree.map(np.testing.assert_array_equal, first, second)


@few_networks
def test_compiled_equals_not_compiled(name: str) -> None:
    compiled, _ = evaluate(name, frames())
    with jax.disable_jit():
        plain = NETWORKS[name].apply(parameters(name), frames(), operator_of(name)).x
    np.testing.assert_allclose(plain, compiled, rtol=0, atol=1e-5 * np.abs(compiled).max())


# --- refusals ------------------------------------------------------------------------------------


@every_network
def test_row05_frames_of_another_shape_are_refused(name: str) -> None:
    apply = partial(NETWORKS[name].apply, parameters(name), operator=operator_of(name))
    with pytest.raises(ValueError, match=r"operator's shape \(6, 6\), got \(2, 6, 7\)"):
        apply(np.zeros((2, 6, 7), np.float32))
    for shape in ((6, 6), (2, 6, 6, 1)):
        with pytest.raises(ValueError, match=r"must have shape \(B, N, M\), got "):
            apply(np.zeros(shape, np.float32))


@every_network
def test_row21_operator_of_another_division_is_refused(name: str) -> None:
    network = NETWORKS[name]
    own = network.config.division
    other = build(SIDE, division=2, psf=0.5)
    message = f"the network divides pixels by {own}, the operator by 2"
    with pytest.raises(ValueError, match=message):
        network.init(jax.random.key(0), other)
    with pytest.raises(ValueError, match=message):
        network.apply(parameters(name), frames(), other)
