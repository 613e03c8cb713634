"""Train the first blocks and the exit after them on the full model's predictions: one small model for every step.

A student is what a user would make of the same heads without a plan. Blocks and head start as the model's own, and
both train; exits for plans train on a frozen backbone. The budget is the context's, as for `pruned`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from dyndit.analysis.compare.peers.base import PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.conditions import Condition
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step, Unconditional
from dyndit.training.lora import trainable_copy
from dyndit.training.match import Match


@dataclass(frozen=True)
class Student(PeerSettings):
    """depth: blocks of the student, fewer than the model has. passes: guide by an unconditional pass of as many."""

    name: ClassVar[str] = "student"
    compared: ClassVar = ((4,), (6,), (6, False))
    """A third and half of twelve blocks, and half of them without guidance."""
    least: ClassVar = {"depth": 1}
    depth: int
    passes: bool = True

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Train the student, or load it. Raises InputError: no context, too great a depth, or an adapted backbone."""
        if self.depth >= model.backbone.num_blocks:
            found = f"depth {self.depth}: the model has {model.backbone.num_blocks} blocks"
            raise InputError(f"peer {self.name}: {found}; expected fewer than it has")
        if context is None:
            raise InputError(f"peer {self.name}: needs a context to train in")

        def train(folder: Path) -> DynamicDepth:
            student = cut(model, self.depth)
            Match(context.fit).train(model, AtDepth(student, self.depth), context.data, folder)
            return student.eval()

        made_of = f"{model.identity.backbone} {model.identity.exits} {context.fit} {context.data.fingerprint}"
        return context.trained(f"{self.name}-depth{self.depth}", made_of, train).to(model.device)

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Run the student at every step."""
        guided = [self.passes and isinstance(step.guide, Unconditional) for step in full.steps]
        steps = [Step.equal(self.depth, guide) for guide in guided]
        return full.with_steps(steps, router=self.name, settings={"depth": self.depth})


def cut(model: DynamicDepth, depth: int) -> DynamicDepth:
    """Copy a model, with one exit. Only what runs at `depth` trains: the blocks after it keep their weights.

    Raises InputError: an adapter made the backbone.
    """
    if not isinstance(model.backbone, ClassConditionalDiT):
        raise InputError(f"student: backbone {type(model.backbone).__name__}; expected a ClassConditionalDiT")
    backbone = trainable_copy(model.backbone)
    for unused in (*backbone.blocks[depth:], backbone.final_layer):
        unused.requires_grad_(False)
    exits = Exits(backbone, ExitConfig((depth,), model.exits.config.head)).float().requires_grad_(True)
    if depth in model.exits.layers:  # else the head starts as distillation starts it
        exits.heads[str(depth)].load_state_dict(model.exits.heads[str(depth)].state_dict())
    return DynamicDepth(backbone, exits, pixel_space=model.pixel_space, process=model.process)


class AtDepth(nn.Module):
    """A model as a function that leaves at one depth."""

    def __init__(self, dynamic: DynamicDepth, depth: int) -> None:
        super().__init__()
        self.dynamic, self.depth = dynamic, depth

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """Predict at the depth.  x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""
        return self.dynamic(x, t, y, depth=self.depth)
