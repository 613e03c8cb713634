"""Write the findings of a report, a sentence each, from the frames behind its tables."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from dyndit.analysis.report.budgets import winners
from dyndit.analysis.report.calibrations import by_plan, calibration_findings, is_plan
from dyndit.analysis.report.cells import percent
from dyndit.analysis.report.frontier import KEPT, NO_VERDICT, NONE, against_controls, against_unguided
from dyndit.analysis.report.runs import PLANS, label
from dyndit.analysis.report.savings import bias_findings
from dyndit.plans.plan import DepthPlan


def findings_of(
    frame: pd.DataFrame, rows: pd.DataFrame, folder: Path, margin: float, *, first: bool = True
) -> list[str]:
    """Return all findings of one group. frame: its `frontier.summary`, rows: its raw rows, folder: holds its plans.

    first: the plans were not described yet, by an earlier group of the same arms under another extractor.
    """
    found = origin_findings(rows) + headlines(frame, margin) + calibration_findings(frame)
    found += budget_findings(rows) + frontier_findings(frame, margin) + unguided_findings(rows) + control_findings(rows)
    found += bias_findings(frame) + unrecorded_findings(rows)
    return found + (plan_findings(folder, rows) if first else [])


UNRECORDED = {
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "macs": "multiply-accumulates",
    "macs_heads": "multiply-accumulates of exit heads",
}


def unrecorded_findings(runs: pd.DataFrame) -> list[str]:
    """Name the figures that no row of a group has, in a sentence."""
    scored = runs[runs["role"] == "score"]
    missing = [name for column, name in UNRECORDED.items() if scored[column].isna().all()]
    plans = scored[is_plan(scored["family"])]
    if len(plans) and not plans["calibration"].map(label).any():
        missing.append("the number of calibrations")
    return [f"Not recorded in these rows: {', '.join(missing)}."] if missing else []


def origin_findings(runs: pd.DataFrame) -> list[str]:
    """Warn of unlike classes among one group's rows, and say where a reference of statistics comes from."""
    scored, found = runs[runs["role"] == "score"], []
    labels = sorted({value or "unknown" for value in scored["labels"].fillna("")})
    if len(labels) > 1:
        found.append(f"Warning: arms differ in their class labels ({', '.join(labels)}); distances differ by that too.")
    for reference in sorted(set(scored["reference"].fillna("")) - {"", "pictures"}):
        found.append(f"Reference: {reference}.")
    for resize in sorted(set(scored["resize"].fillna("")) - {""}):
        found.append(f"All pictures were cropped and resized: {resize}.")
    return found


def headlines(frame: pd.DataFrame, margin: float = 0.05) -> list[str]:
    """Write the findings of one group's `frontier.summary`, a sentence each."""
    dynamic = frame[~frame["family"].isin(["full", "unguided"])]
    found = []
    plans = by_plan(frame, margin)
    plans = plans[plans["family"].isin(PLANS)]
    for (solver, steps), arms in plans.groupby(["solver", "steps"], sort=False):
        known = arms[arms["verdict"] != ""]
        kept = known[known["verdict"] == KEPT]
        if known.empty:
            continue
        if (known["verdict"] == NONE).all():
            found.append(f"{solver}, {steps} steps: {NO_VERDICT}.")
            continue
        if kept.empty:
            found.append(f"{solver}, {steps} steps: none of {len(known)} plans is shown to keep full depth's quality.")
            continue
        best = kept.loc[max(kept.index, key=lambda k: kept.loc[k, "time_saved"].mean)]
        found.append(
            f"{solver}, {steps} steps: largest time saving at unchanged quality "
            f"{percent(best['time_saved'])}, at {percent(best['share_of_blocks'])} of the blocks "
            f"({best['arm']}; FD difference {best['fd_diff']:+.2f}, upper bound at most {margin:.0%} of full "
            f"depth's FD); {len(kept)} of {len(known)} plans keep it; chosen among them on these very blocks."
        )
    for solver, arms in dynamic.groupby("solver", sort=False):
        compared = arms[[not math.isnan(d.mean) for d in arms["fd_diff_equal_time"]]]
        counts = [
            f"{family} {own['better'].sum()} and {own['worse'].sum()} of {len(own)}"
            for family, own in compared.groupby("family", sort=False)
        ]
        if counts:
            found.append(
                f"{solver}, against full depth at equal time, how many arms are better and worse (95% interval "
                f"excludes 0): {'; '.join(counts)}."
            )
    return found


def frontier_findings(frame: pd.DataFrame, margin: float = 0.05) -> list[str]:
    """Compare one group's searched plans with the full-depth frontier.  frame: its `frontier.summary`.

    Count plans that take between the times of 5 and 20 full-depth steps of the same solver.
    """
    found = []
    for solver, arms in frame.groupby("solver", sort=False):
        full = arms[arms["family"] == "full"].set_index("steps")["ms"]
        if not {5, 20} <= set(full.index):
            continue
        plans = arms[(arms["family"] == "searched") & arms["ms"].between(full[5], full[20])]
        if plans.empty:  # a solver with full depth only
            continue
        plans = plans[[not math.isnan(d.mean) for d in plans["fd_diff_equal_time"]]]
        above = sum(
            d.mean > margin * (fd.mean - d.mean) for d, fd in zip(plans["fd_diff_equal_time"], plans["fd"], strict=True)
        )
        found.append(
            f"{solver}, between the times of 5 and 20 full-depth steps: of {len(plans)} searched plans "
            f"{plans['better'].sum()} lie clearly below the full-depth frontier, {above} above it by more than "
            f"{margin:.0%}."
        )
    return found


def control_findings(runs: pd.DataFrame) -> list[str]:
    """Compare searched plans with constants, reversals and ramps of the same budget, a sentence per family.

    Variants have their own table (`tables.against_searched_table`).
    """
    found, table = [], against_controls(runs)
    if table.empty:
        return found
    for (solver, steps, budget, family), rows in table.groupby(["solver", "steps", "budget", "family"], sort=False):
        if (rows["variant"] != "").any():
            continue
        best = rows.sort_values("fd_control").iloc[0]
        many = f"the best of {len(rows)} {family} plans, " if len(rows) > 1 else ""
        verdict = "better" if best["better"] else "worse" if best["worse"] else "neither better nor worse"
        found.append(
            f"{solver}, {int(steps)} steps, budget {budget:g}: the searched plan against {many}{best['control']}: FD "
            f"{best['fd_diff']:+.2f} ({verdict}), in {best['time_ratio']:.2f} of its time."
        )
    return found


def unguided_findings(runs: pd.DataFrame) -> list[str]:
    """Compare searched plans with full depth without guidance at equal time, a sentence per solver."""
    return [
        f"{solver}, against full depth without guidance at equal time: of {len(rows)} searched plans "
        f"{rows['better'].sum()} better, {rows['worse'].sum()} worse (95% interval excludes 0)."
        for solver, rows in against_unguided(runs).groupby("solver", sort=False)
    ]


def plan_findings(folder: Path, runs: pd.DataFrame) -> list[str]:
    """Report the searched plans' mean conditional depth in the noisiest, middle and last third of the steps."""
    scored = runs[(runs["role"] == "score") & (runs["plan"].fillna("") != "")]
    found = []
    for (solver, steps), group in scored.groupby(["solver", "steps"], sort=False):
        plans = [plan.depths for name in group["plan"].unique() if (plan := read_plan(folder, name))]
        if plans and steps >= 3:
            parts = zip(*(np.array_split(depths, 3) for depths in plans), strict=True)
            depths = ", ".join(f"{np.mean([np.mean(part) for part in third]):.1f}" for third in parts)
            found.append(
                f"{solver}, {int(steps)} steps: mean conditional depth over {len(plans)} searched plans in the "
                f"noisiest, middle and last third of the steps: {depths}."
            )
    return found + [f"The same plan: {', '.join(names)}." for names in same_plans(folder, scored) if len(names) > 1]


def same_plans(folder: Path, scored: pd.DataFrame) -> list[list[str]]:
    """Return the arms of each distinct plan, in the order of the rows."""
    found: dict[tuple[object, ...], list[str]] = {}
    for _, row in scored[scored["plan"].fillna("") != ""].drop_duplicates("arm").iterrows():
        if plan := read_plan(folder, row["plan"]):
            key = (plan.solver, plan.timesteps, plan.steps, plan.exits)
            found.setdefault(key, []).append(row["arm"])
    return list(found.values())


def budget_findings(runs: pd.DataFrame) -> list[str]:
    """Count the budgets that each family wins, and name the families that beat searched plans at equal time."""
    table = winners(runs)
    if table.empty or table["best"].map(len).max() < 2:
        return []
    parts = []
    for family, rows in table.groupby("winner", sort=False):
        parts.append(f"{family} at {len(rows)} ({int(rows['clear'].sum())} clearly)")
    found = [f"Best within a budget of time, of {len(table)} budgets: {', '.join(parts)}."]
    if not table["against_searched"].map(bool).any():
        return found
    beaten = table.explode("beats_searched").groupby("beats_searched", sort=False)["budget_ms"]
    text = "; ".join(f"{family} (within {', '.join(f'{b:g}' for b in ms)} ms)" for family, ms in beaten)
    slow = table.loc[~table["against_searched"].map(bool), "budget_ms"]
    within = f"; no searched plan is as fast as {', '.join(f'{b:g}' for b in slow)} ms" if len(slow) else ""
    found.append(
        f"Families that beat searched plans at equal time: {text or 'none'} (any solver, 95% interval excludes 0"
        f"{within})."
    )
    return found


def read_plan(folder: Path, name: str) -> DepthPlan | None:
    """Read a plan file of a run, from its folder or the `plans` folder in it; None if there is no such file."""
    for path in (folder / name, folder / "plans" / name):
        if name and path.is_file():
            return DepthPlan.load(path)
    return None
