"""Test if a model repeats its training pictures.

Measure each sample's distance in feature space to its nearest training picture. Do the same for held-out pictures,
which the model cannot have memorised. 1% of held-out pictures lie below their 1st percentile. If more than 1% of the
samples do, the samples lie closer to the training pictures than new pictures.
"""

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from dyndit.errors import InputError
from dyndit.stats import Interval

QUANTILE = 0.01
MIN_HELD_OUT = 100  # fewer have no 1st percentile


@dataclass(frozen=True)
class Memorisation:
    """share: of samples closer than `threshold`, the 1st held-out percentile. median_*: of the nearest distances."""

    share: Interval
    threshold: float
    median_sample: float
    median_held_out: float


def nearest_distances(features: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """Measure each row's distance to the nearest of others. features: (N, D), others: (M, D) -> (N,)."""
    nearest = [others[torch.cdist(rows, others).argmin(1)] for rows in features.split(chunk)]
    # cdist multiplies matrices: exact enough to find the neighbour, but a copy's distance would not be 0.
    return (features - torch.cat(nearest)).norm(dim=1)


def check_memorisation(samples: Tensor, train: Tensor, held_out: Tensor, confidence: float = 0.95) -> Memorisation:
    """Compare features, (N, D) each. Raises InputError: too few held-out pictures, or training pictures among them."""
    if len(held_out) < MIN_HELD_OUT:
        raise InputError(f"--held-out: {len(held_out)} pictures, expected at least {MIN_HELD_OUT}")
    theirs = nearest_distances(held_out, train).sort().values
    ours = nearest_distances(samples, train).sort().values
    threshold = theirs.quantile(QUANTILE).item()
    if threshold == 0:
        raise InputError("--held-out: training pictures are among them, expected pictures that were not trained on")
    share = (ours < threshold).double().mean().item()
    low, high = _limits(ours, theirs, confidence)
    median_sample, median_held_out = ours.median().item(), theirs.median().item()
    return Memorisation(Interval(share, min(low, share), max(high, share)), threshold, median_sample, median_held_out)


def _limits(ours: Tensor, theirs: Tensor, confidence: float) -> tuple[float, float]:
    """Bound the share below the true percentile; both arguments are sorted.

    The percentile and the share below it are uncertain; each gets half of the error. So the limits hold for any
    distribution of distances, but are wider. Order statistics bound the percentile, Clopper & Pearson (1934) the share.
    """
    tail = (1 - confidence) / 4
    rank_low, rank_high = stats.binom.ppf((tail, 1 - tail), len(theirs), QUANTILE).astype(int)
    below = theirs[rank_low - 1].item() if rank_low > 0 else 0.0
    above = theirs[min(rank_high, len(theirs) - 1)].item()
    num, fewest, most = len(ours), int((ours < below).sum()), int((ours < above).sum())
    low = stats.beta.ppf(tail, fewest, num - fewest + 1) if fewest else 0.0
    high = stats.beta.ppf(1 - tail, most + 1, num - most) if most < num else 1.0
    return float(low), float(high)
