"""Classifier-free guidance."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): eps = eps_u + scale * (eps_c - eps_u).

    channels: number of guided channels; None for all. The published DiT guides the first 3 of its 4 channels.
    """

    scale: float = 1.0
    channels: int | None = None

    def combine(self, cond: Tensor, uncond: Tensor, num_channels: int) -> Tensor:
        """Guide.  cond, uncond: (B, C_out, H, W) -> (B, C_out, H, W). Unguided channels and the variance are cond's."""
        guided = min(num_channels, num_channels if self.channels is None else self.channels)
        head = uncond[:, :guided] + self.scale * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([head, cond[:, guided:]], dim=1)
