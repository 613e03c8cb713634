"""TaylorSeer: between full steps, the outputs of modules are forecast by Taylor's formula on finite differences.

Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", ICCV 2025,
arXiv:2503.06923. Whose code runs: diffusers, `apply_taylorseer_cache`.

Its own patterns end in "attn" and match no module of a DiT, whose attention is "attn1": left to them, nothing would be
cached. `what` names the modules instead: "modules" forecasts every block's attention and MLP, as the paper does for
DiT (the embedders, norms and gates of all blocks still run); "output" forecasts the output projection and skips all
blocks, diffusers' lite mode. Factors are kept in float32, where diffusers rounds them to bfloat16 by default.
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
    """Full steps k, from 0: below `warmup`, then warmup + 1 and every `interval`-th on; order: of the expansion."""

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
        """Every step is a full one."""
        return cls(1)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Both kinds, at 2, 3 and 4 steps."""
        return cls(2), cls(3), cls(2, "output"), cls(4, "output")

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """The full steps' for "output"; None for "modules", which runs parts of every block."""
        if self.what != "output":
            return None
        full = [k < self.warmup or (k - self.warmup - 1) % self.interval == 0 for k in range(plan.num_steps)]
        return plan.share_of_blocks * sum(full) / plan.num_steps

    def attach(self, transformer: "DiTTransformer2DModel") -> None:
        """Hooks on the modules that are forecast or skipped."""
        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=_FORECAST[self.what],
            skip_predict_identifiers=_SKIPPED[self.what],
        )
        apply_taylorseer_cache(transformer, config)
