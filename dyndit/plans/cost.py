"""The cost of a plan in measured time: seconds of the parts of a step, summed over the plan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from dyndit.plans.plan import DepthPlan, full_step
from dyndit.plans.step import Step


@dataclass(frozen=True)
class PartTimes:
    """Seconds of each part for one batch of rows: embedding, a block on average, an exit head, the model's own head."""

    embed: float
    block: float
    exit: float
    head: float
    exits: Mapping[int, float] = field(default_factory=dict)
    """Seconds by depth, for heads whose cost differs from `exit`."""
    blocks: tuple[float, ...] = ()
    """Seconds of each block, if blocks differ; (): all take `block`."""
    recalls: Mapping[int, float] = field(default_factory=dict)
    """Seconds by depth, for heads of learned forecasts."""

    def through(self, first: int, last: int) -> float:
        """Return the seconds from depth `first` to depth `last`."""
        return sum(self.blocks[first:last]) if self.blocks else (last - first) * self.block


@dataclass(frozen=True)
class CostModel:
    """Measured seconds for `batch_size` pictures: one branch (B rows), two branches (2B rows), and the solver."""

    batch_size: int
    num_blocks: int
    one: PartTimes
    two: PartTimes
    solver: float
    """Seconds per step outside the network: scheduler, guidance, clamping."""
    device: str = "cpu"

    def step_seconds(self, step: Step) -> float:
        """Predict the seconds of a step. A guide by the branch's own exit costs that exit's head.

        A forecast costs its exit's head twice, because the full-depth step before it ran the head too. A learned one
        costs a head of its own, once.
        """
        work = step.work()
        extra = sum(self._leave(self.one, depth) for depth in work.heads_on_the_way)
        if len(work.depths) == 1:
            (depth,) = work.depths
            leave = self._leave(self.one, depth)
            if work.forecast:
                leave = self.one.recalls.get(depth, 2 * leave)
            return self.solver + self.one.embed + self.one.through(0, depth) + leave + extra
        shallow, deep = sorted(work.depths)
        seconds = self.solver + self.two.embed + self.two.through(0, shallow)
        if shallow == deep:
            return seconds + self._leave(self.two, deep)
        rest = self.one.through(shallow, deep) + self._leave(self.one, deep)
        return seconds + self._leave(self.one, shallow) + rest

    def plan_seconds(self, plan: DepthPlan) -> float:
        """Predict the seconds from noise to picture for one batch."""
        return sum(n * self.step_seconds(step) for n, step in zip(plan.calls_by_step, plan.steps, strict=True))

    def network_seconds(self, plan: DepthPlan) -> float:
        """Predict the seconds in the network alone, without the solver."""
        return self.plan_seconds(plan) - sum(plan.calls_by_step) * self.solver

    def share_of_time(self, plan: DepthPlan) -> float:
        """Predict the time as a share of the full plan's time at the same steps."""
        full = self.step_seconds(full_step(plan.num_blocks, plan.cfg_scale))
        return self.plan_seconds(plan) / (full * sum(plan.calls_by_step))

    def _leave(self, parts: PartTimes, depth: int) -> float:
        return parts.head if depth == self.num_blocks else parts.exits.get(depth, parts.exit)

    def describe(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_description(cls, data: dict[str, Any]) -> Self:
        """Build from the output of `describe`, also after JSON has turned its keys into text."""

        def parts(times: dict[str, Any]) -> PartTimes:
            heads = {
                kind: {int(depth): seconds for depth, seconds in times.get(kind, {}).items()}
                for kind in ("exits", "recalls")
            }
            known: dict[str, Any] = {**times, **heads, "blocks": tuple(times.get("blocks", ()))}
            return PartTimes(**known)

        both: dict[str, Any] = {"one": parts(data["one"]), "two": parts(data["two"])}
        return cls(**{**data, **both})
