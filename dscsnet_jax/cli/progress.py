"""Progress on stderr, where that is a terminal; results never mix with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")

RUN = 2048
"""Frames after which to report: many small runs would fill few blocks of windows."""


def tracked(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items, with a bar that counts them.

    Example:
      >>> sum(tracked([1, 2, 3], "adding"))
      6
    """
    console = Console(stderr=True)
    # The console calls anything a terminal where FORCE_COLOR is set.
    quiet = not sys.stderr.isatty()
    yield from track(items, label, console=console, disable=quiet, transient=True)


def stage(label: str) -> contextlib.AbstractContextManager[object]:
    """A note that is shown for as long as a piece of work takes.

    Example:
      >>> with stage("adding"):
      ...     print(1 + 1)
      2
    """
    shown = sys.stderr.isatty()
    return Console(stderr=True).status(label) if shown else contextlib.nullcontext()


def runs_of(frames: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut frames into runs of `size`; what is left over joins the last run.

    Args:
      frames: (B, N, M) counts.
      size: frames of a run.

    Returns:
      Runs of `size` .. `2 size - 1` frames; one shorter run if there are fewer frames.

    Example:
      >>> [len(run) for run in runs_of(np.zeros((8, 1, 1)), 3)]
      [3, 5]
    """
    return np.split(frames, range(size, len(frames) - size + 1, size))
