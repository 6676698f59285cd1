"""Sampler: average over all scenes that explain a window, instead of the best one.

Metropolis chains, several a window, started around the fit. Their steps would leave a Gaussian
distribution as it is, however long they are: that of the fit at first, then more and more that
of the samples so far (an adaptation that dies out: Haario, Saksman and Tamminen 2001); their
length is tuned in a burn-in. The maximum is a poor answer where the posterior is broad or cut
off by the prior; its mean has the least squared error, and its spread is the error. Windows
whose chains disagree go on, with longer turns, and keep every other sample of those before.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dscsnet_jax.inference.chains import NUM_CHAINS, NUM_SAMPLES, Chains, begin
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.lanes import lanes_last
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.summary import Posterior, nothing
from dscsnet_jax.inference.turn import NUM_BURN_IN, NUM_TURNS, THINNING, turn
from dscsnet_jax.physics.targets import Targets

_PIECE = 32  # windows that run together


class _Loop(NamedTuple):
    """How often the chains of each window (B,) have run, what they tell, where they are."""

    turn: jax.Array
    answer: Posterior
    chains: Chains


@lanes_last
def sample(
    windows: Observation,
    start: Targets,
    known: Known,
    key: jax.Array,
    *,
    num_chains: int = NUM_CHAINS,
    num_burn_in: int = NUM_BURN_IN,
    num_samples: int = NUM_SAMPLES,
    thinning: int = THINNING,
    psf_slope: bool = False,
    keep_samples: bool = False,
) -> Posterior:
    """Posterior mean, errors and intervals of the targets of each window.

    The number of targets is that of the start. Limits of the prior hold but for 0.0005
    pixels. Targets that change places are put back to where they are nearest to, sample
    by sample. Windows whose chains disagree go on, with more steps a sample.

    Args:
      windows: `Observation` of (B, N, M).
      start: `Targets` (B, K, ...), best those of a fit.
      known: PSF, sensor's gain and scene prior.
      key: PRNG key.
      num_chains: per window, at least 2.
      num_burn_in: rounds before, for the chains to forget their start.
      num_samples: rounds that are kept, one sample each, of every chain.
      thinning: steps of a round, for each slot of a window.
      psf_slope: compute `Posterior.psf_slope`.
      keep_samples: answer with `Posterior.samples`.

    Returns:
      A `Posterior`.

    Raises:
      ValueError: if a number of chains, rounds or steps is too small.

    Example:
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(5.0, 5.0, 200.0)]])
      >>> y = render(truth, frame_size=11, psf=0.5)
      >>> seen = observe(y, Sensor(read_noise=2.0, background=0.0))
      >>> answer = jax.jit(sample)(seen, truth, Known(psf=Gaussian(0.5)), jax.random.key(0))
      >>> answer.targets.position[0, 0].round(1).tolist(), round(float(answer.std[0, 0, 0]), 2)
      ([5.0, 5.0], 0.02)

    References:
      G. O. Roberts, A. Gelman, W. R. Gilks, Ann. Appl. Probab. 7 (1997) 110 (scaling);
      H. Haario, E. Saksman, J. Tamminen, Bernoulli 7 (2001) 223 (adaptation);
      J. S. Liu, Monte Carlo Strategies in Scientific Computing, 2001 (surrogate transitions);
      R. Cranley, T. N. L. Patterson, SIAM J. Numer. Anal. 13 (1976) 904.
    """
    if num_chains < 2 or num_samples < 4 or num_burn_in < 1 or thinning < 1:
        raise ValueError(
            "expected at least 2 chains, 4 samples, 1 burn-in round and step, got "
            f"{num_chains}, {num_samples}, {num_burn_in}, {thinning}"
        )
    start = jax.tree.map(jnp.asarray, start)
    length, size = start.mask.shape[0], min(_PIECE, start.mask.shape[0])
    numbers = {"num_chains": num_chains, "num_samples": num_samples}
    given = windows, start, begin(windows, start, known, key, **numbers)
    run = partial(
        turn,
        known=known,
        key=key,
        num_burn_in=num_burn_in,
        num_samples=num_samples,
        thinning=thinning,
        psf_slope=psf_slope,
        keep_samples=keep_samples,
    )

    def piece(loop: _Loop) -> _Loop:
        """Windows that stand at the same turn go on together."""
        number = loop.turn.min()
        index = jnp.nonzero(loop.turn == number, size=size, fill_value=length)[0]
        some = jax.tree.map(lambda a: a.at[index].get(mode="clip"), (windows, start, loop.chains))
        new = run(*some, number=number)
        answer, chains = jax.tree.map(
            lambda a, b: a.at[index].set(b, mode="drop"), (loop.answer, loop.chains), new
        )
        after = jnp.where(new[0].settled, NUM_TURNS, number + 1)
        return _Loop(loop.turn.at[index].set(after, mode="drop"), answer, chains)

    shapes = jax.eval_shape(lambda: run(*given, number=0))[0]
    first = jnp.where(start.mask.any(1), 0, NUM_TURNS).astype(jnp.int32)
    loop = _Loop(first, nothing(shapes), given[2])
    return jax.lax.while_loop(lambda loop: loop.turn.min() < NUM_TURNS, piece, loop).answer
