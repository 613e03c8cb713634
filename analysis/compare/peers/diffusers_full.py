"""Full depth by diffusers' own `DiTTransformer2DModel`, nothing cached: what its caches save time against.

Whose code runs: diffusers (`DiTTransformer2DModel`, Apache-2.0).
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.plans.plan import DepthPlan


@dataclass(frozen=True)
class DiffusersFull(DiffusersCache):
    """No settings."""

    name: ClassVar[str] = "diffusers-full"

    @property
    def label(self) -> str:
        """There is nothing to set."""
        return "uncached"

    @classmethod
    def off(cls) -> Self:
        """It is the full model."""
        return cls()

    def share_of_blocks(self, plan: DepthPlan) -> float:
        """All that the plan has."""
        return plan.share_of_blocks
