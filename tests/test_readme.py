"""The README's Python runs, and its install lines are the ones CI uses."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from dscsnet_jax.physics import scene

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At most two targets a frame, and programs that compile fast: each runs once."""
    whole = scene.get_preset

    def light_preset(name: str, **changes: Any) -> scene.Preset:
        return whole(name, max_targets=2, **changes)

    monkeypatch.setattr(scene, "get_preset", light_preset)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("light")
def test_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) <= 10
    assert blocks[0].count("np.arange(500)") == 1
    fewer = blocks[0].replace("np.arange(500)", "np.arange(32)")
    exec(compile(fewer, "README.md", "exec"), {})
    score = float(capsys.readouterr().out.split()[-1])
    assert 90 < score <= 100


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_one_line_sets_everything_up(name: str) -> None:
    text = README.read_text("utf-8")
    block = re.search(rf"<!-- {name}:begin -->\n```sh\n(.*?)\n```\n<!-- {name}:end -->", text)
    assert block is not None
    assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install ")
