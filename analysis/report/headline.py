"""Answer on the first screen: how much faster at the same quality, and against what. A sentence, a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from dyndit.analysis.report.calibrations import by_plan, candidates, is_plan, words
from dyndit.analysis.report.cells import Column, Table, filled, number, percent, saved_at_equal_fd
from dyndit.analysis.report.frontier import KEPT, LOST, NO_VERDICT, NONE, OPEN, summary
from dyndit.analysis.report.runs import GROUP, scored_rows
from dyndit.stats import Interval, paired_interval

NAME = "at a glance"
SPEED, BACKBONES = "How much faster, at the same quality", "Which backbone is best"
"""Headings of the first screen: of plans, and of backbones that differ in their training."""
TRAINED_ALIKE = "trained alike"
"""What rows name in place of a model where every arm is a backbone of its own."""
AS_FAST = 1.02
"""A rival may take this factor of the plan's time."""
WORDS = {KEPT: "unchanged", LOST: "worse", OPEN: "not shown", NONE: NONE, "": "–"}


@dataclass(frozen=True)
class Glance:
    """The answer of one group of comparable rows: its sentence, and the best plan at each solver and step count."""

    sentence: str
    detail: str
    """Which plan, its FD, and what the result rests on; "" if there is none."""
    best: pd.DataFrame
    """Columns of `calibrations.by_plan`, and rival (arm; "" for none), rival_fd (Interval: its FD less the plan's)."""
    of_plans: bool
    """True if the best are calibrated plans, False for other arms."""
    heading: str = SPEED


def glance_of(frame: pd.DataFrame, rows: pd.DataFrame, margin: float) -> Glance:
    """Summarise one group.  frame: its `frontier.summary`, rows: its raw rows."""
    if (rows["model"] == TRAINED_ALIKE).all():
        return Glance(*_of_backbones(scored_rows(rows)), pd.DataFrame(), of_plans=False, heading=BACKBONES)
    plans = by_plan(frame, margin)
    judged = plans[plans["verdict"] != ""]
    best = pd.DataFrame([_best(same) for _, same in judged.groupby(["solver", "steps"], sort=False)])
    if len(best):
        found = [_rival(row, frame, rows) for _, row in best.iterrows()]
        best = best.assign(rival=[name for name, _ in found], rival_fd=[difference for _, difference in found])
    return Glance(*_sentences(plans, judged, frame, margin), best, bool(is_plan(frame["family"]).any()))


def sentences(runs: pd.DataFrame, margin: float) -> list[str]:
    """Return the sentence and the detail of each group of a run's rows that `shown_first` shows. For the terminal."""
    groups = [rows for _, rows in scored_rows(runs).groupby(GROUP, sort=False)]
    return named([glance_of(summary(rows, margin), rows, margin) for rows in groups], groups)


def shown_first(glances: Sequence[Glance]) -> list[int]:
    """Return the groups that the first screen is about: with plans to judge, else with other arms, else the first."""
    judged = [k for k, glance in enumerate(glances) if len(glance.best)]
    return [k for k in judged if glances[k].of_plans] or judged or [0]


def named(glances: Sequence[Glance], groups: Sequence[pd.DataFrame]) -> list[str]:
    """Return sentence and detail, in turn, of the groups on the first screen, with what tells these groups apart."""
    shown = shown_first(glances)
    differ = [name for name in GROUP if len({str(groups[k][name].iloc[0]) for k in shown}) > 1]
    differ = [name for name in differ if not (name == "extractor" and "metric" in differ)]
    units = {"cfg_scale": "guidance {}", "num_images": "{} pictures a block", "threads": "{} threads"}
    units["batch_size"] = "batches of {}"
    found = []
    for k in shown:
        label = ", ".join(units.get(name, "{}").format(groups[k][name].iloc[0]) for name in differ)
        sentence = f"{label}: {glances[k].sentence}" if label else glances[k].sentence
        found += [sentence[0].upper() + sentence[1:], glances[k].detail]
    return found


def _best(plans: pd.DataFrame) -> pd.Series:
    """Return the fastest plan that keeps quality; without one, the plan whose upper bound is nearest."""
    kept = plans[plans["verdict"] == KEPT]
    if len(kept):
        return kept.loc[max(kept.index, key=lambda k: kept.loc[k, "time_saved"].mean)]
    bound = [d.mean if math.isnan(d.high) else d.high for d in plans["fd_diff"]]
    return plans.iloc[min(range(len(plans)), key=bound.__getitem__)]


def _rival(plan: pd.Series, frame: pd.DataFrame, rows: pd.DataFrame) -> tuple[str, Interval]:
    """Find the best arm of any other kind that is about as fast: fewer steps, no guidance, a peer."""
    mine = set(candidates(frame)["arm"])
    others = frame[~frame["arm"].isin(mine) & ~is_plan(frame["family"]) & (frame["ms"] <= AS_FAST * plan["ms"])]
    if others.empty:
        return "", Interval(math.nan, math.nan, math.nan)
    name = others.loc[min(others.index, key=lambda k: others.loc[k, "fd"].mean), "arm"]
    scored = rows[rows["role"] == "score"]
    both = scored[scored["arm"].isin([name, plan["arm"]])].pivot_table(index="block", columns="arm", values="fd")
    both = both.dropna()
    return name, paired_interval(both[name], both[plan["arm"]])


def _sentences(plans: pd.DataFrame, judged: pd.DataFrame, frame: pd.DataFrame, margin: float) -> tuple[str, str]:
    """Write the sentence and the detail of a group."""
    noun = "plan" if is_plan(frame["family"]).any() else "arm"
    if plans.empty:
        return "full depth alone was measured: nothing to compare it with.", ""
    if judged.empty:
        return f"no verdict: full depth was not measured at the steps of any {noun}.", ""
    best, num = _best(judged), f"{len(judged)} {noun}{'s' * (len(judged) > 1)}"
    where = f"full depth at the same {int(best['steps'])} steps of {best['solver']}"
    moved = f"{frame['metric'].iloc[0]} {best['fd_diff']:+.2f}, margin {margin:.0%}"
    rest = f"; {words(best['calibrations'])}" if noun == "plan" else ""
    if best["verdict"] == KEPT:
        chosen = f"; the best of {num}, chosen on these very pictures" if len(judged) > 1 else ""
        times = f"{number(best['ms'])} ms a picture where {where} takes {number(best['ms_full'])}"
        saved = f"{percent(best['time_saved'])} of the time is saved at unchanged quality"
        return f"{saved}: {times}; {_equal(best)}.", f"{best['arm']}: {moved}{chosen}{rest}."
    nearest = f"{best['arm']} takes {percent(best['time_saved'])} less time than {where}: {moved}{rest}."
    if (judged["verdict"] == NONE).all():
        return f"{NO_VERDICT}.", nearest
    counts = judged["verdict"].value_counts()
    held = [f"{counts[OPEN]} of {num} undecided: draw more"] if OPEN in counts else []
    held += [f"{counts[LOST]} of {num} worse by more than that"] if LOST in counts else []
    held += [f"{counts[NONE]} of {num} on one seed block"] if NONE in counts else []
    lost = f"no {noun} is shown to keep full depth's quality within {margin:.0%} ({'; '.join(held)})."
    return lost, f"Nearest: {nearest}"


def _of_backbones(rows: pd.DataFrame) -> tuple[str, str]:
    """Write the sentence and the detail of backbones trained alike: `settings` are their names, blocks their seeds."""
    by_seed = rows.pivot_table(index="block", columns="settings", values="fd")
    metric, num, first = rows["metric"].iloc[0], len(by_seed), rows[rows["family"] == "full"]["settings"].iloc[0]
    distances = {str(name): paired_interval(by_seed[name].dropna().to_numpy()) for name in by_seed}
    best, *others = sorted(distances, key=lambda name: distances[name].mean)
    listed = ", ".join(f"{name} {distances[name]:.2f}" for name in others)
    sentence = f"lowest {metric} of {len(distances)} backbones: {best} {distances[best]:.2f}; then {listed}."
    both = by_seed[[best, first]].dropna() if best != first else by_seed[:0]
    paired = f"; {best} − {first}: {paired_interval(both[best], both[first]):+.2f}, paired by seed" if len(both) else ""
    return sentence, f"{num} training seed{'s' * (num > 1)}{paired}."


def _equal(plan: pd.Series) -> str:
    """Say the saving against full depth with fewer steps, where it is as good."""
    against = "full depth with fewer steps at equal FD"
    if not math.isnan(plan["time_saved_at_least"]):
        return f"against {against}, at least {plan['time_saved_at_least']:.0%}"
    if math.isnan(plan["time_saved_equal_fd"].mean):
        return f"{against} lies outside what was measured"
    return f"against {against}, {percent(plan['time_saved_equal_fd'])}"


def glance_table(glances: Sequence[Glance], margin: float) -> Table:
    """Return the table of the first screen: the best plan of each extractor, solver and step count."""
    frames = [glances[k].best for k in shown_first(glances) if len(glances[k].best)]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"family": []})
    differ = [name for name in GROUP if name in frame and name != "extractor" and frame[name].nunique() > 1]
    numbers = [Column("calibrations", "calibrations")] if len(frame) and frame["calibrations"].max() > 1 else []
    return filled(
        NAME,
        "The fastest plan that keeps quality at each solver and step count; where none does, the one that is nearest. "
        f"Quality is unchanged if the upper 95% bound of the difference is at most {margin:.0%} of full depth's FD. "
        "Rival: the best arm of another kind in the plan's time (fewer steps, no guidance, a peer), and its FD less "
        "the plan's.",
        "headline.glance_of: calibrations.by_plan of frontier.summary; paired differences of FD over blocks",
        [
            *(Column(name.replace("_", " "), name) for name in differ),
            Column("solver, steps", lambda r: f"{r['solver']} {int(r['steps'])}"),
            Column("plan", "arm"),
            Column("ms", "ms", number),
            Column("full depth, ms", "ms_full", number),
            Column("time saved", "time_saved", percent),
            Column("at equal FD", "time_saved_equal_fd", text=saved_at_equal_fd),
            Column("FD − full depth", "fd_diff", "{:+.2f}".format),
            Column("quality", lambda r: WORDS[r["verdict"]]),
            Column("rival in that time", lambda r: r["rival"] or "none as fast"),
            Column("its FD − plan's", "rival_fd", "{:+.2f}".format),
            *numbers,
        ],
        frame,
    )
