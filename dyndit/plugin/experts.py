"""Pipelines of two transformers: Wan 2.2 has an expert for high noise and an expert for low noise.

    high = dyndit.apply_dyndit(pipe, "exits-high.safetensors", plan_high)
    low = dyndit.apply_dyndit(pipe, "exits-low.safetensors", plan_low, component="transformer_2")

`transformer` runs the timesteps from the boundary up, `transformer_2` those below it. Each expert is a model of its
own, with its own exits, plan and handle. Its plan has its own timesteps alone.
"""

import torch
from diffusers import DiffusionPipeline, SCMScheduler
from torch import Tensor, nn

COMPONENTS = ("transformer", "transformer_2")
"""Names of a pipeline's transformers."""


def transformers_in(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Return the transformers of a pipeline."""
    found = (pipeline.components.get(name) for name in COMPONENTS)
    return [transformer for transformer in found if transformer is not None]


def own_timesteps(pipeline: DiffusionPipeline, transformer: nn.Module) -> Tensor:
    """Return the scheduler's timesteps at which the pipeline calls this transformer, falling."""
    timesteps = pipeline.scheduler.timesteps
    if isinstance(pipeline.scheduler, SCMScheduler):
        timesteps = timesteps[:-1]  # its last angle, 0, is the picture, where no step starts
    return timesteps[are_own(pipeline, transformer, timesteps)]


def are_own(pipeline: DiffusionPipeline, transformer: nn.Module, timesteps: Tensor) -> Tensor:
    """Return True for each timestep, (K,), at which the pipeline would call this transformer.  -> (K,)."""
    ratio = pipeline.config.get("boundary_ratio")
    if ratio is None:
        return torch.ones_like(timesteps, dtype=torch.bool)
    low = timesteps < ratio * pipeline.scheduler.config.num_train_timesteps
    second = pipeline.components.get("transformer_2")
    return low if transformer is getattr(second, "_orig_mod", second) else ~low
