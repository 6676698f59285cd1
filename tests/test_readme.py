"""The README's Python runs, and its install lines are the ones CI uses."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) <= 10
    exec(compile(blocks[0], "README.md", "exec"), {})
    score = float(capsys.readouterr().out.split()[-1])
    assert 53.5 < score < 100


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_one_line_sets_everything_up(name: str) -> None:
    text = README.read_text("utf-8")
    block = re.search(rf"<!-- {name}:begin -->\n```sh\n(.*?)\n```\n<!-- {name}:end -->", text)
    assert block is not None
    assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install ")
