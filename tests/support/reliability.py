"""Build docs/reliability.md from the tests marked `@pytest.mark.reliability("what is promised")`.

    python -m pytest -m reliability --junitxml=build/reliability.xml && python tests/support/reliability.py

The page has a row per mark. It is written only if every marked test passed in that run.
"""

import ast
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, JUNIT = ROOT / "docs" / "reliability.md", ROOT / "build" / "reliability.xml"

INTRO = """# Reliability

What holds when machines die, disks fill and files are damaged. Each row is a promise and the test that shows it, with
the number of cases that passed. `make reliability` runs these tests and writes this page, which nobody edits by hand.
"""


@dataclass(frozen=True)
class Row:
    """A promise.  file: the test's, relative to the root. section: from the file's docstring."""

    promise: str
    file: str
    test: str
    section: str

    @property
    def key(self) -> tuple[str, str]:
        """Return the test as junit names it: ("tests.unit.test_files", "test_x")."""
        return self.file.removesuffix(".py").replace("/", "."), self.test


def rows() -> list[Row]:
    """Return the rows of all marks, by file and line. Nothing is imported."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(text) if "mark.reliability(" in (text := path.read_text()) else ast.Module([], [])
        section = (ast.get_docstring(tree) or path.stem).splitlines()[0].partition(":")[0].partition(";")[0].rstrip(".")
        for node in tree.body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.reliability":
                    promise = ast.literal_eval(mark.args[0])
                    found.append(Row(promise, path.relative_to(ROOT).as_posix(), node.name, section))
    return found


def passed(junit: Path) -> Counter[tuple[str, str]]:
    """Count the cases of each test that passed. A test with a case that did not pass counts as 0."""
    counts: Counter[tuple[str, str]] = Counter()
    bad = set()
    for case in ET.parse(junit).getroot().iter("testcase"):
        key = (case.attrib["classname"], case.attrib["name"].partition("[")[0])
        counts[key] += 1
        if {child.tag for child in case} & {"failure", "error", "skipped"}:
            bad.add(key)
    return Counter({key: count for key, count in counts.items() if key not in bad})


def page(of: list[Row], cases: Mapping[tuple[str, str], int]) -> str:
    """Return the page's text."""
    lines, section = [INTRO], None
    for row in of:
        if row.section != section:
            section = row.section
            lines.append(f"## {section}\n\n[`{row.file}`](../{row.file})\n\n| promise | test | cases |\n|---|---|---|")
        last = row is of[-1] or of[of.index(row) + 1].section != section
        lines.append(f"| {row.promise} | `{row.test}` | {cases[row.key]} |" + "\n" * last)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page, or say which marked tests did not pass."""
    marked, cases = rows(), passed(JUNIT)
    if missing := [f"{row.file}::{row.test}" for row in marked if not cases[row.key]]:
        sys.exit("not passed: " + ", ".join(missing))
    PAGE.write_text(page(marked, cases))


if __name__ == "__main__":
    main()
