"""Draw what trainings cost and what they brought: loss and FD over compute, FD over sampling time."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyndit.analysis.report.style import COLOURS, INK, STYLE, number_log, panels
from dyndit.stats import Interval, paired_interval


def trainings_figure(costs: pd.DataFrame, runs: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw a point per kind of backbone, with 95% intervals over training seeds, labelled with name and tokens.

    costs: name, seed, training_flops, tokens, loss. runs: rows of runs.csv whose `settings` are the names. A line
    joins the points by rising compute if compute differs much.
    """
    metric = runs["metric"].iloc[0]
    names = sorted(names, key=lambda name: costs[costs["name"] == name]["training_flops"].iloc[0])
    by_name = {name: (costs[costs["name"] == name], runs[runs["settings"] == name]) for name in names}
    labels = [f"{name} ({own['tokens'].iloc[0]} tokens)" for name, (own, _) in by_name.items()]
    compute = [own["training_flops"].iloc[0] for own, _ in by_name.values()]
    power = 3 * math.floor(math.log10(min(compute)) / 3)
    spent, of_spent = [flops / 10**power for flops in compute], f"training compute ($10^{{{power}}}$ FLOPs)"
    times = [rows["ms_per_picture"].median() for _, rows in by_name.values()]
    losses = [paired_interval(own.sort_values("seed")["loss"].to_numpy()) for own, _ in by_name.values()]
    distances = [paired_interval(rows.sort_values("block")["fd"].to_numpy()) for _, rows in by_name.values()]
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(3, 3, 10.0, 3.2)
        _draw(axes[0], spent, losses, labels, of_spent, "loss")
        _draw(axes[1], spent, distances, labels, of_spent, f"{metric} (lower is better)")
        _draw(axes[2], times, distances, labels, "ms per picture", f"{metric} (lower is better)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def _draw(
    axis: Axes, x: Sequence[float], y: Sequence[Interval], labels: Sequence[str], xlabel: str, ylabel: str
) -> None:
    spread = max(x) > 1.5 * min(x)
    if spread:
        axis.plot(x, [value.mean for value in y], color=INK, lw=0.8, alpha=0.4)
    for k, (place, value, label) in enumerate(zip(x, y, labels, strict=True)):
        half = float(np.nan_to_num(value.half))
        axis.errorbar(place, value.mean, half, marker="o", ms=5, ls="", capsize=2, color=COLOURS[k % 6], label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if spread:
        axis.set_xscale("log")
        number_log(axis.xaxis, (1, 2, 5))
