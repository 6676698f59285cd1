"""Network: its configuration, its parameters, and what every ablation switch does."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.targets import from_lists
from dscsnet_jax.unfolding.admm import Unfolded, admm_lasso
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig, num_parameters

SMALL: dict[str, Any] = {"iterations": 2, "channels": 8, "attention_channels": 4}
# Without attention and history: what most switches are compared on.
PLAIN: dict[str, Any] = {**SMALL, "threshold": "scalar", "history": False}

# Each program runs once or twice, so compiling fast matters more than running fast.
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


@cache
def structure(config: NetworkConfig) -> Any:
    """Shapes of the parameters, without the cost of drawing them."""
    operator = build(7, division=config.division, psf=0.5)
    return jax.eval_shape(DSCSNet(config).init, jax.random.key(0), operator)


def parameters(config: dict[str, Any], seed: int = 0) -> Any:
    """Random parameters of the network's structure: no leaf at a special value."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [entry.key for entry in path]
        noise = rng.normal(size=shape.shape)
        if names[-1] == "kernel":
            return np.asarray(noise / np.sqrt(np.prod(shape.shape[1:-1])), np.float32)
        centre = next((CENTRES[name] for name in names if name in CENTRES), 0.0)
        return np.asarray(centre + 0.1 * noise, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, structure(NetworkConfig(**config)))


@cache
def frames() -> np.ndarray:
    """A frame with two targets and one with three, whole counts."""
    tables = [
        [(2.9, 3.1, 240.0), (3.3, 3.5, 225.0)],
        [(2.8, 2.7, 230.0), (3.4, 2.8, 245.0), (3.0, 3.5, 221.0)],
    ]
    return np.round(np.asarray(render(from_lists(tables), frame_size=7, psf=0.5), np.float32))


@cache
def program(config: NetworkConfig, trace: bool) -> Callable[..., Unfolded]:
    """`apply` of a network with these switches, compiled once for each shape of frame."""
    return quick_jit(partial(DSCSNet(config).apply, unroll=1, trace=trace))


def run(config: dict[str, Any], params: Any, y: np.ndarray, trace: bool = False) -> Unfolded:
    """The answer of a network with these switches, as NumPy."""
    switches = NetworkConfig(**config)
    operator = build(y.shape[-1], division=switches.division, psf=0.5)
    return jax.tree.map(np.asarray, program(switches, trace)(params, y, operator))


# --- configuration --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("auxiliary", "l0", "auxiliary must be one of l1, l2, got 'l0'"),
        ("threshold", "none", "threshold must be one of attention, convolutional, scalar"),
        ("multiplier", "on", "multiplier must be one of learned, fixed, off, got 'on'"),
        ("x_step", "cg", "x_step must be one of exact, gradient, got 'cg'"),
        ("transform_resolution", "fine", "transform_resolution must be one of pixel, subpixel"),
        ("normalise", "batch", "normalise must be one of fixed, frame, got 'batch'"),
        ("iterations", 0, "iterations must be at least 1, got 0"),
        ("channels", 0, "channels must be at least 1, got 0"),
        ("division", 0, "division must be at least 1, got 0"),
        ("attention_channels", 0, "attention_channels must be at least 1, got 0"),
        ("attention_heads", 0, "attention_heads must be at least 1, got 0"),
        ("attention_heads", 5, "attention_channels 24 must be a multiple of attention_heads 5"),
        ("attention_radius", -1, "attention_radius must be at least 0, got -1"),
        ("intensity_scale", 0.0, "intensity_scale must be positive, got 0.0"),
        ("intensity_scale", float("nan"), "intensity_scale must be positive, got nan"),
    ],
)
def test_invalid_values_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**{field: value})


# --- parameters -----------------------------------------------------------------------


def expected_count(config: NetworkConfig) -> int:
    """Number of parameters, counted on paper."""
    c2, width, fine = config.division**2, config.channels, config.transform_resolution != "pixel"

    def conv(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + outputs

    inputs = (4 if fine else 2 * c2 + 2) + (config.normalise == "frame")
    block = conv(inputs, width) + 2 * conv(width, width)
    block += conv(width, 1 if fine else c2)
    features, mixed = width * c2 if fine else width, config.attention_channels
    side = 2 * config.attention_radius + 1
    block += {
        "attention": (features + c2 + 1) * 3 * mixed
        + (mixed + 1) * features
        + config.attention_heads * side**2,
        "convolutional": conv(features + c2, features),
        "scalar": 1,
    }[config.threshold]
    scalars = 2 + (config.multiplier == "learned") + (config.x_step == "gradient")
    history = config.iterations if config.history else 0
    return 1 + (1 if config.tied else config.iterations) * (block + scalars + history)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"iterations": 3, "channels": 16, "division": 5},
        {"threshold": "convolutional", "history": False},
        {"threshold": "scalar", "multiplier": "off", "x_step": "gradient"},
        {"multiplier": "fixed", "tied": True, "auxiliary": "l2"},
        {"transform_resolution": "subpixel", "channels": 8},
        {"transform_resolution": "subpixel", "channels": 8, "threshold": "convolutional"},
        {"attention_heads": 3, "attention_radius": 1},
        {"normalise": "frame"},
        {"normalise": "frame", "transform_resolution": "subpixel", "channels": 8},
    ],
    ids=str,
)
def test_parameter_count(changes: dict[str, Any]) -> None:
    config = NetworkConfig(**changes)
    assert num_parameters(structure(config)) == expected_count(config)


def test_default_parameter_count() -> None:
    """4 x (8688 + 20784 + 20784 + 3897 + 5425 + 3 + 4) + 1 for the start."""
    assert num_parameters(structure(NetworkConfig())) == 238_341


def test_init_starts_as_classical_admm_with_a_small_correction() -> None:
    # One cell a pixel and four channels: nearly all kernels have one shape to compile.
    config = NetworkConfig(division=1, channels=4, threshold="scalar", iterations=3)
    network, operator = DSCSNet(config), build(5, division=1, psf=0.5)
    params = network.init(jax.random.key(7), operator)
    start = jax.tree.map(jax.nn.softplus, {**params["iterations"]["scalars"], **params["start"]})
    for name, value in {"rho": 0.1, "lam": 0.002, "eta": 1.0}.items():
        np.testing.assert_allclose(start[name], value, rtol=1e-5)
    assert not params["iterations"]["history"].any()
    kernels = {
        name: np.asarray(layer["kernel"])
        for name, layer in params["iterations"]["block"].items()
        if "kernel" in layer
    }
    for kernel in kernels.values():  # iterations and channels are drawn independently
        assert len(np.unique(kernel)) == kernel.size
    fan_in = 9 * 4
    assert kernels["readout"].std() < 0.15 / np.sqrt(fan_in) < 0.5 * kernels["analysis"].std()
    again = network.init(jax.random.key(7), operator)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = network.init(jax.random.key(8), operator)
    assert (kernels["embed"] != other["iterations"]["block"]["embed"]["kernel"]).all()


# --- without its learned correction the network is the classical iteration --------------


def without_correction(params: Any) -> Any:
    """The same parameters with the transform's last layer at zero."""
    block = params["iterations"]["block"]
    silent = {**block, "readout": jax.tree.map(np.zeros_like, block["readout"])}
    return {**params, "iterations": {**params["iterations"], "block": silent}}


def classical(config: NetworkConfig, params: Any, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """All `x` and `z` of the ADMM of method.md, with dense matrices in NumPy."""
    operator = build(y.shape[-1], division=config.division, psf=0.5)
    phi = np.asarray(operator.matrix())

    def value(raw: jax.Array) -> np.ndarray:
        return np.log1p(np.exp(np.asarray(raw)))

    def minimise(target: np.ndarray, rho: float) -> np.ndarray:
        normal = phi.T @ phi + rho * np.eye(phi.shape[1])
        return np.linalg.solve(normal, phi.T @ b + rho * target)

    b = y.reshape(len(y), -1).T / config.intensity_scale
    scalars = {name: value(raw) for name, raw in params["iterations"]["scalars"].items()}
    z = u = np.zeros((phi.shape[1], len(y)))
    x = minimise(z, float(value(params["start"]["rho"])))
    xs, zs = [], []
    for k in range(config.iterations):
        rho, lam = scalars["rho"][k], scalars["lam"][k]
        eta = {"learned": scalars.get("eta", [0] * 9)[k], "fixed": 1, "off": 0}[config.multiplier]
        v = x + u
        z = np.maximum(v - lam / rho if config.auxiliary == "l1" else rho * v / (rho + lam), 0)
        u = u + eta * (x - z)
        if config.x_step == "exact":
            x = minimise(z - u, rho)
        else:
            x = x - scalars["step"][k] * (phi.T @ (phi @ x - b) + rho * (x - z + u))
        xs.append(x.T.reshape(len(y), *operator.map_shape) * config.intensity_scale)
        zs.append(z.T.reshape(len(y), *operator.map_shape) * config.intensity_scale)
    return np.stack(xs), np.stack(zs)


@pytest.mark.parametrize(
    "changes",
    [
        {"iterations": 4},
        {"auxiliary": "l2", "multiplier": "off"},
        {"x_step": "gradient", "multiplier": "fixed", "division": 2},
    ],
    ids=str,
)
def test_without_correction_the_iterates_are_the_classical_ones(
    x64: None, changes: dict[str, Any]
) -> None:
    config = {**PLAIN, **changes}
    params = jax.tree.map(lambda p: p.astype(float), without_correction(parameters(config)))
    y = frames().astype(float)
    answer = run(config, params, y, trace=True)
    xs, zs = classical(NetworkConfig(**config), params, y)
    np.testing.assert_allclose(answer.trace["x"], xs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(answer.trace["z"], zs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(answer.x, xs[-1], rtol=0, atol=1e-9)


def test_without_correction_z_is_that_of_admm_lasso(x64: None) -> None:
    config, rho, lam, eta = {**PLAIN, "tied": True, "iterations": 3}, 0.3, 0.004, 0.7
    params = without_correction(parameters(config))
    raw = {"rho": rho, "lam": lam, "eta": eta}
    for name, value in raw.items():
        params["iterations"]["scalars"][name] = np.array([softplus_inverse(value)])
    params["start"]["rho"] = np.array(softplus_inverse(rho))
    y = frames().astype(float)
    answer = run(config, params, y, trace=True)
    lasso = quick_jit(partial(admm_lasso, num_iterations=3))
    operator = build(7, division=3, psf=0.5)
    expected = lasso(y, operator, rho=rho, lam=lam * 250.0, eta=eta).x
    np.testing.assert_allclose(answer.trace["z"][-1], expected, rtol=0, atol=1e-10)


# --- the ablation switches --------------------------------------------------------------


def overlay(own: Any, shared: Any) -> Any:
    """`own`, with the leaves of `shared` wherever name and shape agree."""
    known = dict(jax.tree_util.tree_leaves_with_path(shared))

    def pick(path: Any, leaf: jax.Array) -> jax.Array:
        other = known.get(path)
        return other if other is not None and other.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(pick, own)


SWITCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (PLAIN, {"auxiliary": "l2"}),
    (PLAIN, {"history": True}),
    (PLAIN, {"multiplier": "fixed"}),
    (PLAIN, {"multiplier": "off"}),
    (PLAIN, {"x_step": "gradient"}),
    (PLAIN, {"nonneg": False}),
    (PLAIN, {"channels": 12}),
    (PLAIN, {"normalise": "frame"}),
    (PLAIN, {"transform_resolution": "subpixel"}),
    (PLAIN, {"threshold": "convolutional"}),
    (PLAIN, {"threshold": "attention"}),
    ({**PLAIN, "threshold": "convolutional"}, {"threshold": "attention"}),
    ({**PLAIN, "threshold": "attention"}, {"attention_radius": 1}),
    ({**PLAIN, "threshold": "attention"}, {"attention_heads": 2}),
]


@pytest.mark.parametrize(("base", "switch"), SWITCHES, ids=str)
def test_switch_changes_the_answer(base: dict[str, Any], switch: dict[str, Any]) -> None:
    before = run(base, parameters(base), frames()).x
    params = overlay(parameters({**base, **switch}, seed=1), parameters(base))
    after = run({**base, **switch}, params, frames()).x
    assert np.isfinite(after).all()
    # Counts, where rounding stays below 1e-3.
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize(("division", "cells"), [(1, 7), (5, 35)])
def test_division_sets_the_cells_of_the_answer(division: int, cells: int) -> None:
    config = {**PLAIN, "division": division}
    x = run(config, parameters(config), frames()).x
    assert x.shape == (2, cells, cells)
    assert np.isfinite(x).all()


def test_more_iterations_go_on_from_fewer() -> None:
    config = {**PLAIN, "iterations": 3}
    params = parameters(config)
    long = run(config, params, frames(), trace=True)
    first = {**params, "iterations": jax.tree.map(lambda p: p[:2], params["iterations"])}
    short = run({**config, "iterations": 2}, first, frames(), trace=True)
    np.testing.assert_allclose(short.x, long.trace["x"][1], rtol=0, atol=1e-4)
    assert np.abs(short.x - long.x).max() > 0.1
    np.testing.assert_array_equal(long.trace["x"][-1], long.x)
    assert long.trace["x"].shape == long.trace["z"].shape == (3, 2, 21, 21)
    assert long.trace["symmetry"].shape == (3, 2)
    assert run(config, params, frames()).trace is None


def test_tied_parameters_serve_every_iteration() -> None:
    params = parameters({**PLAIN, "tied": True})
    tied = run({**PLAIN, "tied": True}, params, frames()).x
    repeated = jax.tree.map(lambda p: np.repeat(p, 2, 0), params["iterations"])
    untied = run(PLAIN, {**params, "iterations": repeated}, frames()).x
    np.testing.assert_allclose(tied, untied, rtol=0, atol=1e-4)
    assert np.abs(tied - run(PLAIN, parameters(PLAIN), frames()).x).max() > 0.1


@pytest.mark.parametrize(("multiplier", "eta"), [("fixed", 1.0), ("off", 0.0)])
def test_multiplier_is_a_learned_one_of_this_step(multiplier: str, eta: float) -> None:
    params = parameters(PLAIN)
    raw = softplus_inverse(eta) if eta else -np.inf
    params["iterations"]["scalars"]["eta"] = np.full(2, raw, np.float32)
    learned = run(PLAIN, params, frames()).x
    del params["iterations"]["scalars"]["eta"]
    given = run({**PLAIN, "multiplier": multiplier}, params, frames()).x
    np.testing.assert_allclose(learned, given, rtol=0, atol=1e-4)


def test_history_looks_back_only() -> None:
    config = {**PLAIN, "history": True, "iterations": 3}
    params = parameters(config)

    def answer(change: np.ndarray) -> np.ndarray:
        logits = params["iterations"]["history"] + change.astype(np.float32)
        changed = {**params["iterations"], "history": logits}
        return run(config, {**params, "iterations": changed}, frames()).x

    still = answer(np.zeros((3, 3)))
    np.testing.assert_array_equal(answer(np.triu(np.full((3, 3), 9.0), 1)), still)
    for k, j in ((1, 0), (2, 0), (2, 1), (2, 2)):
        change = np.zeros((3, 3))
        change[k, j] = 1.0
        assert np.abs(answer(change) - still).max() > 1e-3


def test_symmetry_is_the_error_of_the_inner_inverse() -> None:
    """With F's and G's inner layers the identity, `H'(H(e)) = e`; an offset b gives b^2."""
    params = parameters({**PLAIN, "iterations": 1})
    block = params["iterations"]["block"]
    identity = np.zeros((1, 3, 3, 8, 8), np.float32)
    identity[:, 1, 1] = np.eye(8)
    block["embed"]["bias"] = np.full(
        (1, 8), 50.0, np.float32
    )  # above zero: the rectifier does nothing
    for name, offset in (("analysis", 0.0), ("synthesis", 0.5)):
        block[name] = {"kernel": identity, "bias": np.full((1, 8), offset, np.float32)}
    answer = run({**PLAIN, "iterations": 1}, params, frames(), trace=True)
    np.testing.assert_allclose(answer.trace["symmetry"], 0.25, rtol=1e-5)


@pytest.mark.parametrize("resolution", ["pixel", "subpixel"])
def test_answer_moves_with_a_target_by_whole_pixels(resolution: str) -> None:
    """On frames of several attention blocks, away from the border."""
    config = {**SMALL, "iterations": 1, "transform_resolution": resolution}
    side, margin = 24, 9
    tables = [[(11.3 + d, 11.8 - d, 240.0), (11.8 + d, 11.9 - d, 230.0)] for d in (0, 1)]
    y = render(from_lists(tables), frame_size=side, psf=0.5)
    still, moved = run(config, parameters(config), np.asarray(y)).x
    inner = slice(3 * margin, 3 * (side - margin))
    back = np.roll(moved, (-3, 3), (0, 1))
    np.testing.assert_allclose(back[inner, inner], still[inner, inner], rtol=0, atol=1e-3)
    assert np.abs(moved - still).max() > 10


def test_answer_scales_with_the_frames_through_intensity_scale() -> None:
    wide = {**PLAIN, "intensity_scale": 1000.0}
    params = parameters(PLAIN)
    four = run(wide, params, 4 * frames()).x
    np.testing.assert_allclose(four, 4 * run(PLAIN, params, frames()).x, rtol=0, atol=1e-3)


# --- frames normalised one by one -------------------------------------------------------

FRAMEWISE: dict[str, Any] = {**PLAIN, "normalise": "frame"}


@cache
def with_noise(config: NetworkConfig) -> Callable[..., jax.Array]:
    """`(params, y, noise) -> x`, compiled once a network."""
    network = DSCSNet(config)

    def answer(params: Any, y: jax.Array, noise: jax.Array) -> jax.Array:
        operator = sensing_operator(7, division=3, psf=0.5)
        return network.apply(params, y, operator, noise=noise, unroll=1).x

    return quick_jit(answer)


def run_with_noise(config: dict[str, Any], params: Any, y: Any, noise: list[float]) -> np.ndarray:
    return np.asarray(
        with_noise(NetworkConfig(**config))(params, np.asarray(y, np.float32), np.float32(noise))
    )


@pytest.mark.parametrize("factor", [0.013, 3.7, 270.0])
def test_framewise_answer_scales_with_frame_and_noise(factor: float) -> None:
    params = parameters(FRAMEWISE)
    noise = np.array([2.0, 150.0])  # below and above a third of the peak
    still = run_with_noise(FRAMEWISE, params, frames(), noise)
    scaled = run_with_noise(FRAMEWISE, params, factor * frames(), factor * noise)
    np.testing.assert_allclose(scaled / factor, still, rtol=0, atol=1e-5 * np.abs(still).max())
    assert np.abs(still).max() > 20
    # Powers of two change no digit, whatever else is in the batch.
    by_frame = np.array([4.0, 0.125])[:, None, None]
    exact = run_with_noise(FRAMEWISE, params, by_frame * frames(), by_frame[:, 0, 0] * noise)
    np.testing.assert_array_equal(exact, by_frame.astype(np.float32) * still)


def test_framewise_scale_is_the_peak_or_three_times_the_noise() -> None:
    network, fixed = DSCSNet(NetworkConfig(**FRAMEWISE)), DSCSNet(NetworkConfig(**PLAIN))
    y = jnp.stack([jnp.zeros((4, 4)).at[1, 2].set(90.0), jnp.full((4, 4), -5.0)])
    assert network.scale(y).tolist() == [90.0, 1.0]
    assert network.scale(y, jnp.array([29.0, 4.0])).tolist() == [90.0, 12.0]
    assert network.scale(y, jnp.array([31.0, 0.0])).tolist() == [93.0, 1.0]
    assert fixed.scale(y, jnp.array([31.0, 4.0])).tolist() == [250.0, 250.0]


@pytest.mark.parametrize(("noise", "times"), [(2.0, 1), (300.0, 3)])
def test_framewise_network_deaf_to_noise_is_the_fixed_one_at_its_scale(
    noise: float, times: int
) -> None:
    """With the last input's weights at zero, each frame alone sees `intensity_scale` = peak."""
    params = parameters(FRAMEWISE)
    embed = params["iterations"]["block"]["embed"]
    deaf = embed["kernel"].copy()
    deaf[..., -1, :] = 0
    embed["kernel"] = deaf
    both = run_with_noise(FRAMEWISE, params, frames(), [noise, noise])
    embed["kernel"] = deaf[..., :-1, :]
    for y, x in zip(frames(), both, strict=True):
        scale = float(y.max()) if times == 1 else 3 * noise
        alone = run({**PLAIN, "intensity_scale": scale}, params, y[None]).x[0]
        np.testing.assert_allclose(x, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_noise_changes_the_framewise_answer_frame_by_frame() -> None:
    params = parameters(FRAMEWISE)
    low, high, one = (
        run_with_noise(FRAMEWISE, params, frames(), noise)
        for noise in ([2.0, 2.0], [20.0, 20.0], [20.0, 2.0])
    )
    assert (np.abs(high - low).max((1, 2)) > 0.1).all()
    np.testing.assert_array_equal(one[0], high[0])
    np.testing.assert_array_equal(one[1], low[1])
    # Noise below a thousandth of the peak is none.
    none = run_with_noise(FRAMEWISE, params, frames(), [0.0, 0.0])
    np.testing.assert_array_equal(run_with_noise(FRAMEWISE, params, frames(), [0.1, 0.1]), none)
    np.testing.assert_allclose(run(FRAMEWISE, params, frames()).x, none, rtol=0, atol=1e-4)


def test_fixed_network_ignores_the_noise() -> None:
    params = parameters(PLAIN)
    quiet, loud = (
        run_with_noise(PLAIN, params, frames(), noise) for noise in ([0.0, 0.0], [2.0, 90.0])
    )
    np.testing.assert_array_equal(quiet, loud)
    assert quiet.any()


@cache
def framewise_slope() -> Callable[..., Any]:
    """Gradient of the answer's energy by the parameters and the frames."""
    network = DSCSNet(NetworkConfig(**FRAMEWISE))

    def energy(params: Any, y: jax.Array, noise: jax.Array) -> jax.Array:
        operator = sensing_operator(7, division=3, psf=0.5)
        return (network.apply(params, y, operator, noise=noise, unroll=1).x ** 2).sum()

    return quick_jit(jax.grad(energy, argnums=(0, 1)))


@pytest.mark.parametrize("level", [0.0, -7.0])
@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_row02_framewise_answer_to_frames_without_a_peak_is_finite(
    level: float, noise: float
) -> None:
    """Zeros, and frames that lie below their subtracted background; gradients as well."""
    y = np.full((2, 7, 7), level, np.float32)
    assert np.isfinite(run_with_noise(FRAMEWISE, parameters(FRAMEWISE), y, [noise] * 2)).all()
    gradient = framewise_slope()(parameters(FRAMEWISE), y, np.full(2, noise, np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_row07_whole_counts_give_the_answer_of_the_same_floats() -> None:
    config = {**PLAIN, "history": True}
    params = parameters(config)
    whole = run(config, params, frames().astype(np.uint16)).x
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, run(config, params, frames()).x, rtol=0, atol=1e-4)


def test_remat_and_unroll_change_neither_answer_nor_gradient(x64: None) -> None:
    config = {**PLAIN, "history": True}
    network, operator = DSCSNet(NetworkConfig(**config)), build(7, division=3, psf=0.5)
    params = jax.tree.map(lambda p: p.astype(float), parameters(config))
    y = frames().astype(float)

    def outcome(**options: Any) -> tuple[jax.Array, Any]:
        def loss(p: Any, y: jax.Array, operator: SensingOperator) -> jax.Array:
            return ((network.apply(p, y, operator, **options).x / 250 - 1) ** 2).sum()

        return quick_jit(jax.value_and_grad(loss))(params, y, operator)

    value, slope = outcome(unroll=1)
    other, gradient = outcome(unroll=True, remat=True)
    np.testing.assert_allclose(other, value, rtol=1e-12)
    close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)
    jax.tree.map(close, gradient, slope)


def test_num_parameters_counts_scalars_too() -> None:
    assert num_parameters({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(()), jnp.zeros(4)]}) == 11


def test_config_is_immutable_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetworkConfig().channels = 3  # type: ignore[misc]
    assert hash(NetworkConfig()) == hash(NetworkConfig(channels=48))
