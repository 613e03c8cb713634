"""Where plans use exits: what `Distill.used` weighs an exit's error by, so that each learns where it is needed."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.plan import DepthPlan

Stretch = tuple[int, int, int, float]
"""(depth, low, high, share): the exit at `depth` predicts at the timesteps low..high, both included, `share` times."""


@dataclass(frozen=True, repr=False)
class Usage:
    """For each exit, how often plans run it at each timestep. Plain data, so that a recipe's settings hold it whole.

    stretches: their shares add up where they overlap. num_timesteps: T, of the noise schedule. rest: what the weight of
    an exit is made of where no plan runs it, beside a share of 1 where every plan runs it once. Without any, such an
    exit would be forgotten, and no later search could come back to it.

    Raises:
        InputError: a stretch outside 0..T-1, or no `rest`.
    """

    stretches: tuple[Stretch, ...]
    num_timesteps: int = 1000
    rest: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rest < math.inf:
            raise InputError(f"rest {self.rest:g}: expected above 0, and finite")
        for depth, low, high, _ in self.stretches:
            if not 0 <= low <= high < self.num_timesteps:
                last = self.num_timesteps - 1
                raise InputError(f"usage: exit {depth} at timesteps {low}..{high}, expected within 0..{last}")

    @classmethod
    def of(cls, plans: Iterable[DepthPlan], *, num_timesteps: int = 1000, rest: float = 0.1) -> Self:
        """The mean over plans of the predictions that each exit makes: for either branch, or as a step's own guide.

        Step k covers the timesteps from its own down to the next step's, as in `ShiftTable.weights`; the last one down
        to 0. The first covers those above its own too: something has to start there.

        Raises:
            InputError: no plans, or one with a timestep outside 0..num_timesteps-1.
        """
        plans, counts = tuple(plans), Counter()
        if not plans:
            raise InputError("usage: no plans, expected at least one")
        for plan in plans:
            if not 0 <= plan.timesteps[-1] <= plan.timesteps[0] <= num_timesteps - 1:
                found = f"timesteps {plan.timesteps[0]}..{plan.timesteps[-1]}"
                raise InputError(f"usage: a plan of {found}, expected within {num_timesteps - 1}..0")
            for (low, high), depths in zip(_covered(plan, num_timesteps), _exits_run(plan), strict=True):
                # Between two steps of fractional timesteps there may be no whole one.
                counts.update((depth, low, high) for depth in depths if low <= high)
        return cls(tuple((*key, count / len(plans)) for key, count in sorted(counts.items())), num_timesteps, rest)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of the exits that any plan runs, rising."""
        return tuple(sorted({depth for depth, *_ in self.stretches}))

    def shares(self, depths: Sequence[int]) -> Tensor:
        """How often the exits at E `depths` are run at each timestep, in predictions per plan.  -> (E, T), float64."""
        shares = torch.zeros(len(depths), self.num_timesteps, dtype=torch.float64)
        for depth, low, high, share in self.stretches:
            if depth in depths:
                shares[depths.index(depth), low : high + 1] += share
        return shares

    def weights(self, depths: Sequence[int]) -> Tensor:
        """What an error weighs, by E exits' `depths` and timestep: `rest` + share, scaled to mean 1.  -> (E, T)."""
        weights = self.rest + self.shares(depths)
        return weights / weights.mean()

    def __repr__(self) -> str:
        """Short enough for a message, and another one for every other usage: a run's identity holds it."""
        content = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]
        return f"Usage(exits {list(self.depths)}, rest {self.rest:g}, {content})"


def _covered(plan: DepthPlan, num_timesteps: int) -> list[tuple[int, int]]:
    """Lowest and highest whole timestep that each step covers."""
    highs = [num_timesteps - 1, *(math.floor(t) for t in plan.timesteps[1:])]
    lows = [*(high + 1 for high in highs[1:]), 0]
    return list(zip(lows, highs, strict=True))


def _exits_run(plan: DepthPlan) -> list[list[int]]:
    """Depths of the exits that predict at each step; twice where both branches leave there."""
    steps = zip(plan.run_depths, plan.uncond, plan.guides, strict=True)
    return [[depth for depth in step if 0 < depth < plan.num_blocks] for step in steps]
