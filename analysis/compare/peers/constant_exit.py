"""Run one exit at every step, guided by one earlier exit: the plainest plan with the parts of a searched one.

It tells how much of a searched plan's saving is due to the heads and their guide, and how much to choosing by timestep.
"""

from dataclasses import dataclass
from typing import ClassVar

from dyndit.analysis.compare.peers.base import PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import OwnExit, Step, Unconditional


@dataclass(frozen=True)
class ConstantExit(PeerSettings):
    """depth: of the exit that runs at every step. guide: of the exit that guides it; 0: a pass of the same depth."""

    name: ClassVar[str] = "constant-exit"
    compared: ClassVar = ((8, 4), (6, 4), (4, 2))
    """Two thirds, half and a third of twelve blocks."""
    least: ClassVar = {"depth": 1, "guide": 0}
    depth: int
    guide: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide >= self.depth:
            raise InputError(f"peer {self.name}: guide {self.guide}, expected an exit before depth {self.depth}")

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Return the model. Raises InputError: it does not leave at one of the depths."""
        if missing := sorted({self.depth, self.guide or self.depth} - set(model.depths)):
            raise InputError(f"peer {self.name}: depth {missing[0]}, expected one of {list(model.depths)}")
        return model

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Run the exit at every step. Steps without guidance stay without."""
        guided = Step(self.depth, OwnExit(self.guide) if self.guide else Unconditional(self.depth))
        steps = [guided if isinstance(step.guide, Unconditional) else Step(self.depth) for step in full.steps]
        return full.with_steps(steps, router=self.name, settings={"depth": self.depth, "guide": self.guide})
