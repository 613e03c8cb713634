"""Inputs to train exits on: noised pictures, recorded calls, or states of the sampler."""

from collections.abc import Callable

import torch
from torch import Tensor

from dyndit.models.base import Inputs
from dyndit.models.conditions import ConditionType
from dyndit.process import Process
from dyndit.training.conditioned import Rows, as_condition

States = Callable[[Tensor, Rows, torch.Generator], Inputs]
"""Makes inputs of the model from a batch of the data: (x, rows, generator) -> inputs. Exits are trained on them."""

TRAJECTORIES_SEED = 2_000_003
"""Seed of the states to distil on. Calibration and scoring have other seeds."""


def noised(
    process: Process, null_share: float, condition: ConditionType, x: Tensor, y: Rows, generator: torch.Generator
) -> Inputs:
    """Noise pictures at random timesteps, and replace a share of their conditions by the null.  x: (B, C, H, W)."""
    t = process.sample_timesteps(len(x), generator).to(x.device)
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    return Inputs(process.noised(x, eps, t), t, condition.dropped(as_condition(y), generator, null_share))
