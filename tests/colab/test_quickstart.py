"""The notebook runs from top to bottom as it is committed, and shows what it promises."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from dscsnet_jax.physics import scene

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "colab" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Outputs of every code cell, by the cell's id, of one run in a kernel of this Python."""
    home = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        # A user's own kernel named python3, or settings, would come before this environment's.
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name.lower()))
        patch.delenv("JUPYTER_PATH", raising=False)
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's notes would mix with the outputs
        notebook = read()
        first = nbformat.v4.new_code_cell("import sys; print(sys.executable)", id="python")
        notebook.cells.insert(0, first)
        where = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def printed(outputs: dict[str, list[Any]], cell: str) -> str:
    return "".join(o.text for o in outputs[cell] if o.output_type == "stream")


def targets_of(lines: list[str]) -> np.ndarray:
    """Row, its error, col, its error, counts, their error of each target printed."""
    pattern = r"row (\S+) \+- (\S+), col (\S+) \+- (\S+), (\S+) \+- (\S+) counts, \w+"
    found = [re.fullmatch(pattern, line) for line in lines]
    return np.array([[float(number) for number in match.groups()] for match in found if match])


def test_it_is_committed_without_outputs() -> None:
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_it_calls_public_names_only() -> None:
    code = "\n".join(cell.source for cell in read().cells if cell.cell_type == "code")
    modules = re.findall(r"^from (dscsnet_jax\S*) import (.+)$", code, re.MULTILINE)
    assert len(modules) >= 5
    names = ".".join(f"{module}.{name}" for module, name in modules)
    assert not re.search(r"[.,]\s*_", names)
    assert not re.search(r"\w\._[a-z]", code)


def test_the_kernel_is_this_python_and_installs_nothing(outputs: dict[str, list[Any]]) -> None:
    assert printed(outputs, "python").strip() == sys.executable
    assert outputs["install"] == []


def test_the_device_is_printed(outputs: dict[str, list[Any]]) -> None:
    assert re.fullmatch(r"JAX \d+\.\S+ on \S.*\n", printed(outputs, "device"))


def test_targets_are_printed_with_their_errors(outputs: dict[str, list[Any]]) -> None:
    found = targets_of(printed(outputs, "unmix").splitlines())
    draw = jax.jit(
        partial(scene.simulate, scene.get_preset("csist")),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    split = draw(scene.frame_keys(0, "test", np.arange(1)))
    true = np.asarray(split.targets.position[0])[np.asarray(split.targets.mask[0])]
    assert len(found) == len(true) > 0
    for place in true:
        assert np.abs(found[:, (0, 2)] - place).max(1).min() < 0.1


def test_the_scores_are_printed_and_above_their_floors(outputs: dict[str, list[Any]]) -> None:
    lines = printed(outputs, "floor").splitlines()
    pattern = r"(\w+): CSO-mAP (\d+\.\d+) over (\d+) frames \(floor (\d+\.\d+)\)"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [m and m[1] for m in found] == ["grid", "offgrid"]
    table = printed(outputs, "score")
    for match in found:
        assert match is not None
        assert int(match[3]) == 200
        assert 100 >= float(match[2]) >= float(match[4])
        assert re.search(rf"^{match[1]} +{match[2]} ", table, re.MULTILINE)
    assert found[1] is not None
    assert float(found[1][4]) == 90


def test_the_picture_is_shown(outputs: dict[str, list[Any]]) -> None:
    (picture,) = outputs["picture"]
    assert picture.output_type == "execute_result"
    # Only an image of some content takes this many bytes, base64-encoded.
    assert len(picture.data["image/png"]) > 20_000


def test_the_hand_made_pair_is_found_within_its_errors(outputs: dict[str, list[Any]]) -> None:
    first, *rows = printed(outputs, "own").splitlines()
    assert first.startswith("found 2 targets; noise ")
    assert float(first.split()[4]) == pytest.approx(0.5, abs=0.1)
    found = targets_of(rows)
    found = found[np.argsort(found[:, 0])]
    true = np.array([(5.8, 9.2, 230.0), (6.2, 8.8, 240.0)])
    error, std = np.abs(found[:, ::2] - true), found[:, 1::2]
    assert (std[:, :2] < 0.05).all()
    assert (error < 4 * std + (5e-4, 5e-4, 0.5)).all()  # the digits printed


def test_the_gradient_agrees_with_the_finite_difference(outputs: dict[str, list[Any]]) -> None:
    numbers = re.search(r"gradient (\S+), finite difference (\S+)", printed(outputs, "gradient"))
    assert numbers is not None
    gradient, difference = map(float, numbers.groups())
    assert gradient > 10  # the assumed sigma is too large, and the derivative says so
    assert gradient == pytest.approx(difference, rel=0.05)


def test_the_implicit_derivative_agrees_with_the_finite_difference(
    outputs: dict[str, list[Any]],
) -> None:
    pattern = r"(\w+) target: (\S+), finite difference (\S+)"
    found = re.findall(pattern, printed(outputs, "implicit"))
    assert [name for name, _, _ in found] == ["first", "second"]
    slopes, checks = np.array([[float(x) for x in numbers] for _, *numbers in found]).T
    assert np.abs(slopes).min() > 0.1  # a step of 0.02 resolves it
    np.testing.assert_allclose(slopes, checks, rtol=0.02, atol=5e-3)
