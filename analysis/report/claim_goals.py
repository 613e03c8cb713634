"""Judge the goals of a claim, and write what its protocol makes of the outcome."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from dyndit.analysis.report.cells import percent
from dyndit.analysis.report.claims import BETTER, LEVEL, PLAN, PRIMARY, WORSE, Claim, listed, number_word

SAVING, FEW, PRECISION, NEAR = {True: 0.30, False: 0.40}, 10, -0.01, 0.01
"""Share of time to save, up to `FEW` steps of G and at more; loss of precision that is allowed; share of FD within
which a simpler arm does nearly as well."""
SIMPLER = {
    "C": "guidance by an own exit at full depth",
    "D": "the same heads without a search",
    "H": "a smaller student",
}
"""Arms that would show that choosing by timestep is not what saves the time."""


@dataclass(frozen=True)
class Goal:
    """A goal: what was measured, what was asked for, and whether it is met. None: cannot be judged."""

    name: str
    measured: str
    asked: str
    met: bool | None
    note: str = ""


def goals(claim: Claim) -> list[Goal]:
    """Judge the goals 1 to 4 of the protocol. Without limits, or with a row missing, a goal is not judged."""
    return [*_quality(claim), *_times(claim), _rivals(claim), _precision(claim)]


def _quality(claim: Claim) -> Iterator[Goal]:
    for extractor in claim.extractors:
        difference, full, lacking = claim.against_full(extractor)
        limit = claim.margin * full
        met = None if math.isnan(difference.high) else difference.high <= limit
        asked = f"upper limit at most {limit:+.2f} ({claim.margin:.0%} of A)"
        yield Goal(f"1 quality by {extractor}", f"{difference:+.2f}", asked, met, _lacks(lacking, claim))


def _times(claim: Claim) -> Iterator[Goal]:
    for role, batch in (("score", claim.rows.loc[claim.rows["role"] == "score", "batch_size"].iloc[0]), ("time", 1)):
        saved, lacking = claim.saved(role)
        met = None if math.isnan(saved.low) else saved.low >= asked_of(claim)
        asked = f"lower limit at least {asked_of(claim):.0%}"
        yield Goal(f"2 time saved, batches of {batch}", percent(saved), asked, met, _lacks(lacking, claim))


def asked_of(claim: Claim) -> float:
    """Return the share of time to save: fewer steps leave less to save."""
    return SAVING[bool((claim.of(claim.extractors[0], PLAN)["steps"] <= FEW).all())]


def _rivals(claim: Claim) -> Goal:
    name, asked = "3 rivals at equal time", f"better than each, corrected p at most {LEVEL:g}"
    if claim.extractors[0] != PRIMARY:
        return Goal(name, "–", asked, None, f"not scored by {PRIMARY}")
    frame = claim.comparisons(PRIMARY)
    there = frame[frame["calibrations"] > 0]
    better = int((there["outcome"] == BETTER).sum())
    met = None if len(claim.calibrations) < 2 or there.empty else better == len(there)
    note = _lacks([], claim) or "; ".join(f"{r['letter']} {r['note']}" for _, r in there.iterrows() if not r["outcome"])
    return Goal(name, f"better than {better} of {len(there)}", asked, met, note)


def _precision(claim: Claim) -> Goal:
    name, asked = "4 precision", f"lower limit at least {PRECISION:+.2f}"
    if claim.extractors[0] != PRIMARY:
        return Goal(name, "–", asked, None, f"not scored by {PRIMARY}")
    difference, _, lacking = claim.against_full(PRIMARY, "precision")
    met = None if math.isnan(difference.low) else difference.low >= PRECISION
    return Goal(name, f"{difference:+.3f}", asked, met, _lacks(lacking, claim))


def sentences(claim: Claim) -> list[str]:
    """Write what the protocol makes of the outcome: the headline first, nothing softer."""
    found = goals(claim)
    if len(claim.calibrations) < 2:
        saved, lacking = claim.saved()
        saves = "" if lacking else f" The searched plan saves {percent(saved)} of the time."
        return [f"One calibration: nothing is shown.{saves}"]
    saying = [*_headline(claim, found)]
    if claim.extractors[0] != PRIMARY:
        return [*saying, f"Not scored by {PRIMARY}, which decides about rivals: they are not judged."]
    frame = claim.comparisons(PRIMARY)
    return [*_clearly_better(frame), *saying, *_of_rivals(frame), *_what_else(frame)]


def summary(claim: Claim, below: int) -> list[str]:
    """Write `sentences` with all rivals that are not beaten in one of them, for a page that has a table too.

    claim: two calibrations at least, scored by the extractor that decides. below: how many of the strongest rivals
    stand in that table with their differences; letters are enough for them.
    """
    frame = claim.comparisons(PRIMARY)
    shown = set(frame["letter"][frame["outcome"] != ""][:below])
    rows = _not_beaten(frame)
    told = [f"{row['letter']} (below)" for row in rows if row["letter"] in shown]
    told += [f"{named(row)} ({_difference(row)})" for row in rows if row["letter"] not in shown]
    rivals = _of_rivals(frame)
    if told:
        rivals = [f"It is not shown to be better at equal time than {'; '.join(told)}.", *_absent(frame)]
    return [*_clearly_better(frame), *_headline(claim, goals(claim)), *rivals, *_what_else(frame)]


def _difference(row: pd.Series) -> str:
    return f"{row['diff']:+.2f}" if row["outcome"] else row["note"]


def _headline(claim: Claim, found: Sequence[Goal]) -> Iterator[str]:
    """Write the first sentence: quality, time and precision."""
    quality, times, precision = found[: len(claim.extractors)], found[len(claim.extractors) : -2], found[-1]
    saved, _ = claim.saved()
    short = "" if all(goal.met for goal in times) else f" (goal: {asked_of(claim):.0%} in every batch size)"
    falls = ""
    if precision.met is False:
        falls = f", and precision falls by {-claim.against_full(PRIMARY, 'precision')[0].mean:.3f}"
    if all(goal.met for goal in quality):
        rests = f"{claim.margin:.0%}, {claim.words}, {number_word(len(quality))} extractor{'s' * (len(quality) > 1)}"
        yield f"A searched plan saves {percent(saved)} of the time{short} at unchanged quality ({rests}){falls}."
        return
    parts = []
    for extractor, goal in zip(claim.extractors, quality, strict=True):
        difference, full, lacking = claim.against_full(extractor)
        if lacking:
            parts.append(f"{extractor}: no row for calibration {listed(lacking)}")
        elif not goal.met:
            moved = f"{abs(difference.mean / full):.1%} {'higher' if difference.mean >= 0 else 'lower'}"
            parts.append(f"{extractor}: FD is {moved} (upper limit {difference.high / full:+.1%})")
    lost = f"quality is not shown to be unchanged by {'; by '.join(parts)}"
    yield f"At {percent(saved)} of the time saved{short}, {lost}{falls}."


def _clearly_better(frame: pd.DataFrame) -> Iterator[str]:
    for _, row in frame[frame["outcome"] == WORSE].iterrows():
        yield f"{named(row)} is better than the searched plan at equal time ({_numbers(row)})."


def _of_rivals(frame: pd.DataFrame) -> Iterator[str]:
    there = frame[frame["calibrations"] > 0]
    if len(there) and (there["outcome"] == BETTER).all():
        yield f"At equal time it is better than each of {number_word(len(there))} alternatives."
    for row in _not_beaten(frame):
        numbers = _numbers(row) if row["outcome"] else row["note"]
        yield f"It is not shown to be better than {named(row)} at equal time ({numbers})."
    yield from _absent(frame)


def _not_beaten(frame: pd.DataFrame) -> list[pd.Series]:
    return [row for _, row in frame[(frame["calibrations"] > 0) & (frame["outcome"] != BETTER)].iterrows()]


def _absent(frame: pd.DataFrame) -> Iterator[str]:
    for _, row in frame[frame["calibrations"] == 0].iterrows():
        yield f"{named(row)} has no arm within the time; it left the comparison."


def _what_else(frame: pd.DataFrame) -> Iterator[str]:
    """Write the sentences on simpler arms and on the order of the steps."""
    by_letter = {row["letter"]: row for _, row in frame.iterrows() if row["outcome"]}
    for letter, what in SIMPLER.items():
        if letter in by_letter and by_letter[letter]["fd"] < (1 + NEAR) * by_letter[letter]["plan_fd"]:
            yield f"The timestep-aware plan is not what saves the time; {what} does nearly as well."
    if "F" in by_letter and not by_letter["F"]["diff"].excludes(0):
        yield "The order of the steps does not matter: the same steps shuffled do as well."


def _numbers(row: pd.Series) -> str:
    text = f"difference {row['diff']:+.2f}, corrected p {p_value(row['corrected'])}"
    return f"{text}; {row['note']}" if row["note"] else text


def _lacks(lacking: Sequence[int], claim: Claim) -> str:
    if lacking:
        return f"left out: no row for calibration {listed(lacking)}"
    return "one calibration" if len(claim.calibrations) < 2 else ""


def named(row: pd.Series) -> str:
    """Name an arm of a comparison: `B, full depth in fewer steps`."""
    return f"{row['letter']}, {row['what']}"


def p_value(value: float) -> str:
    """Write three decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"
