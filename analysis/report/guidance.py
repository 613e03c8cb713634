"""Draw the guidance sweep: quality over the guidance scale, a line for each way to guide."""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dyndit.analysis.report.runs import GROUP
from dyndit.analysis.report.style import COLOURS, INK, STYLE, panels
from dyndit.stats import paired_interval

FEWEST_SCALES = 3
WAYS = ("full", "own-exit", "interval")
"""Families of the sweep: guidance by the unconditional pass, by an own exit, in an interval."""
QUALITIES = {"is": "Inception score", "precision": "precision", "recall": "recall"}


def sweep_of(scored: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a sweep: equal in everything but scale and way to guide, at `FEWEST_SCALES` or more.

    Of several solvers, step counts or extractors that have one, take the first. Empty without a sweep.
    """
    shared = [name for name in GROUP if name != "cfg_scale"]
    for _, rows in scored[scored["family"].isin(WAYS)].groupby([*shared, "solver", "steps"], sort=False):
        if rows.loc[rows["family"] == "full", "cfg_scale"].nunique() >= FEWEST_SCALES:
            return rows
    return scored.iloc[:0]


def guidance_figure(sweep: pd.DataFrame) -> Figure:
    """Draw FD, and the Inception score, precision and recall if measured, over the guidance scale.

    sweep: from `sweep_of`. Bars are 95% intervals over seed blocks. A scale of 1 is unguided, in every way.
    """
    metric = sweep["metric"].iloc[0]
    shown = {"fd": f"{metric} (lower is better)"}
    shown |= {name: label for name, label in QUALITIES.items() if sweep[name].notna().all()}
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(shown), min(2, len(shown)), 8.0 if len(shown) > 1 else 5.5, 3.2)
        for axis, (column, label) in zip(axes, shown.items(), strict=True):
            for k, (way, rows) in enumerate(lines_of(sweep).items()):
                found = {scale: paired_interval(same[column]) for scale, same in rows.groupby("cfg_scale")}
                halves = [float(np.nan_to_num(value.half)) for value in found.values()]
                means = [value.mean for value in found.values()]
                line = {"marker": "o", "ms": 4, "lw": 1.4, "capsize": 1.5, "elinewidth": 0.8}
                axis.errorbar(list(found), means, halves, color=INK if k == 0 else COLOURS[k % 6], label=way, **line)
            axis.set(xlabel="guidance scale (1: none)", ylabel=label)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def lines_of(sweep: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Name the rows of each way to guide. Unguided rows begin every line."""
    unguided = sweep[(sweep["family"] == "full") & (sweep["cfg_scale"] == 1)]
    lines = {}
    for (family, settings), rows in sweep.groupby(["family", "settings"], sort=False):
        name = {"full": "unconditional pass", "own-exit": "own exit", "interval": "noise levels"}[family]
        start = unguided if family != "full" and not math.isclose(rows["cfg_scale"].min(), 1) else unguided.iloc[:0]
        lines[f"{name} {settings}".strip()] = pd.concat([start, rows])
    return dict(sorted(lines.items(), key=lambda item: item[0] != "unconditional pass"))
