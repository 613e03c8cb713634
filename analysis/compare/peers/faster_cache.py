"""Run FasterCache: at low noise forecast the unconditional branch from the conditional branch.

The forecast adds the difference of low and high frequencies from the last step that ran both branches. The conditional
branch's attention is forecast too.

Source: Z. Lv et al., "FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality", ICLR 2025,
arXiv:2410.19355. Code: diffusers, `apply_faster_cache`, told to split a DiT's argument `class_labels`. The method is
made for videos; a picture is one frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffusers.hooks import FasterCacheConfig, apply_faster_cache
from diffusers.utils import logging
from torch import nn

from dyndit.analysis.compare.peers.foreign import DiffusersCache, DiffusersPeer
from dyndit.errors import InputError
from dyndit.models.dynamic import StepInputs


class FasterCachePeer(DiffusersPeer):
    """A peer that puts the unconditional rows first."""

    uncond_first = True

    def ready(self, step: StepInputs) -> None:
        """Tell the cache the timestep. Raises InputError: the step has no unconditional branch."""
        if len(step.labels) != 2:
            raise InputError(f"peer {self.settings.name}: no guidance at step {step.k}, expected --cfg-scale above 1")
        super().ready(step)


@dataclass(frozen=True)
class FasterCache(DiffusersCache):
    """Below timestep `below` the unconditional branch runs at every `uncond`-th step. While the conditional branch runs
    alone, its attention runs at every `attention`-th step.
    """

    name: ClassVar[str] = "faster-cache"
    runs: ClassVar[type[DiffusersPeer]] = FasterCachePeer
    switched_off: ClassVar = {"uncond": 1, "attention": 1}
    """Both branches at every step; then no attention is forecast."""
    compared: ClassVar = ((2, 2), (5, 2), (5, 2, 901))
    """A milder setting, diffusers' own (5, 2), and one over a wider range of timesteps."""
    least: ClassVar = {"uncond": 1, "attention": 1, "below": 1}
    uncond: int = 5
    attention: int = 2
    below: int = 641

    def attach(self, transformer: nn.Module, timestep: Callable[[], float]) -> None:
        """Hook the cache into the transformer and every attention."""
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=self.attention,
            spatial_attention_timestep_skip_range=(-1, self.below),
            unconditional_batch_skip_range=self.uncond,
            unconditional_batch_timestep_skip_range=(-1, self.below),
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            current_timestep_callback=timestep,
            _unconditional_conditional_input_kwargs_identifiers=("hidden_states", "timestep", "class_labels"),
        )
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns at every use that it is experimental
        try:
            apply_faster_cache(transformer, config)
        finally:
            logging.set_verbosity(before)
