"""What exits are trained on: noised pictures, recorded calls, or states of the sampler."""

from collections.abc import Callable

import torch
from torch import Tensor

from dyndit.models import Inputs
from dyndit.process import Process

Rows = Tensor | dict[str, Tensor]
"""What comes with x in a batch of a data set: labels (B,), or tensors of B rows by name."""


States = Callable[[Tensor, Rows, torch.Generator], Inputs]
"""What exits are to be right on, made of a batch of the data: (x, rows, generator) -> inputs of the model."""


TRAJECTORIES_SEED = 2_000_003
"""Of the states to distil on; apart from those of calibration and of scoring."""


def noised(
    process: Process, null_share: float, null_class: int | None, x: Tensor, y: Tensor, generator: torch.Generator
) -> Inputs:
    """Pictures at random timesteps, some of their labels replaced by the null label.  x: (B, C, H, W), y: (B,)."""
    t = process.sample_timesteps(len(x), generator).to(x.device)
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    lost = torch.rand(len(y), generator=generator) < null_share
    if null_class is not None:
        y = torch.where(lost.to(y.device), null_class, y)
    return Inputs(process.noised(x, eps, t), t, y)
