"""Make the tables of a report: each cell holds a text and the numbers behind it.

Markdown, HTML (`page`), the terminal and report.json all print the same table.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table as TerminalTable

from dyndit.analysis.report import budgets
from dyndit.analysis.report.frontier import against_controls
from dyndit.analysis.report.runs import QUALITY, arm_name
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
    """A column of the tables. show: gives the text of a row. rank: gives its sort key."""

    title: str
    show: Callable[[pd.Series], str]
    rank: Callable[[pd.Series], float | str]
    key: str = ""
    """The summary's column of the numbers; "": no numbers."""

    def numbers(self, row: pd.Series) -> tuple[float, ...]:
        """Return the numbers behind the text of a cell."""
        value = row[self.key] if self.key else ()
        if isinstance(value, Interval):
            return value.mean, value.low, value.high
        return (float(value),) if isinstance(value, (int, float)) else ()


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


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns of the tables; the terminal shows the first eight."""
    metric = frame["metric"].iloc[0] if len(frame) and frame["metric"].nunique() == 1 else "FD"
    return [
        Column("arm", lambda r: r["arm"], lambda r: r["arm"]),
        Column("solver", lambda r: r["solver"], lambda r: r["solver"]),
        Column("steps", lambda r: str(r["steps"]), lambda r: r["steps"], "steps"),
        Column(
            "share of blocks",
            lambda r: percent(r["share_of_blocks"]),
            lambda r: r["share_of_blocks"],
            "share_of_blocks",
        ),
        Column("ms per picture", lambda r: _number(r["ms"]), lambda r: r["ms"], "ms"),
        Column(f"{metric} ± 95%", lambda r: str(r["fd"]), lambda r: r["fd"].mean, "fd"),
        Column("time saved vs full depth", lambda r: percent(r["time_saved"]), lambda r: r["time_saved"], "time_saved"),
        Column(
            "time saved at equal FD",
            _saved_at_equal_fd,
            lambda r: np.fmax(r["time_saved_equal_fd"].mean, r["time_saved_at_least"]),
            "time_saved_equal_fd",
        ),
        Column("FD − full depth, same steps", lambda r: f"{r['fd_diff']:+.2f}", lambda r: r["fd_diff"].mean, "fd_diff"),
        Column("quality unchanged", lambda r: _verdict(r["unchanged"]), lambda r: _verdict(r["unchanged"])),
        Column(
            "FD − full depth, same time",
            lambda r: f"{r['fd_diff_equal_time']:+.2f}",
            lambda r: r["fd_diff_equal_time"].mean,
            "fd_diff_equal_time",
        ),
        Column("KID × 1000", lambda r: _number(1e3 * r["kid"]), lambda r: r["kid"], "kid"),
        Column("IS", lambda r: _number(r["is"]), lambda r: r["is"], "is"),
        Column("precision", lambda r: _share(r["precision"]), lambda r: r["precision"], "precision"),
        Column("recall", lambda r: _share(r["recall"]), lambda r: r["recall"], "recall"),
        Column("predicted ms", lambda r: _number(r["predicted_ms"]), lambda r: r["predicted_ms"], "predicted_ms"),
        Column("GMACs (GFLOPs) per picture", _work, lambda r: r["macs"], "macs"),
        Column("note", lambda r: r["note"], lambda r: r["note"]),
    ]


def _work(row: pd.Series) -> str:
    """Write the denoiser's multiply-accumulates, and its floating-point operations (twice as many)."""
    return "–" if math.isnan(row["macs"]) else f"{_number(row['macs'] / 1e9)} ({_number(2 * row['macs'] / 1e9)})"


NUM_TERMINAL, METRIC = 8, 5
# On 80 columns every heading above narrow figures has to break, except the arm's heading.
HEADINGS = {
    "share of blocks": "share of\nblocks",
    "ms per picture": "ms per\npicture",
    "time saved vs full depth": "saved\nvs full",
    "time saved at equal FD": "saved at\nequal FD",
}


def _rows(frame: pd.DataFrame) -> Iterator[pd.Series]:
    return (row for _, row in frame.iterrows())


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
    for row in _rows(frame):
        short = arm_name(row["family"], "", "", row["budget"], row["settings"])  # solver and steps have columns here
        table.add_row(
            short, *(column.show(row) for column in columns[1:]), style="dim" if row["family"] == "full" else ""
        )
    return table


def markdown_table(frame: pd.DataFrame) -> str:
    """Turn the result of `frontier.summary` into a Markdown table, with verdicts and notes."""
    return as_markdown(arms_table(frame))


def as_markdown(table: Table) -> str:
    """Write a table as Markdown."""
    lines = [list(table.columns), ["---" if name in TEXT_COLUMNS else "---:" for name in table.columns]]
    lines += [[cell.text.replace("|", "\\|") for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def arms_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `frontier.summary` into a row per arm."""
    empty = {name for name in QUALITY if frame[name].isna().all()}
    if (frame["note"] == "").all():
        empty.add("note")
    columns = [column for column in _columns(frame) if (column.key or column.title) not in empty]
    return Table(
        "arms",
        "Every arm that was measured.",
        "frontier.summary of the rows of role score: medians of time, means of FD and paired differences over blocks",
        tuple(column.title for column in columns),
        tuple(tuple(Cell(c.show(row), c.rank(row), c.numbers(row)) for c in columns) for row in _rows(frame)),
        tuple(frame["family"]),
    )


def against_full_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.against_full` into a row per arm except full depth."""
    return Table(
        "against full depth",
        "Against full depth's frontier of the same solver, with bootstrap intervals over seed blocks: FD is averaged "
        "over the blocks before the frontier is read off. Limits that read 'beyond' lie outside full depth's measured "
        "range.",
        "budgets.against_full: block bootstrap of frontiers of mean FD, piecewise linear in log time",
        ("arm", "solver", "ms per picture", "time saved at equal FD [95%]", "FD − full depth at equal time [95%]"),
        tuple(
            (
                Cell(row["arm"], row["arm"]),
                Cell(row["solver"], row["solver"]),
                _cell(_number(row["ms"]), row["ms"]),
                _interval_cell(_saved_between(row), row["time_saved"]),
                _interval_cell(_between(row["fd_diff"], "+.2f"), row["fd_diff"]),
            )
            for row in _rows(frame)
        ),
        tuple(frame["family"]),
    )


def against_searched_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `frontier.against_controls` into a row per arm with a searched plan's steps and budget."""
    verdicts = ["worse" if row["better"] else "better" if row["worse"] else "–" for row in _rows(frame)]
    differences = [Interval(-d.mean, -d.high, -d.low) for d in frame.get("fd_diff", ())]
    return Table(
        "against the searched plan",
        "Every other arm that was made for the same solver, steps and budget of time: fixed schedules, variants, other "
        "routers. Its FD less the searched plan's, paired by block; its time over the searched plan's; better or worse "
        "where the 95% interval excludes 0.",
        "frontier.against_controls: paired differences of FD over blocks, median of the blocks' ratios of time",
        ("arm", "solver", "steps", "budget", "FD − searched plan ± 95%", "verdict", "time over searched plan's"),
        tuple(
            (
                Cell(row["control"], row["control"]),
                Cell(row["solver"], row["solver"]),
                _cell(f"{row['steps']:g}", row["steps"]),
                _cell(f"{row['budget']:g}", row["budget"]),
                _interval_cell(f"{difference:+.2f}", difference),
                Cell(verdict, verdict),
                _cell(f"{1 / row['time_ratio']:.2f}", 1 / row["time_ratio"]),
            )
            for row, difference, verdict in zip(_rows(frame), differences, verdicts, strict=True)
        ),
        tuple(frame.get("family", ())),
    )


def areas_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.areas` into a row per solver and family."""
    return Table(
        "areas",
        "Area between each family's frontier (best FD within a time) and full depth's of the same solver, over the "
        "log time that both cover; negative: the family is better. Bootstrap over seed blocks, the choice of arms "
        "included.",
        "budgets.areas: block bootstrap of the area between frontiers of mean FD without dominated arms, in log time",
        ("solver", "family", "arms", "from ms", "to ms", "area, FD · ln ms [95%]", "mean FD difference [95%]"),
        tuple(
            (
                Cell(row["solver"], row["solver"]),
                Cell(row["family"], row["family"]),
                _cell(str(row["arms"]), row["arms"]),
                _cell(_number(row["from_ms"]), row["from_ms"]),
                _cell(_number(row["to_ms"]), row["to_ms"]),
                _interval_cell(_between(row["area"], "+.2f"), row["area"]),
                _interval_cell(_between(row["fd_diff"], "+.2f"), row["fd_diff"]),
            )
            for row in _rows(frame)
        ),
        tuple(frame["family"]),
    )


def winners_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.winners` into a row per budget of time, a column per family."""
    families = list(dict.fromkeys(name for best in frame["best"] for name in best))
    return Table(
        "winners",
        "The best arm within each budget of time, any solver: a column per family with its best FD. Margins against "
        "the second-best family are cross-fitted (arms picked in the other blocks) and paired by block; clear: the "
        "95% interval lies above 0.",
        "budgets.winners: arms with a median time within the budget, lowest mean FD of each family",
        ("budget, ms", "winner", "best arm", "margin ± 95%", "clear", *families),
        tuple(
            (
                _cell(f"{row['budget_ms']:g}", row["budget_ms"]),
                Cell(row["winner"], row["winner"]),
                Cell(row["arm"], row["arm"]),
                _interval_cell(f"{row['margin']:+.2f}", row["margin"]),
                Cell(_verdict(bool(row["clear"])), _verdict(bool(row["clear"]))),
                *(_best_cell(row["best"].get(family)) for family in families),
            )
            for row in _rows(frame)
        ),
    )


def settings_table(groups: list[pd.DataFrame]) -> Table:
    """List run, machine and settings of each group.  groups: the raw rows of each."""
    return Table(
        "runs",
        "What was measured where. Nothing is averaged or compared across these rows.",
        "the labels of the raw rows, and how many there are",
        ("run", "machine", "metric", "settings", "arms", "blocks", "pictures per block"),
        tuple(
            (
                *(Cell(str(rows[name].iloc[0]), str(rows[name].iloc[0])) for name in ("run", "machine", "metric")),
                Cell(settings_of(rows), settings_of(rows)),
                _cell(str(rows["arm"].nunique()), rows["arm"].nunique()),
                _cell(str(rows["block"].nunique()), rows["block"].nunique()),
                _cell(f"{rows['num_images'].iloc[0]:g}", rows["num_images"].iloc[0]),
            )
            for rows in groups
        ),
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


def _cell(text: str, value: float) -> Cell:
    return Cell(text, float(value), (float(value),))


def _interval_cell(text: str, interval: Interval) -> Cell:
    return Cell(text, interval.mean, (interval.mean, interval.low, interval.high))


def _best_cell(best: tuple[str, float] | None) -> Cell:
    return Cell("–") if best is None else _cell(f"{best[1]:.2f}", best[1])


def _between(interval: Interval, spec: str) -> str:
    """Write `-0.52 [-0.61, -0.43]`; a dash for NaN."""
    if math.isnan(interval.mean):
        return "–"
    limits = [format(limit, spec) for limit in (interval.low, interval.high)]
    return format(interval.mean, spec) + ("" if math.isnan(interval.low) else f" [{', '.join(limits)}]")


def _saved_between(row: pd.Series) -> str:
    """Write `38% [35%, 41%]`; `≥ 70%` if full depth never reaches this FD."""
    saved = row["time_saved"]
    if saved.mean == math.inf:
        return f"≥ {row['saved_at_least']:.0%}" + ("" if math.isinf(saved.low) else f" [{saved.low:.0%}, beyond]")
    if not math.isfinite(saved.mean):
        return "–"
    limits = ["beyond" if math.isinf(limit) else f"{limit:.0%}" for limit in (saved.low, saved.high)]
    return f"{saved.mean:.0%}" + ("" if math.isnan(saved.low) else f" [{', '.join(limits)}]")
