"""Program: the whole answer for a batch of windows of one shape, as one pure function.

fit -> counts that compete by evidence -> posterior -> answer
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from dscsnet_jax.inference.fit import Fit
from dscsnet_jax.inference.known import Known
from dscsnet_jax.inference.observation import Observation
from dscsnet_jax.inference.sampler import sample
from dscsnet_jax.inference.search import select
from dscsnet_jax.inference.summary import Posterior
from dscsnet_jax.physics.targets import Targets


class Answer(NamedTuple):
    """What `estimate` tells of B windows.

    Attributes:
      fit: of the best count.
      log_evidence: (B, K+1) of each count that was tried and can be; -inf of the others.
      posterior: means, errors and intervals at the best count.
    """

    fit: Fit
    log_evidence: jax.Array
    posterior: Posterior


def estimate(windows: Observation, start: Targets, known: Known, key: jax.Array) -> Answer:
    """Fit, count and average the targets of windows.

    Pure: it runs under `jit`, `vmap`, and over a mesh by `jax.sharding` or `shard_map`. A
    window's answer does not depend on its neighbours in the batch.

    Args:
      windows: `Observation` of (B, N, M), with what is told or estimated of each.
      start: `Targets` (B, K, ...); free slots are room for more targets.
      known: PSF, sensor's gain and scene prior.
      key: PRNG key; each window's stream also depends on its recorded pixels.

    Returns:
      `Answer`.

    Example:
      >>> from dscsnet_jax.inference.observation import observe
      >>> from dscsnet_jax.physics.optics import render
      >>> from dscsnet_jax.physics.preset import Sensor
      >>> from dscsnet_jax.physics.psf import Gaussian
      >>> from dscsnet_jax.physics.targets import from_lists
      >>> truth = from_lists([[(3.0, 2.6, 240.0), (3.1, 3.4, 200.0)]])
      >>> y = render(truth, frame_size=7, psf=0.5)
      >>> guess = from_lists([[(3.0, 3.0, 400.0)]], max_targets=3)
      >>> windows = observe(y, Sensor(read_noise=1.0, background=0.0))
      >>> answer = jax.jit(estimate)(windows, guess, Known(psf=Gaussian(0.5)), jax.random.key(0))
      >>> sorted(round(float(col), 1) for col in answer.posterior.targets.position[0, :2, 1])
      [2.6, 3.4]
    """
    selected = select(windows, start, known)
    posterior = sample(windows, selected.fit.targets, known, key)
    return Answer(selected.fit, selected.log_evidence, posterior)
