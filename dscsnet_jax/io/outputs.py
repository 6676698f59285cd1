"""Outputs: refuse, check and replace what is about to be written.

Writers fill a neighbour of the output and rename it at the end, so that a failure
leaves what was there before, never half a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def prepare_output(path: str | Path, *, force: bool = False, folder: bool = False) -> Path:
    """Check, before the work starts, that an output may and can be written.

    Missing parent folders (and the folder itself) are created.

    Args:
      path: the file or folder to be written.
      force: allow an existing file, or a folder that is not empty. Nothing is deleted
        here; the writer replaces what it writes and nothing else.
      folder: `path` is a folder.

    Returns:
      `path` as a `Path`.

    Raises:
      FileExistsError: if the output exists and `force` is false, or is no plain file
        (folder) at all.
      OSError: if nothing can be written there.

    Example:
      >>> with tempfile.TemporaryDirectory() as home:
      ...     prepare_output(f"{home}/new/targets.csv").name
      'targets.csv'
    """
    path = Path(path)
    kind = "folder" if folder else "file"
    exists = os.path.lexists(path)
    if exists and not (path.is_dir() if folder else path.is_file()):
        raise FileExistsError(f"output {path} exists and is not a {kind}")
    home = path if folder else path.parent
    try:
        occupied = exists and (not folder or any(path.iterdir()))
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"output {kind} {path} cannot be written ({error.strerror})"
        ) from error
    if occupied and not force:
        state = "exists and is not empty" if folder else "exists"
        raise FileExistsError(f"output {kind} {path} {state}; use force to replace it")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a neighbour of `path` to write to; rename it to `path` if all went well.

    Example:
      >>> with tempfile.TemporaryDirectory() as home:
      ...     target = Path(home, "a.txt")
      ...     with replacing(target) as partial:
      ...         _ = partial.write_text("done")
      ...     target.read_text(), len(os.listdir(home))
      ('done', 1)
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
