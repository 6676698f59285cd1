"""Command line: one thin module a verb; parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import dscsnet_jax
from dscsnet_jax.cli import verbs

VERBS = {
    "simulate": "make a set of frames with their truth",
    "train": "train a network on scenes simulated on the fly",
    "evaluate": "score a method on a set of frames with truth",
    "unmix": "tell the targets of your frames apart",
    "calibrate": "learn from your frames what sensor and scenes they have in common",
    "known": "show or check what is known of a sensor and its scenes",
    "import-weights": "make weights of a published PyTorch checkpoint",
    "demo": "simulate, unmix, score and draw a picture",
    "info": "print versions, devices, cache folder and weights",
}
STOPPED = 130
"""Exit code of a run that a signal stopped."""

_FAILED, _BAD_INPUT, _CLOSED_PIPE = 1, 2, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dscsnet VERB ...`.

    Args:
      argv: arguments without the program's name; default: those of the process.

    Returns:
      Exit code: 0 on success only, 2 for bad input or output, 130 when stopped by a
      signal, 141 when the reader of standard output went away, 1 for other failures.

    Raises:
      SystemExit: from argparse, for `--help` (0) and wrong usage (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" not in arguments:
        # On some CPUs XLA logs an error for each cached program (jax-ml/jax #38445) and
        # compiles it anew; it reads this when JAX is imported, which a verb does.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = _parser().parse_args(arguments)
    run = importlib.import_module(f"{__name__}.{args.verb.replace('-', '_')}").run
    _keep_compilations()
    try:
        with _notes():
            code = run(args)
        sys.stdout.flush()  # a full disk or a closed pipe is no success
        return code
    except KeyboardInterrupt:
        print(f"dscsnet {args.verb}: interrupted", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        return _CLOSED_PIPE
    except (ValueError, OSError, ImportError) as error:
        return _report(error, args, _BAD_INPUT)
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        return _report(error, args, _FAILED)
    finally:
        _settle_stdout()


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What the library warns of is a note for whoever runs a verb."""
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=UserWarning, module=re.escape(__name__))
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        yield


def _report(error: Exception, args: argparse.Namespace, code: int) -> int:
    """One clear line, with the traceback only if asked for."""
    if args.debug:
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    print(f"dscsnet {args.verb}: error: {message}", file=sys.stderr)
    return code


def _settle_stdout() -> None:
    """Drop output that cannot be written: Python would fail on it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    """All verbs with their arguments; what they do is imported when one is run."""
    parser = argparse.ArgumentParser(
        prog="dscsnet",
        description="Tell closely spaced infrared point targets apart.",
        epilog="example: dscsnet demo",
        formatter_class=_front_page,
    )
    version = f"dscsnet {dscsnet_jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        verb = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        getattr(verbs, name.replace("-", "_"))(verb)
    return parser


def _front_page(prog: str) -> argparse.HelpFormatter:
    """Help with all verbs beside their summaries: argparse forgets that verbs are indented."""
    formatter = argparse.HelpFormatter(prog, max_help_position=28)
    formatter._action_max_length = max(map(len, VERBS)) + 4
    return formatter


def _keep_compilations() -> None:
    """Keep compiled programs on disk, so that a second start is fast.

    A folder the user named (JAX_COMPILATION_CACHE_DIR) is respected; one that cannot be
    written only costs the time.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "dscsnet_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds programs to be run
    except (OSError, RuntimeError):  # Path.home() where nobody is at home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
