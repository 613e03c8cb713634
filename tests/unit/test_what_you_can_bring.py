"""docs/what-you-can-bring.md: every row of its tables names a test that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "what-you-can-bring.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows() -> list[tuple[str, str]]:
    """The first and the last cell of every row, without headings."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    return [
        (row[0].strip(), row[-1].strip()) for row in cells if row[0].strip() != "what" and not set(row[0]) <= set("-: ")
    ]


@pytest.mark.parametrize(("what", "test"), rows())
def test_every_row_has_a_test(what: str, test: str) -> None:
    named = TEST.findall(test)
    assert named, f"{what}: names no test"
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (
            f"{file}: {function}"
        )


def test_there_are_rows() -> None:
    assert len(rows()) > 30
