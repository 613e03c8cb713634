"""Compare quality and time of every arm with full depth.

The reference is full depth with the same solver: at the same number of steps (paired by seed block), and at equal
quality or equal time on the frontier, which is piecewise linear in log time. Times are medians over the blocks of an
arm, as times vary less than FD. Every comparison of FD is made block by block, then summarised as an interval.
"""

import math

import numpy as np
import pandas as pd

from dyndit.analysis.report.runs import GROUP, QUALITY, label, scored_rows
from dyndit.stats import Interval, non_inferior, paired_interval

LABELS = ("arm", "family", "solver", "steps", "budget", "variant", "settings", "calibration")
MISSING = Interval(math.nan, math.nan, math.nan)

KEPT, LOST, OPEN, NONE = "yes", "no", "not shown", "no verdict"
"""Verdicts on quality: unchanged within the margin, worse by more than the margin, neither is certain, one block."""
NO_VERDICT = "one seed block: no verdict, draw more"


def time_at_fd(times: np.ndarray, fds: np.ndarray, fd: float) -> float:
    """Return the shortest time of a frontier at this FD; NaN outside the measured range.

    times: (K,) rising, fds: (K,). Of several crossings the first counts, in favour of full depth.
    """
    if fds[0] <= fd:  # already better at the fastest point; faster points are not measured
        return float(times[0]) if fds[0] == fd else math.nan
    for k in range(1, len(times)):
        if fds[k] <= fd:
            weight = (fds[k - 1] - fd) / (fds[k - 1] - fds[k])
            return math.exp((1 - weight) * math.log(times[k - 1]) + weight * math.log(times[k]))
    return math.nan


def fd_at_time(times: np.ndarray, fds: np.ndarray, time: float) -> float:
    """Return a frontier's FD at this time, piecewise linear in log time; NaN outside the measured range."""
    if not times[0] <= time <= times[-1]:
        return math.nan
    return float(np.interp(math.log(time), np.log(times), fds))


def summary(runs: pd.DataFrame, margin: float = 0.05) -> pd.DataFrame:
    """Summarise the rows of role "score" to one row per arm; times in ms per picture.

    | column | meaning |
    |---|---|
    | GROUP, arm, family, solver, steps, budget | as in runs |
    | blocks | seed blocks measured |
    | share_of_blocks, mean_depth_cond, mean_depth_uncond | means over blocks |
    | ms, ms_q25, ms_q75 | median and quartiles over blocks |
    | fd | Interval over blocks |
    | predicted_fd, macs, macs_heads, predicted_ms, kid, is, precision, recall | means over blocks; NaN: not measured |
    | time_saved | 1 - time / time of full depth, same solver and steps: median of the blocks' ratios |
    | fd_diff | Interval of FD - FD of full depth, same solver and steps, paired by block |
    | fd_full, ms_full | means of full depth's FD and time in the shared blocks, same solver and steps |
    | unchanged | upper bound of fd_diff ≤ margin · FD of full depth; None: no full depth at these steps, or one block |
    | verdict | KEPT, LOST (lower bound above the margin), OPEN, or NONE (one block); "" without full depth |
    | time_saved_equal_fd | Interval of 1 - time / time of full depth at this FD |
    | time_saved_at_least | a lower bound (*) if full depth never reaches this FD in some block; else NaN |
    | fd_diff_equal_time | Interval of FD - FD of full depth at this time |
    | better, worse | fd_diff_equal_time lies wholly below 0, wholly above 0 |
    | note | reason of a missing interpolation |

    (*) mean over blocks of 1 - time / t. t: time of full depth at this FD, or its longest time if it never gets there.

    An Interval is NaN, with a note, if any block's full-depth frontier does not cover it: an interval over the covered
    blocks alone would be biased.
    """
    groups = [group for _, group in scored_rows(runs).groupby(GROUP, sort=False)]
    arms = [(arm, group) for group in groups for _, arm in group.groupby("arm", sort=False)]
    return pd.DataFrame([_summarise_arm(arm, group, margin) for arm, group in arms])


def _summarise_arm(arm: pd.DataFrame, group: pd.DataFrame, margin: float) -> dict[str, object]:
    """Return the row of `summary` for the rows of one arm; group: all rows comparable with it."""
    arm = arm.set_index("block").sort_index()
    first = arm.iloc[0]
    row: dict[str, object] = {name: first[name] for name in (*GROUP, *LABELS)}
    row |= {"steps": int(first["steps"]), "blocks": len(arm), "calibration": label(first["calibration"])}
    row |= {k: arm[k].mean() for k in ("share_of_blocks", "mean_depth_cond", "mean_depth_uncond")}
    ms = arm["ms_per_picture"]
    row |= {"ms": ms.median(), "ms_q25": ms.quantile(0.25), "ms_q75": ms.quantile(0.75)}
    row |= {"fd": paired_interval(arm["fd"]), "predicted_fd": arm["predicted_fd"].mean()}
    row |= {name: pd.to_numeric(arm[name]).mean() for name in ("macs", "macs_heads", "predicted_ms", *QUALITY)}
    full = group[(group["family"] == "full") & (group["solver"] == first["solver"])]
    return row | _against_same_steps(arm, full, margin) | _against_frontier(arm, full)


def _against_same_steps(arm: pd.DataFrame, full: pd.DataFrame, margin: float) -> dict[str, object]:
    """Compare with full depth at the same number of steps, in the shared blocks."""
    same = full[full["steps"] == arm["steps"].iloc[0]].set_index("block")
    blocks = arm.index.intersection(same.index)
    if arm["family"].iloc[0] == "full" or blocks.empty:
        empty = dict.fromkeys(("time_saved", "fd_full", "ms_full"), math.nan)
        return empty | {"fd_diff": MISSING, "unchanged": None, "verdict": ""}
    ours, theirs = arm.loc[blocks], same.loc[blocks]
    difference, fd_full = paired_interval(ours["fd"], theirs["fd"]), float(theirs["fd"].mean())
    verdict = verdict_on(difference, fd_full, margin)
    return {
        "time_saved": float(1 - (ours["ms_per_picture"] / theirs["ms_per_picture"]).median()),
        "fd_full": fd_full,
        "ms_full": float(theirs["ms_per_picture"].median()),
        "fd_diff": difference,
        "unchanged": None if verdict == NONE else verdict == KEPT,
        "verdict": verdict,
    }


def verdict_on(difference: Interval, fd_full: float, margin: float) -> str:
    """Judge a difference of FD: see the verdicts above. An interval without limits allows none."""
    if math.isnan(difference.high):
        return NONE
    if non_inferior(difference, fd_full, margin):
        return KEPT
    return LOST if difference.low > margin * fd_full else OPEN


def _against_frontier(arm: pd.DataFrame, full: pd.DataFrame) -> dict[str, object]:
    """Compare with full depth at equal FD and at equal time, block by block."""
    row = {"time_saved_equal_fd": MISSING, "time_saved_at_least": math.nan, "fd_diff_equal_time": MISSING}
    row |= {"better": False, "worse": False, "note": ""}
    if arm["family"].iloc[0] == "full":
        return row
    times = full.groupby("steps")["ms_per_picture"].median().sort_values()
    if len(times) < 2:
        return row | {"note": "full depth measured at fewer than two step counts"}
    table = full.pivot(index="block", columns="steps", values="fd")[times.index].dropna()
    blocks = arm.index.intersection(table.index)
    if blocks.empty:
        return row | {"note": "no seed block shared with all of full depth"}
    ms, fds = float(arm["ms_per_picture"].median()), arm.loc[blocks, "fd"]
    frontiers = table.loc[blocks].to_numpy()
    notes = []
    equal_fd = [time_at_fd(times.to_numpy(), line, fd) for line, fd in zip(frontiers, fds, strict=True)]
    if np.isfinite(equal_fd).all():
        row["time_saved_equal_fd"] = paired_interval([1 - ms / t for t in equal_fd])
    else:
        above = sum(fd > line[0] for line, fd in zip(frontiers, fds, strict=True))
        if not above:
            longest = float(times.iloc[-1])
            least = [1 - ms / (t if math.isfinite(t) else longest) for t in equal_fd]
            row["time_saved_at_least"] = float(np.mean(least))
        where = "above the fastest" if above else "below the best"
        notes.append(f"FD {where} full-depth arm in {sum(map(math.isnan, equal_fd))} of {len(blocks)} blocks")
    equal_time = [fd_at_time(times.to_numpy(), line, ms) for line in frontiers]
    if np.isfinite(equal_time).all():
        difference = paired_interval(fds, equal_time)
        row |= {"fd_diff_equal_time": difference, "better": difference.high < 0, "worse": difference.low > 0}
    else:
        notes.append(f"time outside full depth's {times.iloc[0]:.3g} to {times.iloc[-1]:.3g} ms")
    return row | {"note": "; ".join(notes)}


def against_unguided(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare searched plans with full depth without guidance at equal time: dropping guidance saves time too.

    One row per searched arm within the times of the sweep: solver, arm, fd_diff (Interval, paired by block), better,
    worse.
    """
    rows = []
    for _, group in scored_rows(runs).groupby([*GROUP, "solver"], sort=False):
        sweep = group[group["family"] == "unguided"]
        for name, arm in group[group["family"] == "searched"].groupby("arm", sort=False):
            found = _against_frontier(arm.set_index("block").sort_index(), sweep)
            if not math.isnan(found["fd_diff_equal_time"].mean):
                row = {"solver": arm["solver"].iloc[0], "arm": name, "fd_diff": found["fd_diff_equal_time"]}
                rows.append(row | {"better": found["better"], "worse": found["worse"]})
    return pd.DataFrame(rows, columns=["solver", "arm", "fd_diff", "better", "worse"])


def against_controls(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare searched plans with all other arms of the same solver, steps and budget of time.

    One row per pair: solver, steps, budget, searched and control (arms), family and variant (of the control),
    time_ratio (searched over control, median over blocks), fd_control (mean), fd_diff (Interval of FD searched - FD
    control, paired by block), better, worse (fd_diff lies wholly below 0, wholly above 0).
    """
    scored = scored_rows(runs)
    scored = scored[scored["family"] != "full"]
    rows = []
    for (*_, solver, steps, budget), group in scored.groupby([*GROUP, "solver", "steps", "budget"], sort=False):
        searched = group[group["family"] == "searched"]
        searched = searched[searched["arm"] == searched["arm"].min()].set_index("block").sort_index()  # one calibration
        for control, theirs in group[group["family"] != "searched"].groupby("arm", sort=False):
            theirs = theirs.set_index("block").sort_index()
            blocks = searched.index.intersection(theirs.index)
            if blocks.empty:
                continue
            ours, others = searched.loc[blocks], theirs.loc[blocks]
            difference = paired_interval(ours["fd"], others["fd"])
            row = {"solver": solver, "steps": steps, "budget": budget}
            row |= {"searched": ours["arm"].iloc[0], "control": control}
            row |= {name: others[name].iloc[0] for name in ("family", "variant")}
            row["time_ratio"] = float((ours["ms_per_picture"] / others["ms_per_picture"]).median())
            row |= {"fd_control": float(others["fd"].mean()), "fd_diff": difference}
            rows.append(row | {"better": difference.high < 0, "worse": difference.low > 0})
    return pd.DataFrame(rows)
