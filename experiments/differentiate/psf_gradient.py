"""Gradients by the PSF's width, and the width calibrated from frames without any label.

    python experiments/differentiate/psf_gradient.py

A map made from one exposure, by the lasso (its implicit derivative) or by a network, is to
predict another exposure of the same scene: `d(loss)/d(sigma)` passes through the solver. The
predictions are best at a width that is too narrow for the lasso, as two neighbouring cells
are wider than one target between them. Off the grid there is no such bias: the evidence of
the fit, with one exposure, has its optimum at the true width. All begin 10 % off and follow the
slope by secants to its root.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.optimize import newton

from dscsnet_jax.estimation.unmix import pretrained
from dscsnet_jax.inference.evidence import laplace
from dscsnet_jax.inference.fit import fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import observe
from dscsnet_jax.maps.network import network_of
from dscsnet_jax.maps.readout import peak_centroids
from dscsnet_jax.physics.optics import SensingOperator, render, sensing_operator
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets, from_lists
from dscsnet_jax.unfolding.solvers import solve_lasso

SIDE, DIVISION = 7, 3
SIGMA, NOISE, LAM = 0.5, 1.0, 5.0
Method = Callable[[jax.Array, SensingOperator], jax.Array]


def exposures(num: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Two exposures (num, N, N) each of as many scenes: pairs, 1.2 to 2 pixels apart."""
    rng = np.random.default_rng(seed)
    middle, angle = rng.uniform(2.5, 3.5, (num, 2)), rng.uniform(0, np.pi, num)
    half = rng.uniform(0.6, 1.0, (num, 1)) * np.stack([np.sin(angle), np.cos(angle)], -1)
    place = np.stack([middle - half, middle + half], 1)
    tables = np.concatenate([place, rng.uniform(220, 250, (num, 2, 1))], -1)
    clean = render(from_lists(list(tables)), frame_size=SIDE, psf=SIGMA)
    first, second = (clean + NOISE * rng.normal(size=clean.shape) for _ in range(2))
    return first, second


def lasso(y: jax.Array, operator: SensingOperator) -> jax.Array:
    """The lasso's map, to a gap at which its derivative has digits (in float64)."""
    return solve_lasso(y, operator, lam=LAM, tolerance=1e-8, max_iterations=50_000).x


def prediction_loss(
    sigma: ArrayLike, first: jax.Array, second: jax.Array, method: Method
) -> jax.Array:
    """`mean (y_2 - Phi x(y_1))^2 / 2 noise^2`, with `Phi` and `x` of the width `sigma`."""
    operator = sensing_operator(SIDE, division=DIVISION, psf=sigma)
    predicted = operator.apply(method(first, operator))
    return ((second - predicted) ** 2).mean() / (2 * NOISE**2)


def starts(y: jax.Array, sigma: ArrayLike) -> Targets:
    """The peaks of the lasso's map at a first guess of the width, where the fits start."""
    operator = sensing_operator(SIDE, division=DIVISION, psf=sigma)
    # Two fits in one place have no derivative: peaks keep a distance.
    return peak_centroids(
        lasso(y, operator), division=DIVISION, separation=0.8, max_targets=4
    ).targets


def evidence_loss(sigma: ArrayLike, y: jax.Array, start: Targets) -> jax.Array:
    """Minus the mean log evidence of a frame, at its fit, which answers to `sigma` too.

    It holds the determinant of the information: the likelihood alone would prefer narrow PSFs
    where targets are blended.
    """
    seen, known = observe(y, Sensor(read_noise=NOISE, background=0.0)), Known(psf=Gaussian(sigma))
    return -laplace(fit(seen, start, known), seen, known).mean()


def calibrate(slope: Callable[[float], ArrayLike], guess: float) -> float:
    """The width near `guess` where `slope`, the loss's derivative, is zero: by secants."""
    return float(newton(lambda s: float(slope(float(s))), guess, x1=0.97 * guess, tol=1e-4))


def main() -> None:
    """Print slopes beside finite differences, and the widths at which they vanish."""
    first, second = exposures(16)
    guess, step = 1.1 * SIGMA, 1e-5
    weights = pretrained()
    network, noise = network_of(weights), jnp.full(len(first), NOISE)
    params = jax.tree.map(jnp.asarray, weights.params)
    losses = {
        "lasso": partial(prediction_loss, first=first, second=second, method=lasso),
        "network": partial(
            prediction_loss,
            first=first,
            second=second,
            method=lambda y, operator: network.apply(params, y, operator, noise=noise).x,
        ),
        "evidence": partial(evidence_loss, y=first, start=starts(first, guess)),
    }
    print(f"true sigma {SIGMA}, guess {guess:.2f}, {len(first)} scenes, noise {NOISE}")
    print("loss      slope at guess  by differences  calibrated  error")
    for name, loss in losses.items():
        both = jax.jit(jax.value_and_grad(loss))
        high, low = (both(guess + d)[0] for d in (step, -step))
        sigma = calibrate(lambda s, both=both: both(s)[1], guess)
        print(
            f"{name:9}{both(guess)[1]:15.6f}{(high - low) / (2 * step):16.6f}"
            f"{sigma:12.4f}{sigma / SIGMA - 1:+7.1%}"
        )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
