"""The scripts of `experiments/` are imported as they import each other: by bare names."""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))


@pytest.fixture
def quick_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile in a third of the time, and keep no programs on disk."""
    import budget

    monkeypatch.setattr(budget, "keep_compilations", lambda _: None)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
