"""Static depth pruning: fewer blocks at every step, the rest fine-tuned on the full model's own predictions.

The budget is the exits': the same number of steps, batch size, optimiser settings and pictures, and the same targets
(`tasks.Match`). Blocks go either by place or by effect, the change in the model's prediction when one block alone is
left out, as one-shot layer pruning of diffusion models ranks them (LAPTOP-Diff, Zhang et al. 2024, arXiv:2404.11098;
TinyFusion, Fang et al. 2024, arXiv:2412.01199, prunes DiTs and learns which to keep instead).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from dyndit.analysis.compare.peers.base import PeerContext, PeerSettings, grid
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.storage import load as checkpoints
from dyndit.training.data import Pictures
from dyndit.training.match import Match


@dataclass(frozen=True)
class Pruned(PeerSettings):
    """drop: how many blocks; by: "spread" keeps evenly spread ones, "effect" those whose absence changes most."""

    name: ClassVar[str] = "pruned"
    drop: int
    by: Literal["spread", "effect"] = "effect"

    def __post_init__(self) -> None:
        if self.drop < 0 or self.by not in ("spread", "effect"):
            raise InputError(f"pruned {self.label}: expected at least 0 blocks, by spread or effect")

    @classmethod
    def off(cls) -> Self:
        """Nothing is dropped, and nothing trained."""
        return cls(0)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """A third of twelve blocks gone, and half."""
        return grid(cls, drop=(4, 6), by=("effect",))

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """The fine-tuned rest, a model of its own; trained, or loaded from the context.

        Raises:
            InputError: there is no context, no block would be left, or the backbone is an adapter's.
        """
        if self.drop == 0:
            return DynamicDepth(model.backbone, pixel_space=model.pixel_space, process=model.process).eval()
        if context is None:
            raise InputError(f"peer {self.name}: needs a context to fine-tune in")
        key = hashlib.sha256(f"{model.identity.backbone} {context.fit} {context.data.fingerprint}".encode()).hexdigest()
        folder = context.out / f"{self.name}-{self.label}-{key[:8]}"
        device = next(model.parameters()).device
        if not (folder / checkpoints.CONFIG).exists():
            student = without_blocks(model, self._kept(model, context.data))
            training = folder.with_name(f"{folder.name}-training")
            checkpoints.save(Match(context.fit).run(model, student, context.data, training)[0], folder)
        return checkpoints.load(folder).to(device)

    def _kept(self, model: DynamicDepth, data: Pictures) -> tuple[int, ...]:
        if self.drop >= model.num_blocks:
            raise InputError(f"pruned drop {self.drop}: the model has {model.num_blocks} blocks; expected fewer")
        if self.by == "spread":
            return evenly_spread(model.num_blocks, model.num_blocks - self.drop)
        return most_effect(effects(model, data), model.num_blocks - self.drop)

    def share_of_blocks(self, plan: DepthPlan) -> float:
        """plan: of the pruned model."""
        return plan.share_of_blocks * plan.num_blocks / (plan.num_blocks + self.drop)


def evenly_spread(num_blocks: int, keep: int) -> tuple[int, ...]:
    """`keep` of 0..num_blocks - 1, the first and the last among them where there are two or more."""
    if keep == 1:
        return (0,)
    return tuple(round(i * (num_blocks - 1) / (keep - 1)) for i in range(keep))


def most_effect(effect: Sequence[float], keep: int) -> tuple[int, ...]:
    """The `keep` blocks of the greatest effect, in their order."""
    ranked = sorted(range(len(effect)), key=lambda index: (-effect[index], index))
    return tuple(sorted(ranked[:keep]))


@torch.no_grad()
def effects(model: DynamicDepth, data: Pictures, *, num_pictures: int = 256, seed: int = 0) -> list[float]:
    """Mean squared change of the noise prediction without each block, on noised pictures at timesteps of all sizes."""
    process, generator = model.process, torch.Generator().manual_seed(seed)
    items = [data[i] for i in torch.randperm(len(data), generator=generator)[:num_pictures].tolist()]
    x_0, y = torch.stack([x for x, _ in items]), torch.tensor([label for _, label in items])
    t = process.sample_timesteps(len(x_0), generator)
    x_t = process.noised(x_0, torch.randn(x_0.shape, generator=generator), t)
    device, channels = next(model.parameters()).device, x_0.shape[1]
    inputs = Inputs(x_t.to(device), t.to(device), y.to(device))

    def noise(skipped: int | None) -> torch.Tensor:
        state = model.backbone.embed(inputs.x, inputs.t, inputs.y)
        for index in range(model.num_blocks):
            if index != skipped:
                state = model.backbone.block(index, state)
        return model.backbone.head(state)[:, :channels]

    whole = noise(None)
    return [(noise(index) - whole).square().mean().item() for index in range(model.num_blocks)]


def without_blocks(model: DynamicDepth, kept: Sequence[int]) -> ClassConditionalDiT:
    """A copy of the backbone with these blocks alone, as they are.

    Raises:
        InputError: the backbone is no `ClassConditionalDiT`.
    """
    backbone = model.backbone
    if not isinstance(backbone, ClassConditionalDiT):
        raise InputError(f"pruned: backbone {type(backbone).__name__}; expected a ClassConditionalDiT")
    student = ClassConditionalDiT.from_config(backbone.config() | {"num_blocks": len(kept)})
    student.load_state_dict(
        {k: v for k, v in backbone.state_dict().items() if not k.startswith("blocks.")}
        | {
            f"blocks.{new}.{name}": value
            for new, old in enumerate(kept)
            for name, value in backbone.blocks[old].state_dict().items()
        }
    )
    return student.eval()
