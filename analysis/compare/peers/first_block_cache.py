"""Run First Block Cache: reuse the residual of all later blocks while the first block's residual hardly changes.

Source: C. Zeyi, ParaAttention, "First Block Cache" (github.com/chengzeyi/ParaAttention), after TeaCache (Liu et al.,
"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", CVPR 2025, arXiv:2411.19108).
Code: diffusers, `apply_first_block_cache`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from dyndit.analysis.compare.peers.base import grid
from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


@dataclass(frozen=True)
class FirstBlockCache(DiffusersCache):
    """threshold: on mean |r - r'| / mean |r'| of the first block's residuals, over the whole batch; 0 never skips."""

    name: ClassVar[str] = "first-block-cache"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"peer {self.name}: threshold {self.threshold:g}, expected at least 0")

    @classmethod
    def off(cls) -> Self:
        """Never skip: no residual change is below threshold 0."""
        return cls(0.0)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Skip from some to most steps."""
        return grid(cls, threshold=(0.05, 0.1, 0.2, 0.3))

    def attach(self, transformer: "DiTTransformer2DModel") -> None:
        """Hook the cache into every block."""
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=self.threshold))
