"""`dscsnet import-weights`: a published PyTorch checkpoint in, weights of ours out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dscsnet_jax.io.outputs import prepare_output
from dscsnet_jax.io.torch_checkpoint import read_initial_matrix, read_state
from dscsnet_jax.io.weights import Metadata, geometry_of, save_weights
from dscsnet_jax.physics.optics import sensing_operator
from dscsnet_jax.unfolding.baselines.published import import_state, matrix
from dscsnet_jax.unfolding.network import num_parameters
from dscsnet_jax.unfolding.registry import make_network


def run(args: argparse.Namespace) -> int:
    """Read, convert, write and print what it is."""
    if args.branch_weight is not None and args.method != "dista_net":
        raise ValueError(f"--branch-weight is of dista_net, not of {args.method}")
    prepare_output(args.out, force=args.force)
    state = read_state(args.checkpoint)
    initial = None if args.initial_matrix is None else read_initial_matrix(args.initial_matrix)
    operator = sensing_operator(args.frame_size, division=args.division, psf=args.sigma)
    fields = {} if args.branch_weight is None else {"branch_weight": args.branch_weight}
    make_network(args.method, **fields)  # what it refuses is no fault of the checkpoint
    if initial is not None:
        with _blamed(args.initial_matrix):
            matrix(initial, operator)
    with _blamed(args.checkpoint):
        network, params = import_state(args.method, state, operator, initial=initial, **fields)
    metadata = Metadata(
        method=args.method,
        config=dataclasses.asdict(network.config),
        geometry=geometry_of(operator),
        training={"imported_from": args.checkpoint.name},
    )
    save_weights(args.out, params, metadata, force=args.force)
    print(f"{args.method}: {num_parameters(params)} parameters\nweights: {args.out}")
    return 0


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Put a file's name in front of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
