"""Summarise plans over independent calibrations: the calibration, not the seed block, is then the unit of analysis.

A plan is what rows of one family, solver, steps, budget and settings have in common. Seed blocks say how far the
drawing of pictures moves a result. Only further calibrations (exits, table, search) say how far their own luck does.
"""

import math

import pandas as pd

from dyndit.analysis.report.frontier import MISSING, verdict_on
from dyndit.analysis.report.runs import GROUP, PLANS
from dyndit.stats import Interval, paired_interval

PLAN = ["family", "solver", "steps", "budget", "settings", "variant"]
_OF_THE_FIRST = (
    *("arm", "share_of_blocks", "ms", "ms_full", "fd_full", "fd_diff", "verdict"),
    *("time_saved_equal_fd", "time_saved_at_least"),
)
UNKNOWN, ONE = "calibrations not recorded", "one calibration"


def is_plan(families: pd.Series) -> pd.Series:
    """Tell which families are plans that a calibration made."""
    return families.isin(PLANS) | families.str.startswith("searched-")


def candidates(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the arms that the headline is about: calibrated plans, without variants; else all but full depth."""
    plans = frame[frame["family"].isin(PLANS)]
    return plans if len(plans) else frame[~frame["family"].isin(["full", "unguided"]) & ~is_plan(frame["family"])]


def by_plan(frame: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Join the candidates' calibrations; one row per plan, from a `frontier.summary`.

    Arms that do not record different calibrations are not joined. With several calibrations the intervals are over
    calibrations, of means over seed blocks. Columns: GROUP, PLAN, arm and share_of_blocks (of the first calibration),
    calibrations (their number; 0: not recorded), ms, ms_full, fd, fd_full, time_saved (Interval), fd_diff (Interval),
    verdict, time_saved_equal_fd, time_saved_at_least.
    """
    rows = []
    for same in _plans(candidates(frame)):
        first = same.iloc[0]
        row = {name: first[name] for name in (*GROUP, *PLAN, *_OF_THE_FIRST)}
        row["fd"], row["calibrations"] = first["fd"].mean, number_of(same)
        row["time_saved"] = Interval(float(first["time_saved"]), math.nan, math.nan)
        if len(same) > 1:
            row |= {name: float(same[name].mean()) for name in ("ms", "ms_full", "fd_full")}
            row["fd"] = sum(value.mean for value in same["fd"]) / len(same)
            row["time_saved"] = paired_interval(same["time_saved"].astype(float))
            row["fd_diff"] = paired_interval([value.mean for value in same["fd_diff"]])
            row["verdict"] = verdict_on(row["fd_diff"], row["fd_full"], margin) if first["verdict"] else ""
            row |= _at_equal_fd(same)
        rows.append(row)
    return pd.DataFrame(rows, columns=[*GROUP, *PLAN, *_OF_THE_FIRST, "fd", "calibrations", "time_saved"])


def _plans(arms: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the arms of each plan: all its calibrations."""
    found = []
    for _, same in arms.groupby([*GROUP, *PLAN], sort=False, dropna=False):
        found += [same] if number_of(same) == len(same) else [same.iloc[[k]] for k in range(len(same))]
    return found


def _at_equal_fd(same: pd.DataFrame) -> dict[str, object]:
    """Summarise the savings at equal FD: an interval if all calibrations have one, else a bound if all have either."""
    means = [value.mean for value in same["time_saved_equal_fd"]]
    if all(map(math.isfinite, means)):
        return {"time_saved_equal_fd": paired_interval(means), "time_saved_at_least": math.nan}
    least = [m if math.isfinite(m) else bound for m, bound in zip(means, same["time_saved_at_least"], strict=True)]
    return {"time_saved_equal_fd": MISSING, "time_saved_at_least": sum(least) / len(least)}


def number_of(rows: pd.DataFrame) -> int:
    """Count the calibrations that a `frontier.summary` records; 0: none."""
    return len(set(rows["calibration"]) - {""})


def words(number: int) -> str:
    """Say how many calibrations a result rests on."""
    return {0: UNKNOWN, 1: ONE}.get(number, f"{number} calibrations")


def calibration_findings(frame: pd.DataFrame) -> list[str]:
    """Say how many calibrations the plans rest on, and what that means for the intervals."""
    plans = frame[is_plan(frame["family"])]
    number = number_of(plans)
    if plans.empty or number == 0:
        return []  # what is not recorded is listed by itself
    if number == 1:
        return [f"{ONE.capitalize()}: intervals are over its seed blocks, and leave out the luck of calibrating."]
    return [f"{words(number)}: their table has intervals over calibrations; other intervals are over seed blocks."]
