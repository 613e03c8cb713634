"""Predict the Fréchet distance of any plan from a shift table."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from dyndit.plans.ages import AgedEntries
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Held, OwnExit, Step, Unconditional
from dyndit.plans.table import ShiftTable
from dyndit.stats import FrechetTo, Moments


class Predictor:
    """Predict from a table at given timesteps: plan -> Fréchet distance to the reference."""

    def __init__(
        self, table: ShiftTable, timesteps: Sequence[float], base: Moments | None = None, calls: Sequence[int] = ()
    ) -> None:
        """Read the table.

        base: moments of full depth at these steps (default: the table's moments). calls: of the network, per step
        (default: one).
        """
        self.table = table
        self.base = table.base if base is None else base
        self.unbias = self.base.num / (self.base.num - 1)
        self.choices: tuple[Step, ...] = (*dict.fromkeys(table.choices), table.full_step)
        self.index = {choice: i for i, choice in enumerate(self.choices)}
        self.entries = AgedEntries(table, self.choices, self.nearest, len(timesteps)) if table.ages else None
        self.weights = table.weights(timesteps)
        self.mean = pad(table.mean, (0, 0, 0, 1))  # the shift of full depth, which comes last, is zero
        self.second = pad(table.second, (0, 0, 0, 0, 0, 1))
        self.frechet = FrechetTo(table.reference)
        self.calls = torch.tensor(calls or [1] * len(timesteps), dtype=torch.float64)
        self.seconds = torch.tensor([table.cost.step_seconds(c) for c in self.choices], dtype=torch.float64)

    def coverage(self, choices: Tensor) -> Tensor:
        """Return the share of each band per table entry.  choices: (M, K) indices -> (M, bands, P + 1)."""
        taken = choices if self.entries is None else self.entries.taken(choices)[1]
        chosen = one_hot(taken, self.mean.shape[1]).double()
        return torch.einsum("kb,mkp->mbp", self.weights, chosen)

    def _shifts(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the shifts of both moments.  choices: (M, K) -> (M, F) and (M, F, F)."""
        a = self.coverage(choices).flatten(1)
        return a @ self.mean.flatten(0, 1), (a @ self.second.flatten(0, 1).flatten(1)).view(-1, *self.second.shape[2:])

    def moments(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Predict moments.  choices: (M, K) -> means (M, F) and covariances (M, F, F)."""
        first, second = self._shifts(choices)
        mean = self.base.mean + first
        return mean, self.unbias * (self.base.second + second - mean[:, :, None] * mean[:, None, :])

    def base_through(self, plan: DepthPlan, measured: Moments) -> Moments:
        """Return the full-depth moments with which the prediction of this plan equals its measured moments."""
        first, second = self._shifts(self.choice(plan)[None])
        return Moments(measured.mean - first[0], measured.second - second[0], measured.num)

    def distances(self, choices: Tensor) -> Tensor:
        """Predict Fréchet distances.  choices: (M, K) -> (M,)."""
        return self.frechet(*self.moments(choices))

    def slopes(self, choice: Tensor) -> Tensor:
        """Return the distance's first-order change per step and choice around a plan.  choice: (K,) -> (K, P + 1)."""
        by_entry = self.entry_slopes(choice)
        return by_entry if self.entries is None else by_entry.gather(1, self.entries.at(choice))

    def entry_slopes(self, choice: Tensor) -> Tensor:
        """Return the slopes per table entry, and for full depth.  choice: (K,) -> (K, entries + 1)."""
        mean, covariance = (m[0] for m in self.moments(choice[None]))
        d_mean, d_covariance = self.frechet.gradient(mean, covariance)
        d_covariance = self.unbias * d_covariance
        d_mean = d_mean - 2 * d_covariance @ mean
        per_band = self.mean @ d_mean + (self.second * d_covariance).sum(dim=(2, 3))
        return self.weights @ per_band

    def choice(self, plan: DepthPlan) -> Tensor:
        """Return indices (K,) of the plan's steps. A step missing in the table takes the nearest measured step."""
        return torch.tensor([self.nearest(step) for step in plan.steps])

    def nearest(self, step: Step) -> int:
        """Return the index of the closest measured choice: first by kind of guide, then by depth."""
        if step in self.index:
            return self.index[step]
        return int(np.argmin([_distance(choice, step) for choice in self.choices]))

    def spent(self, choices: Tensor) -> Tensor:
        """Predict the seconds of plans.  choices: (..., K) -> (...)."""
        return (self.calls * self.seconds[choices]).sum(-1)

    def settled(self, choices: Tensor) -> Tensor:
        """Replace forecasts that have no measured age by plain exits.  choices: (M, K) -> (M, K)."""
        return choices if self.entries is None else self.entries.taken(choices)[0]

    def predict(self, plan: DepthPlan) -> float:
        """Predict the Fréchet distance of a plan."""
        return self.distances(self.choice(plan)[None]).item()


def _distance(one: Step, other: Step) -> float:
    """Measure how much two steps differ: a forecast weighs most, then the kind of guide, depths, then strength."""
    (kind, depth), (other_kind, other_depth) = _place(one), _place(other)
    unlike = 100 * abs(kind - other_kind) + 1000 * (one.forecast != other.forecast)
    return (
        abs(one.depth - other.depth) + abs(depth - other_depth) + unlike + math.tanh(abs(one.strength - other.strength))
    )


def _place(step: Step) -> tuple[int, int]:
    """Place guides by kind and depth: a pass (1, d), no guide (0, 0), held (-1, -1), an own exit (-2, -1 - d)."""
    match step.guide:
        case Unconditional(depth):
            return 1, depth
        case OwnExit(depth):
            return -2, -1 - depth
        case Held():
            return -1, -1
        case _:
            return 0, 0
