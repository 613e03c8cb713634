"""Does a model repeat its training pictures?

Every sample's distance, in feature space, to its nearest training picture, set against the distances of held-out
pictures, which nobody can have memorised. One in a hundred of those lies below their 1st percentile; if more of the
samples do, they lie closer to the training pictures than new pictures of the same kind.
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
    """share: of the samples closer than `threshold`, the 1st percentile of the held-out distances; not memorised: 0.01.

    median_sample, median_held_out: median distances to the nearest training picture.
    """

    share: Interval
    threshold: float
    median_sample: float
    median_held_out: float


def nearest_distances(features: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """Distance of each row to the nearest of others. features: (N, D), others: (M, D) -> (N,)."""
    nearest = [others[torch.cdist(rows, others).argmin(1)] for rows in features.split(chunk)]
    # Distances by matrix product, as above, find the neighbour; a copy's 0 they would blur.
    return (features - torch.cat(nearest)).norm(dim=1)


def check_memorisation(samples: Tensor, train: Tensor, held_out: Tensor, confidence: float = 0.95) -> Memorisation:
    """Compare features, (N, D) each. Does not depend on the order of rows.

    Raises InputError: too few held-out pictures for a 1st percentile, or training pictures among them.
    """
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
    """Limits of the share below the true percentile; both arguments sorted.

    Two things are uncertain, where the percentile lies and the share below it; each gets half of the error, so the
    limits hold without assumptions on the distances, at the price of some width. Order statistics bound the percentile,
    Clopper & Pearson (1934) the shares.
    """
    tail = (1 - confidence) / 4
    rank_low, rank_high = stats.binom.ppf((tail, 1 - tail), len(theirs), QUANTILE).astype(int)
    below = theirs[rank_low - 1].item() if rank_low > 0 else 0.0
    above = theirs[min(rank_high, len(theirs) - 1)].item()
    num, fewest, most = len(ours), int((ours < below).sum()), int((ours < above).sum())
    low = stats.beta.ppf(tail, fewest, num - fewest + 1) if fewest else 0.0
    high = stats.beta.ppf(1 - tail, most + 1, num - most) if most < num else 1.0
    return float(low), float(high)
