"""Second-order terms of a shift table: what two neighbouring bands do to the features beyond the sum of both.

With d(B at p) the change of the mean, or of the second moment, when the bands B are run at the pair p,

    I_b(p, p) = d({b, b + 1} at p) - d({b} at p) - d({b + 1} at p)

is measured. Two pairs that differ are given the mean of their own: I_b(p, q) = (I_b(p, p) + I_b(q, q)) / 2; full depth
interacts with nothing. A plan that covers the share A[b, p] of band b at p is predicted to add

    sum_b sum_pq A[b, p] A[b + 1, q] I_b(p, q) = sum_b sum_p J[b, p] I_b(p, p)
    J[b, p] = (A[b, p] s[b + 1] + s[b] A[b + 1, p]) / 2        s[b] = sum_p A[b, p], full depth left out

which is one more sum over entries, as of first order.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interactions:
    """I_b(p, p) of the features' mean, (bands - 1, P, F), and second moment, (bands - 1, P, F, F), float64.

    P are the table's pairs, in its order, the full one left out.
    """

    mean: Tensor
    second: Tensor

    @classmethod
    def of(cls, single: tuple[Tensor, Tensor], joint: tuple[Tensor, Tensor]) -> Self:
        """From shifts of (mean, second moment): single (bands, P, ...); joint, of b and b + 1, (bands - 1, P, ...)."""
        return cls(*(both - one[:-1] - one[1:] for one, both in zip(single, joint, strict=True)))

    def coverage(self, coverage: Tensor) -> Tensor:
        """J above.  coverage: (M, bands, P + 1), the table's pairs first -> (M, bands - 1, P)."""
        a = coverage[..., : self.mean.shape[1]]
        share = a.sum(-1, keepdim=True)
        return (a[:, :-1] * share[:, 1:] + share[:, :-1] * a[:, 1:]) / 2

    def changes(self, coverage: Tensor) -> tuple[Tensor, Tensor]:
        """What they add to the moments.  coverage: (M, bands, P + 1) -> means (M, F), second moments (M, F, F)."""
        j = self.coverage(coverage).flatten(1)
        second = j @ self.second.flatten(0, 1).flatten(1)
        return j @ self.mean.flatten(0, 1), second.unflatten(1, self.second.shape[2:])

    def slopes(self, coverage: Tensor, d_mean: Tensor, d_second: Tensor) -> Tensor:
        """What they add to the slope of any function of the moments.

        coverage: (bands, P + 1), where the slope is wanted; d_mean (F,), d_second (F, F): the function's slopes in the
        moments -> its slopes in the coverage, (bands, P + 1), zero at full depth.
        """
        num_pairs = self.mean.shape[1]
        a = coverage[:, :num_pairs]
        share = a.sum(1, keepdim=True)
        each = self.mean @ d_mean + (self.second * d_second).sum(dim=(2, 3))  # the function's slope in J
        slopes = torch.zeros_like(coverage)
        slopes[:-1, :num_pairs] += (each * share[1:] + (each * a[1:]).sum(1, keepdim=True)) / 2
        slopes[1:, :num_pairs] += (each * share[:-1] + (each * a[:-1]).sum(1, keepdim=True)) / 2
        return slopes
