"""Spd: against NumPy in both precisions, batched or not, and singular matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.estimation.spd import cholesky, inverse, rounding_floor

SIZES = [1, 2, 4, 7, 16]

jit_inverse = jax.jit(inverse)
jit_cholesky = jax.jit(cholesky)


def correlations(size: int, *, spread: float = 3.0, batch: int = 20) -> np.ndarray:
    """Random SPD matrices (batch, size, size) of unit diagonal, condition up to 10^spread."""
    rng = np.random.default_rng(size)
    basis = np.linalg.qr(rng.normal(size=(batch, size, size)))[0]
    spectrum = 10.0 ** rng.uniform(-spread, 0, (batch, 1, size))
    matrix = (basis * spectrum) @ basis.transpose(0, 2, 1)
    scale = 1 / np.sqrt(np.diagonal(matrix, axis1=1, axis2=2))
    return matrix * scale[:, :, None] * scale[:, None, :]


@pytest.mark.parametrize("size", SIZES)
def test_inverse_and_determinant_equal_numpy(x64: None, size: int) -> None:
    matrix = correlations(size)
    got, log_determinant = jit_inverse(jnp.asarray(matrix))
    expected = np.linalg.inv(matrix)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    np.testing.assert_allclose(log_determinant, np.linalg.slogdet(matrix)[1], atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_float32_loses_no_more_digits_than_the_condition(size: int) -> None:
    matrix = correlations(size).astype(np.float32)
    got, log_determinant = jit_inverse(jnp.asarray(matrix))
    exact = matrix.astype(float)
    expected = np.linalg.inv(exact)
    # |error| <= c n eps cond |inverse| bounds elimination of SPD matrices.
    margin = 4 * size * np.finfo(np.float32).eps * np.linalg.cond(exact)
    error = np.abs(np.asarray(got, float) - expected).max((1, 2))
    assert np.all(error <= margin * np.abs(expected).max((1, 2)))
    assert np.all(np.abs(log_determinant - np.linalg.slogdet(exact)[1]) <= size * margin)


@pytest.mark.parametrize("size", SIZES)
def test_cholesky_equals_numpy(x64: None, size: int) -> None:
    matrix = correlations(size)
    got = jit_cholesky(jnp.asarray(matrix))
    np.testing.assert_allclose(got, np.linalg.cholesky(matrix), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(got, np.tril(got))


def test_one_matrix_equals_its_place_in_the_batch() -> None:
    """No batch axis, one and two of them, and `vmap`: the same numbers."""
    matrix = jnp.asarray(correlations(4).astype(np.float32))
    whole, determinants = jit_inverse(matrix)
    roots = jit_cholesky(matrix)
    one, determinant = jit_inverse(matrix[3])
    np.testing.assert_allclose(one, whole[3], rtol=1e-6)
    np.testing.assert_allclose(determinant, determinants[3], rtol=1e-6)
    np.testing.assert_allclose(jit_cholesky(matrix[3]), roots[3], atol=1e-7)
    folded = matrix.reshape(4, 5, 4, 4)
    np.testing.assert_array_equal(jit_inverse(folded)[0].reshape(whole.shape), whole)
    np.testing.assert_array_equal(jit_cholesky(folded).reshape(roots.shape), roots)
    mapped, _ = jax.jit(jax.vmap(inverse))(matrix)
    np.testing.assert_array_equal(mapped, whole)


@pytest.mark.parametrize("x64", [False, True])
def test_row13_singular_matrices_get_large_numbers_not_nan(x64: bool) -> None:
    equal = np.ones((3, 3))
    opposed = np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 1.0]])
    with jax.enable_x64(x64):
        matrix = jnp.asarray(np.stack([equal, opposed]), float)
        got, log_determinant = jit_inverse(matrix)
        root = jit_cholesky(matrix)
        large = 0.1 / rounding_floor(matrix)
    assert np.isfinite(got).all()
    assert np.isfinite(log_determinant).all()
    variance = np.diagonal(got, axis1=1, axis2=2)
    assert np.all(variance[0] > 0)
    assert variance[0].max() > large
    # The third parameter of the second stands alone and is told well.
    assert np.all(variance[1, :2] > large)
    assert variance[1, 2] == 1
    root = np.asarray(root)
    np.testing.assert_array_equal(root @ root.transpose(0, 2, 1), matrix)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_floor_follows_precision_and_size(x64: None, dtype: type) -> None:
    eps = np.finfo(dtype).eps
    assert rounding_floor(jnp.eye(7, dtype=dtype)) == pytest.approx(28 * eps)


def test_roots_of_semidefinite_matrices_rebuild_them(x64: None) -> None:
    """Rank 3 of 5: two pivots vanish within rounding and their columns are zero."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(10, 5, 3))
    factor /= np.sqrt((factor**2).sum(-1, keepdims=True))
    matrix = factor @ factor.transpose(0, 2, 1)
    root = np.asarray(jit_cholesky(jnp.asarray(matrix)))
    np.testing.assert_allclose(root @ root.transpose(0, 2, 1), matrix, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(root[:, :, 3:], 0)
