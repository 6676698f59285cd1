"""Optics: the closed form against integration, the operator against dense matrices."""

import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import dblquad

from dscsnet_jax.physics import grid
from dscsnet_jax.physics.optics import (
    SensingOperator,
    render,
    sensing_operator,
)
from dscsnet_jax.physics.psf import Gaussian, Psf
from dscsnet_jax.physics.psf_gaussians import GaussianMixture, rotated_gaussian
from dscsnet_jax.physics.targets import Targets, from_lists

GEOMETRIES = [((7, 7), 3), ((4, 6), 4), ((4, 4), 5), ((4, 3), 7)]


# Everything below compiles once per geometry and precision.
WIDTHS = (0.5, 0.7)
jit_render = jax.jit(render, static_argnames="frame_size")


PSFS = {
    "gaussian": Gaussian(WIDTHS),
    "rotated": rotated_gaussian((0.45, 0.7), 30),
    "mixture": GaussianMixture((3.0, 1.0), (0.5, 0.9), ((0.0, 0.0), (0.2, -0.1))),
}


@partial(jax.jit, static_argnums=(0, 1))
def compiled(shape: tuple[int, int], division: int, psf: Psf) -> SensingOperator:
    return sensing_operator(shape, division=division, psf=psf)


def build(shape: tuple[int, int], division: int, name: str = "gaussian") -> SensingOperator:
    return compiled(shape, division, jax.tree.map(jnp.asarray, PSFS[name]))


@jax.jit
def answers(operator: SensingOperator, y: jax.Array, v: jax.Array, rho: float) -> tuple:
    """`apply(v)`, `adjoint(y)`, `solve(v)` and both answers of `data_step(y, v)`."""
    r, residual = operator.data_step(y, v, rho)
    return operator.apply(v), operator.adjoint(y), operator.solve(v, rho), r, residual


def dense(operator: SensingOperator) -> np.ndarray:
    """`Phi` as the (NM, cN cM) matrix that the separable form replaces."""
    pairs = zip(operator.response_row, operator.response_col, strict=True)
    return sum(np.kron(np.asarray(row, float), np.asarray(col, float)) for row, col in pairs)


def flat_apply(matrix: np.ndarray, maps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Dense product on flattened maps, with leading batch axes."""
    lead = maps.shape[:-2]
    return (maps.reshape(*lead, -1) @ matrix.T).reshape(*lead, *shape)


def random_maps(operator: SensingOperator, lead: tuple[int, ...] = (2,)) -> tuple:
    """A frame `y` and a map `v` of tens of counts, as NumPy."""
    rng = np.random.default_rng(1)
    y = 100 * rng.normal(size=(*lead, *operator.frame_shape))
    return y, 100 * rng.normal(size=(*lead, *operator.map_shape))


# --- rendering ---------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "sigma"), [((5, 7), (0.4, 0.9)), ((8, 2), (1.3, 0.3))])
def test_render_against_double_integration(
    x64: None, shape: tuple[int, int], sigma: tuple[float, float]
) -> None:
    targets = [(1.3, 0.8, 240.0), (2.45, 1.1, 130.0)]

    def density(col: float, row: float) -> float:
        return sum(
            level
            / (2 * np.pi * sigma[0] * sigma[1])
            * np.exp(-(((row - r) / sigma[0]) ** 2 + ((col - c) / sigma[1]) ** 2) / 2)
            for r, c, level in targets
        )

    def pixel(i: int, j: int) -> float:
        return dblquad(density, i - 0.5, i + 0.5, j - 0.5, j + 0.5, epsabs=1e-9)[0]

    expected = np.array([[pixel(i, j) for j in range(shape[1])] for i in range(shape[0])])
    got = jit_render(from_lists([targets]), frame_size=shape, psf=jnp.array(sigma))[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def csist_sample(folder: Path) -> tuple[Targets, np.ndarray]:
    """Targets of the annotations (xc is the row) and the frames made by integration."""
    frames = np.load(folder / "frames_float64.npz")["frames"]
    tables = []
    for i in range(len(frames)):
        root = ET.parse(folder / "Annotations" / f"CSO{i}.xml").getroot()
        places = root.findall("object/coordinate")
        tables.append(
            [[float(p.findtext(tag, "")) for tag in ("xc", "yc", "brightness")] for p in places]
        )
    return from_lists(tables), frames


def test_render_equals_the_csist_sample_in_float64(x64: None, data_dir: Path) -> None:
    targets, frames = csist_sample(data_dir / "csist_sample")
    got = jit_render(targets, frame_size=11, psf=0.5)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, frames, rtol=0, atol=1e-11)


def test_render_equals_the_csist_sample_in_float32(data_dir: Path) -> None:
    targets, frames = csist_sample(data_dir / "csist_sample")
    got = jit_render(targets, frame_size=11, psf=0.5)
    assert got.dtype == jnp.float32
    # The frames reach 401 counts, where float32 resolves 3e-5.
    np.testing.assert_allclose(got, frames, rtol=0, atol=2e-4)


def test_render_ignores_padding_and_takes_any_batch() -> None:
    table = [(1.2, 2.1, 50.0), (3.0, 0.4, 70.0)]
    one = jit_render(from_lists([table]), frame_size=5, psf=0.6)[0]
    padded = from_lists([table, []], max_targets=4)
    padded = padded.replace(intensity=np.where(padded.mask, padded.intensity, 1e6))
    both = jit_render(padded, frame_size=5, psf=0.6)
    np.testing.assert_allclose(both[0], one, rtol=1e-6)
    assert not both[1].any()
    single = jax.tree.map(lambda leaf: leaf[0], padded)
    np.testing.assert_allclose(jit_render(single, frame_size=5, psf=0.6), one, rtol=1e-6)


@pytest.mark.parametrize(("shape", "division"), GEOMETRIES)
def test_render_at_cell_centres_equals_apply_of_the_grid_map(
    x64: None, shape: tuple[int, int], division: int
) -> None:
    rng = np.random.default_rng(2)
    cells = np.stack([rng.integers(0, division * side, 4) for side in shape], -1)
    level = rng.uniform(50, 250, 4)
    x = np.zeros((division * shape[0], division * shape[1]))
    np.add.at(x, tuple(cells.T), level)
    places = grid.to_position(cells, division)
    truth = Targets(position=places, intensity=level, mask=np.ones(4, bool))
    expected = jit_render(truth, frame_size=shape, psf=jnp.array(WIDTHS))
    got = build(shape, division).apply(x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)
    mapped = jax.jit(grid.grid_map, static_argnames=("frame_size", "division"))(
        places, level, truth.mask, frame_size=shape, division=division
    )
    np.testing.assert_array_equal(mapped, x)


# --- the sensing operator ----------------------------------------------------------


def test_sigma_is_row_then_col() -> None:
    operator = build((7, 7), 3)
    # The narrow axis is the rows': a cell leaves more of its energy in its own pixel.
    assert float(operator.response_row.max()) > 1.2 * float(operator.response_col.max())
    np.testing.assert_allclose(operator.psf.width, WIDTHS)


@pytest.mark.parametrize(
    ("shape", "division", "name"),
    [*((*of, "gaussian") for of in GEOMETRIES), ((4, 6), 3, "rotated"), ((4, 6), 3, "mixture")],
)
def test_apply_adjoint_solve_and_data_step_equal_the_dense_matrix(
    shape: tuple[int, int], division: int, name: str
) -> None:
    def relative_errors(rho: float) -> list[float]:
        operator = build(shape, division, name)
        assert operator.frame_shape == shape
        assert operator.map_shape == (division * shape[0], division * shape[1])
        matrix = dense(operator)
        y, v = random_maps(operator)
        inverse = np.linalg.inv(matrix.T @ matrix + rho * np.eye(matrix.shape[1]))
        applied = flat_apply(matrix, v, operator.frame_shape)
        adjoint = flat_apply(matrix.T, y, operator.map_shape)
        r = flat_apply(inverse, adjoint + rho * v, operator.map_shape)
        solved = flat_apply(inverse, v, operator.map_shape)
        residual = y - flat_apply(matrix, r, operator.frame_shape)
        got = answers(operator, jnp.asarray(y), jnp.asarray(v), rho)
        expected = (applied, adjoint, solved, r, residual)
        scales = (applied, adjoint, solved, r, y)
        terms = zip(got, expected, scales, strict=True)
        return [np.abs(one - other).max() / np.abs(scale).max() for one, other, scale in terms]

    # One term: exact, in float32 the largest measured is 2.5e-6. Several: by iterations, which
    # leave 1e-6 of the right-hand side, that is so much over rho of the map.
    exact = name == "gaussian"
    for rho in (1e-3, 0.1, 10.0):
        iterated = 2e-6 * (1 + 1 / rho)
        assert max(relative_errors(rho)) < (5e-6 if exact else iterated)
        with jax.enable_x64(True):
            assert max(relative_errors(rho)) < (1e-9 if exact else iterated)


@pytest.mark.parametrize("name", PSFS)
@pytest.mark.parametrize(("shape", "division"), GEOMETRIES)
def test_adjoint_identity(x64: None, shape: tuple[int, int], division: int, name: str) -> None:
    operator = build(shape, division, name)
    y, x = random_maps(operator)
    applied, adjoint, *_ = answers(operator, jnp.asarray(y), jnp.asarray(x), 0.1)
    left, right = (applied * y).sum((-2, -1)), (x * adjoint).sum((-2, -1))
    norms = [np.linalg.norm(a, axis=(-2, -1)) for a in (applied, y)]
    np.testing.assert_array_less(np.abs(left - right), 1e-13 * norms[0] * norms[1])


@pytest.mark.parametrize("name", PSFS)
def test_operator_takes_any_leading_axes(x64: None, name: str) -> None:
    operator = build((4, 6), 4, name)
    y, v = (jnp.asarray(a) for a in random_maps(operator, (2, 3)))
    batch = answers(operator, y, v, 0.1)
    for index in np.ndindex(2, 3):
        one = answers(operator, y[index], v[index], 0.1)
        for a, b in zip(one, batch, strict=True):
            np.testing.assert_allclose(b[index], a, atol=1e-10)


def test_what_has_no_solution_is_nan_and_no_other_frame_is(x64: None) -> None:
    operator = build((4, 6), 4, "mixture")
    y, v = (jnp.asarray(a) for a in random_maps(operator))
    expected = answers(operator, y, v, 0.1)[3:]
    got = answers(operator, y.at[0, 1, 2].set(jnp.nan), v, 0.1)[3:]
    for one, other in zip(got, expected, strict=True):
        assert np.isnan(one[0]).all()
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(("name", "error"), [("gaussian", 1e-12), ("mixture", 1e-5)])
def test_norm_is_the_largest_singular_value(x64: None, name: str, error: float) -> None:
    operator = build((4, 6), 4, name)
    expected = np.linalg.svd(dense(operator), compute_uv=False)[0]
    assert float(operator.norm()) == pytest.approx(expected, rel=error)


@pytest.mark.parametrize("name", PSFS)
def test_the_operator_is_its_matrix(x64: None, name: str) -> None:
    operator = build((4, 6), 3, name)
    np.testing.assert_allclose(operator.matrix(), dense(operator), atol=1e-15)
    # A cell's column is the light of a point at its centre.
    place = grid.to_position(np.array([[5, 7]]), 3)
    point = Targets(place, np.ones(1), np.ones(1, bool))
    seen = jit_render(point, frame_size=(4, 6), psf=PSFS[name])
    column = dense(operator)[:, 5 * 18 + 7].reshape(4, 6)
    np.testing.assert_allclose(column, seen, atol=1e-14)


def test_memory_grows_with_the_frame_not_its_square() -> None:
    size, c = 64, 3
    operator = build((size, size), c)
    held = sum(leaf.size for leaf in jax.tree.leaves(operator))
    assert held == 2 * (c * size**2 + size**2 + size) + 2
    y, v = jnp.zeros((size, size)), jnp.zeros((c * size, c * size))
    for step in (operator.data_step, lambda y, v, rho: operator.solve(v, rho)):
        memory = jax.jit(step).lower(y, v, 0.1).compile().memory_analysis()
        # A handful of maps of float32; the dense matrix alone would be N^2 of them.
        assert memory.temp_size_in_bytes <= 8 * 4 * (c * size) ** 2


# --- derivatives -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "division"), [(5, 4), (32, 3)])
def test_derivative_of_data_step_by_rho_and_sigma(x64: None, size: int, division: int) -> None:
    rng = np.random.default_rng(3)
    y = jnp.asarray(100 * rng.random((size, size)))
    v = jnp.asarray(rng.normal(size=(division * size,) * 2))
    weight_r = jnp.asarray(rng.normal(size=v.shape))
    weight_y = jnp.asarray(rng.normal(size=y.shape))

    @jax.jit
    def value(parameters: jax.Array) -> jax.Array:
        operator = sensing_operator(size, division=division, psf=parameters[1:])
        r, residual = operator.data_step(y, v, parameters[0])
        return (weight_r * r).sum() + (weight_y * residual).sum()

    # The widths are equal once: the axes then share all their eigenvalues.
    for at in (jnp.array([0.1, 0.5, 0.5]), jnp.array([0.03, 0.45, 0.6])):
        steps = 1e-5 * jnp.eye(3)
        expected = [float(value(at + step) - value(at - step)) / 2e-5 for step in steps]
        forward = [float(jax.jvp(value, (at,), (axis,))[1]) for axis in jnp.eye(3)]
        np.testing.assert_allclose(forward, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(value)(at), expected, rtol=1e-6)


def test_derivative_of_data_step_by_frame_and_map(x64: None) -> None:
    operator = build((7, 7), 3)
    y, v = (jnp.asarray(a[0]) for a in random_maps(operator))
    matrix = dense(operator)
    system = np.linalg.inv(matrix.T @ matrix + 0.1 * np.eye(matrix.shape[1]))
    total = jax.jit(jax.grad(lambda y, v: operator.data_step(y, v, 0.1)[0].sum(), (0, 1)))
    by_y, by_v = total(y, v)
    ones = np.ones(matrix.shape[1])
    np.testing.assert_allclose(by_y.ravel(), matrix @ system @ ones, atol=1e-10)
    np.testing.assert_allclose(by_v.ravel(), 0.1 * system @ ones, atol=1e-10)


def test_gradients_are_finite_on_zeros_in_float32() -> None:
    def value(sigma: jax.Array, rho: jax.Array) -> jax.Array:
        operator = sensing_operator(11, division=3, psf=sigma)
        return operator.data_step(jnp.zeros((11, 11)), jnp.zeros((33, 33)), rho)[0].sum()

    slopes = jax.jit(jax.grad(value, (0, 1)))(jnp.float32(0.5), jnp.float32(0.1))
    assert [float(s) for s in slopes] == [0.0, 0.0]
