"""Skip some blocks at every step, without training.

Source: diffusers' layer skipping, made for guidance by a weaker model (skip-layer guidance, Stability AI 2024; spatio-
temporal skip guidance, Hyung et al., arXiv:2411.18664), used here to save time. Code: diffusers, `apply_layer_skip`.
It has no state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import nn

from dyndit.analysis.compare.peers.base import PeerContext
from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan


@dataclass(frozen=True)
class LayerSkip(DiffusersCache):
    """skipped: indices of the skipped blocks, from 0."""

    name: ClassVar[str] = "layer-skip"
    switched_off: ClassVar = {"skipped": ()}
    """No block skipped."""
    compared: ClassVar = (((6,),), ((3, 7),), ((2, 5, 8),), ((1, 3, 5, 7, 9),))
    """One to five of 12 blocks skipped, spread evenly, never the first or the last block."""
    skipped: tuple[int, ...] = (3, 7)

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """See `DiffusersCache.model`. Raises InputError: the model has no block of that index."""
        if bad := [index for index in self.skipped if not 0 <= index < model.num_blocks]:
            raise InputError(f"peer {self.name}: block {bad[0]} skipped, expected 0 to {model.num_blocks - 1}")
        return super().model(model, context)

    def share_of_blocks(self, plan: DepthPlan) -> float:
        """Return the share of blocks that still run."""
        return plan.share_of_blocks * (1 - len(set(self.skipped)) / plan.num_blocks)

    def attach(self, transformer: nn.Module, timestep: Callable[[], float]) -> None:
        """Hook the skipped blocks."""
        if self.skipped:  # diffusers refuses an empty list
            apply_layer_skip(transformer, LayerSkipConfig(indices=list(self.skipped), fqn="transformer_blocks"))
