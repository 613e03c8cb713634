"""Compute what a report prints: a section per group of comparable rows, or per extractor of a claim."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dyndit.analysis.report.cells import Table
from dyndit.analysis.report.claim_tables import findings_of_claim, normalised, tables_of_claim
from dyndit.analysis.report.claims import claims_of, is_claim
from dyndit.analysis.report.findings import findings_of
from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.headline import Glance, glance_of, glance_table, named, shown_first
from dyndit.analysis.report.runs import GROUP, read_runs, runs_file, scored_rows
from dyndit.analysis.report.tables import settings_of, settings_table, tables_of
from dyndit.errors import InputError


@dataclass(frozen=True)
class Content:
    """The findings and tables of one group of comparable rows, all computed from the rows."""

    title: str
    findings: list[str]
    tables: list[Table]
    source: Path
    """The runs file; its folder also holds the plans, the manifest and the run's own figures."""
    rows: pd.DataFrame
    glance: Glance
    first_of_arms: bool
    """False: an earlier group has the same arms under another extractor."""
    first_of_run: bool
    claim: tuple[Path, ...] = ()
    """The runs files of a claim, whose calibrations are joined; empty: no claim."""

    @property
    def unit(self) -> str:
        """What the rows of an arm are, one each."""
        return "calibration" if self.claim else "seed block"


def contents_of(paths: Sequence[Path], margin: float) -> list[Content]:
    """Compute all printed contents of these runs from their rows. Raises InputError."""
    frames = [(runs_file(path), read_runs(path)) for path in paths]
    joined = [(source, runs) for source, runs in frames if is_claim(runs)]
    contents = list(_contents_of_claims(joined, margin)) if joined else []
    frames = [(source, runs) for source, runs in frames if not is_claim(runs)]
    groups = [(source, rows) for source, runs in frames for _, rows in runs.groupby(GROUP, sort=False)]
    groups = [(source, rows) for source, rows in groups if (rows["role"] == "score").any()]
    if not groups and not contents:  # plans are searched, but no arm is scored yet
        raise InputError(f"{paths[0]}: no row of role 'score', expected at least one")
    seen: set[object] = set()
    for source, rows in groups:
        arms = (source, *(str(rows[name].iloc[0]) for name in GROUP if name not in ("extractor", "metric")))
        contents.append(_content(source, rows, margin, arms not in seen, source not in seen))
        seen |= {arms, source}
    return contents


def lead_of(contents: Sequence[Content]) -> int:
    """Return the group that the first screen is about first: of a claim, else with plans to judge."""
    return 0 if contents[0].claim else shown_first([content.glance for content in contents])[0]


def answer(contents: Sequence[Content], margin: float) -> tuple[list[tuple[str, str]], Table]:
    """Return the first screen: sentence and detail of each group with plans, and the table of the best plans.

    Of claims: their sentences, and the goals of the first.
    """
    if claims := [content for content in contents if content.claim and content.findings]:
        said = [(sentence, "") for content in claims for sentence in content.findings]
        return said, claims[0].tables[0]
    glances = [content.glance for content in contents]
    found = named(glances, [scored_rows(content.rows) for content in contents])
    return list(zip(found[::2], found[1::2], strict=True)), glance_table(glances, margin)


def answer_record(contents: Sequence[Content], margin: float) -> dict[str, object]:
    """Return the first screen as JSON."""
    sentences, glance = answer(contents, margin)
    title = contents[lead_of(contents)].glance.heading
    findings = [text for both in sentences for text in both if text]
    return {"title": title, "findings": findings, "tables": [table_record(glance)] if glance.rows else []}


def overview(contents: Sequence[Content]) -> Table:
    """Return the table of groups: run, machine and settings of each."""
    return settings_table([scored_rows(content.rows) for content in contents])


def _content(source: Path, rows: pd.DataFrame, margin: float, first_of_arms: bool, first_of_run: bool) -> Content:
    first = scored_rows(rows).iloc[0]
    frame = summary(rows, margin)
    title = (
        f"{first['run']}: {first['model']} on {first['machine']}, {first['metric']}, {settings_of(scored_rows(rows))}, "
        f"{frame['blocks'].max()} seed blocks of {first['num_images']:g} pictures"
    )
    findings = findings_of(frame, rows, source.parent, margin, first=first_of_arms)
    tables, glance = tables_of(frame, rows, margin), glance_of(frame, rows, margin)
    return Content(title, findings, tables, source, rows, glance, first_of_arms, first_of_run)


def _contents_of_claims(joined: Sequence[tuple[Path, pd.DataFrame]], margin: float) -> Iterator[Content]:
    """Compute a section per claim and extractor. Calibrations stand where other sections have seed blocks."""
    sources = tuple(source for source, _ in joined)
    for claim in claims_of([runs for _, runs in joined], margin):
        for extractor in claim.extractors:
            rows = normalised(claim, extractor)
            first, findings = rows.iloc[0], findings_of_claim(claim, extractor)
            title = (
                f"claim: {first['model']} on {first['machine']}, {claim.point}, {first['metric']}, {claim.words} of "
            )
            glance = Glance(next(iter(findings), ""), "", pd.DataFrame({"family": []}), of_plans=True)
            title += f"{first['num_images']:g} pictures"
            tables = tables_of_claim(claim, extractor)
            yield Content(title, findings, tables, sources[0], rows, glance, False, False, sources)


def table_record(table: Table) -> dict[str, object]:
    """Turn a table into JSON: cells as printed, and the numbers behind them. NaN is null, infinities are text."""
    rows = [[{"text": cell.text, "values": list(map(_json_number, cell.values))} for cell in r] for r in table.rows]
    return {"name": table.name, "derived": table.derived, "columns": list(table.columns), "rows": rows}


def _json_number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
