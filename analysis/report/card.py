"""Make the parts of a model card that need this suite: the picture of the plans, the table of measured runs."""

from pathlib import Path

from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.plan_figures import plan_figure
from dyndit.analysis.report.runs import GROUP, RUNS, read_runs
from dyndit.analysis.report.style import png
from dyndit.analysis.report.tables import markdown_table
from dyndit.markdown import plain
from dyndit.storage.card import CardExtras
from dyndit.storage.native import plans_in

MOST_PLANS = 12
"""Largest number of panels in the picture."""


def card_extras(folder: Path) -> CardExtras:
    """Draw the plans of a native folder, and write its runs.csv as tables. Raises InputError: a file is damaged."""
    return CardExtras(_picture(folder), _measured(folder))


def _picture(folder: Path) -> bytes | None:
    few = list(plans_in(folder).items())[:MOST_PLANS]
    titles = {path.name.removeprefix("plan-").removesuffix(".json"): plan for path, plan in few}
    return png(plan_figure(titles)) if titles else None


def _measured(folder: Path) -> str:
    """Write the runs as Markdown, a table per machine, metric and setting."""
    if not (folder / RUNS).is_file():
        return ""
    parts = []
    for _, runs in read_runs(folder / RUNS).groupby(GROUP, sort=False):
        scored = runs[runs["role"] == "score"]
        if len(scored):
            first = scored.iloc[0]
            parts.append(
                f"{plain(first['machine'])}; {plain(first['metric'])}, guidance {first['cfg_scale']:g}, "
                f"{scored['block'].nunique()} seed blocks of {first['num_images']:g} pictures; ± is a 95% interval "
                "over seed blocks."
            )
            parts.append(markdown_table(summary(runs)).rstrip())
    return "\n\n".join(parts)
