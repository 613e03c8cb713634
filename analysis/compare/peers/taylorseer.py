"""Run TaylorSeer: between full steps forecast the modules' outputs by Taylor's formula on finite differences.

Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", ICCV 2025,
arXiv:2503.06923. Code: diffusers, `apply_taylorseer_cache`.

Diffusers' own patterns end in "attn" and match no module of a DiT, whose attention is "attn1". So `what` names the
modules. "modules" forecasts every block's attention and MLP, as in the paper; embedders, norms and gates still run.
"output" forecasts the output projection and skips all blocks (diffusers' lite mode). Factors stay in float32;
diffusers' default rounds them to bfloat16.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

_FORECAST = {
    "modules": [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"],
    "output": ["proj_out_2"],
}
_SKIPPED = {"modules": None, "output": [r"transformer_blocks\.\d+"]}


@dataclass(frozen=True)
class TaylorSeer(DiffusersCache):
    """Full steps k, from 0: below `warmup`, then warmup + 1 and every `interval`-th step. order: of the expansion."""

    name: ClassVar[str] = "taylorseer"
    interval: int = 3
    what: str = "modules"
    order: int = 1
    warmup: int = 2

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("order", 0), ("warmup", 1)):
            if getattr(self, name) < least:
                raise InputError(f"peer {self.name}: {name} {getattr(self, name)}, expected at least {least}")
        if self.what not in _FORECAST:
            raise InputError(f"peer {self.name}: what {self.what!r}, expected one of {', '.join(_FORECAST)}")

    @classmethod
    def off(cls) -> Self:
        """Run every step in full."""
        return cls(1)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Take "modules" at intervals 2 and 3, "output" at intervals 2 and 4."""
        return cls(2), cls(3), cls(2, "output"), cls(4, "output")

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return the share of the full steps for "output"; None for "modules", which runs parts of every block."""
        if self.what != "output":
            return None
        full = [k < self.warmup or (k - self.warmup - 1) % self.interval == 0 for k in range(plan.num_steps)]
        return plan.share_of_blocks * sum(full) / plan.num_steps

    def attach(self, transformer: "DiTTransformer2DModel") -> None:
        """Hook the modules to forecast or to skip."""
        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=_FORECAST[self.what],
            skip_predict_identifiers=_SKIPPED[self.what],
        )
        apply_taylorseer_cache(transformer, config)
