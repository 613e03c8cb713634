"""The two-model switch: a smaller model for the first, noisiest steps, then the large one.

T-Stitch (Pan et al. 2024, arXiv:2402.14167) switches between separately trained DiTs of one diffusion process, without
retraining. DuoDiff (Gallo Fernández et al. 2024, arXiv:2410.09633) trains a shallow and a deep backbone on the same
objective and switches at a fixed step. In both, the step alone decides which model runs.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan


@dataclass(frozen=True)
class TwoModels(PeerSettings):
    """share: of the steps, the noisiest, that the small model takes. depth: its blocks; the rest is the backbone's."""

    name: ClassVar[str] = "switch"
    switched_off: ClassVar = {"share": 0.0}
    """Every step by the large model."""
    compared: ClassVar = ((0.3,), (0.5,), (0.7,))
    """30%, 50% and 70% of the steps by the small model."""
    share: float
    depth: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"switch share {self.share:g}: expected 0 to 1")
        if self.depth < 1:
            raise InputError(f"switch depth {self.depth}: expected at least 1 block")

    def num_small_steps(self, num_steps: int) -> int:
        """Return the number of first steps that the small model takes."""
        return round(self.share * num_steps)

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Train the small model, or load it. Raises InputError: no recipe to train it with, or it does not fit."""
        if self.share == 0:
            return Switch(model, model, self)
        if context is None:
            raise InputError(f"peer {self.name}: needs a context to train a small model in")
        if context.train is None:
            raise InputError(f"peer {self.name}: the experiment has no `train`; expected how its backbone is trained")
        backbone = replace(context.train.backbone, num_blocks=self.depth)
        recipe = replace(context.train, backbone=backbone, exits=None)
        made_of = f"{recipe.backbone} {recipe.process!r} {recipe.fit} {context.data.fingerprint}"
        name = f"{self.name}-depth{self.depth}"
        small = context.trained(name, made_of, lambda folder: recipe.run(context.data, folder)[0])
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
            theirs = f"but the large model's is {model.process}"
            raise InputError(f"switch: the small model's process {small.process}, {theirs}")
        self.small = small.eval()

    def predict(self, step: StepInputs, memory: object) -> tuple[list[Tensor], object]:
        """Predict every branch at full depth, by the model that this step belongs to."""
        if step.k < self.settings.num_small_steps(len(step.timesteps)):
            depths = (self.small.num_blocks,) * len(step.labels)
            return self.small.branches(step.x_t, step.times, step.labels, depths), memory
        return super().predict(step, memory)
