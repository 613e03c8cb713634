"""Full depth every few steps with a forecast between: the plainest plan with a searched one's forecasts.

`plans.schedules.skips` is the schedule. It tells how much of a searched plan's saving is due to its forecasts, and how
much to choosing by timestep. Where the model has recall heads, forecasts are learned (`models.recall`).
"""

from dataclasses import dataclass
from typing import ClassVar

from dyndit.analysis.compare.peers.base import PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import skips


@dataclass(frozen=True)
class Skips(PeerSettings):
    """A full step every `every` steps; the steps between leave at `depth`, forecast the rest and hold the guidance."""

    name: ClassVar[str] = "skips"
    compared: ClassVar = ((2, 2), (3, 2), (4, 2))
    """Every second, third or fourth step in full, the others with a sixth of twelve blocks."""
    least: ClassVar = {"every": 2, "depth": 1}
    every: int
    depth: int

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Return the model. Raises InputError: it does not leave at `depth`."""
        if self.depth not in model.depths[:-1]:
            raise InputError(f"peer {self.name}: depth {self.depth}, expected one of {list(model.depths[:-1])}")
        return model

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Skip at this depth throughout."""
        return skips(full, depths, self.depth, self.depth, self.every)
