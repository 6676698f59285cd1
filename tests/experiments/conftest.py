"""The scripts of `experiments/` are imported as they import each other: by bare names."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))


@pytest.fixture
def quick_compilation(quick_compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no programs on disk as well."""
    import budget

    monkeypatch.setattr(budget, "keep_compilations", lambda _: None)
