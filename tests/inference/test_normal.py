"""Normal: `log Phi` against SciPy's, and its derivatives against the Mills ratio."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dscsnet_jax.inference.normal import log_ndtr

PLACES = np.unique(
    np.concatenate(
        [
            np.linspace(-60, 60, 24_001),
            *(middle + np.linspace(-1e-3, 1e-3, 201) for middle in (-1, 0)),
            *(np.nextafter(middle, [-np.inf, np.inf]) for middle in (-1.0, 0.0)),
        ]
    )
)
# Of value, slope and bend; a polynomial's derivatives are worst at its end, -1.
TOLERANCE = {np.float32: (3e-6, 5e-5, 1e-3), np.float64: (3e-14, 2e-13, 1e-11)}
both = pytest.mark.parametrize("dtype", TOLERANCE)


def evaluated(function: Callable[[jax.Array], jax.Array], dtype: type) -> tuple[Any, Any]:
    """The places in this precision, as float64, and the function there."""
    with jax.enable_x64(dtype is np.float64):
        x = jnp.asarray(PLACES, dtype)
        found = jax.jit(function)(x)
        assert found.dtype == dtype
        return np.asarray(x, float), np.asarray(found, float)


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Errors, in units of 1 or of the value if that is larger."""
    return np.abs(found - expected) / np.maximum(1, np.abs(expected))


def mills(x: np.ndarray) -> np.ndarray:
    """`phi(x) / Phi(x)`."""
    return np.sqrt(2 / np.pi) / special.erfcx(-x / np.sqrt(2))


def slope(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return jax.vmap(jax.grad(function))


@both
def test_it_is_scipys(dtype: type) -> None:
    x, found = evaluated(log_ndtr, dtype)
    assert relative(found, special.log_ndtr(x)).max() < TOLERANCE[dtype][0]
    assert (found <= 0).all()


@both
def test_the_tail_keeps_its_digits_far_out(dtype: type) -> None:
    """To the last place that the square has in this precision, and no further."""
    with jax.enable_x64(dtype is np.float64):
        x = jnp.asarray([-1e3, -1e6, -1e9, -1e15], dtype)
        found = np.asarray(log_ndtr(x), float)
    expected = special.log_ndtr(np.asarray(x, float))
    np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype is np.float32 else 1e-14)


@both
def test_its_slope_is_the_mills_ratio(dtype: type) -> None:
    x, found = evaluated(slope(log_ndtr), dtype)
    assert np.isfinite(found[np.abs(x) <= 50]).all()
    assert relative(found, mills(x)).max() < TOLERANCE[dtype][1]


@both
def test_its_bend_is_that_of_the_mills_ratio(dtype: type) -> None:
    """`-m (x + m)`: less it is the information of a saturated pixel."""
    x, found = evaluated(slope(jax.grad(log_ndtr)), dtype)
    x, found = (a[np.abs(x) <= 50] for a in (x, found))
    assert np.isfinite(found).all()
    error = np.abs(found + mills(x) * (x + mills(x)))
    assert error.max() < TOLERANCE[dtype][2]
    smooth = np.abs(x + 1) > 0.5  # away from the end of the polynomial
    assert error[smooth].max() < TOLERANCE[dtype][2] / 10


@both
def test_forward_and_backward_derivatives_agree_under_debug_nans(dtype: type) -> None:
    with jax.debug_nans(True), jax.enable_x64(dtype is np.float64):
        x = jnp.asarray([-60.0, -50.0, -1.0, -0.5, 0.0, 0.5, 50.0, 60.0], dtype)
        backward = jax.jit(slope(log_ndtr))(x)
        forward = jax.jit(lambda x: jax.jvp(log_ndtr, (x,), (jnp.ones_like(x),))[1])(x)
        np.testing.assert_allclose(forward, backward, rtol=1e-6)
