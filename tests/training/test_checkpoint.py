"""Checkpoint: what is saved comes back bit for bit, and nothing less is taken for it."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dscsnet_jax.physics.optics import SensingOperator, sensing_operator
from dscsnet_jax.physics.scene import frame_keys, get_preset
from dscsnet_jax.training.checkpoint import Checkpoints
from dscsnet_jax.training.step import TrainState, init_state, make_optimiser, make_step
from dscsnet_jax.unfolding.admm import Unfolded
from dscsnet_jax.unfolding.network import DSCSNet

OPTIMISER = make_optimiser(
    learning_rate=1e-2,
    warmup_steps=1,
    num_steps=6,
    weight_decay=1e-2,
    clip_norm=1.0,
    final_fraction=0.1,
)
BATCH = 8


pytestmark = pytest.mark.usefixtures("quick_compilation")


def state_at(step: int, seed: int = 0, width: int = 3) -> TrainState:
    """A state with awkward numbers in the parameters and in the optimiser."""
    keys = jax.random.split(jax.random.key(seed), 2)
    odd = jnp.array([-0.0, 1e-42, 3e38, 0.1, -1 / 3])
    params = {"odd": odd, "block": {"kernel": jax.random.normal(keys[0], (2, width))}}
    gradient = jax.tree.map(lambda a: jnp.linspace(0.1, seed + 1, a.size).reshape(a.shape), params)
    _, optimiser = OPTIMISER.update(gradient, OPTIMISER.init(params), params)
    return TrainState(jnp.asarray(step, jnp.int32), params, optimiser)


def assert_same_bits(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def opened() -> Iterator[Callable[[Path], Checkpoints]]:
    """Open checkpoints that are closed after the test."""
    those: list[Checkpoints] = []

    def open_one(workdir: Path) -> Checkpoints:
        those.append(Checkpoints(workdir))
        return those[-1]

    yield open_one
    for checkpoints in those:
        checkpoints.close()


Opened = Callable[[Path], Checkpoints]


def test_round_trip_is_exact_with_the_optimiser(opened: Opened, tmp_path: Path) -> None:
    saved = state_at(3)
    opened(tmp_path).save(saved)
    assert (tmp_path / "checkpoints" / "3").is_dir()
    checkpoints = opened(tmp_path)
    assert checkpoints.latest_step() == 3
    assert_same_bits(checkpoints.restore(state_at(0, seed=1)), saved)


def test_newest_two_steps_are_kept_and_the_newest_is_restored(
    opened: Opened, tmp_path: Path
) -> None:
    checkpoints = opened(tmp_path)
    for step in (3, 6, 6, 9):
        checkpoints.save(state_at(step, seed=step))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6", "9"]
    assert_same_bits(checkpoints.restore(state_at(0)), state_at(9, seed=9))


def test_nothing_to_restore_is_an_error(opened: Opened, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    assert checkpoints.latest_step() is None
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.restore(state_at(0))


@pytest.mark.parametrize(
    ("like", "named"),
    [
        (state_at(0, width=4), r"params.block.kernel is \(2, 3\) there, \(2, 4\) here"),
        (
            state_at(0)._replace(params={"odd": jnp.zeros(5)}),
            r"params.block.kernel is \(2, 3\) there, missing here",
        ),
        (
            state_at(0)._replace(
                params={**state_at(0).params, "start": {"rho": jnp.zeros(())}},
            ),
            r"params.start.rho is missing there, \(\) here",
        ),
        (
            state_at(0)._replace(optimiser=optax.sgd(0.1).init({})),
            r"optimiser.0000 is .* missing here",
        ),
    ],
    ids=["other width", "fewer leaves", "more leaves", "other optimiser"],
)
def test_another_network_or_optimiser_is_refused_by_name(
    opened: Opened, tmp_path: Path, like: TrainState, named: str
) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.save(state_at(3))
    with pytest.raises(ValueError, match=rf"checkpoints/3 is of another network.*{named}"):
        checkpoints.restore(like)


DAMAGED = """
import pathlib, sys
import jax.numpy as jnp
from dscsnet_jax.training.checkpoint import Checkpoints
from dscsnet_jax.training.step import TrainState

state = TrainState(jnp.zeros((), jnp.int32), {"a": jnp.zeros(5)}, ())
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(state)
checkpoints.save(state._replace(step=jnp.asarray(6)))
for file in pathlib.Path(sys.argv[1]).glob("checkpoints/6/default/**/d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
try:
    checkpoints.restore(state)
except ValueError as error:
    print(error)
"""


def test_row24_truncated_checkpoint_is_an_error(tmp_path: Path) -> None:
    """In a process of its own: a failed read leaves Orbax's coroutines unawaited."""
    command = [sys.executable, "-c", DAMAGED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"checkpoint {tmp_path / 'checkpoints' / '6'} cannot be read")


KILLED_SAVE = """
import os, signal, sys
import jax.numpy as jnp
from dscsnet_jax.training.checkpoint import Checkpoints
from dscsnet_jax.training.step import TrainState

def kill_at_rename(event, args):
    if event == "os.rename" and os.path.basename(args[0]).startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

def state_at(step):
    return TrainState(jnp.asarray(step, jnp.int32), {"a": jnp.full((5,), step)}, ())

checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(state_at(3))
sys.addaudithook(kill_at_rename)
checkpoints.save(state_at(6))
"""


@pytest.mark.parametrize("renamed", ["default.", "6."], ids=["arrays", "whole step"])
def test_row22_after_kill_9_in_a_save_the_step_before_restores(
    opened: Opened, tmp_path: Path, renamed: str
) -> None:
    """The process kills itself when Orbax is about to rename a part, then the whole step."""
    command = [sys.executable, "-W", "error", "-c", KILLED_SAVE, str(tmp_path), renamed]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left[0] == "3"
    assert left[1].startswith("6.")  # a temporary name
    checkpoints = opened(tmp_path)
    assert checkpoints.latest_step() == 3
    like = TrainState(jnp.asarray(0, jnp.int32), {"a": jnp.zeros((5,), jnp.int32)}, ())
    restored = checkpoints.restore(like)
    np.testing.assert_array_equal(restored.params["a"], np.full(5, 3))
    six = restored._replace(step=jnp.asarray(6, jnp.int32), params={"a": jnp.full((5,), 7)})
    checkpoints.save(six)
    assert_same_bits(opened(tmp_path).restore(like), six)


@pytest.mark.parametrize("inside", ["nothing", "half"])
def test_row22_half_written_temporary_step_is_passed_over(
    opened: Opened, tmp_path: Path, inside: str
) -> None:
    opened(tmp_path).save(state_at(3))
    folder = tmp_path / "checkpoints"
    half = folder / "6.orbax-checkpoint-tmp"
    half.mkdir()
    if inside == "half":
        shutil.copytree(folder / "3" / "default", half / "default.orbax-checkpoint-tmp")
        (half / "default.orbax-checkpoint-tmp" / "manifest.ocdbt").unlink()
    checkpoints = opened(tmp_path)
    assert checkpoints.latest_step() == 3
    assert_same_bits(checkpoints.restore(state_at(0, seed=1)), state_at(3))
    checkpoints.save(state_at(6))
    assert_same_bits(opened(tmp_path).restore(state_at(0, seed=1)), state_at(6))


def test_incomplete_step_under_its_final_name_is_an_error_not_a_silent_step_back(
    opened: Opened, tmp_path: Path
) -> None:
    """No kill leaves this (the name is given last), but a copy cut short does."""
    opened(tmp_path).save(state_at(3))
    (tmp_path / "checkpoints" / "6").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints/6 cannot be read"):
        opened(tmp_path).restore(state_at(0))


class AffineNetwork(DSCSNet):
    """Two leaves instead of a network: it compiles faster, and the rest of the step is real."""

    def apply(self, params: Any, y: jax.Array, operator: SensingOperator, **_: Any) -> Unfolded:
        return Unfolded(params["gain"] * operator.adjoint(y) + params["bias"][None])


def test_row28_three_steps_and_three_resumed_are_six(opened: Opened, tmp_path: Path) -> None:
    """Bit for bit: parameters, optimiser, and the metrics of the frames that come next."""
    preset = get_preset("csist", frame_size=5, max_targets=1)
    operator = sensing_operator(5, division=3, psf=0.5)
    params = {"gain": jnp.asarray(0.3), "bias": jnp.full((15, 15), 2.0)}
    step = jax.jit(make_step(AffineNetwork(), preset, operator, OPTIMISER))

    def train(state: TrainState, until: int) -> tuple[TrainState, list[dict[str, float]]]:
        seen = []
        for done in range(int(state.step), until):
            keys = frame_keys(5, "train", done * BATCH + jnp.arange(BATCH))
            state, metrics = step(state, keys)
            seen.append({name: float(value) for name, value in metrics.items()})
        return state, seen

    start = init_state(AffineNetwork(), operator, OPTIMISER, 5, params)
    whole, losses = train(start, 6)
    half, before = train(start, 3)
    opened(tmp_path).save(half)
    resumed, after = train(opened(tmp_path).restore(start), 6)
    assert before + after == losses
    assert len({m["loss"] for m in losses}) == 6
    assert_same_bits(resumed, whole)
    assert optax.tree.norm(jax.tree.map(lambda a, b: a - b, whole.params, half.params)) > 1e-4
