"""Cells, columns and tables: each cell holds a text and the numbers behind it; and how numbers are written.

Markdown, HTML (`page`), the terminal and report.json all print the same table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dyndit.markdown import plain
from dyndit.stats import Interval


@dataclass(frozen=True)
class Cell:
    """A cell: its text, its sort key (number or text; NaN: no key), and the numbers behind the text."""

    text: str
    rank: float | str = math.nan
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of a report. derived: how its numbers follow from the raw rows."""

    name: str
    caption: str
    derived: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kinds: tuple[str, ...] = ()
    """Kind of each row: its family, if any. Rows of full depth are printed faint."""


TEXT_COLUMNS = (
    *("arm", "solver", "note", "family", "winner", "run", "machine", "metric", "settings", "best arm", "plan"),
    *("solver, steps", "quality", "quality unchanged", "rival in that time"),
)


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    value: str | Callable[[pd.Series], Any]
    """The frame's column of the values, or how to compute a value from a row: a number, an Interval, text; None."""
    show: Callable[[Any], str] = str
    text: Callable[[pd.Series], str] | None = None
    """Text of a row, if the value alone does not say it."""
    rank: Callable[[pd.Series], float] | None = None
    """Sort key of a row, if it is not the number as a float."""

    def cell(self, row: pd.Series) -> Cell:
        """Return the cell of a row of the frame; a dash for None."""
        value = row[self.value] if isinstance(self.value, str) else self.value(row)
        if value is None:
            return Cell("–")
        text = self.show(value) if self.text is None else self.text(row)
        if isinstance(value, str):
            return Cell(text, text)
        numbers = (value.mean, value.low, value.high) if isinstance(value, Interval) else (float(value),)
        return Cell(text, numbers[0] if self.rank is None else self.rank(row), numbers)


def filled(name: str, caption: str, derived: str, columns: Sequence[Column], frame: pd.DataFrame) -> Table:
    """Make a table of a row per row of the frame. A column that says nothing in any row is left out."""
    made = [(column.title, [column.cell(row) for _, row in frame.iterrows()]) for column in columns]
    made = [(title, cells) for title, cells in made if not cells or any(cell.text not in ("", "–") for cell in cells)]
    rows = tuple(zip(*(cells for _, cells in made), strict=True))
    return Table(name, caption, derived, tuple(title for title, _ in made), rows, tuple(frame.get("family", ())))


def number(value: float) -> str:
    """Write three digits, or all digits before the point; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def percent(value: float | Interval) -> str:
    """Write a share as percent, `38%` or `38 ± 2%`."""
    if isinstance(value, Interval):
        if math.isnan(value.mean) or math.isnan(value.low):
            return percent(value.mean)
        return f"{100 * value.mean:.0f} ± {100 * value.half:.0f}%"
    return "–" if math.isnan(value) else f"{value:.0%}"


def share(value: float) -> str:
    """Write two decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def saved_at_equal_fd(row: pd.Series) -> str:
    """Write the saving with its interval; "≥ 70%" if full depth never reaches this FD in its measured range."""
    if math.isnan(row["time_saved_at_least"]):
        return percent(row["time_saved_equal_fd"])
    return f"≥ {row['time_saved_at_least']:.0%}"


def yes(value: bool) -> str:
    """Write a truth value."""
    return "yes" if value else "no"


def heads(row: pd.Series) -> str:
    """Write the exit heads' multiply-accumulates, and their share of the denoiser's."""
    heads = row["macs_heads"]
    return "–" if math.isnan(heads) else f"{number(heads / 1e9)} ({heads / row['macs']:.0%})"


def negative(value: Interval) -> Interval:
    """Turn the interval of a - b into that of b - a."""
    return Interval(-value.mean, -value.high, -value.low)


def work(macs: float) -> str:
    """Write the denoiser's multiply-accumulates, and its floating-point operations (twice as many)."""
    return "–" if math.isnan(macs) else f"{number(macs / 1e9)} ({number(2 * macs / 1e9)})"


def between(interval: Interval) -> str:
    """Write `-0.52 [-0.61, -0.43]`; a dash for NaN."""
    if math.isnan(interval.mean):
        return "–"
    limits = "" if math.isnan(interval.low) else f" [{interval.low:+.2f}, {interval.high:+.2f}]"
    return f"{interval.mean:+.2f}{limits}"


def saved_between(row: pd.Series) -> str:
    """Write `38% [35%, 41%]`; `≥ 70%` if full depth never reaches this FD. `row.bootstrap` is of `against_full`."""
    found = row["bootstrap"]
    if found is None:
        return "–"
    saved = found["time_saved"]
    if saved.mean == math.inf:
        return f"≥ {found['saved_at_least']:.0%}" + ("" if math.isinf(saved.low) else f" [{saved.low:.0%}, beyond]")
    if not math.isfinite(saved.mean):
        return "–"
    limits = ["beyond" if math.isinf(limit) else f"{limit:.0%}" for limit in (saved.low, saved.high)]
    return f"{saved.mean:.0%}" + ("" if math.isnan(saved.low) else f" [{', '.join(limits)}]")


def as_markdown(table: Table) -> str:
    """Write a table as Markdown."""
    lines = [list(map(plain, table.columns)), ["---" if name in TEXT_COLUMNS else "---:" for name in table.columns]]
    lines += [[plain(cell.text) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
