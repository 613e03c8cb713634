"""Guide full depth by its own exit, alone or beside an unconditional pass.

Internal Guidance (Zhou et al. 2025, arXiv:2512.24176) pushes a prediction away from an intermediate head's. That costs
a head and no pass. The paper also guides by a pass at the same time; then every branch is first guided by its own exit.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import own_exit
from dyndit.sampling.guidance import Guidance


@dataclass(frozen=True)
class InternalGuidance(PeerSettings):
    """exit: depth of the exit that guides. low, high: guidance at noise levels in (low, high] alone.

    own: 0: the exit guides in place of the unconditional pass, at the sampling's scale. Otherwise the pass guides at
    the sampling's scale, and within each branch the exit guides at scale `own`; 1 changes nothing.
    """

    name: ClassVar[str] = "internal-guidance"
    switched_off: ClassVar = {"exit": 2, "own": 1.0}
    """The unconditional pass alone."""
    compared: ClassVar = ((4,), (6,), (4, 1.5))
    """Two exits in place of the pass, and one beside it."""
    least: ClassVar = {"exit": 1, "own": 0}
    exit: int
    own: float = 0.0
    low: float = 0.0
    high: float = math.inf

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Return the model, or the peer if a pass guides too. Raises InputError: the model has no such exit."""
        if self.exit not in model.depths[:-1]:
            found = f"exit {self.exit}: the model has exits after {list(model.depths[:-1])}"
            raise InputError(f"peer {self.name}: {found}; expected one of them")
        return model if self.own in (0, 1) else OwnBesidePass(model, self)

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Guide by the exit, or by the pass, in the interval alone."""
        guided = GuidanceInterval(self.low, self.high).plan(full, depths)
        return guided if self.own else own_exit(guided, (self.exit, full.num_blocks), self.exit)


class OwnBesidePass(Peer):
    """Full depth in which each branch is guided by its own exit before the branches guide one another."""

    settings: InternalGuidance

    def __init__(self, model: DynamicDepth, settings: InternalGuidance) -> None:
        super().__init__(model, settings)
        self.exits = model.exits

    def predict(self, step: StepInputs, memory: object) -> tuple[list[Tensor], object]:
        """Predict every branch. A step outside the interval has one branch, which nothing guides."""
        if len(step.branches) == 1:
            return super().predict(step, memory)
        joined, guidance = Inputs.joined(step.branches), Guidance(self.settings.own)
        full, weak = self.run([joined], [self.num_blocks], [self.settings.exit])
        guided = guidance.combine(full, weak, self.backbone.in_channels)
        return list(guided.split(len(step.x_t))), memory
