"""Run pyramid attention broadcast: reuse the output of attention at the steps between.

Source: X. Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast", ICLR 2025, arXiv:2408.12588.
Code: diffusers, `apply_pyramid_attention_broadcast`. A DiT only has spatial self-attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

from dyndit.analysis.compare.peers.base import grid
from dyndit.analysis.compare.peers.foreign import DiffusersCache, DiffusersPeer
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, StepInputs

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


class PyramidPeer(DiffusersPeer):
    """A peer that tells the cache the timestep."""

    def __init__(self, model: DynamicDepth, settings: "PyramidAttention") -> None:
        super().__init__(model, settings)
        self._timestep = 0.0
        settings.attach_with(self.transformer, lambda: self._timestep)
        self.find_states()

    def ready(self, step: StepInputs) -> None:
        """Tell the cache the timestep."""
        self._timestep = step.timesteps[step.k]


@dataclass(frozen=True)
class PyramidAttention(DiffusersCache):
    """Attention runs at every `every`-th step between the timesteps `above` and `below`, elsewhere at every step."""

    name: ClassVar[str] = "pyramid-attention"
    runs: ClassVar[type[DiffusersPeer]] = PyramidPeer
    every: int = 2
    above: int = 100
    below: int = 800

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"peer {self.name}: every {self.every}, expected at least 1")
        if self.above >= self.below:
            raise InputError(f"peer {self.name}: above {self.above} and below {self.below}, expected less above")

    @classmethod
    def off(cls) -> Self:
        """Run attention at every step."""
        return cls(1)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Take diffusers' own range, at every second and every third step."""
        return grid(cls, every=(2, 3))

    def attach_with(self, transformer: "DiTTransformer2DModel", timestep: Callable[[], float]) -> None:
        """Hook the cache into every attention.  timestep: returns the current timestep."""
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.every,
            spatial_attention_timestep_skip_range=(self.above, self.below),
            current_timestep_callback=timestep,
        )
        apply_pyramid_attention_broadcast(transformer, config)
