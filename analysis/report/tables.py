"""Make the tables of a report: each cell holds a text and the numbers behind it.

Markdown, HTML (`page`), the terminal and report.json all print the same table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table as TerminalTable

from dyndit.analysis.report import budgets
from dyndit.analysis.report.frontier import against_controls
from dyndit.analysis.report.runs import QUALITY, arm_name
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


TEXT_COLUMNS = ("arm", "solver", "note", "family", "winner", "run", "machine", "metric", "settings", "best arm")


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


def _filled(name: str, caption: str, derived: str, columns: Sequence[Column], frame: pd.DataFrame) -> Table:
    """Make a table of a row per row of the frame."""
    titles, kinds = tuple(column.title for column in columns), tuple(frame.get("family", ()))
    rows = tuple(tuple(column.cell(row) for column in columns) for _, row in frame.iterrows())
    return Table(name, caption, derived, titles, rows, kinds)


def _number(value: float) -> str:
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


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _saved_at_equal_fd(row: pd.Series) -> str:
    """Write the saving with its interval; "≥ 70%" if full depth never reaches this FD in its measured range."""
    if math.isnan(row["time_saved_at_least"]):
        return percent(row["time_saved_equal_fd"])
    return f"≥ {row['time_saved_at_least']:.0%}"


def _verdict(value: bool | None) -> str:
    return {None: "–", True: "yes", False: "no"}[value]


def _negative(value: Interval) -> Interval:
    return Interval(-value.mean, -value.high, -value.low)


def _work(macs: float) -> str:
    """Write the denoiser's multiply-accumulates, and its floating-point operations (twice as many)."""
    return "–" if math.isnan(macs) else f"{_number(macs / 1e9)} ({_number(2 * macs / 1e9)})"


def _between(interval: Interval) -> str:
    """Write `-0.52 [-0.61, -0.43]`; a dash for NaN."""
    if math.isnan(interval.mean):
        return "–"
    limits = "" if math.isnan(interval.low) else f" [{interval.low:+.2f}, {interval.high:+.2f}]"
    return f"{interval.mean:+.2f}{limits}"


def _saved_between(row: pd.Series) -> str:
    """Write `38% [35%, 41%]`; `≥ 70%` if full depth never reaches this FD."""
    saved = row["time_saved"]
    if saved.mean == math.inf:
        return f"≥ {row['saved_at_least']:.0%}" + ("" if math.isinf(saved.low) else f" [{saved.low:.0%}, beyond]")
    if not math.isfinite(saved.mean):
        return "–"
    limits = ["beyond" if math.isinf(limit) else f"{limit:.0%}" for limit in (saved.low, saved.high)]
    return f"{saved.mean:.0%}" + ("" if math.isnan(saved.low) else f" [{', '.join(limits)}]")


SIGNED = "{:+.2f}".format
ARM, SOLVER, MS = Column("arm", "arm"), Column("solver", "solver"), Column("ms per picture", "ms", _number)


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns of the arms; the terminal shows the first eight."""
    metric = frame["metric"].iloc[0] if len(frame) and frame["metric"].nunique() == 1 else "FD"
    return [
        ARM,
        SOLVER,
        Column("steps", "steps", rank=lambda r: r["steps"]),
        Column("share of blocks", "share_of_blocks", percent),
        MS,
        Column(f"{metric} ± 95%", "fd"),
        Column("time saved vs full depth", "time_saved", percent),
        Column(
            "time saved at equal FD",
            "time_saved_equal_fd",
            text=_saved_at_equal_fd,
            rank=lambda r: np.fmax(r["time_saved_equal_fd"].mean, r["time_saved_at_least"]),
        ),
        Column("FD − full depth, same steps", "fd_diff", SIGNED),
        Column("quality unchanged", lambda r: _verdict(r["unchanged"])),
        Column("FD − full depth, same time", "fd_diff_equal_time", SIGNED),
        Column("KID × 1000", "kid", lambda kid: _number(1e3 * kid)),
        Column("IS", "is", _number),
        Column("precision", "precision", _share),
        Column("recall", "recall", _share),
        Column("predicted ms", "predicted_ms", _number),
        Column("GMACs (GFLOPs) per picture", "macs", _work),
        Column("note", "note"),
    ]


NUM_TERMINAL, METRIC = 8, 5
# On 80 columns every heading above narrow figures has to break, except the arm's heading.
HEADINGS = {
    "share of blocks": "share of\nblocks",
    "ms per picture": "ms per\npicture",
    "time saved vs full depth": "saved\nvs full",
    "time saved at equal FD": "saved at\nequal FD",
}


def terminal_table(frame: pd.DataFrame) -> TerminalTable:
    """Turn the result of `frontier.summary` into the table that ends a run on the terminal."""
    columns = _columns(frame)[:NUM_TERMINAL]
    metric = columns[METRIC].title.removesuffix(" ± 95%")
    title = None if metric == "FD" else f"FD is {metric}"
    table = TerminalTable(title=title, header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        text = column.title in ("arm", "solver")
        heading = HEADINGS.get(column.title, "FD\n± 95%" if column.title.endswith("± 95%") else column.title)
        # On a narrow terminal the arm's name folds; figures never fold.
        table.add_column(heading, justify="left" if text else "right", no_wrap=column.title != "arm", overflow="fold")
    for _, row in frame.iterrows():
        short = arm_name(row["family"], "", "", row["budget"], row["settings"])  # solver and steps have columns here
        texts = [column.cell(row).text for column in columns[1:]]
        table.add_row(short, *texts, style="dim" if row["family"] == "full" else "")
    return table


def markdown_table(frame: pd.DataFrame) -> str:
    """Turn the result of `frontier.summary` into a Markdown table, with verdicts and notes."""
    return as_markdown(arms_table(frame))


def as_markdown(table: Table) -> str:
    """Write a table as Markdown."""
    lines = [list(map(plain, table.columns)), ["---" if name in TEXT_COLUMNS else "---:" for name in table.columns]]
    lines += [[plain(cell.text) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def arms_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `frontier.summary` into a row per arm."""
    empty = {name for name in QUALITY if frame[name].isna().all()}
    if (frame["note"] == "").all():
        empty.add("note")
    return _filled(
        "arms",
        "Every arm that was measured.",
        "frontier.summary of the rows of role score: medians of time, means of FD and paired differences over blocks",
        [column for column in _columns(frame) if column.value not in empty],
        frame,
    )


def against_full_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.against_full` into a row per arm except full depth."""
    return _filled(
        "against full depth",
        "Against full depth's frontier of the same solver, with bootstrap intervals over seed blocks: FD is averaged "
        "over the blocks before the frontier is read off. Limits that read 'beyond' lie outside full depth's measured "
        "range.",
        "budgets.against_full: block bootstrap of frontiers of mean FD, piecewise linear in log time",
        [
            ARM,
            SOLVER,
            MS,
            Column("time saved at equal FD [95%]", "time_saved", text=_saved_between),
            Column("FD − full depth at equal time [95%]", "fd_diff", _between),
        ],
        frame,
    )


def against_searched_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `frontier.against_controls` into a row per arm with a searched plan's steps and budget."""
    return _filled(
        "against the searched plan",
        "Every other arm that was made for the same solver, steps and budget of time: fixed schedules, variants, other "
        "routers. Its FD less the searched plan's, paired by block; its time over the searched plan's; better or worse "
        "where the 95% interval excludes 0.",
        "frontier.against_controls: paired differences of FD over blocks, median of the blocks' ratios of time",
        [
            Column("arm", "control"),
            SOLVER,
            Column("steps", "steps", "{:g}".format),
            Column("budget", "budget", "{:g}".format),
            Column("FD − searched plan ± 95%", lambda r: _negative(r["fd_diff"]), SIGNED),
            Column("verdict", lambda r: "worse" if r["better"] else "better" if r["worse"] else "–"),
            Column("time over searched plan's", lambda r: 1 / r["time_ratio"], "{:.2f}".format),
        ],
        frame,
    )


def areas_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.areas` into a row per solver and family."""
    return _filled(
        "areas",
        "Area between each family's frontier (best FD within a time) and full depth's of the same solver, over the "
        "log time that both cover; negative: the family is better. Bootstrap over seed blocks, the choice of arms "
        "included.",
        "budgets.areas: block bootstrap of the area between frontiers of mean FD without dominated arms, in log time",
        [
            SOLVER,
            Column("family", "family"),
            Column("arms", "arms"),
            Column("from ms", "from_ms", _number),
            Column("to ms", "to_ms", _number),
            Column("area, FD · ln ms [95%]", "area", _between),
            Column("mean FD difference [95%]", "fd_diff", _between),
        ],
        frame,
    )


def winners_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.winners` into a row per budget of time, a column per family."""
    families = dict.fromkeys(name for best in frame["best"] for name in best)
    return _filled(
        "winners",
        "The best arm within each budget of time, any solver: a column per family with its best FD. Margins against "
        "the second-best family are cross-fitted (arms picked in the other blocks) and paired by block; clear: the "
        "95% interval lies above 0.",
        "budgets.winners: arms with a median time within the budget, lowest mean FD of each family",
        [
            Column("budget, ms", "budget_ms", "{:g}".format),
            Column("winner", "winner"),
            Column("best arm", "arm"),
            Column("margin ± 95%", "margin", SIGNED),
            Column("clear", lambda r: _verdict(bool(r["clear"]))),
            *(Column(f, lambda r, f=f: r["best"].get(f, (None, None))[1], "{:.2f}".format) for f in families),
        ],
        frame,
    )


def settings_table(groups: list[pd.DataFrame]) -> Table:
    """List run, machine and settings of each group.  groups: the raw rows of each."""
    counted = [
        rows.iloc[0].to_dict()
        | {"settings": settings_of(rows), "arms": rows["arm"].nunique(), "blocks": rows["block"].nunique()}
        for rows in groups
    ]
    return _filled(
        "runs",
        "What was measured where. Nothing is averaged or compared across these rows.",
        "the labels of the raw rows, and how many there are",
        [
            *(Column(name, name) for name in ("run", "machine", "metric", "settings", "arms", "blocks")),
            Column("pictures per block", "num_images", "{:g}".format),
        ],
        pd.DataFrame(counted).drop(columns="family"),
    )


def settings_of(rows: pd.DataFrame) -> str:
    """List a group's known settings: guidance, precision, compilation, threads and batch size."""
    first = rows.iloc[0]
    parts = [f"CFG {first['cfg_scale']:g}", first["dtype"], first["compiled"]]
    parts += [f"{first[name]} {name.replace('_', ' ')}" for name in ("threads",) if first[name]]
    parts += [f"batch {first['batch_size']}"] if first["batch_size"] else []
    return ", ".join(part for part in parts if part)


def tables_of(frame: pd.DataFrame, rows: pd.DataFrame) -> list[Table]:
    """Return all tables of one group except empty tables.  frame: its summary, rows: its raw rows."""
    made = [
        winners_table(budgets.winners(rows)),
        against_searched_table(against_controls(rows)),
        areas_table(budgets.areas(rows)),
        arms_table(frame),
        against_full_table(budgets.against_full(rows)),
    ]
    return [table for table in made if table.rows]
