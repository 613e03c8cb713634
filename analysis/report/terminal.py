"""Show a run on the terminal: a table of its arms for each group of comparable rows, and the answer in a sentence."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dyndit.analysis.report.claim_goals import sentences as of_claim
from dyndit.analysis.report.claims import claims_of, is_claim
from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.headline import sentences
from dyndit.analysis.report.runs import GROUP, read_runs
from dyndit.analysis.report.tables import terminal_table


def show(paths: Path | Sequence[Path], margin: float, console: Console | None = None) -> None:
    """Print the tables of runs and their answers; of a claim, its sentences.  paths: see `read_runs`."""
    console = console or Console()
    frames = [read_runs(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    joined = [runs for runs in frames if is_claim(runs)]
    said = [sentence for claim in (claims_of(joined, margin) if joined else []) for sentence in of_claim(claim)]
    for runs in (runs for runs in frames if not is_claim(runs)):
        for _, rows in runs.groupby(GROUP, sort=False):
            if (rows["role"] == "score").any():
                console.print(terminal_table(summary(rows, margin)))
        said += filter(None, sentences(runs, margin))
    for sentence in said:
        console.print(sentence, highlight=False)


def record(path: Path, margin: float) -> list[dict[str, Any]]:
    """Return the arms of a run as plain data, for `--json`: an interval is (mean, low, high)."""
    table = summary(read_runs(path), margin)
    rows = table[["arm", "solver", "steps", "share_of_blocks", "ms", "time_saved", "verdict"]].copy()
    for name in ("fd", "fd_diff", "time_saved_equal_fd"):
        rows[name] = [[i.mean, i.low, i.high] for i in table[name]]
    return json.loads(rows.to_json(orient="records"))
