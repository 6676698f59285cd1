"""Strict mode for every test, and the fixtures several rooms share.

Warnings are errors, ranks are never promoted in silence.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")

_CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def x64() -> Iterator[None]:
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Small oracle files the tests compare against."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What takes the place of the user's folder of caches."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cache(cache_home: Path) -> Iterator[Path]:
    """Where `dscsnet` keeps compilations; JAX's settings are put back after each module."""
    before = {name: getattr(jax.config, name) for name in _CACHE}
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield cache_home / "dscsnet_jax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
