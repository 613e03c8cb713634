"""Run MagCache: reuse the blocks' residual while the accumulated error, estimated from residual magnitudes, is small.

Source: Z. Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", NeurIPS 2025, arXiv:2506.09045.
Code: diffusers, `apply_mag_cache`. It needs ratios of magnitudes that depend on the model and the steps. They are
measured here by the paper's formula, on one full-depth sampling of `PICTURES` pictures by the process's usual solver.
Guided samplings are measured at guidance 1.5. The first sampling with a number of steps measures them: sample once
before timing.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from torch import Tensor, nn

from dyndit.analysis.compare.peers.diffusers_full import DiffusersFull
from dyndit.analysis.compare.peers.foreign import DiffusersCache, DiffusersPeer
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.sampling.sample import sample

PICTURES, SEED, GUIDANCE = 32, 1_000_003, 1.5


def magnitude_ratios(model: DynamicDepth, num_steps: int, guided: bool) -> tuple[float, ...]:
    """Measure each step's residual norm over the step before, mean over tokens; 1 at the first step."""
    full, entered, norms = DiffusersFull().model(model), [], []

    def leave(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        norms.append(torch.linalg.norm((output - entered.pop()).float(), dim=-1))

    blocks = full.transformer.transformer_blocks
    blocks[0].register_forward_pre_hook(lambda _block, inputs: entered.append(inputs[0]))
    blocks[-1].register_forward_hook(leave)
    labels, scale = model.backbone.condition.in_turn(PICTURES), GUIDANCE if guided else 1.0
    sample(full, labels, num_steps=num_steps, cfg_scale=scale, seed=SEED, batch_size=PICTURES)
    return (1.0, *((now / (before + 1e-8)).mean().item() for before, now in pairwise(norms)))


class MagCachePeer(DiffusersPeer):
    """A peer that attaches the cache when the number of steps and of branches is known."""

    def __init__(self, model: DynamicDepth, settings: "MagCache") -> None:
        super().__init__(model, settings)
        self._ratios: dict[tuple[int, bool], tuple[float, ...]] = {}
        self._attached: tuple[int, bool] | None = None

    def ratios(self, num_steps: int, guided: bool) -> tuple[float, ...]:
        """Return `magnitude_ratios` of this model, measured once."""
        wanted = (num_steps, guided)
        if wanted not in self._ratios:
            alone = DynamicDepth(self.backbone, pixel_space=self.pixel_space, process=self.process)
            self._ratios[wanted] = magnitude_ratios(alone, *wanted)
        return self._ratios[wanted]

    def ready(self, step: StepInputs) -> None:
        """Hook in the cache for this number of steps, in place of an older hook."""
        wanted = (len(step.timesteps), len(step.labels) > 1)
        if wanted == self._attached:
            return
        settings: MagCache = self.settings
        config = MagCacheConfig(
            threshold=settings.threshold,
            max_skip_steps=settings.skips,
            retention_ratio=settings.retention,
            num_inference_steps=wanted[0],
            mag_ratios=torch.tensor(self.ratios(*wanted)),
        )
        apply_mag_cache(self.transformer, config)
        self.find_states()
        self._attached = wanted


@dataclass(frozen=True)
class MagCache(DiffusersCache):
    """threshold: on the accumulated error. skips: most steps in a row. retention: share of first steps run in full."""

    name: ClassVar[str] = "mag-cache"
    runs: ClassVar[type[DiffusersPeer]] = MagCachePeer
    switched_off: ClassVar = {"skips": 0}
    """No step skipped."""
    compared: ClassVar = ((0.06,), (0.12,), (0.24,), (0.5,))
    """From some to most steps skipped."""
    least: ClassVar = {"threshold": 0, "skips": 0}
    threshold: float = 0.12
    skips: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.retention <= 1:
            raise InputError(f"peer {self.name}: retention {self.retention:g}, expected 0 to 1")
