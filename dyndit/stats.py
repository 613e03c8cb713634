"""Statistics: moments and the Fréchet distance, and confidence intervals.

**Fréchet distance** between Gaussians N(m, S) and N(μ, Σ) (Heusel et al. 2017, after Fréchet 1957):

    FD = |m - μ|² + tr S + tr Σ - 2 tr (Σ^½ S Σ^½)^½

Its bias falls as 1/N: compare only sets of equal size, scored against the same reference pictures.

**Intervals** are over seed blocks. Compared arms share their seeds block by block. Differences are taken within a
block, so the seeds' common effect on both arms cancels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from dyndit.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """First two moments of `num` features, float64.  mean: (D,), second: (D, D), raw E[f fᵀ]."""

    mean: Tensor
    second: Tensor
    num: int

    def __repr__(self) -> str:
        return f"Moments({len(self.mean)} features, {self.num} pictures)"

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D), as np.cov gives it."""
        return (self.second - torch.outer(self.mean, self.mean)) * (self.num / (self.num - 1))

    @classmethod
    def of_covariance(cls, mean: Tensor, covariance: Tensor, num: int = 2**31) -> "Moments":
        """Make moments of this unbiased covariance.  mean: (D,), covariance: (D, D)."""
        mean, covariance = mean.double(), covariance.double()
        return cls(mean, covariance * ((num - 1) / num) + torch.outer(mean, mean), num)


def moments(features: Tensor) -> Moments:
    """Compute moments in float64.  features: (N, D), N ≥ 2."""
    features = features.double()
    return Moments(features.mean(0), features.T @ features / len(features), len(features))


def square_root(covariance: Tensor) -> Tensor:
    """Return R (D, D) with R Rᵀ = covariance (D, D, symmetric). Negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance between the Gaussians with these moments.

    The last trace is the sum of the singular values of A^½ B^½. Unlike the square roots of the eigenvalues of A B,
    singular values keep full precision if the covariances have no full rank.
    """
    root = square_root(a.covariance).T @ square_root(b.covariance)
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * torch.linalg.svdvals(root).sum()
    return distance.item()


class FrechetTo:
    """The Fréchet distance to one fixed reference, for many Gaussians at once: the search's inner loop.

    A prediction may have directions of negative variance, which no pictures have. Clipped to 0, these directions would
    lower the trace and make the worst plan look best. So √(-x) = -√x: negative variance counts against the plan.
    """

    def __init__(self, reference: Moments) -> None:
        self.mean = reference.mean
        self.trace = reference.covariance.trace()
        self.root = square_root(reference.covariance)

    def __call__(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Return the distances.  mean: (..., D), covariance: (..., D, D), float64 -> (...,)."""
        values = torch.linalg.eigvalsh(self._product(covariance))
        roots = values.sign() * values.abs().sqrt()
        traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self.trace
        return (mean - self.mean).square().sum(-1) + traces - 2 * roots.sum(-1)

    def gradient(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return dFD/dmean (..., D) and dFD/dcovariance (..., D, D).  mean: (..., D), covariance: (..., D, D).

        With R Rᵀ = Σ and M = Rᵀ S R: dFD/dm = 2 (m - μ), dFD/dS = 1 - R |M|^-½ Rᵀ. Directions in which M
        vanishes have no finite slope; they count as flat (pseudo-inverse).
        """
        values, vectors = torch.linalg.eigh(self._product(covariance))
        sizes = values.abs()
        floor = sizes.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
        inverse = torch.where(sizes > floor, sizes.clamp(min=1e-300).rsqrt(), 0.0)
        side = self.root @ vectors
        slope = torch.eye(mean.shape[-1], dtype=mean.dtype) - (side * inverse[..., None, :]) @ side.mT
        return 2 * (mean - self.mean), slope

    def _product(self, covariance: Tensor) -> Tensor:
        """Return Rᵀ S R, made exactly symmetric. It has the eigenvalues of Σ^½ S Σ^½."""
        product = self.root.T @ covariance @ self.root
        return (product + product.mT) / 2


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence limits. The limits are NaN if there was only one block."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Return half the width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Return True if the value lies outside the limits, and False without limits."""
        return self.low > value or self.high < value

    def __format__(self, spec: str) -> str:
        """Write `8.41 ± 0.22`. The spec formats both numbers, with two decimals by default."""
        if math.isnan(self.mean):
            return "–"
        spec = spec or ".2f"
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {format(self.half, spec.lstrip('+'))}"

    def __str__(self) -> str:
        return format(self, "")


def paired_interval(a: Any, b: Sequence[float] | None = None, confidence: float = 0.95) -> Interval:
    """Compute Student's t interval of the mean of a, or of a - b paired by position.

    a, b: one number per seed block, in the same order of blocks. Blocks with a NaN drop out. One block gives its mean
    with NaN limits; no block gives NaN.
    """
    values = np.asarray(a, float) - (0.0 if b is None else np.asarray(b, float))
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float(values[0]) if len(values) else math.nan, math.nan, math.nan)
    mean = float(values.mean())
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def non_inferior(difference: Interval, reference: float, margin: float) -> bool:
    """Return True if quality is unchanged: upper bound of FD(arm) - FD(full) ≤ margin · FD(full).

    reference: FD(full), margin: a fraction (0.05 on digits, 0.03 on CIFAR-10). False without limits.
    """
    return difference.high <= margin * reference


def over_calibrations(a: Mapping[int, float], b: Mapping[int, float] | None = None) -> tuple[Interval, float]:
    """Return Student's 95% interval of the mean of a - b over calibrations, and its two-sided p value.

    a, b: a figure by number of the calibration; without b the figures of a alone. Calibrations that only one arm has
    drop out. Fewer than two: limits and p are NaN. Equal differences: p is 0, or 1 if they are all 0.
    """
    differences = [a[k] - (0.0 if b is None else b[k]) for k in (a if b is None else a.keys() & b.keys())]
    found, freedom = paired_interval(differences), sum(map(math.isfinite, differences)) - 1
    if freedom < 1:
        return found, math.nan
    error = found.half / float(scipy.stats.t.ppf(0.975, freedom))
    return found, float(2 * scipy.stats.t.sf(abs(found.mean) / error, freedom) if error else found.mean == 0)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct the p values of several comparisons by name (Holm 1979, "A Simple Sequentially Rejective Test").

    The i-th smallest of m, from 0, is multiplied by m - i, and is at least the one before, at most 1. Example: 0.01,
    0.04, 0.03 become 0.03, 0.06, 0.06. A NaN stays and counts as a comparison. Raises InputError: a value not in 0..1.
    """
    if bad := [name for name, p in p_values.items() if not (math.isnan(p) or 0 <= p <= 1)]:
        raise InputError(f"p value of {bad[0]}: {p_values[bad[0]]:g}, expected 0 to 1")
    known = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name])
    corrected, least = dict(p_values), 0.0
    for rank, name in enumerate(known):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = least
    return corrected


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], num_blocks: int, confidence: float = 0.95
) -> Interval:
    """Bootstrap a statistic over whole seed blocks, for statistics that are not a plain mean over blocks.

    statistic: weights of the blocks, (R, num_blocks), each row summing to 1 -> (R,) values. ±inf marks a value beyond
    the measured range. Up to 8 blocks, every resample is counted exactly; beyond, 10,000 are drawn with a fixed seed.
    Limits: Student's t times the bootstrap's standard error, corrected by √(n / (n - 1)). For a mean this is Student's
    interval itself; plain percentiles of five blocks cover far too little. If some resample is infinite, the limits are
    percentiles, widened for few blocks. Both follow Hesterberg, "What Teachers Should Know About the Bootstrap" (2015).
    Limits are NaN for one block, or if the statistic is undefined on some resample.
    """
    mean = float(statistic(np.full((1, num_blocks), 1 / num_blocks))[0])
    if num_blocks < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan)
    counts, chances = _resamples(num_blocks)
    values = statistic(counts / num_blocks)
    if np.isnan(values).any():
        return Interval(mean, math.nan, math.nan)
    quantile = float(scipy.stats.t.ppf((1 + confidence) / 2, num_blocks - 1)) * math.sqrt(num_blocks / (num_blocks - 1))
    if np.isfinite(values).all():
        half = quantile * math.sqrt(chances @ (values - chances @ values) ** 2)
        return Interval(mean, mean - half, mean + half)
    tail = float(scipy.stats.norm.sf(quantile))
    order = np.argsort(values)
    below = np.cumsum(chances[order])
    low = values[order][np.searchsorted(below, tail)]
    high = values[order][min(np.searchsorted(below, 1 - tail), len(values) - 1)]
    return Interval(mean, float(low), float(high))


@cache
def _resamples(num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Count how often each resample draws each block (R, num_blocks). Also return each resample's chance (R,)."""
    if num_blocks > 8:
        counts = np.random.default_rng(0).multinomial(num_blocks, [1 / num_blocks] * num_blocks, size=10_000)
        return counts, np.full(len(counts), 1 / len(counts))
    draws = combinations_with_replacement(range(num_blocks), num_blocks)
    counts = np.array([np.bincount(draw, minlength=num_blocks) for draw in draws])
    return counts, scipy.stats.multinomial.pmf(counts, num_blocks, [1 / num_blocks] * num_blocks)


def median_interval(values: Any, confidence: float = 0.95) -> Interval:
    """Return the median with two order statistics as limits, at this confidence or more.

    Distribution-free, since the count below the median is binomial. Of 9 values the limits are the 2nd and the 8th, of
    60 the 22nd and the 39th. NaN limits for fewer than 6 values at 95%. NaN values drop out. `Interval.mean` is the
    median.
    """
    ordered = np.sort(np.asarray(values, float))
    ordered = ordered[np.isfinite(ordered)]
    count = len(ordered)
    if not count:
        return Interval(math.nan, math.nan, math.nan)
    middle, rank = float(np.median(ordered)), int(scipy.stats.binom.ppf((1 - confidence) / 2, count, 0.5))
    if rank < 1:
        return Interval(middle, math.nan, math.nan)
    return Interval(middle, float(ordered[rank - 1]), float(ordered[count - rank]))


def relative_width(interval: Interval) -> float:
    """Return the width of an interval (high - low) as a share of its middle. Infinite without limits."""
    width = (interval.high - interval.low) / abs(interval.mean) if interval.mean else math.inf
    return math.inf if math.isnan(width) else width
