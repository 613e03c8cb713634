"""Compare families of arms: areas between frontiers, and the best family at each budget of time.

Families are named as in runs.csv: `full` is full depth over its step counts, `searched` this project's plans. All
comparisons stay within one group of rows (`runs.GROUP`) and use the seed blocks that all arms share.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dyndit.analysis.report.frontier import MISSING
from dyndit.analysis.report.runs import GROUP, scored_rows
from dyndit.stats import Interval, bootstrap_interval, paired_interval

BASES = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Arms:
    """Arms on their shared seed blocks, fastest first."""

    names: list[str]
    families: np.ndarray
    """(A,)"""
    ms: np.ndarray
    """(A,) medians over the blocks, ms per picture."""
    fds: np.ndarray
    """(A, N)"""

    def pick(self, keep: np.ndarray) -> "Arms":
        """Return the arms with a true value in `keep`, (A,)."""
        names = [name for name, kept in zip(self.names, keep, strict=True) if kept]
        return Arms(names, self.families[keep], self.ms[keep], self.fds[keep])

    def of(self, family: str) -> "Arms":
        """Return the arms of a family."""
        return self.pick(self.families == family)


def arms_of(rows: pd.DataFrame) -> Arms:
    """Make the arms of one group from its rows. Keep only the blocks that every arm has."""
    table = rows.pivot_table(index="arm", columns="block", values="fd", sort=False).dropna(axis="columns")
    first = rows.groupby("arm", sort=False).agg({"family": "first", "ms_per_picture": "median"}).loc[table.index]
    order = np.argsort(first["ms_per_picture"].to_numpy(), kind="stable")
    return Arms(
        [str(table.index[k]) for k in order],
        first["family"].to_numpy()[order],
        first["ms_per_picture"].to_numpy(float)[order],
        table.to_numpy(float)[order],
    )


def areas(runs: pd.DataFrame) -> pd.DataFrame:
    """Measure the area between each family's frontier and full depth's, per solver; one row per solver and family.

    A frontier joins the arms that no faster arm equals in mean FD, piecewise linearly in log time. It is flat after its
    last arm, so a bad arm never moves it. The area covers the log time that both families cover. NaN if a family has
    one arm, or the times do not overlap. Each bootstrap resample of blocks builds new frontiers, so the interval
    includes the choice of the best arms.

    Columns: GROUP, solver, family, arms, from_ms, to_ms, area (Interval, FD times ln ms; negative: better than full
    depth), fd_diff (Interval, area over width in log time: the mean difference of FD).
    """
    found = []
    for key, rows in scored_rows(runs).groupby([*GROUP, "solver"], sort=False):
        arms = arms_of(rows)
        full = arms.of("full")
        for family in dict.fromkeys(rows["family"]):
            if family != "full" and len(full.names):
                ours = arms.of(family)
                row = dict(zip((*GROUP, "solver"), key, strict=True)) | {"family": family, "arms": len(ours.names)}
                found.append(row | _area(ours, full))
    return pd.DataFrame(found, columns=[*GROUP, "solver", "family", "arms", "from_ms", "to_ms", "area", "fd_diff"])


def _area(ours: Arms, full: Arms) -> dict[str, object]:
    low, high = max(ours.ms[0], full.ms[0]), min(ours.ms[-1], full.ms[-1])
    if not low < high or not ours.fds.size:
        return {"from_ms": math.nan, "to_ms": math.nan, "area": MISSING, "fd_diff": MISSING}
    inner = [ms[(ms > low) & (ms < high)] for ms in (ours.ms, full.ms)]
    knots = np.log(np.unique(np.concatenate([[low, high], *inner])))

    def area(weights: np.ndarray) -> np.ndarray:
        return np.trapezoid(_frontier(ours, weights, knots) - _frontier(full, weights, knots), knots, axis=1)

    width, found = knots[-1] - knots[0], bootstrap_interval(area, ours.fds.shape[1])
    scaled = Interval(found.mean / width, found.low / width, found.high / width)
    return {"from_ms": low, "to_ms": high, "area": found, "fd_diff": scaled}


def _frontier(arms: Arms, weights: np.ndarray, log_ms: np.ndarray) -> np.ndarray:
    """Evaluate the frontier of weighted mean FD at these log times.  weights: (R, N), log_ms: (K,) -> (R, K)."""
    lines, times = weights @ arms.fds.T, np.log(arms.ms)
    num = len(times)
    before = np.minimum.accumulate(np.pad(lines[:, :-1], ((0, 0), (1, 0)), constant_values=np.inf), axis=1)
    new, index = lines < before, np.arange(num)
    log_ms = np.maximum(log_ms, times[0])
    place = np.searchsorted(times, log_ms, side="right") - 1
    last = np.maximum.accumulate(np.where(new, index, 0), axis=1)[:, place]
    coming = np.minimum.accumulate(np.where(new, index, num)[:, ::-1], axis=1)[:, ::-1]
    following = np.pad(coming, ((0, 0), (0, 1)), constant_values=num)[:, place + 1]
    following = np.where(following < num, following, last)  # flat after the last arm
    width = times[following] - times[last]
    share = np.divide(log_ms - times[last], width, out=np.zeros_like(width), where=width > 0)
    start, end = (np.take_along_axis(lines, knots, axis=1) for knots in (last, following))
    return start + share * (end - start)


def budget_grid(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high` ms, twelve per decade."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [ms for k in decades for base in BASES if low <= (ms := float(f"{base}e{k}")) <= high]


def winners(runs: pd.DataFrame) -> pd.DataFrame:
    """Find the best arm of each family and the winner within each budget of time; one row per group and budget.

    Columns: GROUP, budget_ms, best (family -> (arm, mean FD); without families that have no arm so fast), winner
    (family), arm, margin (Interval: FD of the second-best family minus FD of the winner, paired by block), clear (the
    margin lies above 0), against_searched (family -> Interval: FD of its best arm minus FD of the best searched arm),
    beats_searched (families with that interval wholly below 0).

    All solvers compete. `best` uses the mean FD over all blocks. The differences are cross-fitted: each block compares
    the arms that are best in the *other* blocks, so a choice among many arms is no advantage.
    """
    found = []
    for key, rows in scored_rows(runs).groupby(GROUP, sort=False):
        arms = arms_of(rows)
        if arms.fds.size:
            for budget in budget_grid(arms.ms[0], arms.ms[-1]):
                found.append(dict(zip(GROUP, key, strict=True)) | _winner(arms.pick(arms.ms <= budget), budget))
    columns = ["budget_ms", "best", "winner", "arm", "margin", "clear", "beats_searched", "against_searched"]
    return pd.DataFrame(found, columns=[*GROUP, *columns])


def _winner(arms: Arms, budget: float) -> dict[str, object]:
    families = {name: arms.of(name) for name in dict.fromkeys(arms.families)}
    means = {name: family.fds.mean(axis=1) for name, family in families.items()}
    best = {name: (families[name].names[int(fds.argmin())], float(fds.min())) for name, fds in means.items()}
    ranked = sorted(best, key=lambda name: best[name][1])
    chosen = {name: _cross_fitted(family.fds) for name, family in families.items()}
    margin = MISSING if len(ranked) < 2 else paired_interval(chosen[ranked[1]], chosen[ranked[0]])
    against = {}
    if "searched" in chosen:
        against = {name: paired_interval(fd, chosen["searched"]) for name, fd in chosen.items() if name != "searched"}
    return {
        "budget_ms": budget,
        "best": best,
        "winner": ranked[0],
        "arm": best[ranked[0]][0],
        "margin": margin,
        "clear": margin.low > 0,
        "beats_searched": [name for name, difference in against.items() if difference.high < 0],
        "against_searched": against,
    }


def _cross_fitted(fds: np.ndarray) -> np.ndarray:
    """Return in each block the FD of the arm that is best in the other blocks.  fds: (A, N) -> (N,)."""
    if fds.shape[1] < 2:
        return fds[fds.mean(axis=1).argmin()]
    others = fds.sum(axis=1, keepdims=True) - fds
    return fds[others.argmin(axis=0), np.arange(fds.shape[1])]


def against_full(runs: pd.DataFrame) -> pd.DataFrame:
    """Bootstrap the time saved at equal FD and the FD difference at equal time; one row per arm except full depth.

    Average FD over the blocks of a resample before reading full depth's frontier (`frontier.summary` reads it block by
    block). Columns: GROUP, arm, family, solver, ms, and

    - time_saved: Interval of 1 - time / time of full depth at this FD. inf: full depth never reaches this FD. -inf:
      even full depth's fastest arm is better.
    - saved_at_least: 1 - time / full depth's longest time if full depth never reaches this FD; else NaN.
    - fd_diff: Interval of FD - FD of full depth at this time; NaN outside the measured range.
    """
    found = []
    for key, rows in scored_rows(runs).groupby([*GROUP, "solver"], sort=False):
        full = arms_of(rows[rows["family"] == "full"]) if (rows["family"] == "full").any() else None
        for name, arm in rows[rows["family"] != "full"].groupby("arm", sort=False):
            row = dict(zip((*GROUP, "solver"), key, strict=True)) | {"arm": name, "family": arm["family"].iloc[0]}
            if full is None or len(full.names) < 2:
                continue
            both = arms_of(pd.concat([arm, rows[rows["family"] == "full"]]))
            if both.fds.size:
                found.append(row | _against_full(both))
    columns = ["solver", "arm", "family", "ms", "time_saved", "saved_at_least", "fd_diff"]
    return pd.DataFrame(found, columns=[*GROUP, *columns])


def _against_full(both: Arms) -> dict[str, object]:
    full, ours = both.of("full"), both.pick(both.families != "full")
    ms, log_ms, num_blocks = float(ours.ms[0]), np.log(full.ms), full.fds.shape[1]
    at_this_time = np.array([np.interp(math.log(ms), log_ms, arm) for arm in np.eye(len(log_ms))])  # of each arm

    def saved(weights: np.ndarray) -> np.ndarray:
        return _saved(ms, log_ms, weights @ full.fds.T, weights @ ours.fds[0])

    def difference(weights: np.ndarray) -> np.ndarray:
        return weights @ (ours.fds[0] - at_this_time @ full.fds)

    time_saved = bootstrap_interval(saved, num_blocks)
    inside = full.ms[0] <= ms <= full.ms[-1]
    return {
        "ms": ms,
        "time_saved": time_saved,
        "saved_at_least": 1 - ms / full.ms[-1] if time_saved.mean == math.inf else math.nan,
        "fd_diff": bootstrap_interval(difference, num_blocks) if inside else MISSING,
    }


def _saved(ms: float, log_ms: np.ndarray, lines: np.ndarray, fds: np.ndarray) -> np.ndarray:
    """Return 1 - ms / the time when each line first reaches its FD.  log_ms: (K,), rising, lines: (R, K), fds: (R,)."""
    reached, rows = lines <= fds[:, None], np.arange(len(lines))
    first = reached.argmax(axis=1)
    before = np.maximum(first - 1, 0)
    above, below = lines[rows, before], lines[rows, first]
    weight = np.divide(above - fds, above - below, out=np.ones_like(fds), where=above > below)
    found = 1 - ms / np.exp((1 - weight) * log_ms[before] + weight * log_ms[first])
    found = np.where(reached.any(axis=1), found, math.inf)
    return np.where(lines[:, 0] < fds, -math.inf, found)
