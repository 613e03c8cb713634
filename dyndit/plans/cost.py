"""What a plan costs in measured time: seconds of the parts of a step, and their sum over a plan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from dyndit.plans.plan import DepthPlan, full_step
from dyndit.plans.step import Step


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
        """Build from what `asdict` gave, also through JSON, whose keys are text."""
        return cls(**{**data, "exits": {int(depth): seconds for depth, seconds in data["exits"].items()}})


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

    def step_seconds(self, step: Step) -> float:
        """Seconds of a step. A guide of its own exit costs that head.

        A forecast costs its exit's head twice: the step at full depth that it builds on ran the head too.
        """
        work = step.work()
        heads = [*work.heads_on_the_way, *((step.depth,) if work.forecast else ())]
        extra = sum(self._leave(self.one, depth) for depth in heads)
        if len(work.depths) == 1:
            (depth,) = work.depths
            return self.solver + self.one.embed + depth * self.one.block + self._leave(self.one, depth) + extra
        shallow, deep = sorted(work.depths)
        seconds = self.solver + self.two.embed + shallow * self.two.block
        if shallow == deep:
            return seconds + self._leave(self.two, deep)
        rest = (deep - shallow) * self.one.block + self._leave(self.one, deep)
        return seconds + self._leave(self.one, shallow) + rest

    def plan_seconds(self, plan: DepthPlan) -> float:
        """Predicted seconds from noise to picture for one batch."""
        return sum(map(self.step_seconds, plan.steps))

    def network_seconds(self, plan: DepthPlan) -> float:
        """Predicted seconds of those in the network: without the solver's."""
        return self.plan_seconds(plan) - plan.num_steps * self.solver

    def share_of_time(self, plan: DepthPlan) -> float:
        """Predicted time as a share of full depth's at the same steps."""
        full = self.step_seconds(full_step(plan.num_blocks, plan.cfg_scale))
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
