"""The two-model switch: a smaller model for the first, noisiest steps, then the large one.

T-Stitch (Pan et al. 2024, arXiv:2402.14167) switches between separately trained DiTs of one diffusion process, without
retraining. DuoDiff (Gallo Fernández et al. 2024, arXiv:2410.09633) trains a shallow and a deep backbone on the same
objective and switches at a fixed step. In both, the step alone decides which model runs.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings, grid
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan
from dyndit.storage import load as checkpoints


@dataclass(frozen=True)
class TwoModels(PeerSettings):
    """Settings of the switch.  share: share of steps, the noisiest, that the small model takes. depth: its blocks.

    The small model is trained like the comparison's backbone, but with fewer blocks.
    """

    name: ClassVar[str] = "switch"
    share: float
    depth: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"switch share {self.share:g}: expected 0 to 1")
        if self.depth < 1:
            raise InputError(f"switch depth {self.depth}: expected at least 1 block")

    @classmethod
    def off(cls) -> Self:
        """Give every step to the large model."""
        return cls(0.0)

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Give 30%, 50% and 70% of the steps to the small model."""
        return grid(cls, share=(0.3, 0.5, 0.7))

    def num_small_steps(self, num_steps: int) -> int:
        """Return the number of first steps that the small model takes."""
        return round(self.share * num_steps)

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Train the small model, or load it from the context.

        Raises:
            InputError: no context, or no recipe for a backbone in it; or the small model works on other pictures.
        """
        if self.share == 0:
            return Switch(model, model, self)
        if context is None:
            raise InputError(f"peer {self.name}: needs a context to train a small model in")
        if context.train is None:
            raise InputError(f"peer {self.name}: the experiment has no `train`; expected how its backbone is trained")
        backbone = replace(context.train.backbone, num_blocks=self.depth)
        recipe = replace(context.train, backbone=backbone, exits=None)
        made_of = f"{recipe.backbone} {recipe.process!r} {recipe.fit} {context.data.fingerprint}"
        key = hashlib.sha256(made_of.encode()).hexdigest()
        folder = context.out / f"{self.name}-depth{self.depth}-{key[:8]}"
        if not (folder / checkpoints.CONFIG).exists():
            trained, _ = recipe.run(context.data, folder.with_name(f"{folder.name}-training"))
            checkpoints.save(trained, folder)
        small = checkpoints.load(folder)
        return Switch(model, small.to(next(model.parameters()).device), self)

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return None if the small model takes steps: its blocks may be narrower, so shares cannot be compared."""
        return plan.share_of_blocks if self.share == 0 else None


class Switch(Peer):
    """The large model, which gives the first steps to a small model."""

    settings: TwoModels

    def __init__(self, model: DynamicDepth, small: DynamicDepth, settings: TwoModels) -> None:
        super().__init__(model, settings)
        for name in ("sample_shape", "out_channels", "condition"):
            large, little = getattr(model.backbone, name), getattr(small.backbone, name)
            if large != little:
                raise InputError(f"switch: the small model's {name} {little}, but the large model's is {large}")
        if small.process != model.process:
            raise InputError(
                f"switch: the small model's process {small.process}, but the large model's is {model.process}"
            )
        self.small = small.eval()

    def predict(self, step: StepInputs, memory: object) -> tuple[list[Tensor], object]:
        """Predict every branch at full depth, by the model that this step belongs to."""
        if step.k < self.settings.num_small_steps(len(step.timesteps)):
            depths = (self.small.num_blocks,) * len(step.labels)
            return self.small.branches(step.x_t, step.times, step.labels, depths), memory
        return super().predict(step, memory)
