"""Confidence intervals over seed blocks, and the verdict "unchanged quality".

Arms that are compared share their seeds block by block, so differences are taken within a block: what the
seeds do to both arms cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

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


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], num_blocks: int, confidence: float = 0.95
) -> Interval:
    """Block bootstrap of a statistic of the seed blocks that is no plain mean over them.

    statistic: weights of the blocks, (R, num_blocks), each row summing to 1 -> (R,) values; ±inf says that a value
    lies beyond what was measured. Up to 8 blocks every resample is counted exactly, beyond that 10,000 are drawn with
    a fixed seed. Limits: Student's t times the bootstrap's standard error, corrected by √(n / (n - 1)); for a mean that
    is Student's interval itself, while plain percentiles of five blocks cover far less than they say. Where some
    resample is infinite: percentiles, widened for few blocks. Both after Hesterberg, "What Teachers Should Know About
    the Bootstrap" (2015). One block gives NaN limits, and so does a statistic that some resample leaves undefined.
    """
    mean = float(statistic(np.full((1, num_blocks), 1 / num_blocks))[0])
    if num_blocks < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan)
    counts, chances = _resamples(num_blocks)
    values = statistic(counts / num_blocks)
    if np.isnan(values).any():
        return Interval(mean, math.nan, math.nan)
    quantile = float(stats.t.ppf((1 + confidence) / 2, num_blocks - 1)) * math.sqrt(num_blocks / (num_blocks - 1))
    if np.isfinite(values).all():
        half = quantile * math.sqrt(chances @ (values - chances @ values) ** 2)
        return Interval(mean, mean - half, mean + half)
    tail = float(stats.norm.sf(quantile))
    order = np.argsort(values)
    below = np.cumsum(chances[order])
    low = values[order][np.searchsorted(below, tail)]
    high = values[order][min(np.searchsorted(below, 1 - tail), len(values) - 1)]
    return Interval(mean, float(low), float(high))


@cache
def _resamples(num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each block is drawn in a resample (R, num_blocks), and the chance of each resample (R,)."""
    if num_blocks > 8:
        counts = np.random.default_rng(0).multinomial(num_blocks, [1 / num_blocks] * num_blocks, size=10_000)
        return counts, np.full(len(counts), 1 / len(counts))
    draws = combinations_with_replacement(range(num_blocks), num_blocks)
    counts = np.array([np.bincount(draw, minlength=num_blocks) for draw in draws])
    return counts, stats.multinomial.pmf(counts, num_blocks, [1 / num_blocks] * num_blocks)
