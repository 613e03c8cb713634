"""Prune blocks for all steps and fine-tune the others on the full model's own predictions.

The training budget equals the exits' budget: steps, batch size, optimiser settings, pictures and targets
(`training.match.Match`). Blocks are dropped by place or by effect: the change of the prediction without that block.
LAPTOP-Diff (Zhang et al. 2024, arXiv:2404.11098) ranks layers of diffusion models in this way. TinyFusion (Fang et al.
2024, arXiv:2412.01199) prunes DiTs and learns which blocks to keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from dyndit.analysis.compare.peers.base import PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.training.data import Pictures
from dyndit.training.match import Match


@dataclass(frozen=True)
class Pruned(PeerSettings):
    """drop: number of dropped blocks. by: keep evenly spread blocks ("spread") or the most effective ("effect")."""

    name: ClassVar[str] = "pruned"
    switched_off: ClassVar = {"drop": 0}
    """No block dropped, nothing trained."""
    compared: ClassVar = ((4, "effect"), (6, "effect"))
    """A third and half of twelve blocks dropped."""
    drop: int
    by: Literal["spread", "effect"] = "effect"

    def __post_init__(self) -> None:
        if self.drop < 0 or self.by not in ("spread", "effect"):
            raise InputError(f"pruned {self.label}: expected at least 0 blocks, by spread or effect")

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Train the pruned model, or load it. Raises InputError: no context, no block left, or an adapted backbone."""
        if self.drop == 0:
            return DynamicDepth(model.backbone, pixel_space=model.pixel_space, process=model.process).eval()
        if context is None:
            raise InputError(f"peer {self.name}: needs a context to fine-tune in")

        def train(folder: Path) -> DynamicDepth:
            student = without_blocks(model, self._kept(model, context.data))
            return Match(context.fit).run(model, student, context.data, folder)[0]

        made_of = f"{model.identity.backbone} {context.fit} {context.data.fingerprint}"
        return context.trained(f"{self.name}-{self.label}", made_of, train).to(next(model.parameters()).device)

    def _kept(self, model: DynamicDepth, data: Pictures) -> tuple[int, ...]:
        if self.drop >= model.num_blocks:
            raise InputError(f"pruned drop {self.drop}: the model has {model.num_blocks} blocks; expected fewer")
        if self.by == "spread":
            return evenly_spread(model.num_blocks, model.num_blocks - self.drop)
        return most_effect(effects(model, data), model.num_blocks - self.drop)

    def share_of_blocks(self, plan: DepthPlan) -> float:
        """Return the share of the full model's blocks.  plan: a plan of the pruned model."""
        return plan.share_of_blocks * plan.num_blocks / (plan.num_blocks + self.drop)


def evenly_spread(num_blocks: int, keep: int) -> tuple[int, ...]:
    """Choose `keep` of 0..num_blocks - 1; the first and the last are among two or more."""
    if keep == 1:
        return (0,)
    return tuple(round(i * (num_blocks - 1) / (keep - 1)) for i in range(keep))


def most_effect(effect: Sequence[float], keep: int) -> tuple[int, ...]:
    """Return the `keep` blocks of greatest effect, in their order."""
    ranked = sorted(range(len(effect)), key=lambda index: (-effect[index], index))
    return tuple(sorted(ranked[:keep]))


def noised_inputs(model: DynamicDepth, data: Pictures, *, num_pictures: int, seed: int, least: int = 0) -> Inputs:
    """Noise random pictures at the process's timesteps. Timesteps below `least` are moved up by it."""
    process, generator = model.process, torch.Generator().manual_seed(seed)
    items = [data[i] for i in torch.randperm(len(data), generator=generator)[:num_pictures].tolist()]
    x_0, y = torch.stack([x for x, _ in items]), torch.tensor([label for _, label in items])
    t = process.sample_timesteps(len(x_0), generator)
    t = torch.where(t < least, t + least, t)
    x_t = process.noised(x_0, torch.randn(x_0.shape, generator=generator), t)
    device = next(model.parameters()).device
    return Inputs(x_t.to(device), t.to(device), y.to(device))


@torch.no_grad()
def effects(model: DynamicDepth, data: Pictures, *, num_pictures: int = 256, seed: int = 0) -> list[float]:
    """Measure the mean squared change of the noise prediction without each block, over all noise levels."""
    inputs, channels = noised_inputs(model, data, num_pictures=num_pictures, seed=seed), model.backbone.in_channels

    def noise(skipped: int | None) -> torch.Tensor:
        state = model.backbone.embed(inputs.x, inputs.t, inputs.y)
        for index in range(model.num_blocks):
            if index != skipped:
                state = model.backbone.block(index, state)
        return model.backbone.head(state)[:, :channels]

    whole = noise(None)
    return [(noise(index) - whole).square().mean().item() for index in range(model.num_blocks)]


def without_blocks(model: DynamicDepth, kept: Sequence[int]) -> ClassConditionalDiT:
    """Copy the backbone with only the kept blocks, weights unchanged. Raises InputError: an adapter made it."""
    backbone = model.backbone
    if not isinstance(backbone, ClassConditionalDiT):
        raise InputError(f"pruned: backbone {type(backbone).__name__}; expected a ClassConditionalDiT")
    student = ClassConditionalDiT.from_config(backbone.config() | {"num_blocks": len(kept)})
    state = {k: v for k, v in backbone.state_dict().items() if not k.startswith("blocks.")}
    for new, old in enumerate(kept):
        state |= {f"blocks.{new}.{name}": value for name, value in backbone.blocks[old].state_dict().items()}
    student.load_state_dict(state)
    return student.eval()
