"""Where exits matter: what `Distill.emphasis` weighs an exit's error by, so that each learns where it is needed.

Either where plans run it, or by how far the pictures' distribution was measured to move for an error of it.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dyndit.analysis.fidelity import FrechetTo
from dyndit.errors import InputError
from dyndit.plan import DepthPlan
from dyndit.routers.searched import ShiftTable

Stretch = tuple[int, int, int, float]
"""(depth, low, high, share): the exit at `depth` matters that much at each timestep low..high, both included."""


@dataclass(frozen=True, repr=False)
class Emphasis:
    """For each exit, how much it matters at each timestep. Plain data, so that a recipe's settings hold it whole.

    stretches: their shares add up where they overlap. num_timesteps: T, of the noise schedule. rest: what the weight of
    an exit is made of where it has no share, beside a share of 1 where every plan runs it once, or where it matters as
    much as exits do on average. Without any, it would be forgotten there, and no later search could come back to it.

    Raises:
        InputError: a stretch outside 0..T-1, or no `rest`.
    """

    stretches: tuple[Stretch, ...]
    num_timesteps: int = 1000
    rest: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rest < math.inf:
            raise InputError(f"emphasis: rest {self.rest:g}, expected above 0, and finite")
        for depth, low, high, _ in self.stretches:
            if not 0 <= low <= high < self.num_timesteps:
                last = self.num_timesteps - 1
                raise InputError(f"emphasis: exit {depth} at timesteps {low}..{high}, expected within 0..{last}")

    @classmethod
    def of_plans(cls, plans: Iterable[DepthPlan], *, num_timesteps: int = 1000, rest: float = 0.1) -> Self:
        """The mean over plans of the predictions that each exit makes: for either branch, or as a step's own guide.

        Step k covers the timesteps from its own down to the next step's, as in `ShiftTable.weights`; the last one down
        to 0. The first covers those above its own too: something has to start there.

        Raises:
            InputError: no plans, or one with a timestep outside 0..num_timesteps-1.
        """
        plans, counts = tuple(plans), Counter()
        if not plans:
            raise InputError("emphasis: no plans, expected at least one")
        for plan in plans:
            if not 0 <= plan.timesteps[-1] <= plan.timesteps[0] <= num_timesteps - 1:
                found = f"timesteps {plan.timesteps[0]}..{plan.timesteps[-1]}"
                raise InputError(f"emphasis: a plan of {found}, expected within {num_timesteps - 1}..0")
            for (low, high), depths in zip(_covered(plan, num_timesteps), _exits_run(plan), strict=True):
                # Between two steps of fractional timesteps there may be no whole one.
                counts.update((depth, low, high) for depth in depths if low <= high)
        return cls(tuple((*key, count / len(plans)) for key, count in sorted(counts.items())), num_timesteps, rest)

    @classmethod
    def of_shifts(
        cls, table: ShiftTable, errors: pd.DataFrame, *, num_timesteps: int = 1000, rest: float = 0.1
    ) -> Self:
        """How far the pictures move for each unit of an exit's squared error: weighted so, the loss is to first order
        the sum of the distances that the exits' bands were measured to move pictures by.

        The distance is Fréchet's, from full depth's pictures to those of the same seeds with the exit at one band's
        steps, the unconditional branch as deep as was measured with it. Exits that the table lacks get the geometric
        interpolation between their neighbours' in depth, those beyond its shallowest or deepest that one's. errors: of
        these very exits, `tasks.exit_error_table`.

        Raises:
            InputError: the table has no exit with an unconditional pass or, where nothing is guided, no exit at all.
        """
        distances = _distances(table)
        depths = sorted(set(errors["depth"]))
        tops = [num_timesteps - 1, *(math.floor(edge) for edge in table.edges[1:-1])]
        stretches = list(zip([*(top + 1 for top in tops[1:]), 0], tops, strict=True))
        values = []
        for band, (low, high) in enumerate(stretches):
            if low > high:
                continue
            squared = _mean_errors(errors, low, high, num_timesteps)
            ratios = [distances[d][band] / squared[d] for d in distances]
            logs = np.log(np.maximum(ratios, 1e-30) / (high - low + 1))
            values += [(d, low, high, math.exp(np.interp(d, list(distances), logs))) for d in depths]
        mean = sum(share * (high - low + 1) for _, low, high, share in values) / (len(depths) * num_timesteps)
        return cls(tuple((*key, share / mean) for *key, share in sorted(values)), num_timesteps, rest)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of the exits that have a share, rising."""
        return tuple(sorted({depth for depth, *_ in self.stretches}))

    def shares(self, depths: Sequence[int]) -> Tensor:
        """How much the exits at E `depths` matter at each timestep: of plans, in predictions per plan.  -> (E, T)."""
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
        """Short enough for a message, and another one for every other emphasis: a run's identity holds it."""
        content = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]
        return f"Emphasis(exits {list(self.depths)}, rest {self.rest:g}, {content})"


def _covered(plan: DepthPlan, num_timesteps: int) -> list[tuple[int, int]]:
    """Lowest and highest whole timestep that each step covers."""
    highs = [num_timesteps - 1, *(math.floor(t) for t in plan.timesteps[1:])]
    lows = [*(high + 1 for high in highs[1:]), 0]
    return list(zip(lows, highs, strict=True))


def _exits_run(plan: DepthPlan) -> list[list[int]]:
    """Depths of the exits that predict at each step; twice where both branches leave there."""
    steps = zip(plan.run_depths, plan.uncond, plan.guides, strict=True)
    return [[depth for depth in step if 0 < depth < plan.num_blocks] for step in steps]


def _distances(table: ShiftTable) -> dict[int, list[float]]:
    """By exit, rising: how far each band's steps at that exit move the pictures.

    Raises:
        InputError: as `Emphasis.of_shifts`.
    """
    guided, deepest = table.full_pair[1] > 0, {}
    for index, (cond, uncond) in enumerate(table.pairs):
        known = deepest.get(cond)
        if 0 < cond < table.num_blocks and (uncond > 0) == guided and (known is None or uncond > table.pairs[known][1]):
            deepest[cond] = index
    if not deepest:
        beside = " beside an unconditional pass" if guided else ""
        raise InputError(f"emphasis: the shift table measured no exit{beside}, expected one")
    frechet, base = FrechetTo(table.base), table.base
    picks = [deepest[depth] for depth in sorted(deepest)]
    mean, second = base.mean + table.mean[:, picks], base.second + table.second[:, picks]
    covariance = (second - mean[..., :, None] * mean[..., None, :]) * (base.num / (base.num - 1))
    moved = frechet(mean, covariance).clamp(min=0)
    return {depth: moved[:, i].tolist() for i, depth in enumerate(sorted(deepest))}


def _mean_errors(errors: pd.DataFrame, low: int, high: int, num_timesteps: int) -> dict[int, float]:
    """By exit, the mean squared error on the noise at the timesteps low..high, from bands equal in timesteps."""
    edges = torch.linspace(0, num_timesteps, errors["band"].max() + 2).long().tolist()
    overlap = [max(0, min(high + 1, b) - max(low, a)) for a, b in pairwise(edges)]
    by_band = errors.pivot(index="depth", columns="band", values="noise_error")
    return (by_band @ np.array(overlap) / (high - low + 1)).to_dict()
