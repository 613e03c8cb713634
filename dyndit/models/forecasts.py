"""Forecast the gap between an exit and full depth from earlier steps.

At a full-depth step the gap of an exit is the difference g = eps_L - eps_d. At later steps the exit runs alone. Its gap
is then forecast to first order in the log-SNR l, from the last two full-depth steps:

    g(l) ~ g_1 + (l - l_1) (g_1 - g_2) / (l_1 - l_2)

A good exit has a small gap, so a wrong forecast does little harm. A learned correction scales the two terms by 1 + a
and 1 + b. Both a and b are linear in a few functions of l and of the gap's age. They start at zero and are fitted by
ridge regression to the gaps of full-depth trajectories.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndit.process import Process

NUM_TERMS = 4


@dataclass(frozen=True)
class Gaps:
    """Gaps of exits to full depth at one step, by depth: (B, C_out, H, W) of the conditional branch."""

    timestep: float
    by_depth: Mapping[int, Tensor]


def remembered(earlier: Sequence[Gaps], timestep: float, gaps: Mapping[int, Tensor]) -> tuple[Gaps, ...]:
    """Append one full step and keep the last two, the later step last. A step evaluated again replaces itself."""
    before = [known for known in earlier if known.timestep != timestep]
    return (*before[-1:], Gaps(timestep, gaps))


def forecast_gap(
    earlier: Sequence[Gaps], depth: int, timestep: float, process: Process, gains: Tensor | None = None
) -> Tensor:
    """Forecast the gap of the exit at `depth` at a later timestep.  -> (B, C_out, H, W).

    process: the model's process. gains: (2, NUM_TERMS), the learned correction, or None. With only one remembered
    step, its gap is used unchanged.
    """
    known = [gaps for gaps in earlier if depth in gaps.by_depth]
    level, slope = terms(known, depth, timestep, process)
    if gains is None:
        return level if slope is None else level + slope
    scale = (1 + gains.double().cpu() @ basis(timestep, known[-1].timestep, process)).tolist()
    return scale[0] * level if slope is None else scale[0] * level + scale[1] * slope


def terms(known: Sequence[Gaps], depth: int, timestep: float, process: Process) -> tuple[Tensor, Tensor | None]:
    """Return the terms of order 0 and 1, (B, C_out, H, W) each. With one remembered step, the second is None."""
    last = known[-1]
    level = last.by_depth[depth]
    if len(known) < 2:
        return level, None
    before = known[-2]
    now, later, earlier = (process.log_snr_at(t) for t in (timestep, last.timestep, before.timestep))
    ahead = (now - later) / (later - earlier)
    return level, ahead * (level - before.by_depth[depth])


def basis(timestep: float, since: float, process: Process) -> Tensor:
    """Return the correction's basis, (NUM_TERMS,): functions of the log-SNR and of its rise since `since`."""
    now = process.log_snr_at(timestep)
    place, age = now / 10, (now - process.log_snr_at(since)) / 5
    return torch.tensor([1.0, place, age, place * age], dtype=torch.float64)


class GapRegression:
    """Fit the correction of every exit's forecasts by ridge regression on observed gaps; zero without any gaps.

    Trajectories come as `Gaps` at successive full-depth steps. Each gap is forecast from the gaps one to `oldest`
    steps before. The error of the plain forecast is regressed on its two terms times `basis`.
    """

    def __init__(self, depths: Sequence[int], process: Process, *, oldest: int = 3, ridge: float = 1e-3) -> None:
        self.depths, self.process, self.oldest, self.ridge = tuple(depths), process, oldest, ridge
        size = 2 * NUM_TERMS
        self.gram = torch.zeros(len(self.depths), size, size, dtype=torch.float64)
        self.missed = torch.zeros(len(self.depths), size, dtype=torch.float64)

    def add(self, trajectory: Sequence[Gaps]) -> None:
        """Add the gaps of one batch's steps, the noisiest first."""
        for step, gaps in enumerate(trajectory):
            for age in range(1, min(step, self.oldest) + 1):
                known = trajectory[max(0, step - age - 1) : step - age + 1]
                along = basis(gaps.timestep, known[-1].timestep, self.process)
                for row, depth in enumerate(self.depths):
                    forecast = terms(known, depth, gaps.timestep, self.process)
                    self._add(row, gaps.by_depth[depth], forecast, along)

    def _add(self, row: int, gap: Tensor, forecast: tuple[Tensor, Tensor | None], along: Tensor) -> None:
        level, slope = (torch.zeros_like(gap) if term is None else term for term in forecast)
        columns = torch.stack([level, slope]).double().flatten(1).cpu()
        missed = (gap - level - slope).double().flatten().cpu()
        self.gram[row] += torch.kron((columns @ columns.T).contiguous(), torch.outer(along, along))
        self.missed[row] += torch.kron(columns @ missed, along)

    def gains(self) -> Tensor:
        """Solve the regression -> (E, 2, NUM_TERMS), float32, the layout of `Exits.gains`."""
        size = self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None, None]
        damped = self.gram + self.ridge * size * torch.eye(2 * NUM_TERMS, dtype=torch.float64)
        return torch.linalg.solve(damped, self.missed).float().view(-1, 2, NUM_TERMS)
