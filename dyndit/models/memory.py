"""What a sampling step leaves for later steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dyndit.models.forecasts import Gaps
from dyndit.models.recall import Left


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
