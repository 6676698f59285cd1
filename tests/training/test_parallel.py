"""Parallel: several devices give what one gives; run on eight virtual CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dscsnet_jax.training.parallel import data_parallel

LEARNING_RATE = 1e-2

EIGHT_DEVICES = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
jax.config.update("jax_numpy_rank_promotion", sys.argv[2])
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.physics.scene import frame_keys, get_preset
from dscsnet_jax.training.checkpoint import Checkpoints
from dscsnet_jax.training.parallel import data_parallel
from dscsnet_jax.training.step import init_state, make_optimiser, make_step
from dscsnet_jax.unfolding.network import DSCSNet, NetworkConfig

preset = get_preset("csist", frame_size=5, max_targets=1)
operator = sensing_operator(5, division=3, psf=0.5)
network = DSCSNet(NetworkConfig(iterations=1, channels=4, threshold="scalar"))
optimiser = make_optimiser(
    learning_rate=1e-2, warmup_steps=1, num_steps=9,
    weight_decay=1e-2, clip_norm=1.0, final_fraction=0.1,
)
shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), operator))
traced = []

def make(axis):
    step = make_step(network, preset, operator, optimiser, axis_name=axis)
    def counted(state, keys):
        traced.append(axis)
        return step(state, keys)
    return counted

def start():
    rng = np.random.default_rng(0)
    def draw(path, leaf):
        small = jax.tree_util.keystr(path[-1:]) in ("['theta']", "['lam']")
        return jnp.asarray(rng.normal(-4.0 * small, 0.2, leaf.shape), leaf.dtype)
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return init_state(network, operator, optimiser, 0, params)

def train(step, state, until):
    seen = []
    for done in range(int(state.step), until):
        state, metrics = step(state, frame_keys(0, "train", done * 16 + jnp.arange(16)))
        seen.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return state, seen

def host(tree):
    return [np.asarray(leaf, np.float64).ravel().tolist() for leaf in jax.tree.leaves(tree)]

devices = jax.devices()
last, last_share = data_parallel(make, devices[-1:])
many, share = data_parallel(make, devices)
alone, metrics_alone = train(last, start(), 3)
spread, metrics_spread = train(many, start(), 3)
out = {
    "shares": [last_share, share],
    "devices": [sorted(d.id for d in state.step.devices()) for state in (alone, spread)],
    "params": [host(alone.params), host(spread.params), host(start().params)],
    "metrics": [metrics_alone, metrics_spread],
    "traced": {str(axis): traced.count(axis) for axis in set(traced)},
}
try:
    many(spread, frame_keys(0, "train", jnp.arange(15)))
except ValueError as error:
    out["ragged"] = str(error)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(spread)
resumed, metrics_resumed = train(last, checkpoints.restore(start()), 4)
checkpoints.save(resumed)
spread, metrics_on = train(many, spread, 4)
back, metrics_back = train(many, checkpoints.restore(start()), 5)
alone, metrics_alone = train(last, resumed, 5)
out["resumed"] = [metrics_resumed + metrics_back, metrics_on + metrics_alone]
checkpoints.close()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps of a tiny network on one of eight devices and on all eight."""
    workdir: Path = tmp_path_factory.mktemp("eight")
    flags = "--xla_force_host_platform_device_count=8"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in a third of the time
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **quick}
    ranks = jax.config.jax_numpy_rank_promotion
    command = [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, str(workdir), ranks]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_eight_devices_give_the_parameters_of_one(eight: dict[str, Any]) -> None:
    """Equal but for rounding: eight means of two frames are averaged instead of sixteen.

    The gradient's sums run in another order, so it differs by a few units in the last
    place of its largest terms, about 1e-6 of it. Adam divides by the gradient's own
    size, so each of the three steps moves a parameter by at most about the learning
    rate, and differs by that share of it where terms do not cancel.
    """
    assert eight["shares"] == [1, 8]
    assert eight["devices"] == [[7], list(range(8))]
    moved = []
    for one, many, start in zip(*eight["params"], strict=True):
        np.testing.assert_allclose(many, one, rtol=3e-7, atol=1e-4 * LEARNING_RATE)
        moved.append(np.abs(np.subtract(one, start)).max())
    assert sorted(moved)[2] > LEARNING_RATE  # but for one iteration's history and the first rho


def test_eight_devices_give_the_metrics_of_one(eight: dict[str, Any]) -> None:
    one, many = eight["metrics"]
    np.testing.assert_allclose(many, one, rtol=1e-5)
    losses = [loss for loss, _ in one]
    assert len(set(losses)) == 3
    assert min(norm for _, norm in one) > 0.1


def test_step_is_traced_once_whatever_the_layout_of_the_first_state(eight: dict[str, Any]) -> None:
    assert eight["traced"] == {"None": 1, "batch": 1}


def test_batch_that_does_not_divide_is_refused(eight: dict[str, Any]) -> None:
    assert eight["ragged"] == "a batch of 15 does not divide by 8 devices"


def test_row27_resumes_on_another_number_of_devices(eight: dict[str, Any]) -> None:
    """Saved on eight, resumed on one, saved there, resumed on eight."""
    resumed, uninterrupted = eight["resumed"]
    np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-5)


def test_no_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="no device"):
        data_parallel(lambda axis: pytest.fail("built a step"), [])
