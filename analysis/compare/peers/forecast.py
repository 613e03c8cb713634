"""Forecast the deep blocks' residual from the last two full steps.

After TaylorSeer (Liu et al. 2025, "From Reusing to Forecasting", arXiv:2503.06923): a Taylor series in the step, by
finite differences, for the features of every module. Here the series is of first order and forecasts one residual, as
`stale` keeps it. Its variable is the step, or log-SNR as in exponential integrators. A branch with only one full step
behind it reuses that residual.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dyndit.analysis.compare.peers.stale import Kept, Stale
from dyndit.models.dynamic import StepInputs
from dyndit.process import Process


@dataclass(frozen=True)
class Forecast(Stale):
    """A full step every `every` steps. Other steps run `depth` blocks and forecast the rest `along` step or log-SNR."""

    name: ClassVar[str] = "forecast"
    compared: ClassVar = ((2, 2, "step"), (2, 2, "snr"), (3, 2, "step"), (3, 2, "snr"))
    """The intervals of `stale` at its shallower depth, along either variable."""
    along: Literal["step", "snr"] = "step"

    def residual(self, kept: Sequence[Kept], step: StepInputs, process: Process) -> Tensor:
        """Extrapolate the straight line through the last two full steps to this step."""
        if len(kept) < 2:
            return kept[-1].residual
        ks = (kept[0].k, kept[1].k, step.k)
        times = (kept[0].timestep, kept[1].timestep, step.timesteps[step.k])
        at = map(float, ks) if self.along == "step" else map(process.log_snr_at, times)
        return extrapolate(kept[0].residual, kept[1].residual, *at)


def extrapolate(older: Tensor, newer: Tensor, at_older: float, at_newer: float, at: float) -> Tensor:
    """Evaluate the line through (at_older, older) and (at_newer, newer) at `at`."""
    return torch.lerp(older, newer, (at - at_older) / (at_newer - at_older))
