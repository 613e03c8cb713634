"""What a sampling step runs, what it is given, and what it leaves for later steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from dyndit.models.base import Inputs
from dyndit.models.conditions import Condition
from dyndit.models.forecasts import Gaps
from dyndit.models.recall import Left


@dataclass(frozen=True)
class Work:
    """The branches and heads of one step.

    Example: `Work((12, 6))` runs 12 blocks with the condition and 6 without it; `Work((8,), own_exit=4)` runs 8 blocks
    and, on the way, the exit head after block 4.
    """

    depths: tuple[int, ...]
    """Blocks that each branch runs: the conditional branch first, then the unconditional branch if it runs."""
    own_exit: int = 0
    """Depth of the conditional branch's exit that guides it; 0: no exit guides it."""
    held: bool = False
    """Guide by the difference between both branches at the last step that ran both branches."""
    forecast: bool = False
    """Add a forecast of the gap to full depth to the conditional exit's prediction."""
    strength: float = 1.0
    """Factor of the guidance: the guiding prediction moves away from the conditional one by it."""
    kept: tuple[int, ...] = ()
    """Exits whose forecasts at later steps build on this step, rising. Heads of those that extrapolate run at it."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks run, summed over all branches."""
        return sum(self.depths)

    @property
    def heads_on_the_way(self) -> tuple[int, ...]:
        """Return the exit heads that run without ending a branch, in rising order, if all forecasts extrapolate."""
        return self.heads_beside(())

    def heads_beside(self, recall: Collection[int]) -> tuple[int, ...]:
        """Return the same for a model whose forecasts at the depths `recall` are learned: they need no exit head."""
        return tuple(sorted({*self.kept} - {*recall} | ({self.own_exit} if self.own_exit else set())))

    def strengthened(self, conditional: Tensor, guide: Tensor) -> Tensor:
        """Move the guiding prediction away from the conditional one, both (B, C_out, ...); by 1 it stays, bit for bit.

        Guidance at any scale s then adds strength * (s - 1) times their difference: no caller has to know of it.
        """
        if self.strength == 1:
            return guide
        return conditional.float() - self.strength * (conditional.float() - guide.float())

    def keeping(self, depths: tuple[int, ...]) -> Self:
        """Return this work with what forecasts at these exits need remembered too."""
        return replace(self, kept=tuple(sorted({*self.kept, *depths})))


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a model at one step of the sampling loop.

    k: the step, from 0. branches: the inputs of each branch, the conditional branch first. Their x has the scale and
    the precision that the network takes. work: blocks and heads to run, one depth per branch. timesteps: all timesteps
    of the sampling, falling, as plain floats. uncond_first: stack the unconditional rows first if depths are equal.
    """

    k: int
    branches: tuple[Inputs, ...]
    work: Work
    timesteps: tuple[float, ...]
    uncond_first: bool = False

    @property
    def x_t(self) -> Tensor:
        """Return the conditional branch's pictures, (B, C, H, W)."""
        return self.branches[0].x

    @property
    def times(self) -> Tensor:
        """Return the conditional branch's timesteps, (B,)."""
        return self.branches[0].t

    @property
    def labels(self) -> tuple[Condition, ...]:
        """Return the condition of each branch."""
        return tuple(branch.y for branch in self.branches)


@dataclass(frozen=True)
class Memory:
    """Values that a step leaves for later steps. Never written to, so trajectories that fork share it.

    gaps: the exits' gaps to full depth at the last two full steps. left: the tokens of the last full step. guided: both
    branches' predictions at the last step that ran both, the conditional prediction first; None before such a step.
    """

    gaps: tuple[Gaps, ...] = ()
    left: Left | None = None
    guided: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, _memo: object) -> Self:
        return self
