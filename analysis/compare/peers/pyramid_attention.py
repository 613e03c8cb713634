"""Run pyramid attention broadcast: reuse the output of attention at the steps between.

Source: X. Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast", ICLR 2025, arXiv:2408.12588.
Code: diffusers, `apply_pyramid_attention_broadcast`. A DiT only has spatial self-attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn

from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.errors import InputError


@dataclass(frozen=True)
class PyramidAttention(DiffusersCache):
    """Attention runs at every `every`-th step between the timesteps `above` and `below`, elsewhere at every step."""

    name: ClassVar[str] = "pyramid-attention"
    switched_off: ClassVar = {"every": 1}
    """Attention at every step."""
    compared: ClassVar = ((2,), (3,))
    """Diffusers' own range, at every second and every third step."""
    least: ClassVar = {"every": 1}
    every: int = 2
    above: int = 100
    below: int = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.above >= self.below:
            raise InputError(f"peer {self.name}: above {self.above} and below {self.below}, expected less above")

    def attach(self, transformer: nn.Module, timestep: Callable[[], float]) -> None:
        """Hook the cache into every attention."""
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.every,
            spatial_attention_timestep_skip_range=(self.above, self.below),
            current_timestep_callback=timestep,
        )
        apply_pyramid_attention_broadcast(transformer, config)
