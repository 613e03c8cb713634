"""Figures: drawn off screen, in colours that stay apart for colour-blind readers, legible at README width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from dyndit.analysis.metrics.intervals import paired_interval
from dyndit.files import written_whole
from dyndit.plans.plan import REUSED, guide_of, written, written_cond

INK, FAINT = "#222222", "#bbbbbb"
# Okabe and Ito's palette, in an order in which neighbours differ in lightness as well; full depth has INK.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MOST_WORDS = 40
"""Sampling steps up to which a plan's map has words in it."""
MAP_WORDS = {"+": "4+: exit at 4, the rest forecast", "e": "e4: guided by its own exit at 4", "r": "r: guidance reused"}
"""What stands in the cells of a plan's map, by a letter of it."""
MARKERS = {"full": "o", "searched": "D", "ramp": "^", "constant": "s", "reversed": "v"}
OTHER_MARKERS = "P", "X", "*", "p", "h", "<", ">", "d", "8", "H"
# Beyond four families of plans and peers, colours tell families apart instead of step counts.
FAMILY_COLOURS = (*COLOURS, "#8B4513", "#7B68EE", "#556B2F", "#B22222", "#008B8B", "#C0A000")
MOST_FAMILIES_BY_STEPS = 4
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "dyndit",
}


# Families that are swept over steps, and drawn as lines labelled with them.
SWEEPS = {
    "full": {"color": INK, "ls": "-", "label": "full depth (label: steps)"},
    "unguided": {"color": "#8a8a8a", "ls": "--", "label": "full depth, no guidance"},
}


def save(figure: Figure, path: Path) -> None:
    """Write the figure as the suffix says (.png, .svg, .pdf), whole or not at all."""
    dated = {"metadata": {"Date": None}} if Path(path).suffix == ".svg" else {}  # the same figure is the same file
    with written_whole(path) as draft, matplotlib.rc_context({"svg.hashsalt": "dyndit"}):
        figure.savefig(draft, dpi=150, facecolor="white", **dated)


def _panels(num: int, columns: int, width: float, height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    """Return a figure without pyplot's global state, and `num` axes, `columns` to a row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * -(-num // columns)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(-(-num // columns), columns, squeeze=False, **kwargs).ravel()
        for spare in axes[num:]:
            spare.set_visible(False)
    return figure, list(axes[:num])


def _arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs -> per arm family, solver, steps, ms (median), fd (mean), half (of its interval), predicted."""
    rows = []
    for _, arm in runs[runs["role"] == "score"].groupby("arm", sort=False):
        fd = paired_interval(arm["fd"])
        row = {name: arm[name].iloc[0] for name in ("arm", "family", "solver", "steps", "budget")}
        row |= {"ms": arm["ms_per_picture"].median(), "fd": fd.mean, "half": np.nan_to_num(fd.half)}
        rows.append(row | {"predicted": arm["predicted_fd"].mean()})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Look:
    """Colours and markers of the arms that are no sweep of full depth; families as they come, new ones too."""

    families: list[str]
    steps: list[int]

    @classmethod
    def of(cls, arms: pd.DataFrame) -> "_Look":
        dynamic = arms[~arms["family"].isin(SWEEPS)]
        return cls(list(dict.fromkeys(dynamic["family"])), sorted(dynamic["steps"].unique()))

    @property
    def by_family(self) -> bool:
        return len(self.families) > MOST_FAMILIES_BY_STEPS

    def colour(self, family: str, steps: int) -> str:
        if family in SWEEPS:
            return SWEEPS[family]["color"]
        if self.by_family:
            return FAMILY_COLOURS[self.families.index(family) % len(FAMILY_COLOURS)]
        return COLOURS[self.steps.index(steps) % len(COLOURS)]

    def marker(self, family: str) -> str:
        if family in SWEEPS:
            return "o"
        others = [name for name in self.families if name not in MARKERS]
        return MARKERS.get(family) or OTHER_MARKERS[others.index(family) % len(OTHER_MARKERS)]

    def key(self, arms: pd.DataFrame) -> list[Line2D]:
        """Legend entries: a line per sweep, a colour per step count (or family), a marker per family."""
        present = set(arms["family"])
        key = [Line2D([], [], marker="o", ms=4, **style) for family, style in SWEEPS.items() if family in present]
        if not self.by_family:
            key += [Line2D([], [], color=self.colour("", s), lw=3, label=f"{int(s)} steps") for s in self.steps]
        for family in self.families:
            color = self.colour(family, 0) if self.by_family else "#777777"
            key.append(Line2D([], [], color=color, marker=self.marker(family), ls="", ms=4.5, label=family))
        return key


def frontier_figure(runs: pd.DataFrame) -> Figure:
    """FD over time per picture, a panel per solver: full depth over steps, dynamic depth over budgets.

    Runs of one machine and one model. Bars are 95% intervals of each arm by itself; arms share their seeds,
    so paired differences are known better. Arms far above the frontier stand at the upper edge with their
    FD.
    """
    arms, metric = _arms(runs), runs["metric"].iloc[0]
    solvers = list(dict.fromkeys(arms["solver"]))
    width = 8.0 if len(solvers) > 1 else 6.5
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(solvers), min(2, len(solvers)), width, 3.7, sharey=True)
        main = arms[arms["family"].isin(["full", "searched"])]
        main = arms if main.empty else main
        low, high = (main["fd"] - main["half"]).min(), (main["fd"] + main["half"]).max()
        top = high + 0.08 * (high - low)
        look = _Look.of(arms)
        for axis, solver in zip(axes, solvers, strict=True):
            _draw_frontier(axis, arms[arms["solver"] == solver], look, top)
            axis.set(title=solver, xlabel="ms per picture, noise to uint8")
            _log_time(axis)
        axes[0].set_ylim(low - 0.06 * (high - low), top)
        for axis in axes[:: min(2, len(solvers))]:
            axis.set_ylabel(f"{metric} (lower is better)")
        key = look.key(arms)
        longest = max(len(handle.get_label()) for handle in key)
        figure.legend(handles=key, loc="outside lower center", ncols=2 if longest > 30 else 3 if longest > 16 else 4)
    return figure


def _draw_frontier(axis: Axes, arms: pd.DataFrame, look: _Look, top: float) -> None:
    bars = {"capsize": 1.5, "elinewidth": 0.8, "zorder": 3}
    for family, style in SWEEPS.items():
        sweep = arms[arms["family"] == family].sort_values("ms")
        axis.errorbar(sweep["ms"], sweep["fd"], sweep["half"], marker="o", ms=4, lw=1.4, **style, **bars)
        for ms, fd, steps in zip(sweep["ms"], sweep["fd"], sweep["steps"], strict=True):
            offset = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 8, "color": style["color"]}
            axis.annotate(f"{int(steps)}", (ms, fd), **offset, annotation_clip=True, zorder=5)
    dynamic = arms[~arms["family"].isin(SWEEPS)]
    for (family, steps), group in dynamic.groupby(["family", "steps"], sort=False):
        group = group.sort_values("ms")
        marker, colour = look.marker(family), look.colour(family, steps)
        shown, above = group[group["fd"] <= top], group[group["fd"] > top]
        if family == "searched":
            line = {"marker": marker, "ms": 4.5, "lw": 1.4, **bars}
            axis.errorbar(shown["ms"], shown["fd"], shown["half"], color=colour, **line)
        else:
            alpha = 0.9 if look.by_family else 0.55
            axis.plot(shown["ms"], shown["fd"], marker, color=colour, ms=4.5, alpha=alpha, mew=0, zorder=2)
        edge = axis.get_xaxis_transform()
        axis.plot(above["ms"], [0.97] * len(above), marker, color=colour, ms=4.5, mew=0, transform=edge)
        for ms, fd in zip(above["ms"], above["fd"], strict=True):
            place = {"xytext": (0, -5), "textcoords": "offset points", "ha": "center", "va": "top"}
            axis.annotate(f"↑{fd:.0f}", (ms, 0.97), xycoords=edge, **place, fontsize=7, color=colour)


def _log_time(axis: Axes) -> None:
    """Log scale with plain numbers, enough of them where the range is less than a decade."""
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.autoscale_view()
    left, right = axis.get_xlim()
    subs = (1, 2, 3, 5, 7) if right / left < 12 else (1, 2, 5)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def plan_figure(plans: Mapping[str, Mapping[str, object]]) -> Figure:
    """Depth over the sampling steps, a panel per plan; keys are titles, values the content of plan files.

    Solid: conditional branch, dashed: unconditional branch (0: no unconditional pass at this step), dots: the exit of
    the conditional branch that guides it in the other's place, crosses: the rest is forecast.
    """
    columns = min(3, len(plans))
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(plans), columns, 2.9 * columns + 0.6, 2.5)
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


def time_figure(runs: pd.DataFrame) -> Figure | None:
    """Time per picture, a bar per arm: in the denoiser, and the rest (solver, decoding); None where none was split.

    Medians over seed blocks, of one machine. Arms whose denoiser was not timed have one bar.
    """
    scored = runs[(runs["role"] == "score")]
    arms = scored.groupby("arm", sort=False)[["ms_per_picture", "ms_denoiser"]].median()
    if arms["ms_denoiser"].isna().all():
        return None
    denoiser = arms["ms_denoiser"].fillna(0.0)
    known = arms["ms_denoiser"].notna()
    places = np.arange(len(arms))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _panels(1, 1, 7.5, 0.165 * len(arms) + 1.0)
        axis.barh(places, denoiser, 0.72, color=COLOURS[1], label="denoiser")
        rest = arms["ms_per_picture"] - denoiser
        axis.barh(places[known], rest[known], 0.72, left=denoiser[known], color=COLOURS[4], label="rest")
        if (~known).any():
            axis.barh(places[~known], rest[~known], 0.72, color=FAINT, label="not split")
        _one_line_per_arm(axis, list(arms.index))
        axis.set_xlabel("ms per picture, noise to uint8 (median over seed blocks)")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    return figure


def spread_figure(runs: pd.DataFrame) -> Figure:
    """FD of every arm in every seed block, a line per arm, a colour per block: how far seeds alone move it."""
    scored = runs[runs["role"] == "score"]
    arms = list(dict.fromkeys(scored["arm"]))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _panels(1, 1, 7.5, 0.165 * len(arms) + 1.0)
        for k, (block, rows) in enumerate(scored.groupby("block")):
            places = [arms.index(arm) for arm in rows["arm"]]
            colour = FAMILY_COLOURS[k % len(FAMILY_COLOURS)]
            axis.plot(rows["fd"], places, "o", ms=3.5, mew=0, alpha=0.8, color=colour, label=f"{block:g}")
        _one_line_per_arm(axis, arms)
        if scored["fd"].min() > 0 and scored["fd"].max() > 4 * scored["fd"].min():
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=20))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"{scored['metric'].iloc[0]} (lower is better)")
        if scored["block"].nunique() <= 12:
            axis.legend(title="seed block", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _one_line_per_arm(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(np.arange(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def samples_figure(rows: Mapping[str, Tensor], columns: int = 16) -> Figure:
    """Pictures of the same seeds, a row per arm.  rows: label -> uint8 (N, C, H, W), equal sizes."""
    strips = []
    for pictures in rows.values():
        few = pictures[:columns].cpu()
        few = few.expand(-1, 3, -1, -1) if few.shape[1] == 1 else few
        pad = max(1, few.shape[-1] // 16)
        framed = torch.nn.functional.pad(few, (pad,) * 4, value=255)
        strips.append(torch.cat(list(framed), dim=2).permute(1, 2, 0).numpy())
    height, width = strips[0].shape[:2]
    labels = max(len(label) for label in rows) * 0.065 + 0.15  # inches
    with matplotlib.rc_context(STYLE):
        tall = (8 - labels) * height / width * len(rows) + 0.1
        figure, (axis,) = _panels(1, 1, 8, tall)
        figure.set_layout_engine("none")
        axis.set_position((labels / 8, 0.0, 1 - labels / 8, 1.0))
        axis.imshow(np.concatenate(strips), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks((np.arange(len(rows)) + 0.5) * height - 0.5, list(rows))
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
        axis.grid(visible=False)
    return figure


def predicted_figure(runs: pd.DataFrame) -> Figure:
    """FD predicted from the calibration table against FD measured on fresh seeds, a point per plan.

    Arms without a prediction are left out. On the grey line the additive prediction is exact.
    """
    arms, metric = _arms(runs), runs["metric"].iloc[0]
    arms = arms[arms["predicted"].notna()]
    look = _Look.of(arms)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _panels(1, 1, 5.6, 4.0)
        for (family, steps), group in arms.groupby(["family", "steps"], sort=False):
            marker, colour = look.marker(family), look.colour(family, steps)
            points = {"ls": "", "marker": marker, "ms": 4.5, "elinewidth": 0.8, "capsize": 1.5}
            axis.errorbar(group["predicted"], group["fd"], group["half"], color=colour, alpha=0.8, **points)
        if len(arms):
            both = np.concatenate([arms["predicted"], arms["fd"]])
            ends = [both.min() * 0.95, both.max() * 1.05]
            axis.plot(ends, ends, color=FAINT, lw=1.2, zorder=1)
            if both.max() > 4 * both.min() > 0:
                axis.set(xscale="log", yscale="log")
                for side in (axis.xaxis, axis.yaxis):
                    side.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=20))
                    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                    side.set_minor_formatter(NullFormatter())
            axis.set_aspect("equal", adjustable="datalim")
        if len(arms) > 2:
            rank = arms["predicted"].corr(arms["fd"], method="spearman")
            text = f"{len(arms)} plans, rank correlation {rank:.2f}"
            axis.text(0.03, 0.96, text, transform=axis.transAxes, va="top", fontsize=8)
        axis.set(xlabel=f"predicted {metric}", ylabel=f"measured {metric}")
        axis.legend(handles=look.key(arms), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def error_figure(
    frame: pd.DataFrame, label: str = "mean squared error", xlabel: str = "log-SNR band, noise to picture"
) -> Figure:
    """Heat map of the exits' errors.  frame: index layers, columns bands (log-SNR, timesteps), noisiest first."""
    values = frame.to_numpy(float)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _panels(1, 1, 6.5, 3.4)
        positive = values[values > 0]
        norm = LogNorm(positive.min(), positive.max()) if positive.size else None
        image = axis.pcolormesh(np.where(values > 0, values, np.nan), norm=norm, cmap="viridis")
        axis.set_xticks(np.arange(len(frame.columns)) + 0.5, _short(frame.columns))
        axis.set_yticks(np.arange(len(frame.index)) + 0.5, _short(frame.index))
        axis.grid(visible=False)
        axis.set(xlabel=xlabel, ylabel="exit after layer")
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis, label=label)
    return figure


def _short(labels: Sequence[object]) -> list[str]:
    """Numbers with one decimal at most, other labels as they are."""
    return [f"{x:.1f}".removesuffix(".0") if isinstance(x, (int, float)) else str(x) for x in labels]
