"""How much each pixel moves each estimate, and the error bars that follow from it.

    python experiments/differentiate/sensitivity.py

`S = d(row, col, intensity)/d(pixel)` of the off-grid fit, in reverse mode: one linear solve at
the optimum per number, whatever the iterations. Independent noise of every pixel then spreads
the estimates by `noise^2 S S^T`. At a frame that the model explains, known noise and no
prior, that is the covariance `(J^T J)^-1` that `fit` reports; on a noisy frame they part,
by a share of the residuals. `S` also foretells what one bad pixel does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dscsnet_jax.inference.fit import Fit, fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import observe
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.preset import Sensor
from dscsnet_jax.physics.psf import Gaussian
from dscsnet_jax.physics.targets import Targets, from_lists

SIDE, SIGMA, NOISE = 7, 0.5, 2.0
PAIR = [(2.8, 2.6, 240.0), (3.3, 3.4, 225.0)]  # row, col (pixels), counts


def estimates(frame: jax.Array, start: Targets) -> tuple[jax.Array, Fit]:
    """(3K,) row, col (pixels) and intensity (counts) of each target in turn, and their fit.

    One frame (N, M) of known noise and background; nothing is known of the scene.
    """
    best = fit(
        observe(frame[None], Sensor(read_noise=NOISE, background=0.0)),
        start,
        Known(psf=Gaussian(SIGMA)),
    )
    found = best.targets
    return jnp.concatenate([found.position, found.intensity[..., None]], -1).reshape(-1), best


def sensitivity(frame: jax.Array, start: Targets) -> tuple[jax.Array, Fit]:
    """`S` (3K, N, M): change of each estimate per count in each pixel; and the fit."""
    return jax.jacrev(estimates, has_aux=True)(frame, start)


def propagated(s: jax.Array) -> jax.Array:
    """`noise^2 S S^T` (3K, 3K): covariance by independent noise of the pixels."""
    return NOISE**2 * jnp.einsum("pij,qij->pq", s, s)


def main() -> None:
    """Print the map of one estimate, both error bars, and the effect of a bad pixel."""
    truth = from_lists([PAIR])
    clean = render(truth, frame_size=SIDE, psf=SIGMA)[0]
    noisy = clean + NOISE * np.random.default_rng(0).normal(size=clean.shape)
    measure = jax.jit(sensitivity)
    for name, frame in {"noise-free": clean, "noisy": noisy}.items():
        s, best = measure(frame, truth)
        spread = jnp.sqrt(jnp.diagonal(propagated(s)))
        print(f"{name}: standard deviations of row, col (pixels), intensity (counts)")
        print("  noise^2 S S^T", np.array2string(spread, precision=5))
        print("  fit          ", np.array2string(best.std[0].reshape(-1), precision=5))
    print("S of the first target's row on the noisy frame, 1/1000 pixel per count")
    print(np.array2string(1000 * np.asarray(s[0]), precision=2, suppress_small=True))
    pixel, excess = (2, 3), 1.0
    moved = measure(noisy.at[pixel].add(excess), truth)[1].targets.position - best.targets.position
    print(f"pixel {pixel} brighter by {excess} count moves row, col by (pixels)")
    print("  foretold", np.array2string(excess * s[:2, *pixel], precision=6))
    print("  refitted", np.array2string(moved[0, 0], precision=6))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
