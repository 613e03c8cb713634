"""Extrapolate a Fréchet distance to infinitely many samples: its bias falls as 1/N."""

import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.stats import FrechetTo, Moments, moments

NUM_SIZES = 5
"""Number of sample sizes to extrapolate from."""


def distance_at_infinity(features: Tensor, reference: Moments) -> float:
    """Extrapolate the Fréchet distance that infinitely many samples would have (Chong & Forsyth 2020).

    features: (N, D), rows in random order, N ≥ 10. Fit a line in 1/N (arXiv:1911.07023) to five sizes N, N/2, ... N/5.
    Size N/k is the mean over k disjoint parts, so every size uses all samples and shares their first-order noise. The
    remaining noise grows as k, hence weights 1/k. The bias of the reference stays. On Gaussians 8% of the bias is left
    at N = 10 D, with the other sign, and 23% at 5 D.
    Raises InputError: N < 10.
    """
    if len(features) < 2 * NUM_SIZES:
        raise InputError(f"samples: {len(features)} pictures, expected at least {2 * NUM_SIZES} to extrapolate from")
    frechet = FrechetTo(reference)
    parts = torch.arange(1, NUM_SIZES + 1, dtype=torch.float64)
    distances = torch.stack([_mean_distance(features.tensor_split(int(k)), frechet) for k in parts])
    weights = (1 / parts).sqrt()
    design = torch.stack([torch.ones_like(parts), parts], dim=1)  # 1/N of N/k is proportional to k
    return torch.linalg.lstsq(design * weights[:, None], distances * weights).solution[0].item()


def _mean_distance(parts: tuple[Tensor, ...], frechet: FrechetTo) -> Tensor:
    """Return the mean distance over parts (n, D)."""
    each = [moments(part) for part in parts]
    return torch.stack([frechet(m.mean, m.covariance) for m in each]).mean()
