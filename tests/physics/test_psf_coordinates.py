"""Coordinates of PSFs: there and back, their derivatives, and the errors of what they tell."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.psf_airy import airy
from dscsnet_jax.physics.psf_coordinates import coordinates
from dscsnet_jax.physics.psf_gaussians import GaussianMixture, Moffat, rotated_gaussian
from dscsnet_jax.physics.psf_tables import empirical

ARRAY = np.exp(-(np.add.outer((np.arange(21) - 10.0) ** 2, (np.arange(21) - 10.0) ** 2) / 9))
PSFS = {
    "gaussian": (Gaussian(0.5), ["sigma"]),
    "two widths": (Gaussian(np.array([0.4, 0.6])), ["sigma[0]", "sigma[1]"]),
    "rotated": (rotated_gaussian((0.45, 0.6), 30.0), ["sigma[0]", "sigma[1]", "angle"]),
    "moffat": (Moffat(1.2, 2.5), ["fwhm", "beta"]),
    "airy": (airy(1.05, obscuration=0.3, jitter=0.2), ["resolution", "jitter"]),
    "mixture": (
        GaussianMixture(np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.8, 1.5])),
        ["weight[1]", "weight[2]", "sigma[0]", "sigma[1]", "sigma[2]"],
    ),
    "empirical": (empirical(ARRAY, oversampling=4), ["scale"]),
}


def image(psf: Any) -> jax.Array:
    terms, place = psf.terms(), jnp.array(4.3)
    rows, cols = (terms.responses(axis, place, 9) for axis in (0, 1))
    return jnp.einsum("ri,rj->ij", rows, cols, precision="highest")


@pytest.mark.parametrize("name", PSFS)
def test_there_and_back_is_the_same_psf(x64: None, name: str) -> None:
    psf, names = PSFS[name]
    psf = jax.tree.map(lambda a: jnp.asarray(a, float), psf)
    at = coordinates(psf)
    assert list(at.names) == names
    np.testing.assert_allclose(image(at.psf(at.values)), image(psf), atol=1e-9)
    slope = jax.jacfwd(lambda x: image(at.psf(x)))(at.values)
    step = 1e-6
    for i in range(len(names)):
        unit = step * np.eye(len(names))[i]
        up, down = (image(at.psf(at.values + s * unit)) for s in (1, -1))
        np.testing.assert_allclose(slope[..., i], (up - down) / (2 * step), atol=2e-7)
    assert (np.abs(slope).max((0, 1)) > 1e-3).all()  # each is seen


def test_a_blur_of_nothing_can_grow() -> None:
    at = coordinates(airy(1.05))
    slope = jax.jacfwd(lambda x: image(at.psf(x)))(at.values)
    assert np.abs(slope[..., 1]).max() > 1e-3
    assert float(at.psf(jnp.array([0.0, -1.0])).jitter) >= 0


def test_errors_are_those_of_draws() -> None:
    """Shares depend on all ratios, and errors may go together."""
    psf, _ = PSFS["mixture"]
    at = coordinates(psf)
    rng = np.random.default_rng(0)
    root = rng.normal(0, 0.02, (5, 5))
    drawn = np.asarray(at.values) + (root @ rng.normal(size=(5, 4000))).T
    many = jax.vmap(at.psf)(jnp.asarray(drawn, jnp.float32))
    told = at.errors(root @ root.T)
    assert [round(v, 6) for v, _ in told.values()] == [0.3, 0.2, 0.4, 0.8, 1.5]
    spread = np.concatenate([np.std(many.weight, 0)[1:], np.std(many.sigma, 0)])
    np.testing.assert_allclose([s for _, s in told.values()], spread, rtol=0.06)
    unknown = np.diag([np.inf, 1e-4, 1e-4, 1e-4, 1e-4])
    assert np.isinf(at.errors(unknown)["weight[1]"][1])
