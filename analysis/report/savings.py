"""Say what a saving is made of: fewer steps, unconditional passes, conditional blocks; and what the prediction missed.

Blocks are counted against full depth at the most steps of the same solver. With S steps of depth c and u (conditional,
unconditional) and full depth's S' steps of C and U, the blocks that are not run are

    S' (C + U) - S (c + u)  =  (S' - S) (C + U)  +  S (U - u)  +  S (C - c)
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dyndit.analysis.report.runs import GROUP


@dataclass(frozen=True)
class Parts:
    """Blocks that are not run, as shares of the reference's blocks. `total` is the sum of the others."""

    total: float
    steps: float
    unconditional: float
    conditional: float

    def __str__(self) -> str:
        parts = " + ".join(f"{100 * part:.0f}" for part in (self.steps, self.unconditional, self.conditional))
        return f"{100 * self.total:.0f}% = {parts}"


def with_parts(frame: pd.DataFrame) -> pd.DataFrame:
    """Add a column `parts` to a `frontier.summary`: `Parts`; None without known depths, or full depth."""
    keys = [*GROUP, "solver"]
    full = frame[frame["family"] == "full"].sort_values("steps").groupby(keys, sort=False).last()
    return frame.assign(parts=[_parts(row, full, tuple(row[key] for key in keys)) for _, row in frame.iterrows()])


def _parts(row: pd.Series, full: pd.DataFrame, key: tuple[object, ...]) -> Parts | None:
    if key not in full.index:
        return None
    best = full.loc[key]
    steps, cond, uncond = row["steps"], row["mean_depth_cond"], row["mean_depth_uncond"]
    most, whole = best["steps"], best["mean_depth_cond"] + best["mean_depth_uncond"]
    if not math.isfinite(cond + uncond + whole) or (row["family"] == "full" and steps == most):
        return None
    parts = np.array(
        [
            (most - steps) * whole,
            steps * (best["mean_depth_uncond"] - uncond),
            steps * (best["mean_depth_cond"] - cond),
        ]
    ) / (most * whole)
    return Parts(float(parts.sum()), *map(float, parts))


def predictions(frame: pd.DataFrame) -> pd.DataFrame:
    """List predicted beside measured; one row per arm with a predicted FD.

    Columns: arm, family, predicted_ms, ms, ms_ratio, predicted_fd, fd (mean), fd_ratio. Ratios are measured over
    predicted.
    """
    known = frame[frame["predicted_fd"].notna()]
    found = known[["arm", "family", "predicted_ms", "ms", "predicted_fd"]].astype({"predicted_fd": float})
    found = found.assign(fd=[value.mean for value in known["fd"]], ms_ratio=_ms_ratio(known))
    return found.assign(fd_ratio=found["fd"] / found["predicted_fd"])


def bias_findings(frame: pd.DataFrame) -> list[str]:
    """Name the bias of the predictions, in a sentence each for time and for FD."""
    plans, found = predictions(frame), []
    whole = _ms_ratio(frame[frame["family"] == "full"])
    if plans["ms_ratio"].notna().any():
        text = f"Predicted time: plans take {_bias(plans['ms_ratio'], 'more time', 'less time')}"
        found.append(text + (f"; full depth {_bias(whole, 'more', 'less')}." if whole.notna().any() else "."))
    if len(plans):
        found.append(f"Predicted FD: plans measure {_bias(plans['fd_ratio'], 'higher', 'lower')}.")
    return found


def _ms_ratio(frame: pd.DataFrame) -> pd.Series:
    return frame["ms"] / frame["predicted_ms"].astype(float)


def _bias(ratios: pd.Series, above: str, below: str) -> str:
    """Write `14% less time than predicted (median of 9; 20% less time to 2% more time)`."""
    ratios = ratios.dropna()

    def one(ratio: float) -> str:
        return f"{abs(ratio - 1):.0%} {above if ratio >= 1 else below}"

    spread = "" if len(ratios) < 2 else f" (median of {len(ratios)}; {one(ratios.min())} to {one(ratios.max())})"
    return f"{one(float(ratios.median()))} than predicted{spread}"
