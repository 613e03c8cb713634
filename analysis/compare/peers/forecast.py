"""Forecast reuse: the deep blocks' addition is extrapolated from the last two full steps rather than held.

After TaylorSeer (Liu et al. 2025, "From Reusing to Forecasting", arXiv:2503.06923), which forecasts the features of
every module from finite differences over its full steps, a Taylor series in the step. Here it is first order, of one
residual, that of `stale`; in the step, or in log-SNR, the variable that exponential integrators expand in. Until a
branch has two full steps behind it, the one is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dyndit.analysis.compare.peers.base import grid
from dyndit.analysis.compare.peers.stale import Kept, Stale
from dyndit.models.dynamic import StepInputs
from dyndit.process import Process


@dataclass(frozen=True)
class Forecast(Stale):
    """A full step every `every` steps, `depth` blocks between them, the rest forecast `along` the step or log-SNR."""

    name: ClassVar[str] = "forecast"
    along: Literal["step", "snr"] = "step"

    @classmethod
    def off(cls) -> Self:
        """Every step is full."""
        return cls(every=1, depth=1)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """As `stale`, at the shallower depth, along either variable."""
        return grid(cls, every=(2, 3), depth=(2,), along=("step", "snr"))

    def residual(self, kept: Sequence[Kept], step: StepInputs, process: Process) -> Tensor:
        """The straight line through the last two full steps, at this one."""
        if len(kept) < 2:
            return kept[-1].residual
        ks = (kept[0].k, kept[1].k, step.k)
        times = (kept[0].timestep, kept[1].timestep, step.timesteps[step.k])
        at = map(float, ks) if self.along == "step" else map(process.log_snr_at, times)
        return extrapolate(kept[0].residual, kept[1].residual, *at)


def extrapolate(older: Tensor, newer: Tensor, at_older: float, at_newer: float, at: float) -> Tensor:
    """The value at `at` of the line through (at_older, older) and (at_newer, newer)."""
    return torch.lerp(older, newer, (at - at_older) / (at_newer - at_older))
