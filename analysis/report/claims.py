"""Judge a claim over independent calibrations: searched plans against tuned rivals, as its protocol says.

docs/results/claim/protocol.md defines the arms by letter. The unit is the calibration: with the rows of calibration c,
d(c) = FD(G, c) - FD(X, c) at equal time. A comparison is the mean of d with Student's interval, and its p value, which
is corrected over the family of rivals (`stats.holm`). A comparison that lacks a calibration is named and left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from dyndit.analysis.report.frontier import MISSING
from dyndit.analysis.report.runs import GROUP, TEXT, label
from dyndit.calibration.extractor import SEPARATOR
from dyndit.errors import InputError
from dyndit.stats import Interval, holm, over_calibrations

FULL, PLAN = "A", "searched"
PRIMARY = "efficientnet-lite0"
"""The extractor that decides: nothing was chosen by it."""
RIVALS = {
    "B": ("B", "full depth in fewer steps"),
    "C": ("C", "full depth guided by its own exit"),
    "C'": ("C-interval", "guidance in an interval"),
    "D": ("D", "the same heads without a search"),
    "F": ("shuffled", "the same steps shuffled"),
    "H": ("H", "a smaller student"),
    "I": ("ecad", "an evolved cache"),
    "J": ("J", "the best tuned cache"),
    "K": ("K", "a pruned backbone"),
}
"""Letter of each rival, its family in the rows, and what it is. They are one family of comparisons."""
EXPLAINING = {
    "E1": ("searched-E1", "the search, guided by full depth's pass alone"),
    "E2": ("searched-E2", "the search, guided by one own exit alone"),
    "L": ("L", "width by timestep"),
}
"""Arms in a family of their own: they explain, and decide nothing."""
FAMILIES = {FULL, PLAN, *(family for family, _ in (*RIVALS.values(), *EXPLAINING.values()))}
LEVEL, MATCHING = 0.05, 0.02
"""Level of a corrected p value; times are equal within this share."""
BETTER, WORSE, OPEN = "better", "worse", "not shown"
MORE, LESS = "more time", "less time"
KEY = [name for name in GROUP if name not in ("run", "machine", "cfg_scale", "extractor", "metric")]
TEXTS = tuple(name for name in KEY if name in TEXT)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, eq=False)
class Claim:
    """The rows of one claim: all calibrations and extractors, of one model.

    Calibrations may come from several machines, and one from several runs: G is in each, and every arm is compared with
    the G of its own run, drawn in turns with it on one machine.
    """

    rows: pd.DataFrame
    """Scored and timed rows, calibrations as whole numbers."""
    margin: float

    @cached_property
    def calibrations(self) -> tuple[int, ...]:
        """Return the numbers of the calibrations."""
        return tuple(sorted(set(self.rows["calibration"])))

    @cached_property
    def extractors(self) -> tuple[str, ...]:
        """Return the extractors, the primary one first. Joined ones calibrate alone: they judge nothing."""
        names = {name for name in self.rows["extractor"] if SEPARATOR not in name}
        return tuple(sorted(names, key=lambda name: (name != PRIMARY, name)))

    @property
    def point(self) -> str:
        """Return solver and steps of G: `unipc, 20 steps`."""
        return str(self.rows["point"].iloc[0])

    @property
    def words(self) -> str:
        """Say how many calibrations there are."""
        return f"{number_word(len(self.calibrations))} calibration{'s' * (len(self.calibrations) > 1)}"

    def of(self, extractor: str, family: str, role: str = "score") -> pd.DataFrame:
        """Return the rows of a family by one extractor."""
        rows = self.rows
        return rows[(rows["extractor"] == extractor) & (rows["family"] == family) & (rows["role"] == role)]

    def paired(self, extractor: str, family: str, column: str = "fd", role: str = "score") -> list[dict[int, float]]:
        """Return a figure of G, and of an arm, by calibration: G's of the arm's run."""
        arm, plan = (self.of(extractor, name, role).set_index(["calibration", "run"]) for name in (family, PLAN))
        plan = plan[plan.index.isin(arm.index)]
        return [{k: float(v) for (k, _), v in rows[column].dropna().items()} for rows in (plan, arm)]

    def lacking(self, *figures: Mapping[int, float]) -> list[int]:
        """Return the calibrations that one of the figures lacks."""
        return [k for k in self.calibrations if any(k not in found for found in figures)]

    def saved(self, role: str = "score") -> tuple[Interval, list[int]]:
        """Return the share of A's time that G saves, and the calibrations without it."""
        found = self.paired(self.extractors[0], FULL, "ms_per_picture", role)
        if lacking := self.lacking(*found):
            return MISSING, lacking
        return over_calibrations({k: 1 - found[0][k] / found[1][k] for k in self.calibrations})[0], []

    def against_full(self, extractor: str, column: str = "fd") -> tuple[Interval, float, list[int]]:
        """Return G - A of a figure, A's mean, and the calibrations without it."""
        plan, full = self.paired(extractor, FULL, column)
        if lacking := self.lacking(plan, full):
            return MISSING, math.nan, lacking
        return over_calibrations(plan, full)[0], float(np.mean([full[k] for k in self.calibrations])), []

    def comparisons(self, extractor: str, arms: Mapping[str, tuple[str, str]] = RIVALS) -> pd.DataFrame:
        """Compare G with every arm: a row per letter, the strongest rival first.

        Columns: letter, what, calibrations, ratio (mean of the arm's time over G's), fd, plan_fd (means), diff
        (Interval of G - X), p, corrected, outcome (is G BETTER, WORSE, or OPEN; "" without a figure), note. An arm that
        took more time than G does not make it WORSE.
        """
        rows = [self._compared(extractor, letter, *arm) for letter, arm in arms.items()]
        there = {row["letter"]: row["p"] for row in rows if row["calibrations"]}
        corrected = holm(there)
        for row in rows:
            row["corrected"] = corrected.get(row["letter"], math.nan)
            outcome = OPEN
            if row["corrected"] <= LEVEL and (row["diff"].mean < 0 or MORE not in row["note"]):
                outcome = BETTER if row["diff"].mean < 0 else WORSE
            row["outcome"] = "" if math.isnan(row["diff"].mean) else outcome
        columns = ["letter", "what", "calibrations", "ratio", "fd", "plan_fd", "diff", "p", "corrected", "outcome"]
        columns += ["note"]
        rows.sort(key=lambda row: (math.isnan(row["diff"].mean), -np.nan_to_num(row["diff"].mean), row["letter"]))
        return pd.DataFrame(rows, columns=columns)

    def _compared(self, extractor: str, letter: str, family: str, what: str) -> dict[str, object]:
        plan, fds = self.paired(extractor, family)
        times, own_times = self.paired(extractor, family, "ms_per_picture")
        row = {"letter": letter, "what": what, "calibrations": len(own_times), "note": ""}
        row |= {**dict.fromkeys(("ratio", "fd", "plan_fd", "p"), math.nan), "diff": MISSING}
        if not own_times:
            return row | {"note": "no arm: out of reach at this time, or not asked for"}
        if lacking := self.lacking(plan, fds, times):
            return row | {"note": f"left out: no row for calibration {listed(lacking)}"}
        difference, p = over_calibrations(plan, fds)
        ratios = {k: own_times[k] / times[k] for k in self.calibrations}
        ratio, kinds = float(np.mean([*ratios.values()])), {k: _matched(ratios[k]) for k in self.calibrations}
        note = "; ".join(
            f"{kind}: {listed([k for k in kinds if kinds[k] == kind])}" for kind in sorted(set(kinds.values()) - {""})
        )
        row |= {"ratio": ratio, "fd": float(np.mean([*fds.values()])), "plan_fd": float(np.mean([*plan.values()]))}
        return row | {"diff": difference, "p": p, "note": note}


def _matched(ratio: float) -> str:
    """Say how an arm's time differs from G's; "" if they are matched."""
    return "" if abs(ratio - 1) <= MATCHING else MORE if ratio > 1 else LESS


def claims_of(runs: Sequence[pd.DataFrame], margin: float) -> list[Claim]:
    """Join the runs of a protocol, a claim for each model, setting and point of G.

    Raises InputError: a calibration has a row twice; only G may stand in several runs.
    """
    rows = pd.concat(map(_numbered, runs), ignore_index=True)
    rows = rows.assign(**{name: rows[name].map(label) for name in (*TEXTS, "variant")})
    found = []
    scored = rows[rows["role"] == "score"]
    for _, own in scored.groupby([*KEY, "point"], sort=True):
        known = own[own["family"].isin(FAMILIES)]
        known = known.assign(once=known["run"].where(known["family"] == PLAN, ""))
        twice = known[known.duplicated(["extractor", "calibration", "family", "once"], keep=False)]
        if len(twice):
            first = twice.iloc[0]
            runs_of = " and ".join(sorted(set(twice["run"]))) or "one run"
            raise InputError(
                f"calibration {first['calibration']}, family {first['family']}: two rows by {first['extractor']} "
                f"({runs_of}); expected one"
            )
        same = [name for name in (*KEY, "point") if name != "batch_size"]
        timed = rows[(rows["role"] == "time") & (rows[same] == own[same].iloc[0]).all(axis=1)]
        found.append(Claim(pd.concat([own, timed]).sort_values(["extractor", "calibration", "arm", "role"]), margin))
    return found


def _numbered(runs: pd.DataFrame) -> pd.DataFrame:
    """Number the calibration of every row, and name G's solver and steps. Rows without a number take their run's."""
    numbers, plans = runs["calibration"].map(label), runs[runs["family"].isin([PLAN, FULL])]
    if numbers[numbers != ""].nunique() == 1:
        numbers = numbers.replace("", numbers[numbers != ""].iloc[0])
    point = f"{plans['solver'].iloc[0]}, {int(plans['steps'].iloc[0])} steps" if len(plans) else ""
    return runs[numbers != ""].assign(calibration=numbers[numbers != ""].astype(int), point=point)


def is_claim(runs: pd.DataFrame) -> bool:
    """Tell if a run's scored rows have a family that is named by its letter, of a numbered calibration."""
    scored = runs[(runs["role"] == "score") & (runs["calibration"].map(label) != "")]
    return any(len(family) == 1 for family in set(scored["family"]) & FAMILIES)


def listed(numbers: Sequence[int]) -> str:
    """Write calibrations: `0, 3`."""
    return ", ".join(map(str, numbers))


def number_word(value: int) -> str:
    """Write a number up to ten as a word."""
    return NUMBERS[value] if value < len(NUMBERS) else str(value)
