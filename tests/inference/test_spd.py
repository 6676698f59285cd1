"""Spd: against NumPy in both precisions, batched or not, and singular matrices.

Results are judged by `c n eps cond`, the bound of elimination, not by what one CPU rounds to.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.inference import spd
from dscsnet_jax.inference.evidence import laplace, psf_information
from dscsnet_jax.inference.fit import fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import observe
from dscsnet_jax.inference.prior import preset_prior
from dscsnet_jax.inference.sampler import sample
from dscsnet_jax.inference.search import select
from dscsnet_jax.inference.tempered import tempered
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.scene import get_preset
from dscsnet_jax.physics.targets import from_lists

SIZES = [1, 2, 4, 7, 16]
PRECISIONS = [np.float32, np.float64]


def inverse(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`spd.inverse` of matrices (..., P, P), which the room has in front."""
    got, log_determinant = spd.inverse(jnp.moveaxis(matrix, (-2, -1), (0, 1)))
    return jnp.moveaxis(got, (0, 1), (-2, -1)), log_determinant


def cholesky(matrix: jax.Array) -> jax.Array:
    return jnp.moveaxis(spd.cholesky(jnp.moveaxis(matrix, (-2, -1), (0, 1))), (0, 1), (-2, -1))


def rounding_floor(matrix: jax.Array) -> float:
    return spd.rounding_floor(matrix.swapaxes(0, -1))


jit_inverse = jax.jit(inverse)
jit_cholesky = jax.jit(cholesky)


def with_unit_diagonal(matrix: np.ndarray) -> np.ndarray:
    scale = 1 / np.sqrt(np.diagonal(matrix, axis1=1, axis2=2))
    matrix = matrix * (scale[:, :, None] * scale[:, None, :])
    matrix = (matrix + matrix.swapaxes(1, 2)) / 2
    matrix[:, np.arange(len(matrix[0])), np.arange(len(matrix[0]))] = 1
    return matrix


def correlations(size: int, *, spread: float = 3.0, batch: int = 20) -> np.ndarray:
    """Random SPD matrices (batch, size, size) of unit diagonal, condition up to 10^spread."""
    rng = np.random.default_rng(size)
    basis = np.linalg.qr(rng.normal(size=(batch, size, size)))[0]
    spectrum = 10.0 ** rng.uniform(-spread, 0, (batch, 1, size))
    return with_unit_diagonal((basis * spectrum) @ basis.transpose(0, 2, 1))


def of_rank(rank: int, size: int, *, batch: int) -> np.ndarray:
    """Random matrices (batch, size, size) of unit diagonal that tell `rank` directions."""
    factor = np.random.default_rng([size, rank]).normal(size=(batch, size, rank))
    return with_unit_diagonal(factor @ factor.transpose(0, 2, 1))


def margin(matrix: np.ndarray, dtype: type) -> np.ndarray:
    """(batch,) relative error that elimination of `matrix` in `dtype` may make."""
    return 4 * matrix.shape[-1] * np.finfo(dtype).eps * np.linalg.cond(matrix)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_loses_no_more_digits_than_the_condition(x64: None, size: int, dtype: type) -> None:
    matrix = correlations(size).astype(dtype)
    got, log_determinant = jit_inverse(jnp.asarray(matrix))
    root = jit_cholesky(jnp.asarray(matrix))
    assert got.dtype == log_determinant.dtype == root.dtype == dtype
    exact = matrix.astype(float)
    allowed = margin(exact, dtype)
    expected = np.linalg.inv(exact)
    error = np.abs(got - expected).max((1, 2))
    assert np.all(error <= allowed * np.abs(expected).max((1, 2)))
    assert np.all(np.abs(log_determinant - np.linalg.slogdet(exact)[1]) <= size * allowed)
    assert np.all(np.abs(root - np.linalg.cholesky(exact)).max((1, 2)) <= allowed)
    np.testing.assert_array_equal(got, np.swapaxes(got, 1, 2))
    np.testing.assert_array_equal(root, np.tril(root))


def test_one_matrix_equals_its_place_in_the_batch() -> None:
    """No batch axis, one and two of them, and `vmap`: the same numbers but for rounding."""
    matrix = correlations(4).astype(np.float32)
    allowed = margin(matrix.astype(float), np.float32)[:, None, None]
    whole, determinants = jit_inverse(matrix)
    roots = jit_cholesky(matrix)
    largest = np.abs(whole).max((1, 2), keepdims=True)
    one, determinant = jit_inverse(matrix[3])
    assert np.all(np.abs(one - whole[3]) <= allowed[3] * largest[3])
    assert abs(determinant - determinants[3]) <= 4 * allowed[3, 0, 0]
    assert np.all(np.abs(jit_cholesky(matrix[3]) - roots[3]) <= allowed[3])
    folded = matrix.reshape(4, 5, 4, 4)
    mapped = jax.jit(jax.vmap(inverse))(matrix)[0]
    for other in (jit_inverse(folded)[0].reshape(whole.shape), mapped):
        assert np.all(np.abs(other - whole) <= allowed * largest)
    assert np.all(np.abs(jit_cholesky(folded).reshape(roots.shape) - roots) <= allowed)


@pytest.mark.parametrize("x64", [False, True])
def test_row13_singular_matrices_get_large_numbers_not_nan(x64: bool) -> None:
    equal = np.ones((3, 3))
    opposed = np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 1.0]])
    with jax.enable_x64(x64):
        matrix = jnp.asarray(np.stack([equal, opposed]), float)
        got, log_determinant = jit_inverse(matrix)
        root = jit_cholesky(matrix)
        floor = rounding_floor(matrix)
    assert np.isfinite(got).all()
    assert np.isfinite(log_determinant).all()
    variance = np.diagonal(got, axis1=1, axis2=2)
    assert np.all(variance > 0)
    assert variance[0].max() > 0.1 / floor
    # The third parameter of the second stands alone and is told well.
    assert np.all(variance[1, :2] > 0.1 / floor)
    assert variance[1, 2] == pytest.approx(1, rel=floor)
    root = np.asarray(root)
    np.testing.assert_allclose(root @ root.transpose(0, 2, 1), matrix, rtol=0, atol=floor)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", [7, 13, 19, 31, 40])
def test_row13_any_rank_gives_finite_positive_variances(x64: None, size: int, dtype: type) -> None:
    for rank in (1, 2, 3, size // 2, size - 1):
        matrix = jnp.asarray(of_rank(rank, size, batch=500), dtype)
        got, log_determinant = jit_inverse(matrix)
        assert np.isfinite(got).all()
        # `(A^-1)_ii >= 1 / A_ii` for every positive definite matrix.
        variance = np.diagonal(got, axis1=1, axis2=2)
        assert np.all(variance >= 1 - rounding_floor(matrix))
        assert np.isfinite(log_determinant).all()
        assert np.all(log_determinant < 0)
        if rank <= size // 2:
            assert np.all(variance.max(1) > 0.1 / rounding_floor(matrix))


def test_row13_what_is_no_correlation_but_for_rounding_stays_finite() -> None:
    """Symmetric noise of 1e-4: eigenvalues below zero by far more than the floor."""
    noise = np.random.default_rng(0).normal(size=(500, 30, 30)) * 1e-4
    matrix = of_rank(8, 30, batch=500) + np.tril(noise, -1) + np.tril(noise, -1).swapaxes(1, 2)
    got, log_determinant = jit_inverse(matrix.astype(np.float32))
    assert np.isfinite(got).all()
    assert np.all(np.diagonal(got, axis1=1, axis2=2) >= 1)
    assert np.isfinite(log_determinant).all()


def test_row13_chains_of_overlapping_places_stay_far_from_overflow() -> None:
    """Smooth kernels: each pivot near the floor multiplies what those before it left."""
    rng = np.random.default_rng(0)
    place = np.sort(rng.uniform(0, 1, (200, 73)), 1)
    width = 10 ** rng.uniform(-2, 1, (200, 1, 1))
    matrix = np.exp(-(((place[:, :, None] - place[:, None]) / width) ** 2)).astype(np.float32)
    variance = np.diagonal(jit_inverse(matrix)[0], axis1=1, axis2=2)
    assert np.all(variance >= 1)
    assert np.all(variance <= 2 * 73 / rounding_floor(matrix) ** 3)


@pytest.mark.parametrize("twin", [(0, 1), (0, 8), (4, 5), (7, 8)])
def test_row13_twins_take_no_digits_from_the_others(twin: tuple[int, int]) -> None:
    """Two equal parameters are undecided; the variance of the rest is that without one."""
    matrix = correlations(9, spread=1.0, batch=200)
    first, second = twin
    matrix[:, second] = matrix[:, first]
    matrix[:, :, second] = matrix[:, :, first]
    got = np.asarray(jit_inverse(matrix.astype(np.float32))[0])
    variance = np.diagonal(got, axis1=1, axis2=2)
    floor = rounding_floor(jnp.asarray(got))
    assert np.all(variance[:, twin] > 0.1 / floor)
    kept = np.delete(np.arange(9), second)
    reduced = matrix[:, kept[:, None], kept]
    expected = np.diagonal(np.linalg.inv(reduced), axis1=1, axis2=2)
    rest = np.isin(kept, twin, invert=True)
    # The direction of the twins is known to `margin`, and its variance is 1 / floor.
    allowed = margin(reduced, np.float32)
    allowed = allowed + allowed**2 / floor
    error = np.abs(variance[:, kept] - expected)[:, rest]
    assert np.all(error <= allowed[:, None] * expected.max(1, keepdims=True))


def test_derivatives_equal_the_equation(x64: None) -> None:
    """`d A^-1 = -A^-1 dA A^-1` and `d log det A = tr A^-1 dA`, through `vmap` and `jit`."""
    matrix, other = correlations(7), correlations(7, spread=1.0)[::-1]
    rate = other - np.eye(7)
    push = jax.jit(jax.vmap(lambda a, da: jax.jvp(inverse, (a,), (da,))[1]))
    got, log_rate = push(jnp.asarray(matrix), jnp.asarray(rate))
    exact = np.linalg.inv(matrix)
    expected = -exact @ rate @ exact
    allowed = margin(matrix, np.float64) * np.linalg.cond(matrix)
    error = np.abs(got - expected).max((1, 2))
    assert np.all(error <= allowed * np.abs(expected).max((1, 2)))
    trace = np.einsum("bij,bji->b", exact, rate)
    assert np.all(np.abs(log_rate - trace) <= 7 * allowed * np.abs(exact).max((1, 2)))


@pytest.mark.parametrize("x64", [False, True])
def test_row13_singular_matrices_and_their_derivatives_never_pass_through_nan(x64: bool) -> None:
    with jax.enable_x64(x64), jax.debug_nans(True):
        matrix = jnp.asarray(np.stack([np.ones((13, 13)), *of_rank(3, 13, batch=50)]), float)
        rate = jnp.broadcast_to(jnp.eye(13), matrix.shape)
        for function in (inverse, cholesky):
            value, change = jax.jvp(jax.jit(function), (matrix,), (rate,))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value))
            assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(change))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rounding_floor_follows_precision_and_size(x64: None, dtype: type) -> None:
    eps = np.finfo(dtype).eps
    assert rounding_floor(jnp.eye(7, dtype=dtype)) == pytest.approx(28 * eps)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_roots_of_semidefinite_matrices_rebuild_them(x64: None, dtype: type) -> None:
    """Rank 3 of 5: two pivots vanish within rounding, which the first three multiply."""
    matrix = of_rank(3, 5, batch=200)
    allowed = margin(matrix[:, :3, :3], dtype)
    root = np.asarray(jit_cholesky(jnp.asarray(matrix, dtype)), float)
    rebuilt = root @ root.transpose(0, 2, 1)
    assert np.all(np.abs(rebuilt - matrix).max((1, 2)) <= allowed)
    assert np.all((root[:, :, 3:] ** 2).max((1, 2)) <= allowed)


@pytest.mark.slow
def test_programs_of_windows_leave_lapack_alone():
    """Two threads that call it wait for each other for ever where there are few cores."""
    targets = from_lists([[(3.0, 2.6, 240.0), (3.1, 3.4, 200.0)]])
    seen = observe(np.zeros((1, 7, 7), "f"), Sensor(read_noise=1.0, background=0.0))
    known = Known(Gaussian(np.float32(0.5)), prior=preset_prior(get_preset("csist")))
    best = jax.eval_shape(partial(fit, differentiable=False), seen, targets, known)
    programs = {
        select: (seen, targets, known),
        partial(sample, psf_slope=True): (seen, targets, known, jax.random.key(0)),
        laplace: (best, seen, known),
        psf_information: (best, seen, known),
        partial(tempered, num_particles=64, num_moves=2): (
            seen,
            targets.mask,
            known,
            jax.random.key(0),
        ),
    }
    for program, given in programs.items():
        assert "lapack" not in jax.jit(program).lower(*given).as_text(), program
    solved = jax.jit(jax.vmap(jnp.linalg.solve)).lower(np.zeros((2, 3, 3)), np.zeros((2, 3, 1)))
    assert "lapack" in solved.as_text() or jax.default_backend() != "cpu"
