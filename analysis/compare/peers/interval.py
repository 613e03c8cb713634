"""Guidance in an interval of noise levels, at full depth: what dropping guidance alone saves.

Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models", arXiv:2404.07724; `routers.schedules.guidance_interval` is the schedule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from dyndit.analysis.compare.peers.base import PeerSettings
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import guidance_interval
from dyndit.process import DDPM
from dyndit.sampling.solvers import SOLVERS


@dataclass(frozen=True)
class GuidanceInterval(PeerSettings):
    """Guidance at noise levels in (low, high] alone; sigma is 157 at t = 999, 17 at 750, 3.4 at 500, 0.96 at 250."""

    name: ClassVar[str] = "interval"
    low: float
    high: float

    @classmethod
    def off(cls) -> Self:
        """An interval of all noise levels."""
        return cls(0.0, math.inf)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Without the noisiest steps, without the last ones, without both."""
        return cls(0.0, 17.0), cls(0.5, 1000.0), cls(0.5, 10.0)

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """The full plan without its unconditional branch outside of the interval."""
        known = SOLVERS.get(full.solver)
        return guidance_interval(full, self.low, self.high, DDPM() if known is None else known.process())
