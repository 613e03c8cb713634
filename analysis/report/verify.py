"""Check a written report against the raw rows: compute every table cell and finding again and compare."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from dyndit import seals
from dyndit.analysis.report.contents import answer_record, contents_of, overview, table_record
from dyndit.analysis.report.headline import SPEED
from dyndit.analysis.report.write import REPORT
from dyndit.errors import InputError
from dyndit.files import read_json, sha256
from dyndit.markdown import as_plain


@dataclass
class Printed:
    """A section as printed in a file: findings, and tables as rows of texts, the heading row first."""

    title: str
    findings: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)
    """The tables with their numbers, in report.json."""


def verify(report: Path) -> list[str]:
    """Return a line for each number of a report that does not follow from the raw rows; an empty list: all is well.

    report: the folder, or any file of `write_report` in it. report.json names the raw rows, relative to itself. Compare
    the numbers in report.json, report.md and report.html, and the hashes of the runs and figures.
    Raises InputError: report.json is missing or unreadable, or its runs are missing.
    """
    report = Path(report)
    folder = report if report.is_dir() else report.parent
    try:
        return _mismatches(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{folder / REPORT}: damaged (lacks {error}); expected a report of this version") from error


def _mismatches(folder: Path) -> list[str]:
    """Do what `verify` does. A damaged record may raise any error of a missing field."""
    record = _load(folder / REPORT)
    try:
        sources = [folder / source["runs"] for source in record["sources"]]
        hashes, margin = [source["sha256"] for source in record["sources"]], float(record["margin"])
        answer = record["answer"]
        stored = [_printed(answer.get("title", SPEED), answer["findings"], answer["tables"])]  # earlier: of plans only
        stored.append(_printed("Runs", [], [record["overview"]]))
        stored += [_printed(part["title"], part["findings"], part["tables"]) for part in record["sections"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / REPORT}: lacks {error}, expected a report of this version") from error
    contents = contents_of(sources, margin)
    first = answer_record(contents, margin)
    expected = [_printed(first["title"], first["findings"], first["tables"])]
    expected.append(_printed("Runs", [], [table_record(overview(contents))]))
    expected += [_printed(part.title, part.findings, list(map(table_record, part.tables))) for part in contents]
    wrong = [
        f"{source}: not the file that was reported (SHA-256 differs)"
        for source, known in zip(sources, hashes, strict=True)
        if sha256(source) != known
    ]
    wrong += [*_differing(REPORT, stored, expected), *_differing_numbers(stored, expected)]
    readers = {"report.md": read_markdown, "report.html": read_html}
    there = [name for name in readers if (folder / name).is_file()]
    if not there:
        raise InputError(f"{folder}: neither report.md nor report.html, expected one at least")
    for name in there:  # an archived report may lack its page, which is large
        wrong += _differing(name, readers[name]((folder / name).read_text(encoding="utf-8")), expected)
    wrong += _differing_figures(folder)
    return wrong or _edited(folder, record)


def _edited(folder: Path, report: dict) -> list[str]:
    """Compare the report and the figures' manifests with their checksums. Older files have none."""
    records = {REPORT: report} | {path.name: _load(path) for path in sorted(folder.glob("*.manifest.json"))}
    found = []
    for name, data in records.items():
        try:
            seals.unsealed(folder / name, data, needed=False)
        except InputError as error:
            found.append(str(error))
    return found


def _load(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected what `dyndit report` wrote")
    return read_json(path)


def _printed(title: str, findings: list[str], records: list[dict]) -> Printed:
    """Make a section of `table_record`s."""
    tables = [[r["columns"], *([cell["text"] for cell in row] for row in r["rows"])] for r in records]
    return Printed(title, findings, tables, records)


def _differing_numbers(stored: Sequence[Printed], expected: Sequence[Printed]) -> Iterator[str]:
    """Compare the numbers behind equal texts in report.json, to 1e-9 of their size."""
    for old_part, new_part in zip(stored, expected, strict=False):
        for old, new in zip(old_part.records, new_part.records, strict=False):
            for old_row, new_row in zip(old["rows"], new["rows"], strict=False):
                for name, found, cell in zip(new["columns"], old_row, new_row, strict=False):
                    if found["text"] == cell["text"] and not _same(found["values"], cell["values"]):
                        where = f"{REPORT}, {new['name']}, {new_row[0]['text']}, {name}"
                        yield f"{where}: {found['values']}, recomputed {cell['values']}"


def _same(a: Sequence, b: Sequence) -> bool:
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) if isinstance(x, float) and isinstance(y, float) else x == y
        for x, y in zip(a, b, strict=True)
    )


def _differing(file: str, printed: Sequence[Printed], expected: Sequence[Printed]) -> Iterator[str]:
    """Compare titles, findings and cells as printed."""
    for found, section in zip(printed, expected, strict=False):
        if found.title != section.title:
            yield f"{file}: section '{found.title}', recomputed '{section.title}'"
        for old, new in zip(found.findings, section.findings, strict=False):
            if old != new:
                yield f"{file}, finding: '{old}', recomputed '{new}'"
        if len(found.findings) != len(section.findings):
            yield f"{file}, {section.title}: {len(found.findings)} findings, recomputed {len(section.findings)}"
        for old, new in zip(found.tables, section.tables, strict=False):
            for old_row, new_row in zip(old, new, strict=False):
                for name, text, cell in zip(new[0], old_row, new_row, strict=False):
                    if text != cell:
                        yield f"{file}, {new_row[0]}, {name}: '{text}', recomputed '{cell}'"
            if list(map(len, old)) != list(map(len, new)):
                yield f"{file}, table of {new[0][0]}: {len(old) - 1} rows, recomputed {len(new) - 1}, or missing cells"
        if len(found.tables) != len(section.tables):
            yield f"{file}, {section.title}: {len(found.tables)} tables, recomputed {len(section.tables)}"
    if len(printed) != len(expected):
        yield f"{file}: {len(printed)} sections, recomputed {len(expected)}"


def _differing_figures(folder: Path) -> Iterator[str]:
    """Compare the figures with the hashes in their manifests. Each figure needs at least one file."""
    for path in sorted(folder.glob("*.manifest.json")):
        files = _load(path)["files"]
        there = [name for name in files if (folder / name).is_file()]
        if not there:
            yield f"{folder / path.name}: its figure is missing ({', '.join(files)})"
        for name in there:
            if sha256(folder / name) != files[name]:
                yield f"{folder / name}: not the figure that {path.name} describes (SHA-256 differs)"
        for drawn in (of for of in [_load(path).get("exit errors")] if of):
            if (folder / drawn["file"]).is_file() and sha256(folder / drawn["file"]) != drawn["sha256"]:
                yield f"{folder / drawn['file']}: not the errors that {path.name} describes (SHA-256 differs)"


def read_markdown(text: str) -> list[Printed]:
    """Read the sections of report.md, without manifests."""
    sections, in_table = [], False
    for line in text.splitlines():
        if line.startswith("## "):
            sections.append(Printed(as_plain(line[3:])))
        elif line.startswith("- ") and sections:
            sections[-1].findings.append(as_plain(line[2:]))
        elif line.startswith("**") and line.endswith("**") and sections:
            sections[-1].findings.append(as_plain(line[2:-2]))
        elif line.startswith("|") and sections:
            if not in_table:
                sections[-1].tables.append([])
            cells = [as_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(re.fullmatch(r"-+:?", cell) for cell in cells):
                sections[-1].tables[-1].append(cells)
        in_table = line.startswith("|")
    return [section for section in sections if not section.title.startswith("Manifest of ")]


def read_html(text: str) -> list[Printed]:
    """Read the sections of report.html, without manifests."""
    reader = _Reader()
    reader.feed(text)
    return reader.sections


class _Reader(HTMLParser):
    """A parser that collects headings, findings and sortable tables."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[Printed] = []
        self._text: list[str] | None = None
        self._sorts = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._sorts = ("class", "sort") in attrs
            if self._sorts:
                self.sections[-1].tables.append([])
        elif tag == "tr" and self._sorts:
            self.sections[-1].tables[-1].append([])
        elif tag in ("h2", "li") or (tag in ("td", "th") and self._sorts) or tag == "em":
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._sorts = False
        if self._text is None or tag not in ("h2", "li", "em", "td", "th"):
            return
        text, self._text = "".join(self._text), None
        if tag == "h2":
            self.sections.append(Printed(text))
        elif tag in ("li", "em"):
            self.sections[-1].findings.append(text)
        else:
            self.sections[-1].tables[-1][-1].append(text)

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)
