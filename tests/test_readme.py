"""The README's Python runs, and its install lines are the ones CI uses."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dscsnet_jax
from dscsnet_jax.estimation.unmix import unmix
from dscsnet_jax.inference.known import Known
from dscsnet_jax.physics import scene
from dscsnet_jax.physics.optics import render
from dscsnet_jax.physics.psf_tables import empirical
from dscsnet_jax.physics.targets import Targets

pytestmark = pytest.mark.slow

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At most two targets a frame, and programs that compile fast: each runs once."""
    whole = scene.get_preset

    def light_preset(name: str, **changes: Any) -> scene.Preset:
        return whole(name, max_targets=2, **changes)

    # The package first: it keeps what it has loaded, which is then the room's own again.
    for module in (dscsnet_jax, scene):
        monkeypatch.setattr(module, "get_preset", light_preset)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def python_block(word: str) -> str:
    """The one that holds a word."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return found


@pytest.mark.usefixtures("light")
def test_first_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = python_block("np.arange(500)")
    assert len(block.strip().splitlines()) <= 10
    exec(compile(block.replace("np.arange(500)", "np.arange(32)"), "README.md", "exec"), {})
    score = float(capsys.readouterr().out.split()[-1])
    assert 90 < score <= 100


@pytest.mark.usefixtures("light")
def test_python_block_of_other_optics_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = (np.arange(33) - 16) / 4
    array = np.exp(-(place[:, None] ** 2 / 0.4 + (place[None] - 0.3 * place[:, None]) ** 2 / 0.7))
    places = np.array([[5.2, 4.8]])
    truth = Targets(places[None], np.full((1, 1), 300.0), np.ones((1, 1), bool))
    frames = render(truth, frame_size=11, psf=empirical(array, oversampling=4))
    frames = np.asarray(frames) + np.random.default_rng(0).normal(0, 2, (1, 11, 11))
    monkeypatch.setattr(dscsnet_jax, "unmix", partial(unmix, estimate="map"))
    monkeypatch.chdir(tmp_path)
    told = {"array": array, "frames": frames}
    with pytest.warns(UserWarning, match="starts from detection"):
        exec(compile(python_block("dj.empirical"), "README.md", "exec"), told)
    assert told["answer"].targets.count.tolist() == [1]
    np.testing.assert_allclose(told["answer"].targets.position[0, :1], places, atol=0.03)
    again = Known.from_json("sensor.json")
    for a, b in zip(jax.tree.leaves(told["known"]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_one_line_sets_everything_up(name: str) -> None:
    text = README.read_text("utf-8")
    block = re.search(rf"<!-- {name}:begin -->\n```sh\n(.*?)\n```\n<!-- {name}:end -->", text)
    assert block is not None
    assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install ")
