"""Draw plans: depth over the sampling steps, as lines for a few plans and as a map for many plans."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dyndit.analysis.report.style import COLOURS, FAINT, INK, STYLE, panels
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Held, NoGuide, OwnExit, Step

MOST_WORDS = 40
"""Largest number of sampling steps for which a map has words in its cells."""
MAP_WORDS = {"+": "4+: exit at 4, the rest forecast", "e": "e4: guided by its own exit at 4", "h": "h: guidance held"}
"""Meaning of the words in the cells of a map, by a letter of the word."""


def plan_figure(plans: Mapping[str, DepthPlan]) -> Figure:
    """Draw depth over the sampling steps, a panel per plan; keys are titles.

    Solid: the conditional branch. Dashed: the unconditional branch, at 0 without a pass. Dots: the own exit that
    guides. Crosses: steps that forecast.
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
        if not any(plan.guided for plan in plans.values()):
            del key[1]
        figure.legend(handles=key, loc="outside lower center", ncols=4)
    return figure


def _guides(plan: DepthPlan) -> dict[int, int]:
    """Return the steps that an own exit guides, counted from 1, with the depth of the exit."""
    return {k: step.guide.depth for k, step in enumerate(plan.steps, 1) if isinstance(step.guide, OwnExit)}


def _forecasts(plan: DepthPlan) -> dict[int, int]:
    """Return the steps that forecast, counted from 1, with their depth."""
    return {k: step.depth for k, step in enumerate(plan.steps, 1) if step.forecast}


def _uncond(step: Step) -> float:
    """Return the depth of the unconditional branch: 0 without guidance, NaN for guidance without a pass."""
    depths = step.work().depths[1:]
    return depths[0] if depths else 0.0 if step.guide == NoGuide() else np.nan


def _draw_plan(axis: Axes, plan: DepthPlan) -> None:
    timesteps, num = plan.timesteps, plan.num_steps
    edges = np.arange(num + 1) + 0.5  # step k, counted from 1, is as wide as a bar
    axis.axhline(plan.num_blocks, color=FAINT, lw=1)
    axis.stairs(plan.depths, edges, color=COLOURS[1], alpha=0.15, fill=True)
    axis.stairs(plan.depths, edges, color=COLOURS[1], lw=2, baseline=None)
    if plan.guided:
        uncond = [_uncond(step) for step in plan.steps]
        axis.stairs(uncond, edges, color=COLOURS[0], lw=1.6, ls=(0, (3, 1.5)), baseline=None)
    if guides := _guides(plan):
        axis.plot(list(guides), list(guides.values()), ".", color=COLOURS[0])
    if forecasts := _forecasts(plan):
        axis.plot(list(forecasts), list(forecasts.values()), "+", ms=9, mew=2, color="black")
    ticks = range(1, num + 1, -(-num // 6))
    axis.set_xticks(ticks, [f"{k}\n{int(timesteps[k - 1])}" for k in ticks])
    axis.set_xlabel("step, and its timestep below")
    axis.set_xlim(0.4, num + 0.6)
    axis.set_ylim(0, plan.num_blocks * 1.06)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.grid(visible=False, axis="x")


def plan_map_figure(plans: Mapping[str, DepthPlan]) -> Figure:
    """Draw a heat map of plans: a row per plan, a column per step, colour: blocks run.

    Panels are branches, by number of steps. 0 blocks: the branch does not run at that step. White: the branch does not
    run, and an own exit ("e4") or the held difference ("h") guides. "4+": exit at 4, the rest forecast. Plans of up to
    MOST_WORDS steps have words, with a key below.
    """
    counts = sorted({plan.num_steps for plan in plans.values()})
    guided = any(plan.guided for plan in plans.values())
    branches = {"cond": "conditional", "uncond": "unconditional"} if guided else {"cond": "depth"}
    most = max(plan.num_blocks for plan in plans.values())
    groups = [{name: plan for name, plan in plans.items() if plan.num_steps == count} for count in counts]
    heights = [len(group) * 0.19 + 0.75 for group in groups]
    words: set[str] = set()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, sum(heights) + 0.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(groups), len(branches), squeeze=False, height_ratios=heights, sharey="row")
        for line, group, count in zip(axes, groups, counts, strict=True):
            for axis, (branch, title) in zip(line, branches.items(), strict=True):
                depth = _uncond if branch == "uncond" else lambda step: float(step.depth)
                table = np.array([[depth(step) for step in plan.steps] for plan in group.values()])
                words_of = [[_word(step, branch) for step in plan.steps] for plan in group.values()]
                image = axis.pcolormesh(table, vmin=0, vmax=most, cmap="cividis", edgecolors="white", linewidth=0.3)
                axis.set_title(f"{title}, {table.shape[1]} steps", fontsize=9)
                style = {"fontsize": 5.5, "ha": "center", "va": "center"}
                style["color"] = "white" if branch == "cond" else "black"
                for row, column in np.argwhere(np.array(words_of) != "") if count <= MOST_WORDS else ():
                    axis.text(column + 0.5, row + 0.5, words_of[row][column], **style)
                    words.add(words_of[row][column])
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


def _word(step: Step, branch: str) -> str:
    """Return the word in a cell of a map; "" for an empty cell."""
    if branch == "cond":
        return f"{step.depth}+" if step.forecast else ""
    return "h" if isinstance(step.guide, Held) else str(step.guide) if isinstance(step.guide, OwnExit) else ""
