"""What a plan costs in measured time: seconds of the parts of a step, and their sum over a plan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from dyndit.plans.plan import DepthPlan, guide_of


@dataclass(frozen=True)
class PartTimes:
    """Seconds of each part for one batch of rows: embedding, one block, an exit head, the model's own head."""

    embed: float
    block: float
    exit: float
    head: float
    exits: Mapping[int, float] = field(default_factory=dict)
    """By depth, the heads that cost other than `exit`."""

    @classmethod
    def from_description(cls, data: dict) -> Self:
        """Build from what `asdict` gave, also through JSON, whose keys are text; of older tables, without `exits`."""
        return cls(**{**data, "exits": {int(depth): seconds for depth, seconds in data.get("exits", {}).items()}})


@dataclass(frozen=True)
class CostModel:
    """Measured seconds for `batch_size` pictures: with one branch (B rows), with two (2B rows), and the solver."""

    batch_size: int
    num_blocks: int
    one: PartTimes
    two: PartTimes
    solver: float
    """Per step, besides the network: scheduler, guidance, clamping."""
    device: str = "cpu"

    def step_seconds(self, cond: int, uncond: int) -> float:
        """Seconds of a step at these depths; without an unconditional pass a guide of its own exit costs its head.

        A forecast costs its exit's head twice: the step at full depth that it builds on ran it too.
        """
        if cond < 0:
            return self.step_seconds(-cond, uncond) + self._leave(self.one, -cond)
        if uncond <= 0:
            guide = self._leave(self.one, guide_of(uncond)) if guide_of(uncond) else 0.0
            return self.solver + self.one.embed + cond * self.one.block + self._leave(self.one, cond) + guide
        shallow, deep = sorted((cond, uncond))
        seconds = self.solver + self.two.embed + shallow * self.two.block
        if shallow == deep:
            return seconds + self._leave(self.two, deep)
        rest = (deep - shallow) * self.one.block + self._leave(self.one, deep)
        return seconds + self._leave(self.one, shallow) + rest

    def plan_seconds(self, plan: DepthPlan) -> float:
        """Predicted seconds from noise to picture for one batch."""
        return sum(self.step_seconds(c, u) for c, u in plan.pairs)

    def network_seconds(self, plan: DepthPlan) -> float:
        """Predicted seconds of those in the network: without the solver's."""
        return self.plan_seconds(plan) - plan.num_steps * self.solver

    def share_of_time(self, plan: DepthPlan) -> float:
        """Predicted time as a share of full depth's at the same steps."""
        full = self.step_seconds(plan.num_blocks, plan.num_blocks if plan.cfg_scale != 1 else 0)
        return self.plan_seconds(plan) / (full * plan.num_steps)

    def _leave(self, parts: PartTimes, depth: int) -> float:
        return parts.head if depth == self.num_blocks else parts.exits.get(depth, parts.exit)

    def describe(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_description(cls, data: dict) -> Self:
        """Build from what `describe` gave."""
        return cls(**{**data, **{rows: PartTimes.from_description(data[rows]) for rows in ("one", "two")}})
