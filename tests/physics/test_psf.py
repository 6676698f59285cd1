"""PSF: shares of pixels against numerical integration, derivatives, widths."""

import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss
from scipy.special import ndtr

from dscsnet_jax.physics.psf import Gaussian, Psf, as_psf, support
from dscsnet_jax.physics.psf_gaussians import GaussianMixture, Moffat, rotated_gaussian

SIZE = (13, 11)
PLACES = [(6.0, 5.0), (5.7, 5.31), (6.45, 4.5)]
Density = Callable[[np.ndarray, np.ndarray], np.ndarray]


def normal(row: np.ndarray, col: np.ndarray, rows: float, cols: float, mixed: float) -> np.ndarray:
    determinant = rows * cols - mixed**2
    square = cols * row**2 - 2 * mixed * row * col + rows * col**2
    return np.exp(-square / determinant / 2) / (2 * np.pi * np.sqrt(determinant))


def turned(sigma: tuple[float, float], angle: float) -> Density:
    along = np.deg2rad(angle)
    axes = np.array([[np.cos(along), -np.sin(along)], [np.sin(along), np.cos(along)]])
    covariance = axes @ np.diag(np.square(sigma)) @ axes.T
    return lambda r, c: normal(r, c, covariance[0, 0], covariance[1, 1], covariance[0, 1])


def moffat(fwhm: float, beta: float) -> Density:
    scale2 = fwhm**2 / 4 / (2 ** (1 / beta) - 1)
    return lambda r, c: (beta - 1) / (np.pi * scale2) * (1 + (r**2 + c**2) / scale2) ** -beta


def mixture(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    narrow = normal(row, col, 0.45**2, 0.5**2, 0.0)
    return 0.75 * narrow + 0.25 * normal(row - 0.3, col + 0.1, 1.0, 0.9**2, 0.0)


MIXTURE = GaussianMixture((3.0, 1.0), ((0.45, 0.5), (1.0, 0.9)), ((0.0, 0.0), (0.3, -0.1)))
# PSF, its density, and the largest error of a pixel's share.
PSFS: dict[str, tuple[Any, Density, float]] = {
    "gaussian": (Gaussian((0.4, 0.9)), turned((0.4, 0.9), 0), 1e-12),
    "rotated": (rotated_gaussian((0.45, 0.6), 30), turned((0.45, 0.6), 30), 1e-4),
    "long": (rotated_gaussian((0.9, 0.4), -35), turned((0.9, 0.4), -35), 1e-4),
    "moffat": (Moffat(1.2, 2.5), moffat(1.2, 2.5), 1e-4),
    "steep": (Moffat(1.4, 4.765), moffat(1.4, 4.765), 1e-4),
    "mixture": (MIXTURE, mixture, 1e-12),
}
each = pytest.mark.parametrize("name", PSFS)


@partial(jax.jit, static_argnames=("size", "order"))
def shares(
    psf: Psf, place: jax.Array, size: tuple[int, int] = SIZE, order: tuple[int, int] = (0, 0)
) -> jax.Array:
    terms = psf.terms()
    row, col = (terms.responses(i, place[i], size[i], order=order[i]) for i in range(2))
    return jnp.einsum("ri,rj->ij", row, col, precision="highest")


def integrated(density: Density, place: tuple[float, float]) -> np.ndarray:
    node, weight = leggauss(24)
    at = [np.arange(n)[:, None] + node / 2 - p for n, p in zip(SIZE, place, strict=True)]
    values = density(at[0][:, None, :, None], at[1][None, :, None, :])
    return np.einsum("ijab,a,b->ij", values, weight, weight) / 4


@each
@pytest.mark.parametrize("place", PLACES)
def test_pixels_get_the_integral_of_the_density(
    x64: None, name: str, place: tuple[float, float]
) -> None:
    psf, density, error = PSFS[name]
    got = shares(psf, jnp.array(place))
    np.testing.assert_allclose(got, integrated(density, place), rtol=0, atol=error)


@each
def test_light_adds_up_to_one(x64: None, name: str) -> None:
    total = shares(PSFS[name][0], jnp.array([1000.0, 1000.0]), size=(2001, 2001)).sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


@each
def test_derivatives_by_the_place(x64: None, name: str) -> None:
    psf, place, step = PSFS[name][0], jnp.array(PLACES[1]), 1e-5
    for axis, order in ((0, 1), (1, 1), (0, 2), (1, 2)):
        orders = (order, 0) if axis == 0 else (0, order)
        below = (order - 1, 0) if axis == 0 else (0, order - 1)
        off = step * jnp.eye(2)[axis]
        ahead, back = (shares(psf, place + sign * off, order=below) for sign in (1, -1))
        got = shares(psf, place, order=orders)
        np.testing.assert_allclose(got, (ahead - back) / (2 * step), rtol=0, atol=1e-8)


@each
def test_derivatives_by_the_parameters(x64: None, name: str) -> None:
    psf = jax.tree.map(lambda a: jnp.asarray(a, float), PSFS[name][0])
    leaves, tree = jax.tree.flatten(psf)
    place, step = jnp.array(PLACES[1]), 1e-6
    image = jax.jit(lambda leaves: shares(tree.unflatten(leaves), place))
    slopes = jax.jit(jax.jacfwd(image))(leaves)
    for number, leaf in enumerate(leaves):
        for index in np.ndindex(leaf.shape):
            ends = [leaf.at[index].add(sign * step) for sign in (1, -1)]
            ahead, back = (image([*leaves[:number], e, *leaves[number + 1 :]]) for e in ends)
            got = slopes[number][(..., *index)]
            np.testing.assert_allclose(got, (ahead - back) / (2 * step), rtol=0, atol=1e-7)
            assert np.abs(got).max() > 1e-3


@each
def test_precision_is_that_of_the_place(name: str) -> None:
    psf = jax.tree.map(np.float32, PSFS[name][0])
    single = shares(psf, jnp.array(PLACES[2], jnp.float32))
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = shares(psf, jnp.array(PLACES[2], jnp.float64))
        assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-6)


@each
def test_a_wider_one_is_the_same_at_another_scale(x64: None, name: str) -> None:
    psf = PSFS[name][0]
    # Three pixels of a PSF three times as wide hold the light of one.
    place, wide = np.array([6.2, 4.7]), jnp.array([3 * 6.2 + 1, 3 * 4.7 + 1])
    size = (3 * SIZE[0], 3 * SIZE[1])
    large = np.asarray(shares(psf.widened(3.0), wide, size=size))
    summed = large.reshape(SIZE[0], 3, SIZE[1], 3).sum((1, 3))
    np.testing.assert_allclose(summed, shares(psf, jnp.asarray(place)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(psf.widened(3.0).width, 3 * np.asarray(psf.width), rtol=1e-12)


@each
def test_width_is_that_of_a_gaussian_of_the_same_area(x64: None, name: str) -> None:
    psf, density, _ = PSFS[name]
    step = np.arange(-40, 40, 0.02)
    area = 1 / (density(step[:, None], step[None]) ** 2).sum() / 0.02**2
    got = np.asarray(psf.width)
    if name == "long":  # of the axes, not of the ellipse
        np.testing.assert_allclose(got[0] ** 2 + got[1] ** 2, 0.9**2 + 0.4**2)
    else:
        assert 4 * np.pi * got[0] * got[1] == pytest.approx(area, rel=0.04)


def test_half_widths_are_the_known_ones(x64: None) -> None:
    for psf, half in (
        (Gaussian(8.0), 8.0 * (2 * np.log(2)) ** 0.5),
        (Moffat(20.0, 2.5), 10.0),
        (Moffat(20.0, 4.765), 10.0),
    ):
        peak, at_half = (
            shares(psf, jnp.array([60.0 + d, 60.0]), size=(121, 121))[60, 60] for d in (0, half)
        )
        assert float(at_half / peak) == pytest.approx(0.5, abs=2e-3)


def test_the_first_axis_turns_from_rows_to_cols(x64: None) -> None:
    wide = rotated_gaussian((0.9, 0.4), 90)
    np.testing.assert_allclose(wide.width, [0.4, 0.9], rtol=1e-7)
    aslant = np.asarray(shares(rotated_gaussian((0.9, 0.4), 30), jnp.array([6.0, 5.0])))
    assert aslant[7, 6] > 2 * aslant[7, 4]  # rows and cols grow together


@pytest.mark.parametrize(
    ("sigma", "angle", "message"),
    [((0.5, 0.0), 30, "two positive widths"), ((0.2, 1.6), 45, "give it as an array")],
)
def test_what_is_no_rotated_gaussian_is_refused(
    sigma: tuple[float, float], angle: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rotated_gaussian(sigma, angle)


def test_of_rounding_no_share_is_negative() -> None:
    place = jnp.linspace(-3.0, 14.0, 200_001)
    assert float(Gaussian(0.5).terms().responses(0, place, 11).min()) >= 0


def test_light_at_the_edge_and_outside(x64: None) -> None:
    terms = Gaussian(0.5).terms()
    assert float(terms.responses(0, jnp.array(-0.5), 21).sum()) == pytest.approx(0.5, abs=1e-15)
    assert float(terms.responses(0, jnp.array(-30.0), 21).sum()) == 0.0


@each
def test_beyond_the_support_there_is_no_light(x64: None, name: str) -> None:
    psf = PSFS[name][0]
    reach = support(psf)
    image = np.asarray(shares(psf, jnp.array([80.0, 80.0]), size=(161, 161)))
    away = np.maximum(*np.abs(np.indices(image.shape) - 80))
    assert image[away > reach].max() < 1e-7 * image.max() or reach >= 64
    assert image[away == reach - 1].max() > 1e-7 * image.max()


def test_a_psf_of_ones_own_is_one_file(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__, "../../../CONTRIBUTING.md").resolve().read_text(encoding="utf-8")
    found = re.search(r"<!-- psf:begin -->\n```python\n(.*?)```\n<!-- psf:end -->", text, re.DOTALL)
    assert found is not None
    module = types.ModuleType("psf_trail")
    monkeypatch.setitem(sys.modules, "psf_trail", module)  # where dataclasses look names up
    exec(compile(found[1], "psf_trail.py", "exec", dont_inherit=True), vars(module))
    trail = module.Trail(0.5, 0.8)

    def density(row: np.ndarray, col: np.ndarray) -> np.ndarray:
        ends = [ndtr((row + end) / 0.5) for end in (0.4, -0.4)]
        along_col = np.exp(-((col / 0.5) ** 2) / 2) / 0.5 / (2 * np.pi) ** 0.5
        return (ends[0] - ends[1]) / 0.8 * along_col

    got = shares(trail, jnp.array(PLACES[1]))
    np.testing.assert_allclose(got, integrated(density, PLACES[1]), rtol=0, atol=2e-3)
    assert float(got.sum()) == pytest.approx(1, abs=1e-6)


def test_numbers_are_gaussians() -> None:
    assert as_psf(1).width.tolist() == [1.0, 1.0]
    assert as_psf((0.25, 0.5)).width.tolist() == [0.25, 0.5]
    assert as_psf(MIXTURE) is MIXTURE
