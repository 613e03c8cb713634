"""Draw control plans at random: of a given number of blocks, or of exactly another plan's cost.

A searched plan must beat a random plan.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from dyndit.analysis.compare.peers.base import PeerSettings
from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import NoGuide, Step, Unconditional


@dataclass(frozen=True)
class RandomPlan(PeerSettings):
    """Random depths of both branches. They add up to `share` of full depth's blocks, or less by less than one gap
    between neighbouring depths.
    """

    name: ClassVar[str] = "random"
    switched_off: ClassVar = {"share": 1.0}
    """All blocks: only the full plan has as many."""
    compared: ClassVar = ((0.6, 0), (0.6, 1))
    """Two plans."""
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"random share {self.share:g}: expected above 0 and at most 1")

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Draw every depth, then move random ones until the sum fits. Raises InputError: `share` is too small."""
        drawn = random.Random(self.seed)
        entries = list(full.depths) + [depth for depth in full.uncond_depths if depth]
        limit = self.share * sum(entries) * (1 + 1e-9)
        if len(entries) * depths[0] > limit:
            raise InputError(f"random share {self.share:g}: the shallowest plan has {depths[0] / depths[-1]:.2f}")
        chosen = [drawn.randrange(len(depths)) for _ in entries]

        def total() -> int:
            return sum(depths[i] for i in chosen)

        while total() > limit:
            chosen[drawn.choice([i for i, c in enumerate(chosen) if c > 0])] -= 1
        while True:
            spare = limit - total()
            fitting = [i for i, c in enumerate(chosen) if c + 1 < len(depths) and depths[c + 1] - depths[c] <= spare]
            if not fitting:
                break
            chosen[drawn.choice(fitting)] += 1
        cond, rest = chosen[: full.num_steps], iter(chosen[full.num_steps :])
        guides = [Unconditional(depths[next(rest)]) if depth else NoGuide() for depth in full.uncond_depths]
        steps = [Step(depths[i], guide) for i, guide in zip(cond, guides, strict=True)]
        return full.with_steps(steps, router="random", settings={"share": self.share, "seed": self.seed})


def shuffled(plan: DepthPlan, seed: int) -> DepthPlan:
    """Put the plan's own steps in a random order: a control of equal cost, like the reversed plan.

    An order in which a forecast has no step at full depth before it is no plan, and is drawn again.
    """
    steps, drawn = list(plan.steps), random.Random(seed)

    def valid() -> bool:
        first = next((k for k, step in enumerate(steps) if step.depth == plan.num_blocks), len(steps))
        return not any(step.forecast for step in steps[:first])

    drawn.shuffle(steps)
    while not valid():  # the plan itself is a valid order, so one comes
        drawn.shuffle(steps)
    return plan.with_steps(steps, router="shuffled", settings={"seed": seed}, figures={})
