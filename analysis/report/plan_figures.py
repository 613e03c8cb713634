"""Figures of plans: depth over the sampling steps, as lines for a few plans and as a map for many."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dyndit.analysis.report.style import COLOURS, FAINT, INK, STYLE, panels
from dyndit.plans.plan import REUSED, guide_of, written, written_cond

MOST_WORDS = 40
"""Sampling steps up to which a plan's map has words in it."""
MAP_WORDS = {"+": "4+: exit at 4, the rest forecast", "e": "e4: guided by its own exit at 4", "r": "r: guidance reused"}
"""What stands in the cells of a plan's map, by a letter of it."""


def plan_figure(plans: Mapping[str, Mapping[str, object]]) -> Figure:
    """Depth over the sampling steps, a panel per plan; keys are titles, values the content of plan files.

    Solid: conditional branch, dashed: unconditional branch (0: no unconditional pass at this step), dots: the exit of
    the conditional branch that guides it in the other's place, crosses: the rest is forecast.
    """
    columns = min(3, len(plans))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(plans), columns, 2.9 * columns + 0.6, 2.5)
        for axis, (title, plan) in zip(axes, plans.items(), strict=True):
            _draw_plan(axis, plan)
            axis.set_title(title, fontsize=9)
        for axis in axes[::columns]:
            axis.set_ylabel("depth (blocks run)")
        key = [
            Line2D([], [], color=COLOURS[1], lw=2, label="conditional"),
            Line2D([], [], color=COLOURS[0], lw=1.6, ls=(0, (3, 1.5)), label="unconditional"),
            Line2D([], [], color=FAINT, lw=1, label="full depth"),
        ]
        if any(map(_guides, plans.values())):
            key.insert(2, Line2D([], [], color=COLOURS[0], lw=0, marker=".", label="guide: own exit"))
        if any(map(_forecasts, plans.values())):
            key.insert(1, Line2D([], [], color="black", lw=0, marker="+", ms=9, mew=2, label="the rest forecast"))
        if not any(_guided(plan) for plan in plans.values()):
            del key[1]
        figure.legend(handles=key, loc="outside lower center", ncols=4)
    return figure


def _guided(plan: Mapping[str, object]) -> bool:
    return any(depth > 0 for depth in plan["uncond"])


def _guides(plan: Mapping[str, object]) -> dict[int, int]:
    """The steps, counted from 1, that an own exit guides, and its depth."""
    return {step: guide_of(depth) for step, depth in enumerate(plan["uncond"], 1) if guide_of(depth)}


def _forecasts(plan: Mapping[str, object]) -> dict[int, int]:
    """The steps, counted from 1, that forecast what lies beyond their exit, and its depth."""
    return {step: -depth for step, depth in enumerate(plan["cond"], 1) if depth < 0}


def _draw_plan(axis: Axes, plan: Mapping[str, object]) -> None:
    timesteps, cond, uncond = plan["timesteps"], list(map(abs, plan["cond"])), plan["uncond"]
    num = len(timesteps)
    edges = np.arange(num + 1) + 0.5  # step k, counted from 1, is as wide as a bar
    axis.axhline(plan["num_blocks"], color=FAINT, lw=1)
    axis.stairs(cond, edges, color=COLOURS[1], alpha=0.15, fill=True)
    axis.stairs(cond, edges, color=COLOURS[1], lw=2, baseline=None)
    if _guided(plan):
        # A gap where there is guidance without a pass.
        axis.stairs(
            np.where(np.array(uncond) < 0, np.nan, uncond),
            edges,
            color=COLOURS[0],
            lw=1.6,
            ls=(0, (3, 1.5)),
            baseline=None,
        )
    if guides := _guides(plan):
        axis.plot(list(guides), list(guides.values()), ".", color=COLOURS[0])
    if forecasts := _forecasts(plan):
        axis.plot(list(forecasts), list(forecasts.values()), "+", ms=9, mew=2, color="black")
    ticks = range(1, num + 1, -(-num // 6))
    axis.set_xticks(ticks, [f"{k}\n{int(timesteps[k - 1])}" for k in ticks])
    axis.set_xlabel("step, and its timestep below")
    axis.set_xlim(0.4, num + 0.6)
    axis.set_ylim(0, plan["num_blocks"] * 1.06)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.grid(visible=False, axis="x")


def plan_map_figure(plans: Mapping[str, Mapping[str, object]]) -> Figure:
    """Heat map of plans: a row per plan, a column per step, colour: blocks run. Panels: branches, by number of steps.

    plans: label -> content of a plan file; 0 blocks: the branch is not run at that step; white: nor is it, but an own
    exit guides (e4: the one at 4) or guidance is reused (r); 4+: the exit at 4, and the rest forecast. Written out up
    to MOST_WORDS steps, with a key below of what is there.
    """
    counts = sorted({len(plan["cond"]) for plan in plans.values()})
    guided = any(_guided(plan) for plan in plans.values())
    branches = {"cond": "conditional", "uncond": "unconditional"} if guided else {"cond": "depth"}
    most = max(plan["num_blocks"] for plan in plans.values())
    groups = [{name: plan for name, plan in plans.items() if len(plan["cond"]) == count} for count in counts]
    heights = [len(group) * 0.19 + 0.75 for group in groups]
    words: set[str] = set()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, sum(heights) + 0.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(groups), len(branches), squeeze=False, height_ratios=heights, sharey="row")
        for line, group, count in zip(axes, groups, counts, strict=True):
            for axis, (branch, title) in zip(line, branches.items(), strict=True):
                table = np.array([plan[branch] for plan in group.values()], dtype=float)
                worded = table < 0
                table[worded] = -table[worded] if branch == "cond" else np.nan
                image = axis.pcolormesh(table, vmin=0, vmax=most, cmap="cividis", edgecolors="white", linewidth=0.3)
                axis.set_title(f"{title}, {table.shape[1]} steps", fontsize=9)
                write, colour = (written_cond, "white") if branch == "cond" else (_short_uncond, "black")
                for row, column in zip(*np.nonzero(worded), strict=True) if count <= MOST_WORDS else ():
                    word = write(list(group.values())[row][branch][column])
                    place = {"ha": "center", "va": "center"}
                    axis.text(column + 0.5, row + 0.5, word, fontsize=5.5, color=colour, **place)
                    words.add(word)
                ticks = np.arange(0, table.shape[1], -(-table.shape[1] // 10))
                axis.set_xticks(ticks + 0.5, ticks + 1)
                axis.grid(visible=False)
                axis.tick_params(length=0, labelsize=7)
                axis.spines[:].set_visible(False)
            line[0].set_yticks(np.arange(len(group)) + 0.5, list(group))
            line[0].invert_yaxis()
        for axis in axes[-1]:
            axis.set_xlabel("sampling step, noise to picture", fontsize=8)
        figure.colorbar(image, ax=axes.ravel().tolist(), label="blocks run", shrink=0.8)
        if key := [meaning for mark, meaning in MAP_WORDS.items() if any(mark in word for word in words)]:
            figure.supxlabel("     ".join(key), fontsize=8, color=INK)
    return figure


def _short_uncond(uncond: int) -> str:
    """An unconditional depth as short as a cell of a plan's map is wide."""
    return "r" if uncond == REUSED else written(uncond)
