"""Reuse stale residuals: between full steps run only the first blocks and add the deep blocks' last residual.

DeepCache (Ma, Fang and Wang 2023, arXiv:2312.00858) runs a full step every N and otherwise reuses the deep features of
a U-Net. Delta-DiT (Chen et al. 2024, arXiv:2406.01125) does so for transformers. It keeps the residual of the blocks,
not their output, so the step's own input still counts. Here the rear blocks are cached at a uniform interval in all
steps; Delta-DiT changes from rear to front blocks on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan, full_step
from dyndit.process import Process


@dataclass(frozen=True)
class Stale(PeerSettings):
    """A full step every `every` steps; the steps between run `depth` blocks."""

    name: ClassVar[str] = "stale"
    switched_off: ClassVar = {"every": 1, "depth": 1}
    """Every step in full."""
    compared: ClassVar = ((2, 2), (2, 6), (3, 2), (3, 6))
    """Every second or third step in full, the others with a sixth or half of twelve blocks."""
    every: int
    depth: int

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Make the peer. Raises InputError: `depth` is not 1 to L - 1, or `every` is below 1."""
        if not 1 <= self.depth < model.num_blocks:
            raise InputError(f"{self.name} depth {self.depth}: expected 1 to {model.num_blocks - 1}")
        if self.every < 1:
            raise InputError(f"{self.name} every {self.every}: expected at least 1")
        return DeepReuse(model, self)

    def residual(self, kept: Sequence["Kept"], step: StepInputs, process: Process) -> Tensor:
        """Return the deep blocks' residual to add at this step, (B, N, D)."""
        return kept[-1].residual

    def share_of_blocks(self, plan: DepthPlan) -> float:
        """Count the blocks: in each branch the first step is full, then each step `every` steps after the last full."""
        depths: list[list[int]] = []
        for branch in (plan.depths, plan.uncond_depths):
            last, ran = None, []
            for k, wanted in enumerate(branch):
                due = wanted and (last is None or k - last >= self.every)
                last = k if due else last
                ran.append(wanted if due or not wanted else self.depth)
            depths.append(ran)
        full = full_step(plan.num_blocks, plan.cfg_scale).work().blocks * plan.num_steps
        return sum(map(sum, depths)) / full


@dataclass(frozen=True)
class Kept:
    """The residual that the blocks after `depth` added to the tokens at full step k, (B, N, D)."""

    k: int
    timestep: float
    residual: Tensor


Memory = tuple[tuple[Kept, ...], ...]
"""Per guidance branch the residuals of its last full steps, the newest last."""

NUM_KEPT = 2


class DeepReuse(Peer):
    """Full steps, and steps that add the settings' `residual` instead of running the deep blocks, per branch."""

    settings: Stale

    def predict(self, step: StepInputs, memory: Memory | None) -> tuple[list[Tensor], Memory]:
        """Run branches that reuse for `depth` blocks only; run the others in full and keep their residual."""
        kept = list(memory or ((), ()))
        branches, size = range(len(step.labels)), len(step.x_t)
        due = [not kept[b] or step.k - kept[b][-1].k >= self.settings.every for b in branches]
        order = sorted(branches, key=lambda b: due[b])
        joined = Inputs.joined([step.branches[b] for b in order])
        state = self.backbone.embed(joined.x, joined.t, joined.y)
        for index in range(self.settings.depth):
            state = self.backbone.block(index, state)
        reusing = [b for b in order if not due[b]]
        split, tokens = size * len(reusing), []
        if reusing:
            residual = torch.cat([self.settings.residual(kept[b], step, self.process) for b in reusing])
            tokens.append(state.tokens[:split] + residual)
        if split < len(state.tokens):
            shallow = deep = state.rows(split, None)
            for index in range(self.settings.depth, self.num_blocks):
                deep = self.backbone.block(index, deep)
            tokens.append(deep.tokens)
            added = (deep.tokens - shallow.tokens).split(size)
            for b, residual in zip(order[len(reusing) :], added, strict=True):
                kept[b] = (*kept[b], Kept(step.k, step.timesteps[step.k], residual))[-NUM_KEPT:]
        prediction = self.backbone.head(replace(state, tokens=tokens[0] if len(tokens) == 1 else torch.cat(tokens)))
        parts = dict(zip(order, prediction.split(size), strict=True))
        return [parts[b] for b in branches], tuple(kept)
