"""Run full depth with diffusers' own `DiTTransformer2DModel`, without a cache: the reference time of its caches.

Code: diffusers (`DiTTransformer2DModel`, Apache-2.0).
"""

from dataclasses import dataclass
from typing import ClassVar

from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.plans.plan import DepthPlan


@dataclass(frozen=True)
class DiffusersFull(DiffusersCache):
    """Full depth by diffusers. It has no settings."""

    name: ClassVar[str] = "diffusers-full"
    switched_off: ClassVar = {}
    """The only settings: this peer is the full model."""

    @property
    def label(self) -> str:
        """Return a fixed label: there are no settings."""
        return "uncached"

    def share_of_blocks(self, plan: DepthPlan) -> float:
        """Return the plan's own share."""
        return plan.share_of_blocks
