"""Run TaylorSeer: between full steps forecast the modules' outputs by Taylor's formula on finite differences.

Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", ICCV 2025,
arXiv:2503.06923. Code: diffusers, `apply_taylorseer_cache`.

Diffusers' own patterns end in "attn" and match no module of a DiT, whose attention is "attn1". So `what` names the
modules. "modules" forecasts every block's attention and MLP, as in the paper; embedders, norms and gates still run.
"output" forecasts the output projection and skips all blocks (diffusers' lite mode). Factors stay in float32;
diffusers' default rounds them to bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache
from torch import nn

from dyndit.analysis.compare.peers.foreign import DiffusersCache
from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan

_FORECAST = {"modules": [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"], "output": ["proj_out_2"]}
_SKIPPED = {"modules": None, "output": [r"transformer_blocks\.\d+"]}


@dataclass(frozen=True)
class TaylorSeer(DiffusersCache):
    """Full steps k, from 0: below `warmup`, then warmup + 1 and every `interval`-th step. order: of the expansion."""

    name: ClassVar[str] = "taylorseer"
    switched_off: ClassVar = {"interval": 1}
    """Every step in full."""
    compared: ClassVar = ((2,), (3,), (2, "output"), (4, "output"))
    """"modules" at intervals 2 and 3, "output" at intervals 2 and 4."""
    least: ClassVar = {"interval": 1, "order": 0, "warmup": 1}
    interval: int = 3
    what: str = "modules"
    order: int = 1
    warmup: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in _FORECAST:
            raise InputError(f"peer {self.name}: what {self.what!r}, expected one of {', '.join(_FORECAST)}")

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return the share of the full steps for "output"; None for "modules", which runs parts of every block."""
        if self.what != "output":
            return None
        full = [k < self.warmup or (k - self.warmup - 1) % self.interval == 0 for k in range(plan.num_steps)]
        return plan.share_of_blocks * sum(full) / plan.num_steps

    def attach(self, transformer: nn.Module, timestep: Callable[[], float]) -> None:
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
