"""Blocks: pieces of one shape, on as many cores as there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.estimation import blocks
from dscsnet_jax.estimation.blocks import in_blocks


@pytest.fixture(params=[1, 3], autouse=True)
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "_cores", lambda: request.param)
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
