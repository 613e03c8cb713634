"""Predict the Fréchet distance of any plan from a shift table."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dyndit.plans.ages import AgedEntries
from dyndit.plans.plan import DepthPlan, own_exit
from dyndit.plans.table import Pair, ShiftTable
from dyndit.stats import FrechetTo, Moments


class Predictor:
    """The prediction of a table at given timesteps: plan -> Fréchet distance to the reference."""

    def __init__(self, table: ShiftTable, timesteps: Sequence[int], base: Moments | None = None) -> None:
        """`base`: moments of full depth at these very steps, where they were measured (else the table's)."""
        self.table = table
        self.base = table.base if base is None else base
        self.unbias = self.base.num / (self.base.num - 1)
        self.pairs: tuple[Pair, ...] = (*dict.fromkeys(table.pairs), table.full_pair)
        self.index = {pair: i for i, pair in enumerate(self.pairs)}
        self.entries = AgedEntries(table, self.pairs, self.nearest, len(timesteps)) if table.ages else None
        self.weights = table.weights(timesteps)
        bands, features = table.num_bands, table.mean.shape[-1]
        zero = table.mean.new_zeros
        self.mean = torch.cat([table.mean, zero(bands, 1, features)], dim=1)
        self.second = torch.cat([table.second, zero(bands, 1, features, features)], dim=1)
        self.frechet = FrechetTo(table.reference)
        self.seconds = torch.tensor([table.cost.step_seconds(*p) for p in self.pairs], dtype=torch.float64)

    def coverage(self, choices: Tensor) -> Tensor:
        """A of the module's docstring.  choices: (M, K) indices into `pairs` -> (M, bands, P + 1) of the table's."""
        taken = choices if self.entries is None else self.entries.taken(choices)[1]
        chosen = torch.nn.functional.one_hot(taken, self.mean.shape[1]).double()
        return torch.einsum("kb,mkp->mbp", self.weights, chosen)

    def moments(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """choices: (M, K) -> predicted means (M, F) and covariances (M, F, F)."""
        return self.moments_at(self.coverage(choices))

    def moments_at(self, coverage: Tensor) -> tuple[Tensor, Tensor]:
        """coverage: (M, bands, P + 1), whole steps or shares of them -> means (M, F) and covariances (M, F, F)."""
        a = coverage.flatten(1)
        mean = self.base.mean + a @ self.mean.flatten(0, 1)
        second = self.base.second + (a @ self.second.flatten(0, 1).flatten(1)).view(-1, *self.second.shape[2:])
        return mean, self.unbias * (second - mean[:, :, None] * mean[:, None, :])

    def base_through(self, plan: DepthPlan, measured: Moments) -> Moments:
        """What full depth's moments would have to be for the prediction of this plan to be what was measured of it."""
        coverage = self.coverage(self.choice(plan)[None])
        a = coverage.flatten(1)
        mean = measured.mean - (a @ self.mean.flatten(0, 1))[0]
        second = measured.second - (a @ self.second.flatten(0, 1).flatten(1)).view_as(measured.second)
        return Moments(mean, second, measured.num)

    def distances(self, choices: Tensor) -> Tensor:
        """choices: (M, K) -> predicted Fréchet distances (M,)."""
        return self.frechet(*self.moments(choices))

    def slopes(self, choice: Tensor) -> Tensor:
        """First-order change of the distance per step and pair around a plan.  choice: (K,) -> (K, P + 1)."""
        by_entry = self.entry_slopes(choice)
        return by_entry if self.entries is None else by_entry.gather(1, self.entries.at(choice))

    def entry_slopes(self, choice: Tensor) -> Tensor:
        """The same per entry of the table, and for full depth.  choice: (K,) -> (K, entries + 1)."""
        mean, covariance = (m[0] for m in self.moments(choice[None]))
        d_mean, d_covariance = self.frechet.gradient(mean, covariance)
        d_covariance = self.unbias * d_covariance
        d_mean = d_mean - 2 * d_covariance @ mean
        per_band = self.mean @ d_mean + (self.second * d_covariance).sum(dim=(2, 3))
        return self.weights @ per_band

    def choice(self, plan: DepthPlan) -> Tensor:
        """(K,) indices of the plan's pairs; a pair the table lacks is replaced by the nearest measured one."""
        return torch.tensor([self.nearest(pair) for pair in plan.pairs])

    def nearest(self, pair: Pair) -> int:
        """Index of the measured pair with the closest depths."""
        if pair in self.index:
            return self.index[pair]
        (cond, uncond), kind = pair, _guidance(pair[1])
        gaps = [
            abs(abs(c) - abs(cond)) + abs(u - uncond) + 100 * abs(_guidance(u) - kind) + 1000 * ((c < 0) != (cond < 0))
            for c, u in self.pairs
        ]
        return int(np.argmin(gaps))

    def settled(self, choices: Tensor) -> Tensor:
        """The choices (M, K) without forecasts from nothing, or from longer ago than was measured: plain exits."""
        return choices if self.entries is None else self.entries.taken(choices)[0]

    def predict(self, plan: DepthPlan) -> float:
        """Predicted Fréchet distance of a plan."""
        return self.distances(self.choice(plan)[None]).item()


def _guidance(uncond: int) -> int:
    """What an unconditional depth says: 1 a pass, 0 none, below that reused guidance and a guide of its own."""
    return max(min(uncond, 1), own_exit(1))
