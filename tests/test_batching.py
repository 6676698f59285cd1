"""Blocks: pieces of one shape, on as many cores as there are."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax import batching
from dscsnet_jax.batching import (
    frames_per_block,
    in_blocks,
    put_rows,
    take_rows,
    windows_per_block,
)


@pytest.fixture(params=[1, 3], autouse=True)
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(batching, "_cores", lambda: request.param)
    return request.param


@jax.jit
def _double(a: jax.Array, b: jax.Array) -> jax.Array:
    return 2 * a + b


def test_rows_keep_their_order_and_the_filling_is_cut_off() -> None:
    a = np.arange(23.0, dtype=np.float32)
    np.testing.assert_array_equal(in_blocks(_double, a, np.float32(1), size=4), 2 * a + 1)


def test_no_rows_give_no_rows() -> None:
    empty = in_blocks(_double, np.zeros((0, 3), np.float32), np.float32(1), size=4)
    assert empty.shape == (0, 3)


def test_settings_of_the_callers_thread_hold_in_every_block(x64: None) -> None:
    a = np.full(9, 1 + 2.0**-40)
    got = in_blocks(lambda a: jnp.asarray(a) - 1, a, size=2)
    np.testing.assert_array_equal(got, np.full(9, 2.0**-40))
    with jax.numpy_rank_promotion("allow"):
        pairs = in_blocks(
            lambda a: a + jnp.ones((2, 1, len(a)))[:, 0, None, :].sum((0, 1)), a, size=2
        )
    np.testing.assert_array_equal(pairs, a + 2)


def test_an_error_in_a_later_block_is_the_callers() -> None:
    def picky(a: np.ndarray) -> jax.Array:
        if (a > 5).any():
            raise ValueError("more than five")
        return jnp.asarray(a)

    with pytest.raises(ValueError, match="more than five"):
        in_blocks(picky, np.arange(12.0), size=2)


def test_as_many_blocks_run_at_a_time_as_there_are_cores(cores: int) -> None:
    """The first of a function's blocks compiles alone; afterwards all run side by side."""
    together = threading.Barrier(cores)
    calls: list[bool] = []

    def meet(a: np.ndarray) -> np.ndarray:
        calls.append(True)
        if len(calls) > 1:
            together.wait(timeout=20)
        return a

    in_blocks(meet, np.arange(2.0), size=2)
    assert len(calls) == 1
    np.testing.assert_array_equal(in_blocks(meet, np.arange(6.0), size=2), np.arange(6.0))


@pytest.mark.parametrize(
    "setting", [("default_prng_impl", "rbg"), ("threefry_partitionable", False)]
)
def test_random_numbers_are_the_same_in_every_block(setting: tuple[str, object]) -> None:
    name, value = setting
    with getattr(jax, name)(value):
        drawn = in_blocks(
            lambda a: a + jax.random.normal(jax.random.key(0), (2,)), np.zeros(8), size=2
        )
    assert np.unique(drawn).size == 2


def test_rows_are_taken_from_every_array() -> None:
    tree = {"a": np.arange(4), "b": jnp.arange(8.0).reshape(4, 2)}
    taken = take_rows(tree, np.array([3, 1, 1]))
    assert taken["a"].tolist() == [3, 1, 1]
    assert taken["b"].tolist() == [[6, 7], [2, 3], [2, 3]]


def test_rows_are_put_back_where_they_were_taken() -> None:
    tree = {"a": np.arange(4), "b": np.arange(8.0).reshape(4, 2)}
    index = np.array([3, 1])
    changed = put_rows(tree, index, jax.tree.map(np.negative, take_rows(tree, index)))
    assert changed["a"].tolist() == [0, -1, 2, -3]
    assert changed["b"].tolist() == [[0, 1], [-2, -3], [4, 5], [-6, -7]]
    assert tree["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("backend", "frames", "windows"), [("cpu", [16, 4, 1, 1], 32), ("gpu", [256, 256, 64, 4], 1024)]
)
def test_blocks_of_frames_hold_so_many_pixels(
    monkeypatch: pytest.MonkeyPatch, backend: str, frames: list[int], windows: int
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert [frames_per_block((side, side)) for side in (11, 31, 256, 1024)] == frames
    assert windows_per_block() == windows
