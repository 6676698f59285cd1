"""Step: against the same update written out by hand, its schedule and its data."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.scene import (
    SPLITS,
    Preset,
    Scene,
    Variation,
    frame_keys,
    get_preset,
    simulate,
)
from dscsnet_jax.training.step import (
    Step,
    TrainState,
    apply_to_scene,
    grid_truth,
    init_state,
    make_optimiser,
    make_step,
)
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig

PRESET = get_preset("csist", frame_size=5, max_targets=1)
OPERATOR = sensing_operator(5, division=3, psf=0.5)
NETWORK = DSCSNet(NetworkConfig(iterations=1, channels=4, threshold="scalar"))
SCHEDULE: dict[str, Any] = {
    "learning_rate": 2e-2,
    "warmup_steps": 4,
    "num_steps": 60,
    "weight_decay": 1e-2,
    "clip_norm": 0.5,
    "final_fraction": 0.1,
}
SEED, BATCH, WIDTH = 3, 16, 0.35
train_keys = functools.partial(frame_keys, SEED, "train")


pytestmark = pytest.mark.usefixtures("quick_compilation")


def learning_rate(step: int) -> float:
    """The schedule of `SCHEDULE` by its formula."""
    peak, warm, last = SCHEDULE["learning_rate"], SCHEDULE["warmup_steps"], SCHEDULE["num_steps"]
    if step < warm:
        return peak * step / warm
    share = min((step - warm) / (last - warm), 1.0)
    low = SCHEDULE["final_fraction"]
    return peak * (low + (1 - low) * (1 + np.cos(np.pi * share)) / 2)


def made_params(network: DSCSNet = NETWORK) -> Any:
    """Parameters in the network's shapes: random, with thresholds that let something pass."""
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), OPERATOR))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_threshold = jax.tree_util.keystr(path[-1:]) in ("['theta']", "['lam']")
        return jnp.asarray(rng.normal(-4.0 * is_threshold, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class ByHand(NamedTuple):
    """Loss and gradient of a batch, written without the training room."""

    map_error: jax.Array
    symmetry: jax.Array
    gradient: Any


@jax.jit
def by_hand(params: Any, frames: jax.Array, truth: jax.Array, weight: jax.Array) -> ByHand:
    def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        answer = NETWORK.apply(params, frames, OPERATOR, trace=True)
        error = ((answer.x - truth) / 250.0) ** 2
        map_error, symmetry = error.sum() / len(frames), answer.trace["symmetry"].mean()
        return map_error + weight * symmetry, (map_error, symmetry)

    (_, parts), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    return ByHand(*parts, gradient)


@jax.jit
def simulated(keys: jax.Array) -> tuple[Scene, jax.Array]:
    scene = simulate(PRESET, keys)
    return scene, grid_truth(scene.targets, PRESET, WIDTH)


def hand_made(params: Any, index: jax.Array, weight: float = 0.0, split: str = "train") -> ByHand:
    scene, truth = simulated(frame_keys(SEED, split, index))
    return by_hand(params, scene.frames, truth, jnp.asarray(weight))


@pytest.fixture(scope="module")
def step() -> Step:
    optimiser = make_optimiser(**SCHEDULE)
    return jax.jit(make_step(NETWORK, PRESET, OPERATOR, optimiser, truth_width=WIDTH))


def assert_trees_close(got: Any, expected: Any, rtol: float) -> None:
    """Every leaf equal within `rtol` of the largest value of that leaf."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
        )


def minus(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def norm_of(tree: Any) -> float:
    return float(
        np.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(tree)))
    )


def adamw(number: int, p: jax.Array, mean: jax.Array, second: jax.Array) -> np.ndarray:
    """Parameters after step `number` = 1, 2, ... from its moments."""
    unbiased = np.asarray(mean) / (1 - 0.9**number), np.asarray(second) / (1 - 0.999**number)
    change = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + SCHEDULE["weight_decay"] * np.asarray(p)
    return np.asarray(p) - learning_rate(number - 1) * change


def test_step_is_the_update_written_out_by_hand(step: Step) -> None:
    """Two steps of clipping and AdamW in NumPy; the first has learning rate 0."""
    params = made_params()
    state = init_state(NETWORK, OPERATOR, make_optimiser(**SCHEDULE), SEED, params)
    mean = second = jax.tree.map(lambda a: np.zeros(a.shape), params)
    for number in (1, 2):
        index = BATCH * number + jnp.arange(BATCH)
        hand = hand_made(params, index)
        state, metrics = step(state, train_keys(index))
        norm = norm_of(hand.gradient)
        np.testing.assert_allclose(metrics["loss"], hand.map_error, rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
        assert norm > SCHEDULE["clip_norm"]
        shrink = SCHEDULE["clip_norm"] / norm
        g = jax.tree.map(lambda a, shrink=shrink: np.asarray(a) * shrink, hand.gradient)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, g)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, g)
        adam = state.optimiser[1][0]
        assert_trees_close(adam.mu, mean, 2e-5)
        assert_trees_close(adam.nu, second, 4e-5)
        # From the step's own moments: Adam divides by sqrt(nu), which would blow up the
        # rounding of gradients that are near zero.
        params = jax.tree.map(functools.partial(adamw, number), params, adam.mu, adam.nu)
        assert_trees_close(state.params, params, 1e-6)
        assert int(state.step) == number
        params = state.params


def test_symmetry_term_and_remat_are_in_the_step() -> None:
    """With `remat` the iterations are recomputed, and the gradient stays the same."""
    optimiser, weight = optax.sgd(1.0), 100.0
    step = make_step(
        NETWORK,
        PRESET,
        OPERATOR,
        optimiser,
        truth_width=WIDTH,
        symmetry_weight=weight,
        remat=True,
    )
    params, index = made_params(), jnp.arange(BATCH)
    hand = hand_made(params, index, weight=weight)
    state = init_state(NETWORK, OPERATOR, optimiser, 0, params)
    state, metrics = jax.jit(step)(state, train_keys(index))
    np.testing.assert_allclose(metrics["loss"], hand.map_error + weight * hand.symmetry, rtol=1e-5)
    moved = minus(params, state.params)
    assert_trees_close(moved, hand.gradient, 1e-4)
    plain = hand_made(params, index).gradient
    assert norm_of(minus(hand.gradient, plain)) > 0.1 * norm_of(plain)


def test_frames_trained_on_are_those_of_the_train_split_and_the_given_indices(step: Step) -> None:
    """The loss is that of these very frames, and of no other split's or indices'."""
    params, index = made_params(), 1000 + jnp.arange(BATCH)
    state = init_state(NETWORK, OPERATOR, make_optimiser(**SCHEDULE), SEED, params)
    loss = float(step(state, train_keys(index))[1]["loss"])
    own = float(hand_made(params, index).map_error)
    others = [float(hand_made(params, index, split=split).map_error) for split in ("val", "test")]
    others.append(float(hand_made(params, index + 1).map_error))
    np.testing.assert_allclose(loss, own, rtol=1e-5)
    assert min(abs(loss - other) for other in others) > 1e-3 * loss


def test_row32_the_same_state_and_indices_give_the_same_bits(step: Step) -> None:
    state = init_state(NETWORK, OPERATOR, make_optimiser(**SCHEDULE), SEED, made_params())
    one, two = (step(state, train_keys(jnp.arange(BATCH))) for _ in range(2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loss_falls_over_sixty_steps(step: Step) -> None:
    state = init_state(NETWORK, OPERATOR, make_optimiser(**SCHEDULE), SEED, made_params())
    losses = []
    for number in range(SCHEDULE["num_steps"]):
        state, metrics = step(state, train_keys(BATCH * number + jnp.arange(BATCH)))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_the_first_state_compiles_the_step_that_all_others_run(step: Step) -> None:
    state = init_state(NETWORK, OPERATOR, make_optimiser(**SCHEDULE), SEED, made_params())
    after, _ = jax.eval_shape(step, state, train_keys(jnp.arange(BATCH)))
    before = [(a.shape, a.dtype, a.weak_type) for a in jax.tree.leaves(state)]
    assert before == [(a.shape, a.dtype, a.weak_type) for a in jax.tree.leaves(after)]
    weak = {"a": jnp.asarray(0.5)}
    assert weak["a"].weak_type
    assert not init_state(NETWORK, OPERATOR, optax.sgd(1.0), 0, weak).params["a"].weak_type


def test_schedule_warms_up_from_zero_to_the_peak_and_decays_to_the_final_rate() -> None:
    """Under a constant gradient Adam moves by exactly the learning rate."""
    optimiser = make_optimiser(**{**SCHEDULE, "weight_decay": 0.0})
    params, gradient = {"a": jnp.zeros(())}, {"a": jnp.asarray(0.25)}
    state, rates = optimiser.init(params), []
    update = jax.jit(optimiser.update)
    for _ in range(SCHEDULE["num_steps"] + 1):
        change, state = update(gradient, state, params)
        rates.append(-float(change["a"]))
    expected = [learning_rate(number) for number in range(SCHEDULE["num_steps"] + 1)]
    np.testing.assert_allclose(rates, expected, rtol=2e-5)
    assert rates[0] == 0.0
    np.testing.assert_allclose([rates[4], rates[60]], [2e-2, 2e-3], rtol=2e-5)


def test_gradient_is_clipped_by_its_global_norm() -> None:
    optimiser = make_optimiser(**SCHEDULE)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # norm 5, clipped to 0.5
    _, state = optimiser.update(gradient, optimiser.init(params), params)
    mean = jax.tree.map(lambda m: float(m[0]), state[1][0].mu)
    assert mean == pytest.approx({"a": 0.1 * 0.3, "b": 0.1 * 0.4}, rel=1e-6)


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    optimiser = make_optimiser(**SCHEDULE)
    params = {"a": jnp.asarray(3.0)}
    state = optimiser.init(params)
    changes = []
    for _ in range(3):
        change, state = optimiser.update({"a": jnp.asarray(0.0)}, state, params)
        changes.append(float(change["a"]))
    expected = [-learning_rate(number) * 1e-2 * 3.0 for number in range(3)]
    np.testing.assert_allclose(changes, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [0.0, WIDTH])
def test_truth_map_puts_each_target_into_its_nearest_cell_or_around_its_place(
    width: float,
) -> None:
    targets = simulated(train_keys(jnp.arange(BATCH)))[0].targets
    expected = np.zeros((BATCH, 15, 15))
    for frame, slot in zip(*np.nonzero(targets.mask), strict=True):
        cell = 3 * np.asarray(targets.position[frame, slot], np.float64) + 1
        if width == 0:
            shares = (np.arange(15) == np.round(cell)[:, None]).astype(float)
        else:
            shares = np.exp(-((np.arange(15) - cell[:, None]) ** 2) / (2 * width**2))
            shares /= shares.sum(1, keepdims=True)
        expected[frame] += float(targets.intensity[frame, slot]) * np.outer(*shares)
    np.testing.assert_allclose(grid_truth(targets, PRESET, width), expected, atol=1e-3)


# --- frames whose conditions differ ----------------------------------------------------------


def varied_step(preset: Preset) -> tuple[Step, TrainState]:
    network = DSCSNet(
        NetworkConfig(iterations=1, channels=4, threshold="scalar", normalise="frame")
    )
    optimiser = make_optimiser(**SCHEDULE)
    step = make_step(network, preset, OPERATOR, optimiser, truth_width=WIDTH)
    return jax.jit(step), init_state(network, OPERATOR, optimiser, SEED, made_params(network))


def test_training_on_varied_frames_stays_finite_and_falls() -> None:
    """A few hundred frames, among them some without targets."""
    preset = get_preset("csist_varied", frame_size=5, max_targets=1)
    step, state = varied_step(preset)
    index = jnp.arange(64)
    losses = []
    for number in range(30):
        state, metrics = step(state, train_keys(64 * (number % 6) + index))
        losses.append(float(metrics["loss"]))
        assert np.isfinite([losses[-1], float(metrics["gradient_norm"])]).all()
        assert float(metrics["gradient_norm"]) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    seen = jax.jit(functools.partial(simulate, preset))(train_keys(jnp.arange(6 * 64)))
    empty = np.asarray(seen.targets.count) == 0
    assert 5 < empty.sum() < 40


@pytest.mark.parametrize("noise", [(-1.0, 0.0), (0.0, 10.0)])
def test_batch_of_empty_frames_gives_a_finite_update(noise: tuple[float, float]) -> None:
    """Without noise a frame's peak is exactly its offset, and nothing once that is gone."""
    variation = Variation(empty=1.0, read_noise=noise, digital=0.0)
    step, state = varied_step(
        get_preset("csist_varied", frame_size=5, max_targets=1, variation=variation)
    )
    first, second = (train_keys(k * BATCH + jnp.arange(BATCH)) for k in range(2))
    after, metrics = step(step(state, first)[0], second)
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    assert float(metrics["loss"]) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    assert norm_of(minus(after.params, state.params)) > 0


def test_offset_is_subtracted_before_the_network() -> None:
    """With a known background the update is that of the frames without it."""
    bright, dark = (
        get_preset("csist_float", frame_size=5, max_targets=1, pedestal=offset)
        for offset in (40.0, 0.0)
    )
    (step, state), (plain, _) = varied_step(bright), varied_step(dark)
    keys = train_keys(jnp.arange(BATCH))
    (one, seen), (two, expected) = step(state, keys), plain(state, keys)
    np.testing.assert_allclose(seen["loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(seen["gradient_norm"], expected["gradient_norm"], rtol=1e-3)
    assert jax.tree.structure(one) == jax.tree.structure(two)


def test_parameters_and_frames_of_one_seed_share_no_key() -> None:
    """`split(key(seed))[i]` is `fold_in(key(seed), i)`, the key of a split of the data."""

    class Spy(DSCSNet):
        def init(self, key: jax.Array, operator: Any) -> Any:
            return {"drawn": jax.random.key_data(key)}

    used: list[np.ndarray] = []
    for seed in (0, 7):
        drawn = init_state(Spy(), OPERATOR, optax.sgd(1.0), seed).params["drawn"]
        children = jax.random.split(jax.random.wrap_key_data(drawn), 64)
        used += [np.asarray(jax.random.key_data(children)), np.asarray(drawn)[None]]
        base = jax.random.key(seed)
        used.append(np.asarray(jax.random.key_data(base))[None])
        for split, number in SPLITS.items():
            own = jax.random.fold_in(base, number)[None]
            frames = frame_keys(seed, split, jnp.arange(64))
            used += [np.asarray(jax.random.key_data(keys)) for keys in (own, frames)]
    together = np.concatenate(used)
    assert len(together) == 2 * (64 + 1 + 1 + 3 * 65)
    assert len(np.unique(together, axis=0)) == len(together)


def test_frames_of_varied_optics_are_each_seen_through_their_own() -> None:
    preset = get_preset("csist_varied", frame_size=7)
    scene = jax.jit(simulate, static_argnums=0)(preset, frame_keys(SEED, "train", jnp.arange(3)))
    assert len(np.unique(scene.sigma)) == 3
    assert ((scene.sigma >= 0.4) & (scene.sigma <= 1.0)).all()
    network = DSCSNet(NetworkConfig(iterations=2, channels=4, normalise="frame"))
    nominal = sensing_operator(7, division=3, psf=0.5)
    params = network.init(jax.random.key(0), nominal)
    together = apply_to_scene(network, params, scene, preset, nominal, trace=True)
    for i, sigma in enumerate(np.asarray(scene.sigma)):
        own = sensing_operator(7, division=3, psf=sigma)
        y, noise = (scene.frames - scene.level[:, None, None])[i, None], scene.noise[i, None]
        alone = network.apply(params, y, own, noise=noise, trace=True)
        scale = float(jnp.abs(alone.x).max())
        np.testing.assert_allclose(together.x[i], alone.x[0], atol=1e-4 * scale)
        np.testing.assert_allclose(
            together.trace["z"][:, i], alone.trace["z"][:, 0], atol=1e-4 * scale
        )
