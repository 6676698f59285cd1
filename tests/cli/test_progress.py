"""Progress: drawn on a terminal, and nowhere else."""

import io
import sys
from typing import Any

import pytest

from dscsnet_jax.cli import progress
from dscsnet_jax.training import loop


class Screen(io.StringIO):
    """What a terminal would show."""

    def isatty(self) -> bool:
        return True


def draw() -> None:
    assert list(progress.tracked([1, 2, 3], "counting")) == [1, 2, 3]
    with progress.stage("thinking"):
        pass
    with loop._progress() as bar:
        bar.add_task("train", total=3, completed=2, note="loss 7")


@pytest.mark.parametrize("force", [None, "1"])
def test_nothing_is_drawn_where_stderr_is_no_terminal(
    force: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if force is not None:
        monkeypatch.setenv("FORCE_COLOR", force)
    draw()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_labels_and_counts(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    draw()
    for shown in ("counting", "thinking", "2/3", "loss 7"):
        assert shown in screen.getvalue()
    assert capsys.readouterr().out == ""
