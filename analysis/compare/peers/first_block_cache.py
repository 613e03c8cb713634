"""Run First Block Cache: reuse the residual of all later blocks while the first block's residual hardly changes.

Source: C. Zeyi, ParaAttention, "First Block Cache" (github.com/chengzeyi/ParaAttention), after TeaCache (Liu et al.,
"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", CVPR 2025, arXiv:2411.19108).
Code: diffusers, `apply_first_block_cache`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import nn

from dyndit.analysis.compare.peers.foreign import DiffusersCache


@dataclass(frozen=True)
class FirstBlockCache(DiffusersCache):
    """threshold: on mean |r - r'| / mean |r'| of the first block's residuals, over the whole batch; 0 never skips."""

    name: ClassVar[str] = "first-block-cache"
    switched_off: ClassVar = {"threshold": 0.0}
    """Never skips: no residual change is below threshold 0."""
    compared: ClassVar = ((0.05,), (0.1,), (0.2,), (0.3,))
    """From some to most steps skipped."""
    least: ClassVar = {"threshold": 0}
    threshold: float = 0.1

    def attach(self, transformer: nn.Module, timestep: Callable[[], float]) -> None:
        """Hook the cache into every block."""
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=self.threshold))
