"""Make the tables of a report."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table as TerminalTable

from dyndit.analysis.report import budgets
from dyndit.analysis.report.calibrations import by_plan
from dyndit.analysis.report.cells import (
    Column,
    Table,
    as_markdown,
    between,
    filled,
    heads,
    negative,
    number,
    percent,
    saved_at_equal_fd,
    saved_between,
    share,
    work,
    yes,
)
from dyndit.analysis.report.frontier import against_controls
from dyndit.analysis.report.runs import arm_name
from dyndit.analysis.report.savings import predictions, with_parts
from dyndit.stats import Interval

PARTS = "blocks saved = steps + unconditional + conditional"
SIGNED = "{:+.2f}".format
ARM, SOLVER, MS = Column("arm", "arm"), Column("solver", "solver"), Column("ms per picture", "ms", number)


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns of the arms."""
    metric = frame["metric"].iloc[0] if len(frame) and frame["metric"].nunique() == 1 else "FD"
    at_equal_fd, at_equal_time = _bootstrapped() if "bootstrap" in frame else _by_block()
    return [
        ARM,
        SOLVER,
        Column("steps", "steps", rank=lambda r: r["steps"]),
        Column("share of blocks", "share_of_blocks", percent),
        MS,
        Column(f"{metric} ± 95%", "fd"),
        Column("time saved vs full depth", "time_saved", percent),
        at_equal_fd,
        Column("FD − full depth, same steps", "fd_diff", SIGNED),
        Column("quality unchanged", lambda r: r["verdict"] or "–"),
        at_equal_time,
        Column("KID × 1000", "kid", lambda kid: number(1e3 * kid)),
        Column("precision", "precision", share),
        Column("recall", "recall", share),
        Column("IS", "is", number),
        Column("GMACs (GFLOPs) per picture", "macs", work),
        Column("exit heads, GMACs (share)", "macs_heads", text=heads),
        Column("note", "note"),
    ]


def _by_block() -> tuple[Column, Column]:
    """Return the columns at equal FD and at equal time, interpolated block by block."""
    return (
        Column(
            "time saved at equal FD",
            "time_saved_equal_fd",
            text=saved_at_equal_fd,
            rank=lambda r: np.fmax(r["time_saved_equal_fd"].mean, r["time_saved_at_least"]),
        ),
        Column("FD − full depth, same time", "fd_diff_equal_time", SIGNED),
    )


def _bootstrapped() -> tuple[Column, Column]:
    """Return the same columns from `budgets.against_full`: FD is averaged before it is interpolated."""

    def of(name: str) -> Callable[[pd.Series], Interval | None]:
        return lambda row: None if row["bootstrap"] is None else row["bootstrap"][name]

    return (
        Column("time saved at equal FD [95%]", of("time_saved"), text=saved_between),
        Column("FD − full depth, same time [95%]", of("fd_diff"), between),
    )


# On 80 columns every heading above narrow figures has to break, except the arm's heading.
TERMINAL = {
    "share of blocks": "share\nof\nblocks",
    "ms per picture": "ms per\npicture",
    "FD ± 95%": "FD\n± 95%",
    "time saved vs full depth": "saved\nvs full",
    "time saved at equal FD": "saved at\nequal FD",
    "quality unchanged": "quality\nun-\nchanged",
}
"""Columns of the terminal after the arm, its solver and its steps, with their headings."""


def terminal_table(frame: pd.DataFrame) -> TerminalTable:
    """Turn the result of `frontier.summary` into the table that ends a run on the terminal: 80 columns wide."""
    columns = {"FD ± 95%" if c.title.endswith("± 95%") else c.title: c for c in _columns(frame)}
    metric = next(c.title for c in columns.values() if c.title.endswith("± 95%")).removesuffix(" ± 95%")
    title = None if metric == "FD" else f"FD is {metric}"
    table = TerminalTable(title=title, header_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    # On a narrow terminal the arm's name folds; figures never fold.
    table.add_column("arm", overflow="fold")
    table.add_column("solver\nsteps", no_wrap=True)
    for name, heading in TERMINAL.items():
        left = name == "quality unchanged"
        table.add_column(heading, justify="left" if left else "right", no_wrap=True, overflow="fold")
    for _, row in frame.iterrows():
        short = arm_name(row["family"], "", "", row["budget"], row["settings"])  # solver and steps have a column here
        short += f"-c{row['calibration']}" if row["calibration"] not in ("", "0") else ""
        texts = [columns[name].cell(row).text for name in TERMINAL]
        style = "dim" if row["family"] == "full" else ""
        table.add_row(short, f"{row['solver']} {row['steps']}", *texts, style=style)
    return table


def markdown_table(frame: pd.DataFrame) -> str:
    """Turn the result of `frontier.summary` into a Markdown table, with verdicts and notes."""
    return as_markdown(arms_table(frame))


def arms_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `frontier.summary` into a row per arm, with further columns if the frame has them."""
    total = Column(PARTS, lambda r: r["parts"] and r["parts"].total, text=lambda r: str(r["parts"]))
    parts = [total] if "parts" in frame else []
    *columns, macs, of_heads, note = _columns(frame)
    return filled(
        "arms",
        "Every arm that was measured. Of the blocks that full depth runs at the most steps of the same solver, the "
        "share that is not run is split into what fewer steps, unconditional passes and conditional blocks leave out. "
        "Limits that read 'beyond' lie outside full depth's measured range.",
        "frontier.summary of the rows of role score: medians of time, means of FD and paired differences over blocks; "
        "budgets.against_full: block bootstrap of frontiers of mean FD, piecewise linear in log time; "
        "savings.with_parts: blocks from steps and mean depths",
        [*columns, *parts, macs, of_heads, note],
        frame,
    )


def predictions_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `savings.predictions` into a row per arm, predicted beside measured."""
    return filled(
        "predicted and measured",
        "Times by the table's cost model, and FD by the additive prediction, beside what was measured on fresh seeds. "
        "Ratios are measured over predicted.",
        "savings.predictions: columns predicted_ms and predicted_fd of the rows beside medians and means over blocks",
        [
            ARM,
            Column("predicted ms", "predicted_ms", number),
            Column("measured ms", "ms", number),
            Column("ratio of times", "ms_ratio", share),
            Column("predicted FD", "predicted_fd", share),
            Column("measured FD", "fd", share),
            Column("ratio of FDs", "fd_ratio", share),
        ],
        frame,
    )


def calibrations_table(frame: pd.DataFrame) -> Table:
    """Turn the plans of `calibrations.by_plan` that have several calibrations into a row each."""
    return filled(
        "calibrations",
        "Plans of independent calibrations: exits, table and search have seeds of their own. Intervals are over "
        "calibrations, each the mean over its seed blocks.",
        "calibrations.by_plan: Student's interval over the calibrations' means of paired differences",
        [
            Column("plan", "arm"),
            Column("calibrations", "calibrations"),
            Column("ms per picture", "ms", number),
            Column("time saved vs full depth ± 95%", "time_saved", percent),
            Column("FD − full depth, same steps ± 95%", "fd_diff", SIGNED),
            Column("quality unchanged", "verdict"),
        ],
        frame,
    )


def against_searched_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `frontier.against_controls` into a row per arm with a searched plan's steps and budget."""
    return filled(
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
            Column("FD − searched plan ± 95%", lambda r: negative(r["fd_diff"]), SIGNED),
            Column("verdict", lambda r: "worse" if r["better"] else "better" if r["worse"] else "–"),
            Column("time over searched plan's", lambda r: 1 / r["time_ratio"], "{:.2f}".format),
        ],
        frame,
    )


def areas_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.areas` into a row per solver and family."""
    return filled(
        "areas",
        "Area between each family's frontier (best FD within a time) and full depth's of the same solver, over the "
        "log time that both cover; negative: the family is better. Bootstrap over seed blocks, the choice of arms "
        "included.",
        "budgets.areas: block bootstrap of the area between frontiers of mean FD without dominated arms, in log time",
        [
            SOLVER,
            Column("family", "family"),
            Column("arms", "arms"),
            Column("from ms", "from_ms", number),
            Column("to ms", "to_ms", number),
            Column("area, FD · ln ms [95%]", "area", between),
            Column("mean FD difference [95%]", "fd_diff", between),
        ],
        frame[[not math.isnan(area.mean) for area in frame["area"]]],
    )


def winners_table(frame: pd.DataFrame) -> Table:
    """Turn the result of `budgets.winners` into a row per budget of time, a column per family."""
    families = dict.fromkeys(name for best in frame["best"] for name in best)
    frame = _without_repeats(frame)
    return filled(
        "winners",
        "The best arm within each budget of time, any solver, up to the next budget with other best arms: a column per "
        "family with its best FD. Margins against the second-best family are cross-fitted (arms picked in the other "
        "blocks) and paired by block; clear: the 95% interval lies above 0.",
        "budgets.winners: arms with a median time within the budget, lowest mean FD of each family",
        [
            Column("budget, ms", "budget_ms", "{:g}".format),
            Column("winner", "winner"),
            Column("best arm", "arm"),
            Column("margin ± 95%", "margin", SIGNED),
            Column("clear", lambda r: yes(bool(r["clear"]))),
            *(Column(f, lambda r, f=f: r["best"].get(f, (None, None))[1], "{:.2f}".format) for f in families),
        ],
        frame,
    )


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out budgets at which every family has the same best arm as at the budget before."""
    best = list(frame["best"])
    return frame[[k == 0 or arms != best[k - 1] for k, arms in enumerate(best)]]


def settings_table(groups: list[pd.DataFrame]) -> Table:
    """List run, machine and settings of each group.  groups: the raw rows of each."""
    counted = [
        rows.iloc[0].to_dict()
        | {"settings": settings_of(rows), "arms": rows["arm"].nunique(), "blocks": rows["block"].nunique()}
        for rows in groups
    ]
    return filled(
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


def tables_of(frame: pd.DataFrame, rows: pd.DataFrame, margin: float = 0.05) -> list[Table]:
    """Return all tables of one group except empty tables.  frame: its summary, rows: its raw rows."""
    against_full = {row["arm"]: row for row in budgets.against_full(rows).to_dict("records")}
    plans = by_plan(frame, margin)
    made = [
        winners_table(budgets.winners(rows)),
        against_searched_table(against_controls(rows)),
        areas_table(budgets.areas(rows)),
        calibrations_table(plans[plans["calibrations"] > 1]),
        arms_table(with_parts(frame).assign(bootstrap=[against_full.get(arm) for arm in frame["arm"]])),
        predictions_table(predictions(frame)),
    ]
    return [table for table in made if table.rows]
