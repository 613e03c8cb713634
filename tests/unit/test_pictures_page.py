"""docs/pictures.md: every test that the page names exists, and every row of its tables of files names one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pictures.md").read_text()


def test_every_row_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 30
    for path, name in named:
        assert name == "" or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
    tables = re.findall(r"^\|(.+)\|\n\|[-|]+\|\n((?:\|.+\|\n)+)", PAGE, re.MULTILINE)
    for heading, rows in tables:
        if heading.split("|")[-1].strip() == "test":
            assert all("`tests/" in row for row in rows.splitlines()), rows
