"""The page of promises is made from the marks."""

import re
from collections import Counter
from pathlib import Path

import pytest

from support.reliability import PAGE, Row, page, passed, rows


def test_the_page_is_current() -> None:
    """Every mark has its row, and every row its mark; `make reliability` writes the page."""
    written = Counter(re.findall(r"^\| (.+) \| `(\w+)` \| [1-9]\d* \|$", PAGE.read_text(), re.MULTILINE))
    assert written == Counter((row.promise, row.test) for row in rows())


@pytest.mark.parametrize("tag", ["", "<failure/>", "<error/>", "<skipped/>"])
def test_only_tests_that_passed_count(tmp_path: Path, tag: str) -> None:
    junit = tmp_path / "junit.xml"
    case = '<testcase classname="tests.test_a" name="test_x[{}]">{}</testcase>'
    junit.write_text(f"<testsuites><testsuite>{case.format(1, '')}{case.format(2, tag)}</testsuite></testsuites>")
    assert passed(junit) == ({} if tag else {("tests.test_a", "test_x"): 2})
    row = Row("all is well", "tests/test_a.py", "test_x", "Things")
    assert "| all is well | `test_x` | 2 |" in page([row], {row.key: 2})
