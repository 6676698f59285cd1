"""Tabulated PSFs: against integrals of the formula, exact Gaussians and the arrays themselves."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from scipy.special import j1, ndtr

from dscsnet_jax.physics.psf_airy import Airy, airy
from dscsnet_jax.physics.psf_tables import Empirical, TabulatedTerms, empirical

PLACES = [(5.0, 5.0), (5.23, 4.6), (4.5, 5.125), (5.37, 5.49)]

responses = jax.jit(TabulatedTerms.responses, static_argnums=(1, 3), static_argnames="order")


@partial(jax.jit, static_argnames="shape")
def image(psf: Any, place: Any, shape: tuple[int, int] = (11, 11)) -> jax.Array:
    terms = psf.terms()
    rows, cols = (terms.responses(axis, place[axis], shape[axis]) for axis in (0, 1))
    return jnp.einsum("ri,rj->ij", rows, cols, precision="highest")


def pixels(psf: Any, place: tuple[float, float], shape: tuple[int, int] = (11, 11)) -> np.ndarray:
    return np.asarray(image(psf, jnp.array(place), shape))


# --- Airy: against the formula -----------------------------------------------------


def airy_density(radius: np.ndarray, width: float, obscuration: float) -> np.ndarray:
    """Light per square pixel, as the books give it."""
    v = np.pi * np.maximum(radius, 1e-9) / width
    amplitude = 2 * j1(v) / v
    if obscuration:
        amplitude -= obscuration**2 * 2 * j1(obscuration * v) / (obscuration * v)
    return (amplitude / (1 - obscuration**2)) ** 2 * np.pi / 4 * (1 - obscuration**2) / width**2


@cache
def airy_shares(
    width: float,
    obscuration: float,
    jitter: float,
    place: tuple[float, float],
    num: int = 11,
) -> np.ndarray:
    """(N, N) shares by Gauss-Legendre over pixels, and Gauss-Hermite over the jitter."""
    if jitter:
        shift, weight = hermegauss(7)
        weight = weight / weight.sum()
        moved = [
            (a * b, (place[0] + jitter * x, place[1] + jitter * y))
            for a, x in zip(weight, shift, strict=True)
            for b, y in zip(weight, shift, strict=True)
        ]
        return np.sum([w * airy_shares(width, obscuration, 0.0, p, num) for w, p in moved], 0)
    node, weight = leggauss(10 if width > 0.6 else 20)
    at = np.arange(num)[:, None] + node / 2
    rows, cols = (at - p for p in place)
    density = airy_density(np.hypot(rows[:, :, None, None], cols), width, obscuration)
    return np.einsum("iajb,a,b->ij", density, weight / 2, weight / 2)


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("obscuration", [0.0, 0.3])
@pytest.mark.parametrize("width", [0.8, 1.2, 2.0])
def test_airy_shares_are_the_integrals(
    x64: None, width: float, obscuration: float, jitter: float
) -> None:
    psf = airy(width, obscuration=obscuration, jitter=jitter)
    for place in PLACES:
        expected = airy_shares(width, obscuration, jitter, place)
        np.testing.assert_allclose(pixels(psf, place), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("obscuration", [0.0, 0.3])
def test_airy_light_is_all_but_what_lies_beyond_its_square(x64: None, obscuration: float) -> None:
    # Of what lies beyond, some thousandths fold over, thinly spread.
    expected = airy_shares(1.0, obscuration, 0.0, (7.0, 7.0), 15).sum()
    got = pixels(airy(1.0, obscuration=obscuration), (7.0, 7.0), (15, 15)).sum()
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-3)
    assert 0.95 < expected < 0.98
    whole = pixels(airy(1.0, obscuration=obscuration), (20.0, 20.0), (41, 41)).sum()
    assert got < whole < 1


def test_airy_half_width_is_that_of_the_books(x64: None) -> None:
    width = 25.0  # pixels: they blur nothing
    half = 1.02899 * width / 2
    middle, at_half = (pixels(airy(width), (p, 0.0), (1, 1))[0, 0] for p in (0.0, half))
    np.testing.assert_allclose(at_half / middle, 0.5, atol=1e-3)
    np.testing.assert_allclose(middle, np.pi / 4 / width**2, rtol=2e-3)
    zero = 1.21967 * width
    assert abs(pixels(airy(width), (0.0, zero), (1, 1))[0, 0]) < 2e-3 * middle


@pytest.mark.parametrize(("obscuration", "jitter"), [(0.0, 0.0), (0.3, 0.0), (0.3, 6.0)])
def test_airy_width_has_the_same_effective_area(
    x64: None, obscuration: float, jitter: float
) -> None:
    psf = airy(12.0, obscuration=obscuration, jitter=jitter)
    shares = pixels(psf, (96.0, 96.0), (193, 193))
    expected = np.sqrt(1 / (4 * np.pi * (shares**2).sum()) - 1 / 12)
    np.testing.assert_allclose(psf.width, [expected] * 2, rtol=2e-3)


def test_airy_widened() -> None:
    psf = airy(1.0, obscuration=0.2, jitter=0.1).widened(1.25)
    place = (5.2, 4.7)
    np.testing.assert_allclose(
        pixels(psf, place), airy_shares(1.25, 0.2, 0.125, place), rtol=0, atol=1e-4
    )
    # Narrowed so far that its repetition would fall into the square, were it not cut off.
    narrow = pixels(airy(1.0).widened(0.2), (10.0, 10.0), (21, 21))
    np.testing.assert_allclose(narrow[[3, 17], 10], 0, atol=1e-3)


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_airy_is_differentiable_by_its_parameters(x64: None, jitter: float) -> None:
    def light(resolution: jax.Array, jitter: jax.Array) -> jax.Array:
        psf = airy(1.1, obscuration=0.3).replace(resolution=resolution, jitter=jitter)  # type: ignore[attr-defined]
        return (image(psf, jnp.array([5.2, 4.9])) * jnp.arange(121.0).reshape(11, 11) ** 2).sum()

    light = jax.jit(light)
    at, step = (jnp.array(1.1), jnp.array(jitter)), 1e-5
    slopes = jax.jit(jax.grad(light, (0, 1)))(*at)
    for number, slope in enumerate(slopes):
        up, down = ([a + s * (i == number) for i, a in enumerate(at)] for s in (step, -step))
        expected = (light(*up) - light(*down)) / (2 * step)
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_equal(np.asarray(slopes[1] == 0), jitter == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0.0}, "width 0.0 .* positive number of pixels"),
        ({"width": float("nan")}, "width nan .* positive number of pixels"),
        ({"width": 1.0, "obscuration": 1.0}, "obscuration 1.0 .* from 0 to below 1"),
        ({"width": 1.0, "jitter": -0.1}, r"jitter -0.1 .* 0 or more pixels"),
    ],
)
def test_airy_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        airy(**arguments)


# --- tabulated terms ---------------------------------------------------------------


def some_terms(over: int) -> TabulatedTerms:
    rng = np.random.default_rng(over)
    return TabulatedTerms(
        jnp.asarray(rng.normal(size=(2, 3, 6 * over + 2))), jnp.array([0.1, -1.7]), over
    )


def spline(x: np.ndarray) -> np.ndarray:
    """The cubic B-spline, piece by piece."""
    far = np.abs(x)
    inner = 2 / 3 - far**2 + far**3 / 2
    return np.where(far < 1, inner, np.where(far < 2, (2 - far) ** 3 / 6, 0))


@pytest.mark.parametrize("over", [1, 2, 5])
def test_responses_are_the_sum_of_splines(x64: None, over: int) -> None:
    terms, place = some_terms(over), np.linspace(-6, 12, 73)
    knot = np.arange(terms.table.shape[-1]) - terms.table.shape[-1] // 2
    for axis in (0, 1):
        apart = np.arange(7)[:, None] - place - np.asarray(terms.offset)[axis]
        weight = spline(apart * over - knot[:, None, None])
        expected = np.einsum("rq,qip->rip", np.asarray(terms.table[axis]), weight)
        got = responses(terms, axis, jnp.asarray(place), 7)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("over", [1, 4])
def test_derivatives_are_those_of_the_responses(x64: None, over: int) -> None:
    terms = some_terms(over)
    # At knots, whose second derivative is continuous, and between.
    place = jnp.array([2.0, 2.9, 3.15, 3.65, -1.0, 40.0])
    first, second = (responses(terms, 0, place, 6, order=order) for order in (1, 2))

    def along(p: jax.Array) -> jax.Array:
        return responses(terms, 0, p, 6)

    each = partial(jax.vmap, in_axes=0, out_axes=-1)
    np.testing.assert_allclose(each(jax.jacfwd(along))(place), first, rtol=0, atol=1e-12)
    np.testing.assert_allclose(each(jax.hessian(along))(place), second, rtol=0, atol=1e-11)
    step = 1e-5
    differences = (along(place + step) - along(place - step)) / (2 * step)
    np.testing.assert_allclose(first, differences, rtol=0, atol=1e-6)
    up, down = (responses(terms, 0, place + s, 6, order=1) for s in (step, -step))
    differences = (up - down) / (2 * step)
    np.testing.assert_allclose(second, differences, rtol=0, atol=1e-2)


def test_a_point_far_away_gives_nothing() -> None:
    terms = airy(1.0).terms()
    for order in (0, 1, 2):
        away = jnp.array([-1e9, -300.0, -12.0, 22.0, 300.0, 1e9])
        np.testing.assert_array_equal(responses(terms, 0, away, 11, order=order), 0)


def test_pixels_do_not_depend_on_the_frame(x64: None) -> None:
    terms = airy(1.0).terms()
    place = jnp.linspace(-9, 14, 47)
    small, large = responses(terms, 1, place, 6), responses(terms, 1, place + 20, 46)
    np.testing.assert_allclose(small, large[:, 20:26], rtol=0, atol=1e-14)


def test_shapes_and_types(x64: None) -> None:
    terms, single = airy(1.0).terms(), jnp.float32(3.2)
    assert responses(terms, 0, single, 5).shape == (7, 5)
    assert responses(terms, 0, single, 5).dtype == jnp.float32
    assert responses(terms, 0, jnp.array(3), 5).dtype == jnp.float32
    place = jnp.linspace(-3, 9, 24).reshape(2, 3, 4)
    got = responses(terms, 0, place, 5)
    assert got.shape == (7, 5, 2, 3, 4)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got[:, :, 1, 2, 3], responses(terms, 0, place[1, 2, 3], 5))
    mapped = jax.vmap(lambda p: terms.responses(0, p, 5), 0, 2)(place)
    np.testing.assert_allclose(mapped, got, rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        responses(terms, 0, place.astype(jnp.float32), 5), got, rtol=0, atol=1e-6
    )


def test_psfs_are_mapped_over() -> None:
    psfs = airy(1.2).replace(resolution=jnp.array([1.0, 1.3]), jitter=jnp.array([0.0, 0.2]))  # type: ignore[attr-defined]
    images = jax.vmap(image, (0, None))(psfs, jnp.array([5.1, 4.8]))
    for psf, got in zip((airy(1.0), airy(1.3, jitter=0.2)), images, strict=True):
        np.testing.assert_allclose(got, pixels(psf, (5.1, 4.8)), rtol=0, atol=1.5e-4)


@pytest.mark.parametrize("setting", [jax.checking_leaks, partial(jax.debug_nans, True)])
def test_strict_settings(setting: Any) -> None:
    def total(psf: Airy | Empirical, place: jax.Array) -> jax.Array:
        return image.__wrapped__(psf, place).max()  # type: ignore[attr-defined]

    jax.clear_caches()
    with setting(), jax.numpy_dtype_promotion("strict"):
        for psf in (airy(1.2), gaussian_array(4, (4.0, 4.0), "optical")[0]):
            value, slope = jax.jit(jax.value_and_grad(total))(psf, jnp.array([5.0, 5.0]))
            assert np.isfinite([float(value), *map(np.sum, jax.tree.leaves(slope))]).all()
            assert jax.jit(lambda psf: psf.widened(1.1).width)(psf).dtype == jnp.float32


# --- empirical: exact Gaussians ----------------------------------------------------

SIGMA = (0.55, 0.7)


def gaussian_shares(num: int, place: float, sigma: float, over: int = 1) -> np.ndarray:
    """Share of a Gaussian's light in each of `num` cells of 1 / `over` pixels."""
    edge = (np.arange(num + 1) - 0.5 - place) / over
    return np.diff(ndtr(edge / sigma))


def gaussian_array(
    over: int, reach: tuple[float, float], kind: str, skew: tuple[float, float] = (0.0, 0.0)
) -> tuple[Empirical, np.ndarray]:
    """An `Empirical` Gaussian whose point lies off the middle, and its array."""
    size = [2 * round(r * over) + 1 for r in reach]
    centre = [(n - 1) / 2 + s for n, s in zip(size, skew, strict=True)]
    along = []
    for num, place, sigma in zip(size, centre, SIGMA, strict=True):
        if kind == "optical":
            along.append(gaussian_shares(num, place, sigma, over))
        else:
            off = (np.arange(num) - place) / over
            along.append(ndtr((off + 0.5) / sigma) - ndtr((off - 0.5) / sigma))
    array = 37.0 * np.outer(*along)
    told = None if skew == (0.0, 0.0) else centre
    return empirical(array, oversampling=over, centre=told, kind=kind), array


@pytest.mark.parametrize("kind", ["optical", "effective"])
@pytest.mark.parametrize("skew", [(0.0, 0.0), (1.0, -2.0), (0.3, -0.45)])
@pytest.mark.parametrize(("over", "most"), [(2, 1e-3), (3, 1e-4), (4, 2e-5), (5, 1e-5)])
def test_array_of_a_gaussian_is_that_gaussian(
    x64: None, over: int, most: float, kind: str, skew: tuple[float, float]
) -> None:
    psf, _ = gaussian_array(over, (4.0, 5.0), kind, skew)
    for place in PLACES:
        expected = np.outer(*(gaussian_shares(11, p, s) for p, s in zip(place, SIGMA, strict=True)))
        np.testing.assert_allclose(pixels(psf, place), expected, rtol=0, atol=most)


def test_one_value_per_pixel(x64: None) -> None:
    psf, array = gaussian_array(1, (4.0, 4.0), "optical")
    np.testing.assert_allclose(pixels(psf, (4.0, 4.0), (9, 9)), array / array.sum(), atol=1e-12)


@pytest.mark.parametrize("over", [2, 3, 4])
def test_array_keeps_its_orientation(x64: None, over: int) -> None:
    """A comet: any other order of the axes or direction of them would be far off."""
    rows, cols = np.meshgrid(np.arange(8 * over), np.arange(6 * over), indexing="ij")
    centre = (2 * over + (over - 1) / 2, 3 * over + (over - 1) / 2)
    tail = np.exp(-np.hypot(rows - centre[0], 2 * (cols - centre[1])) / over)
    array = np.where(rows - centre[0] >= (cols - centre[1]) ** 2 / over - over, tail, 0)
    psf = empirical(array, oversampling=over, centre=centre, tolerance=1e-7)
    shares = array.reshape(8, over, 6, over).sum((1, 3)) / array.sum()
    np.testing.assert_allclose(pixels(psf, (2.0, 3.0), (8, 6)), shares, rtol=0, atol=1e-5)
    # A cell further along the rows, and two less along the columns.
    array = np.pad(array, ((1, over - 1), (over - 2, 2)))
    shares = array.reshape(9, over, 7, over).sum((1, 3)) / array.sum()
    place = (2.0 + 1 / over, 4.0 - 2 / over)
    np.testing.assert_allclose(pixels(psf, place, (9, 7)), shares, rtol=0, atol=1e-5)


def test_effective_array_holds_the_pixels(x64: None) -> None:
    array = np.random.default_rng(0).random((13, 9))
    psf = empirical(array, oversampling=2, centre=(6, 4), kind="effective")
    shares = array * 4 / array.sum()
    np.testing.assert_allclose(pixels(psf, (3.0, 2.0), (7, 5)), shares[::2, ::2], atol=1e-12)
    np.testing.assert_allclose(pixels(psf, (3.5, 2.5), (7, 5))[1:, 1:], shares[1::2, 1::2])


def test_terms_are_as_few_as_the_tolerance_asks() -> None:
    noise = np.random.default_rng(0).normal(size=(33, 33))
    array = gaussian_array(4, (4.0, 4.0), "optical")[1]
    assert empirical(array, oversampling=4).table.shape[1] == 1
    rows, cols = np.indices(array.shape) - 16
    array = np.exp(-(rows**2 + cols**2 + rows * cols) / 20)
    few, many = (empirical(array, oversampling=4, tolerance=t) for t in (1e-2, 1e-5))
    assert 1 < few.table.shape[1] < many.table.shape[1] < 12
    noisy = empirical(array + 1e-2 * noise, oversampling=4)
    assert noisy.table.shape[1] == 12


def test_empirical_width_and_widened(x64: None) -> None:
    psf, _ = gaussian_array(5, (5.0, 6.0), "optical")
    np.testing.assert_allclose(psf.width, [np.sqrt(SIGMA[0] * SIGMA[1])] * 2, rtol=0.02)
    same, wider = psf.widened(1.0), psf.widened(1.3)
    np.testing.assert_allclose(same.terms().table, psf.table, rtol=0, atol=1e-12)
    # The pixel widens with it: a Gaussian seen by pixels of 1.3.
    place = (5.2, 4.9)
    edge = np.arange(11)[:, None] + np.array([-0.5, 0.5]) * 1.3
    rows, cols = (
        np.diff(ndtr((edge - p) / (1.3 * s)))[:, 0] / 1.3 for p, s in zip(place, SIGMA, strict=True)
    )
    np.testing.assert_allclose(pixels(wider, place), np.outer(rows, cols), rtol=0, atol=1e-4)
    expected = np.sqrt(1.3**2 * (psf.width**2 + 1 / 12) - 1 / 12)
    np.testing.assert_allclose(wider.width, expected, rtol=1e-12)


def test_empirical_is_differentiable_by_its_scale(x64: None) -> None:
    psf, _ = gaussian_array(4, (4.0, 4.0), "optical", (0.3, -1.4))

    @jax.jit
    def middle(factor: jax.Array) -> jax.Array:
        return image(psf.widened(factor), jnp.array([5.2, 4.9]))[5, 4]

    step = 1e-5
    expected = (middle(1.1 + step) - middle(1.1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(middle))(1.1), expected, rtol=1e-6)


def test_empirical_of_a_point_has_the_least_width() -> None:
    array = np.zeros((15, 15))
    array[7, 7] = 1
    np.testing.assert_allclose(empirical(array, oversampling=5).width, 0.2, rtol=1e-6)


ONES = np.ones((5, 5))


@pytest.mark.parametrize(
    ("array", "arguments", "message"),
    [
        (np.ones(5), {}, r"shape \(5,\): must have two axes"),
        (np.ones((2, 5, 5)), {}, r"shape \(2, 5, 5\): must have two axes"),
        (np.where(np.eye(5), np.nan, 1), {}, r"NaN or an infinity at \[0, 0\]: must be finite"),
        (np.where(np.eye(5, k=2), np.inf, 1), {}, r"infinity at \[0, 2\]"),
        (-ONES, {}, "adds up to -25: light must be positive"),
        (0 * ONES, {}, "adds up to 0: light must be positive"),
        (np.ones((5, 6)), {}, r"shape \(5, 6\) has an even side: tell the centre"),
        (ONES, {"centre": (2, 4.5)}, r"centre \(2, 4.5\) .* within \[0, 0\] and \[4, 4\]"),
        (ONES, {"centre": (-1, 2)}, "must be within"),
        (ONES, {"centre": (2,)}, "must be within"),
        (ONES, {"centre": (2, np.nan)}, "must be within"),
        (ONES, {"oversampling": 0}, "oversampling 0 .* positive whole number"),
        (ONES, {"oversampling": 2.5}, "oversampling 2.5 .* positive whole number"),
        (ONES, {"oversampling": np.inf}, "oversampling inf .* positive whole number"),
        (ONES, {"oversampling": 6}, "must span a pixel, 6 values along each axis"),
        (ONES, {"kind": "epsf"}, "kind 'epsf' .* one of optical, effective"),
    ],
)
def test_empirical_refuses(array: np.ndarray, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empirical(array, **({"oversampling": 1} | arguments))
