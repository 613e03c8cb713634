"""Show a run on the terminal: a table of its arms for each group of comparable rows, and the answer in a sentence."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.headline import sentences
from dyndit.analysis.report.runs import GROUP, read_runs
from dyndit.analysis.report.tables import terminal_table


def show(path: Path, margin: float, console: Console | None = None) -> None:
    """Print the tables of a run and its answer.  path: its folder or its file, see `read_runs`."""
    console, runs = console or Console(), read_runs(path)
    for _, rows in runs.groupby(GROUP, sort=False):
        if (rows["role"] == "score").any():
            console.print(terminal_table(summary(rows, margin)))
    for sentence in filter(None, sentences(runs, margin)):
        console.print(sentence, highlight=False)


def record(path: Path, margin: float) -> list[dict[str, Any]]:
    """Return the arms of a run as plain data, for `--json`: an interval is (mean, low, high)."""
    table = summary(read_runs(path), margin)
    rows = table[["arm", "solver", "steps", "share_of_blocks", "ms", "time_saved", "verdict"]].copy()
    for name in ("fd", "fd_diff", "time_saved_equal_fd"):
        rows[name] = [[i.mean, i.low, i.high] for i in table[name]]
    return json.loads(rows.to_json(orient="records"))
