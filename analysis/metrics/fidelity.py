"""The Fréchet distance between Gaussians N(m, S) and N(μ, Σ) (Heusel et al. 2017, after Fréchet 1957):

    FD = |m - μ|² + tr S + tr Σ - 2 tr (Σ^½ S Σ^½)^½

Its bias falls as 1/N: compare only sets of equal size, scored against the same reference pictures, or take
`distance_at_infinity`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndit.errors import InputError

NUM_SIZES = 5  # sample sizes that the distance at infinity is extrapolated from


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of features, float64. mean: (D,), second: (D, D), raw E[f fᵀ]; num: how many."""

    mean: Tensor
    second: Tensor
    num: int

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D), as np.cov gives it."""
        return (self.second - torch.outer(self.mean, self.mean)) * (self.num / (self.num - 1))

    @classmethod
    def of_covariance(cls, mean: Tensor, covariance: Tensor, num: int = 2**31) -> "Moments":
        """Moments whose unbiased covariance is this one. mean: (D,), covariance: (D, D)."""
        mean, covariance = mean.double(), covariance.double()
        return cls(mean, covariance * ((num - 1) / num) + torch.outer(mean, mean), num)


def moments(features: Tensor) -> Moments:
    """Features: (N, D), N ≥ 2 -> their moments in float64."""
    features = features.double()
    return Moments(features.mean(0), features.T @ features / len(features), len(features))


def square_root(covariance: Tensor) -> Tensor:
    """Covariance: (D, D), symmetric -> R (D, D) with R Rᵀ = covariance; negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance between the Gaussians with these moments.

    The last trace is the sum of the singular values of A^½ B^½: unlike the square roots of eigenvalues of A B
    these keep full precision where the covariances have no full rank.
    """
    root = square_root(a.covariance).T @ square_root(b.covariance)
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * torch.linalg.svdvals(root).sum()
    return distance.item()


class FrechetTo:
    """The Fréchet distance to one fixed reference, for many Gaussians at once: the search's inner loop.

    A prediction may have directions of negative variance, which no pictures have. Counted as none they would lower the
    traces, and the worst plan would look best; the square root is continued oddly, so that they count against it.
    """

    def __init__(self, reference: Moments) -> None:
        self.mean = reference.mean
        self.trace = reference.covariance.trace()
        self.root = square_root(reference.covariance)

    def __call__(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """mean: (..., D), covariance: (..., D, D), float64 -> (...,)."""
        values = torch.linalg.eigvalsh(self._product(covariance))
        roots = values.sign() * values.abs().sqrt()
        traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self.trace
        return (mean - self.mean).square().sum(-1) + traces - 2 * roots.sum(-1)

    def gradient(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """mean: (..., D), covariance: (..., D, D) -> (dFD/dmean (..., D), dFD/dcovariance (..., D, D)).

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
        """Rᵀ S R, made exactly symmetric: it has the eigenvalues of Σ^½ S Σ^½."""
        product = self.root.T @ covariance @ self.root
        return (product + product.mT) / 2


def distance_at_infinity(features: Tensor, reference: Moments) -> float:
    """The Fréchet distance that infinitely many samples would have to this reference (Chong & Forsyth 2020).

    features: (N, D), rows in an order that says nothing, N ≥ 10. Linear in 1/N (arXiv:1911.07023), fitted to five sizes
    N, N/2, ... N/5: size N/k is the mean over k disjoint parts, so that every size sees all the samples and shares
    their first-order noise; what noise is left grows as k, hence weights 1/k. The reference counts as it is. On
    Gaussians 8% of the bias is left at N = 10 D, with the other sign, and 23% at 5 D.
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
    """Mean over parts (n, D) of their distance."""
    each = [moments(part) for part in parts]
    return torch.stack([frechet(m.mean, m.covariance) for m in each]).mean()
