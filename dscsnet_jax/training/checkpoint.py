"""Checkpoint: save and restore the training state with Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dscsnet_jax.training.step import TrainState


class Checkpoints:
    """Checkpoints of one run: `workdir/checkpoints/<step>/`.

    Orbax writes a step under a temporary name and renames it when it is complete, so a
    kill during a save leaves the step before as the latest.

    Args:
      workdir: the run's folder.
      keep: number of newest steps kept.
    """

    def __init__(self, workdir: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        folder = (Path(workdir) / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Save the state under its own step, and wait until it is on disk."""
        step = int(state.step)
        if step != self.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)))
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """Restore the newest step into the structure of `like`.

        Args:
          like: a state of the same network and optimiser.

        Returns:
          The restored state.

        Raises:
          ValueError: if there is no checkpoint, or it does not fit `like`.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError("there is no checkpoint to restore")
        folder = self._manager.directory / str(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        try:
            differ = _differences(self._manager.item_metadata(step).tree, abstract)
            if not differ:
                found = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # what a damaged file raises is up to its decoder
            raise ValueError(f"checkpoint {folder} cannot be read: {error}") from error
        if differ:
            more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
            raise ValueError(
                f"checkpoint {folder} is of another network or optimiser: "
                + ", ".join(differ[:3])
                + more
            )
        leaves = jax.tree.leaves(found["optimiser"])
        optimiser = jax.tree.unflatten(jax.tree.structure(like.optimiser), leaves)
        return TrainState(found["step"], found["params"], optimiser)

    def close(self) -> None:
        """Wait for pending saves and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    """Names on disk; the optimiser's tuples are stored as a numbered list of leaves."""
    leaves = jax.tree.leaves(state.optimiser)
    numbered = {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}
    return {"step": state.step, "params": state.params, "optimiser": numbered}


def _differences(stored: Any, wanted: Any) -> list[str]:
    """Leaves that only one of two trees has, or that differ in shape."""
    there, here = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, wanted)
    )
    return [
        f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    ]
