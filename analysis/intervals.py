"""Confidence intervals over seed blocks, and the verdict "unchanged quality".

Arms that are compared share their seeds block by block, so differences are taken within a block: what the
seeds do to both arms cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence limits; NaN limits where there was only one block."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Return half the width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Return whether the value lies outside; never so without limits."""
        return self.low > value or self.high < value

    def __format__(self, spec: str) -> str:
        """`8.41 ± 0.22`; the spec formats both numbers, two decimals by default."""
        if math.isnan(self.mean):
            return "–"
        spec = spec or ".2f"
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {format(self.half, spec.lstrip('+'))}"

    def __str__(self) -> str:
        return format(self, "")


def paired_interval(a: Sequence[float], b: Sequence[float] | None = None, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of a, or of a - b paired by position.

    a, b: one number per seed block, in the same order of blocks. Blocks with a NaN drop out. One block
    gives its mean with NaN limits, none gives NaN.
    """
    values = np.asarray(a, float) - (0.0 if b is None else np.asarray(b, float))
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float(values[0]) if len(values) else math.nan, math.nan, math.nan)
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def non_inferior(difference: Interval, reference: float, margin: float) -> bool:
    """Return whether quality is unchanged: upper bound of FD(arm) - FD(full) ≤ margin · FD(full).

    reference: FD(full), margin: a fraction (0.05 on digits, 0.03 on CIFAR-10). False without limits.
    """
    return difference.high <= margin * reference
