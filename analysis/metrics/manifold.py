"""Precision and recall (Kynkäänniemi et al. 2019): the share of one set inside the manifold of another.

The manifold is the union of balls: one around each member, up to its k-th nearest neighbour in its own set. A set's
radii cost its size squared. `Measured` keeps them, so a reference is measured once for all arms of a comparison.
"""

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the balls, as in ADM."""
_ROWS = 1000
"""Rows of a matrix of distances at a time: bounds memory."""


def radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Return the distance of each member to its k-th nearest neighbour.  features: (N, D), N > k -> (N,)."""
    nearest = [torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(_ROWS)]
    return torch.cat(nearest)


def share_within(these: Tensor, members: Tensor, reach: Tensor) -> float:
    """Return the share of `these` inside a ball.  these: (N, D), members: (M, D), reach: (M,), their `radii`."""
    inside = [(torch.cdist(rows, members) <= reach).any(dim=1) for rows in these.split(_ROWS)]
    return torch.cat(inside).float().mean().item()
