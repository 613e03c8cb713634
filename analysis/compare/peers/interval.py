"""Guide only in an interval of noise levels, at full depth: save time by dropping guidance alone.

Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models", arXiv:2404.07724; `plans.schedules.guidance_interval` is the schedule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from dyndit.analysis.compare.peers.base import PeerSettings
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import guidance_interval
from dyndit.process import DDPM
from dyndit.sampling.solvers import SOLVERS


@dataclass(frozen=True)
class GuidanceInterval(PeerSettings):
    """Guidance only at noise levels in (low, high]. Sigma is 157 at t = 999, 17 at 750, 3.4 at 500, 0.96 at 250."""

    name: ClassVar[str] = "interval"
    switched_off: ClassVar = {"low": 0.0, "high": math.inf}
    """Guidance at all noise levels."""
    compared: ClassVar = ((0.0, 17.0), (0.5, 1000.0), (0.5, 10.0))
    """No guidance at the noisiest steps, at the last steps, at both."""
    low: float
    high: float

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Drop the full plan's unconditional branch outside the interval."""
        known = SOLVERS.get(full.solver)
        return guidance_interval(full, self.low, self.high, DDPM() if known is None else known.process())
