"""Gaussians, and features drawn from them."""

import torch
from torch import Tensor

from dyndit.stats import Moments


def features(num: int, dim: int, seed: int, rank: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or dim, dim, generator=g, dtype=torch.float64)
    centre = torch.randn(dim, generator=g, dtype=torch.float64)
    return torch.randn(num, rank or dim, generator=g, dtype=torch.float64) @ mix + centre


def gaussian(mean: Tensor, covariance: Tensor, num: int = 1000) -> Moments:
    """Moments whose unbiased covariance is exactly this one."""
    return Moments.of_covariance(mean, covariance, num)


def random_covariance(dim: int, seed: int) -> Tensor:
    f = features(dim + 2, dim, seed)
    return f.T @ f / dim
