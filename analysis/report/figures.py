"""Draw the figures of a run: quality over time, time, spread over seeds, predictions, samples, errors of the exits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

from dyndit.analysis.report.runs import PLANS, label
from dyndit.analysis.report.style import COLOURS, FAINT, INK, STYLE, number_log, panels
from dyndit.pictures import frames_of
from dyndit.stats import paired_interval

MARKERS = {"full": "o", "searched": "D", "ramp": "^", "constant": "s", "reversed": "v"}
OTHER_MARKERS = "P", "X", "*", "p", "h", "<", ">", "d", "8", "H"
# Colours show step counts for up to four families of plans and peers, and families for more.
FAMILY_COLOURS = (*COLOURS, "#8B4513", "#7B68EE", "#556B2F", "#B22222", "#008B8B", "#C0A000")
MOST_FAMILIES_BY_STEPS = 4

LABEL_SHARE = 0.06
"""Share of a panel's width and height that a label takes, about."""

FAR = 2.0
"""In a claim, arms above this factor of the lowest FD are drawn at the upper edge."""

# Families with a sweep over steps: lines, labelled with the number of steps.
SWEEPS = {
    "full": {"color": INK, "ls": "-", "label": "full depth (label: steps)"},
    "unguided": {"color": "#8a8a8a", "ls": "--", "label": "full depth, no guidance"},
}


def _arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Reduce runs to a row per arm: family, solver, steps, ms (median), fd (mean), half its interval, predicted."""
    rows = []
    for _, arm in runs[runs["role"] == "score"].groupby("arm", sort=False):
        fd = paired_interval(arm["fd"])
        row = {name: arm[name].iloc[0] for name in ("arm", "family", "solver", "steps", "budget", "calibration")}
        row["calibration"] = label(row["calibration"])
        row |= {"ms": arm["ms_per_picture"].median(), "fd": fd.mean, "half": np.nan_to_num(fd.half)}
        rows.append(row | {"predicted": arm["predicted_fd"].mean()})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Look:
    """Colours and markers of all arms except the sweeps of full depth. New families get a look by themselves."""

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
        """Make the legend: a line per sweep, a colour per step count (or family), a marker per family."""
        present = set(arms["family"])
        key = [Line2D([], [], marker="o", ms=4, **style) for family, style in SWEEPS.items() if family in present]
        if not self.by_family:
            key += [Line2D([], [], color=self.colour("", s), lw=3, label=f"{int(s)} steps") for s in self.steps]
        for family in self.families:
            color = self.colour(family, 0) if self.by_family else "#777777"
            key.append(Line2D([], [], color=color, marker=self.marker(family), ls="", ms=4.5, label=family))
        return key


def headline_figure(runs: pd.DataFrame, most: int = 3) -> Figure | None:
    """Draw the frontier of full depth, plans, and the `most` families of rivals that reach the lowest FD in their time.

    Return None if there are so few families that `frontier_figure` shows them as clearly, or if full depth is not among
    them, as in a claim, where every family is one arm.
    """
    arms = _arms(runs)
    if "full" not in set(arms["family"]):
        return None
    rivals = arms[~arms["family"].isin([*SWEEPS, *PLANS])]
    plans = arms[arms["family"].isin(PLANS)]
    if plans.empty or rivals["family"].nunique() <= most:
        return None
    in_time = rivals[rivals["ms"] <= plans["ms"].max()]
    best = (in_time if len(in_time) else rivals).groupby("family", sort=False)["fd"].min().nsmallest(most).index
    shown = runs["family"].isin([*SWEEPS, *PLANS, *best]) & runs["solver"].isin(set(plans["solver"]))
    return frontier_figure(runs[shown])


def frontier_figure(runs: pd.DataFrame) -> Figure:
    """Draw FD over time per picture, a panel per solver: full depth over steps, dynamic depth over budgets.

    runs: of one machine and one model. Bars are 95% intervals of each arm alone; paired differences are more precise,
    as arms share seeds. Arms far above full depth and plans are drawn at the upper edge with their FD; where full depth
    is not among the families, as in a claim, those above `FAR` times the lowest FD are.
    """
    arms, metric = _arms(runs), runs["metric"].iloc[0]
    solvers = list(dict.fromkeys(arms["solver"]))
    width = 8.0 if len(solvers) > 1 else 6.5
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(solvers), min(2, len(solvers)), width, 3.7, sharey=True)
        frontier = arms["family"].isin(["full", *PLANS])
        main = arms[frontier if (arms["family"] == "full").any() else arms["fd"] <= FAR * arms["fd"].min()]
        low, high = max(0.0, (main["fd"] - main["half"]).min()), (main["fd"] + main["half"]).max()
        span = (high - low) or 1.0  # a lone row has no extent
        top = high + 0.08 * span
        look = _Look.of(arms)
        for axis, solver in zip(axes, solvers, strict=True):
            _draw_frontier(axis, arms[arms["solver"] == solver], look, top)
            axis.set(title=solver, xlabel="ms per picture, noise to uint8")
            _log_time(axis)
        axes[0].set_ylim(low - 0.06 * span, top)
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
        apart = np.array([np.ptp(np.log(arms["ms"])), min(top, arms["fd"].max()) - arms["fd"].min()]) * LABEL_SHARE
        written: list[np.ndarray] = []
        for ms, fd, steps in zip(sweep["ms"], sweep["fd"], sweep["steps"], strict=True):
            place = np.array([math.log(ms), fd])
            if any((abs(place - other) < apart).all() for other in written):
                continue  # it would lie on another label
            written.append(place)
            above = family == "full"  # the labels of the two sweeps never meet
            offset = {"xytext": (4, 5) if above else (-3, -4), "textcoords": "offset points", "fontsize": 8}
            offset |= {"ha": "left" if above else "right", "va": "bottom" if above else "top"}
            text = axis.annotate(f"{int(steps)}", (ms, fd), **offset, color=style["color"], zorder=5)
            text.set(path_effects=[withStroke(linewidth=2, foreground="white")], clip_on=True)
    dynamic = arms[~arms["family"].isin(SWEEPS)]
    beyond, width = [], float(np.ptp(np.log(arms["ms"]))) or 1.0  # labels at the edge stand below one another
    for (family, steps, _), group in dynamic.groupby(["family", "steps", "calibration"], sort=False):
        group = group.sort_values("ms")
        marker, colour = look.marker(family), look.colour(family, steps)
        shown, above = group[group["fd"] <= top], group[group["fd"] > top]
        if family in PLANS:
            line = {"marker": marker, "ms": 4.5, "lw": 1.4, **bars}
            axis.errorbar(shown["ms"], shown["fd"], shown["half"], color=colour, **line)
        else:
            alpha = 0.9 if look.by_family else 0.55
            axis.plot(shown["ms"], shown["fd"], marker, color=colour, ms=4.5, alpha=alpha, mew=0, zorder=2)
        edge = axis.get_xaxis_transform()
        axis.plot(above["ms"], [0.97] * len(above), marker, color=colour, ms=4.5, mew=0, transform=edge)
        for ms, fd in zip(above["ms"], above["fd"], strict=True):
            near = sum(abs(math.log(ms / other)) < 1.5 * LABEL_SHARE * width for other in beyond)
            beyond.append(ms)
            place = {"xytext": (0, -5 - 9 * near), "textcoords": "offset points", "ha": "center", "va": "top"}
            axis.annotate(f"↑{fd:.0f}", (ms, 0.97), xycoords=edge, **place, fontsize=7, color=colour)


def _log_time(axis: Axes) -> None:
    """Set a log scale with plain numbers, more numbers if the range is about a decade or less."""
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.autoscale_view()
    left, right = axis.get_xlim()
    subs = (1, 2, 3, 5, 7) if right / left < 12 else (1, 2, 5)
    number_log(axis.xaxis, subs)


def time_figure(runs: pd.DataFrame) -> Figure | None:
    """Draw time per picture, a bar per arm: the denoiser, and the rest (solver, decoding).

    runs: of one machine; times are medians over seed blocks. An arm without a denoiser time has one bar. Return None if
    no arm has a denoiser time.
    """
    arms = runs[runs["role"] == "score"].groupby("arm", sort=False)[["ms_per_picture", "ms_denoiser"]].median()
    if arms["ms_denoiser"].isna().all():
        return None
    denoiser, known = arms["ms_denoiser"].fillna(0.0), arms["ms_denoiser"].notna()
    rest, places = arms["ms_per_picture"] - denoiser, np.arange(len(arms))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 7.5, 0.165 * len(arms) + 1.0)
        axis.barh(places, denoiser, 0.72, color=COLOURS[1], label="denoiser")
        axis.barh(places[known], rest[known], 0.72, left=denoiser[known], color=COLOURS[4], label="rest")
        if (~known).any():
            axis.barh(places[~known], rest[~known], 0.72, color=FAINT, label="not split")
        _one_line_per_arm(axis, list(arms.index))
        axis.set_xlabel("ms per picture, noise to uint8 (median over seed blocks)")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    return figure


def spread_figure(runs: pd.DataFrame, unit: str = "seed block") -> Figure:
    """Draw FD of every arm in every seed block, a line per arm, a colour per block: the effect of seeds alone.

    unit: what `block` counts, for the legend. A claim has calibrations there.
    """
    scored = runs[runs["role"] == "score"]
    arms = list(dict.fromkeys(scored["arm"]))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 7.5, 0.165 * len(arms) + 1.0)
        for k, (block, rows) in enumerate(scored.groupby("block")):
            places = [arms.index(arm) for arm in rows["arm"]]
            colour = FAMILY_COLOURS[k % len(FAMILY_COLOURS)]
            axis.plot(rows["fd"], places, "o", ms=3.5, mew=0, alpha=0.8, color=colour, label=f"{block:g}")
        _one_line_per_arm(axis, arms)
        if scored["fd"].min() > 0 and scored["fd"].max() > 4 * scored["fd"].min():
            axis.set_xscale("log")
            number_log(axis.xaxis)
        axis.set_xlabel(f"{scored['metric'].iloc[0]} (lower is better)")
        if scored["block"].nunique() <= 12:
            axis.legend(title=unit, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _one_line_per_arm(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(np.arange(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def samples_figure(rows: Mapping[str, Tensor], columns: int = 16) -> Figure:
    """Draw pictures of the same seeds, a row per arm.  rows: label -> uint8 (N, C, H, W), equal sizes.

    Of clips (N, C, T, H, W) all frames of the first are drawn, then of the next, up to `columns` frames.
    """
    strips = []
    for pictures in rows.values():
        few = frames_of(pictures)[:columns].cpu()
        few = few.expand(-1, 3, -1, -1) if few.shape[1] == 1 else few
        pad = max(1, few.shape[-1] // 16)
        framed = torch.nn.functional.pad(few, (pad,) * 4, value=255)
        strips.append(torch.cat(list(framed), dim=2).permute(1, 2, 0).numpy())
    height, width = strips[0].shape[:2]
    labels = max(len(label) for label in rows) * 0.065 + 0.15  # inches
    with matplotlib.rc_context(STYLE):
        tall = (8 - labels) * height / width * len(rows) + 0.1
        figure, (axis,) = panels(1, 1, 8, tall)
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
    """Draw predicted FD (from the calibration table) against measured FD (on fresh seeds), a point per plan.

    Skip arms without a prediction. On the grey line the additive prediction is exact.
    """
    arms, metric = _arms(runs), runs["metric"].iloc[0]
    arms = arms[arms["predicted"].notna()]
    look = _Look.of(arms)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 5.6, 4.0)
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
                    number_log(side)
            axis.set_aspect("equal", adjustable="datalim")
        if len(arms) > 2:
            rank = arms["predicted"].corr(arms["fd"], method="spearman")
            bias = (arms["fd"] / arms["predicted"]).median() - 1
            text = f"{len(arms)} plans: rank correlation {rank:.2f}; measured {abs(bias):.0%} "
            text += f"{'above' if bias >= 0 else 'below'} predicted (median)"
            axis.set_title(text, fontsize=8, fontweight="normal", loc="left")
        axis.set(xlabel=f"predicted {metric}", ylabel=f"measured {metric}")
        axis.legend(handles=look.key(arms), loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def error_figure(
    frame: pd.DataFrame, label: str = "mean squared error", xlabel: str = "log-SNR band, noise to picture"
) -> Figure:
    """Draw a heat map of the exits' errors.  frame: rows layers, columns bands (log-SNR, timesteps), noisiest first."""
    values = frame.to_numpy(float)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 6.5, 3.4)
        positive = values[values > 0]
        norm = LogNorm(positive.min(), positive.max()) if positive.size else None
        image = axis.pcolormesh(np.where(values > 0, values, np.nan), norm=norm, cmap="viridis")
        columns = _short(frame.columns)
        crowded = sum(map(len, columns)) > 45  # upright labels would overlap
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_xticks(np.arange(len(columns)) + 0.5, columns, **turned)
        axis.set_yticks(np.arange(len(frame.index)) + 0.5, _short(frame.index))
        axis.grid(visible=False)
        axis.set(xlabel=xlabel, ylabel="exit after layer")
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis, label=label)
    return figure


def _short(labels: Sequence[object]) -> list[str]:
    """Write numbers with at most one decimal, other labels unchanged."""
    return [f"{x:.1f}".removesuffix(".0") if isinstance(x, (int, float)) else str(x) for x in labels]
