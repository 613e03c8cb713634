"""Make the tables of a claim, and the rows that its figures draw."""

import math
from collections.abc import Mapping

import pandas as pd

from dyndit.analysis.report.cells import Column, Table, filled, share
from dyndit.analysis.report.claim_goals import goals, named, p_value, sentences
from dyndit.analysis.report.claims import EXPLAINING, FULL, PLAN, PRIMARY, RIVALS, Claim
from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.runs import GROUP, scored_rows
from dyndit.analysis.report.savings import with_parts
from dyndit.analysis.report.tables import arms_table

WORDS = {True: "met", False: "missed", None: "not judged"}
HOW = (
    "Lower FD is better. Every interval is Student's 95% interval over calibrations, and every p value that of the "
    "paired t test over them; p is corrected after Holm over the comparisons of one table. Times are equal within 2%. "
    "A rival that has no step count of the plan's time takes more: the note says so. Figures draw each arm "
    "at its share of its own run's plan, in the plan's mean time."
)


def goals_table(claim: Claim) -> Table:
    """Return a row per goal and extractor, or batch size."""
    frame = pd.DataFrame([vars(goal) | {"outcome": WORDS[goal.met]} for goal in goals(claim)])
    return filled(
        "goals",
        f"What was asked for, and what was measured over {claim.words}. G is the searched plan, A full depth with its "
        "scale tuned.",
        "claim.goals: stats.over_calibrations of paired differences, and of shares of time",
        [
            Column("goal", "name"),
            Column("measured ± 95%", "measured"),
            Column("asked for", "asked"),
            Column("outcome", "outcome"),
            Column("note", "note"),
        ],
        frame,
    )


def comparisons_table(claim: Claim, extractor: str, arms: Mapping[str, tuple[str, str]]) -> Table:
    """Return a row per arm: the difference, its p value, the ratio of times."""
    frame, rivals = claim.comparisons(extractor, arms), arms is RIVALS
    decides = "This extractor decides. " if extractor == PRIMARY else "This extractor decides nothing here. "
    why = decides if rivals else "These arms explain, and decide nothing. "
    return filled(
        "rivals at equal time" if rivals else "what the plan is made of",
        f"{why}G − X: the searched plan's FD less the arm's, over {claim.words}; p: two-sided paired t "
        f"test, and after Holm over these {int((frame['calibrations'] > 0).sum())} comparisons.",
        "claim.comparisons: stats.over_calibrations of FD at G's time, stats.holm",
        [
            Column("rival", named),
            Column("FD", "fd", share),
            Column("G − X ± 95%", "diff", "{:+.2f}".format),
            Column("p", "p", p_value),
            Column("p, Holm", "corrected", p_value),
            Column("time over G's", "ratio", share),
            Column("G is", lambda r: r["outcome"] or "–"),
            Column("note", "note"),
        ],
        frame,
    )


def normalised(claim: Claim, extractor: str) -> pd.DataFrame:
    """Return the scored rows as figures draw them: an arm per family, calibrations in the place of seed blocks.

    Every arm is drawn at its share of its own run's G, in the mean time of G in the runs with A: a machine is not as
    fast in every run. G stands in every run of a calibration, and is drawn once.
    """
    rows = scored_rows(claim.rows[claim.rows["extractor"] == extractor])
    with_full = set(rows.loc[rows["family"] == FULL, "run"])
    plans = rows[rows["family"] == PLAN].set_index(["calibration", "run"])["ms_per_picture"]
    mean = plans[plans.index.isin(with_full, level="run")].mean()
    scales = [mean / plans[key] for key in zip(rows["calibration"], rows["run"], strict=True)]
    rows = rows.assign(**{name: rows[name] * scales for name in ("ms_per_picture", "ms_denoiser")})
    rows = rows[(rows["family"] != PLAN) | rows["run"].isin(with_full)].reset_index(drop=True)
    machines = " and ".join(sorted(set(rows["machine"])))
    common = {
        "run": "claim",
        "machine": machines,
        "cfg_scale": rows["cfg_scale"].min(),
        "plan": "",
        "predicted_fd": math.nan,
    }
    return rows.assign(arm=rows["family"], block=rows["calibration"], calibration="", **common)


def tables_of_claim(claim: Claim, extractor: str) -> list[Table]:
    """Return the tables of one extractor; the goals stand with the first."""
    made = [goals_table(claim)] if extractor == claim.extractors[0] else []
    made += [comparisons_table(claim, extractor, arms) for arms in (RIVALS, EXPLAINING)]
    rows = claim.rows[claim.rows["extractor"] == extractor]
    frame = pd.concat([summary(own) for _, own in scored_rows(rows).groupby(GROUP, sort=True)], ignore_index=True)
    parts = with_parts(frame.assign(cfg_scale=0.0))["parts"]  # full depth runs the same blocks at any scale but 1
    return [*made, arms_table(frame.assign(parts=parts, verdict="", note=""))]


def findings_of_claim(claim: Claim, extractor: str) -> list[str]:
    """Return the sentences of the protocol, at the extractor that decides."""
    return sentences(claim) if extractor == claim.extractors[0] else []
