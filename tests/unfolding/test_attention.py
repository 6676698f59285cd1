"""Attention: against a plain masked softmax, and local in the strict sense."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.unfolding.attention import local_attention

# Each program runs once or twice, so compiling fast matters more than running fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ROWS, COLS, HEADS, WIDTH = 6, 9, 2, 3


def inputs(
    rows: int = ROWS, cols: int = COLS, radius: int = 2, batch: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random q, k, v and bias, float64 NumPy."""
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, batch, rows, cols, HEADS, WIDTH))
    return q, k, v, rng.normal(size=(HEADS, 2 * radius + 1, 2 * radius + 1))


@partial(quick_jit, static_argnames="block")
def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, block: int = 11) -> jax.Array:
    return local_attention(q, k, v, bias, block=block)


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Every pixel asks its neighbours, one by one."""
    out = np.zeros_like(v)
    batch, rows, cols, heads, width = q.shape
    radius = bias.shape[-1] // 2
    for b, i, j, h in np.ndindex(batch, rows, cols, heads):
        weight, mixed = 0.0, np.zeros(width)
        for m in range(max(i - radius, 0), min(i + radius + 1, rows)):
            for n in range(max(j - radius, 0), min(j + radius + 1, cols)):
                logit = q[b, i, j, h] @ k[b, m, n, h] / np.sqrt(width)
                share = np.exp(logit + bias[h, m - i + radius, n - j + radius])
                weight += share
                mixed += share * v[b, m, n, h]
        out[b, i, j, h] = mixed / weight
    return out


@pytest.mark.parametrize(("radius", "block"), [(0, 11), (1, 4), (2, 11), (2, 4), (9, 11), (3, 2)])
def test_equals_a_plain_masked_softmax(x64: None, radius: int, block: int) -> None:
    arrays = inputs(radius=radius)
    got = attend(*map(jnp.asarray, arrays), block=block)
    np.testing.assert_allclose(got, naive(*arrays), rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 5, 6, 9])
def test_answer_does_not_depend_on_the_block(x64: None, block: int) -> None:
    arrays = [jnp.asarray(a) for a in inputs()]
    np.testing.assert_allclose(attend(*arrays, block=block), attend(*arrays), rtol=0, atol=1e-13)


def test_answer_does_not_depend_on_where_the_frame_was_cut(x64: None) -> None:
    q, k, v, bias = (jnp.asarray(a) for a in inputs(rows=12, cols=13))
    whole = attend(q, k, v, bias, block=5)
    piece = attend(*(a[:, 3:, 1:-2] for a in (q, k, v)), bias)
    # What lies within the radius of a cut sees other neighbours.
    np.testing.assert_allclose(piece[:, 2:, 2:-2], whole[:, 5:, 3:-4], rtol=0, atol=1e-13)


def test_moves_with_its_input() -> None:
    q, k, v, bias = (jnp.asarray(a, jnp.float32) for a in inputs(rows=14, cols=14))
    moved = attend(*(jnp.roll(a, (3, -2), (1, 2)) for a in (q, k, v)), bias)
    still = attend(q, k, v, bias)
    inner = moved[:, 5:-2, 2:-4]  # neither wrapped round nor near a border
    np.testing.assert_allclose(inner, still[:, 2:-5, 4:-2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("block", [3, 11])
def test_pixels_beyond_the_radius_have_exactly_no_influence(block: int) -> None:
    radius, (i, j) = 2, (4, 3)
    q, k, v, bias = (jnp.asarray(a, jnp.float32) for a in inputs(rows=9, cols=8, radius=radius))

    @quick_jit
    def slopes(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        def answer(*qkv: jax.Array) -> jax.Array:
            weight = jnp.arange(1.0, 1 + HEADS * WIDTH).reshape(HEADS, WIDTH)
            return (local_attention(*qkv, bias, block=block)[0, i, j] * weight).sum()

        return jax.grad(answer, (0, 1, 2))(q, k, v)

    of_q, of_k, of_v = (np.abs(s).sum((-2, -1)) for s in slopes(q, k, v))
    row, col = np.indices((9, 8))
    near = (np.abs(row - i) <= radius) & (np.abs(col - j) <= radius)
    for slope, reach in ((of_k, near), (of_v, near), (of_q, (row == i) & (col == j))):
        assert (slope[0][reach] > 0).all()
        assert (slope[0][~reach] == 0).all()
        assert (slope[1] == 0).all()


def test_bias_is_relative_and_its_level_does_not_matter(x64: None) -> None:
    q, k, v, bias = (jnp.asarray(a) for a in inputs())
    np.testing.assert_allclose(
        attend(q, k, v, bias + 7.0), attend(q, k, v, bias), rtol=0, atol=1e-13
    )
    # A bias that leaves only the neighbour above, once for all pixels.
    only = jnp.full(bias.shape, -80.0).at[:, 1, 2].set(80.0)
    above = attend(q, k, v, only)
    np.testing.assert_allclose(above[:, 1:], v[:, :-1], rtol=0, atol=1e-13)


def test_large_logits_stay_finite() -> None:
    q, k, v, bias = (jnp.asarray(a, jnp.float32) for a in inputs())
    out = attend(1e4 * q, 1e4 * k, v, bias)
    assert jnp.isfinite(out).all()
    assert out.max() <= v.max()


def test_gradient_equals_finite_differences(x64: None) -> None:
    arrays = tuple(jnp.asarray(a) for a in inputs(rows=4, cols=5, batch=1))
    rng = np.random.default_rng(6)
    towards = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in arrays)

    @quick_jit
    def answer(*arrays: jax.Array) -> jax.Array:
        return (local_attention(*arrays, block=3) ** 2).sum()

    def along(t: float) -> float:
        return float(answer(*(a + t * d for a, d in zip(arrays, towards, strict=True))))

    _, slope = jax.jvp(answer, arrays, towards)
    np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-7)
