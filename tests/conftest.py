"""Strict mode for every test, and the fixtures several rooms share.

Warnings are errors, ranks are never promoted in silence. All processes of a run share the
programs that one of them compiled.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Compiled in two thirds of the time; who sets flags has the programs that users have.
_QUICKER = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
if "XLA_FLAGS" not in os.environ:
    _asked = {**os.environ, "XLA_FLAGS": _QUICKER, "JAX_PLATFORMS": "cpu"}
    _start = [sys.executable, "-c", "import jax; jax.devices()"]  # unknown flags abort a process
    _known = subprocess.run(_start, env=_asked, capture_output=True).returncode == 0
    os.environ["XLA_FLAGS"] = _QUICKER if _known else _QUICKER.split()[0]
if "DSCSNET_JAX_TEST_CACHES" not in os.environ:  # set: kept from run to run
    _home = tempfile.mkdtemp(prefix="dscsnet_jax_tests_")
    atexit.register(shutil.rmtree, _home, ignore_errors=True)
    os.environ["DSCSNET_JAX_TEST_CACHES"] = _home
CACHE_HOME = Path(os.environ["DSCSNET_JAX_TEST_CACHES"])
_SETTINGS = {
    "jax_numpy_rank_promotion": "raise",
    "jax_compilation_cache_dir": str(CACHE_HOME / "dscsnet_jax"),
    # With a limit JAX locks its files, against half-written ones.
    "jax_compilation_cache_max_size": 8 * 2**30,
}
for _name, _value in _SETTINGS.items():
    jax.config.update(_name, _value)
    if "cache" in _name:  # for processes that tests start
        os.environ[_name.upper()] = str(_value)

_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 20_000  # Linux aborts a process that has 65,530; a program takes about a hundred
_SLOW_ROOMS = ("estimation", "inference", "unfolding")  # whose examples compile large programs
_CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples of the rooms that compile large programs are slow."""
    package = Path(__file__).parents[1] / "dscsnet_jax"
    for item in items:
        if item.path.parent in [package / room for room in _SLOW_ROOMS]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs before they take more mappings of memory than a process may have."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compile in a third of the time: the programs of a module run a few times only."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64() -> Iterator[None]:
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Small oracle files the tests compare against."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """Where `dscsnet` keeps compilations; JAX's settings are put back after each module."""
    before = {name: getattr(jax.config, name) for name in _CACHE}
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(CACHE_HOME))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield CACHE_HOME / "dscsnet_jax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
