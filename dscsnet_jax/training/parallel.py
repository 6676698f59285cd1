"""Parallel: the one seam between the pure step and the devices it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dscsnet_jax.training.step import Metrics, Step, TrainState

AXIS = "batch"


def data_parallel(
    make_step: Callable[[str | None], Step], devices: Sequence[jax.Device]
) -> tuple[Step, int]:
    """Compile a step for the given devices.

    On one device the step is jitted. On several, `jax.pmap` gives each its share of
    the frames' keys and averages the gradients; the state is the same everywhere.

    Args:
      make_step: builds the step for a mapped axis name, or for None.
      devices: what to run on.

    Returns:
      The compiled step, which takes (B,) keys of frames, and the number B must divide by.

    Raises:
      ValueError: if there is no device; the step raises it for a ragged batch.
    """
    if not devices:
        raise ValueError("no device to train on")
    if len(devices) == 1:
        compiled = jax.jit(make_step(None), donate_argnums=0)

        def single(state: TrainState, keys: jax.Array) -> tuple[TrainState, Metrics]:
            return compiled(*jax.device_put((state, keys), devices[0]))

        return single, 1
    everywhere = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    mapped = partial(jax.pmap, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)(
        make_step(AXIS)
    )

    def step(state: TrainState, keys: jax.Array) -> tuple[TrainState, Metrics]:
        if len(keys) % len(devices):
            raise ValueError(f"a batch of {len(keys)} does not divide by {len(devices)} devices")
        # The first state lies on one device; another layout would compile a second time.
        return mapped(jax.device_put(state, everywhere), keys.reshape(len(devices), -1))

    return step, len(devices)
