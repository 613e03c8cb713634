"""Train a student backbone on a full model's predictions."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dyndit.models.base import Backbone, Inputs
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import tensors_hash
from dyndit.training.borrowed import borrowed
from dyndit.training.conditioned import Rows, conditioned
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures
from dyndit.training.distill import DISTILLING, Distill
from dyndit.training.fit import FitResult, Task, fit
from dyndit.training.losses import halves
from dyndit.training.states import States, noised


@dataclass(frozen=True)
class Match:
    """Train a student backbone on a frozen full model's predictions, as `Distill` trains exits."""

    fit: FitConfig = DISTILLING
    variance_weight: float = 0.1
    null_share: float = 0.3

    def run(self, model: DynamicDepth, student: Backbone, data: Pictures, out: Path) -> tuple[DynamicDepth, FitResult]:
        """Train the student in place. Return it with its averaged weights, in eval mode, and the loop's record.

        Raises InputError: the data do not fit the model.
        """
        result = self.train(model, student, data, out)
        return DynamicDepth(student, pixel_space=model.pixel_space, process=model.process).eval(), result

    def train(self, model: DynamicDepth, student: nn.Module, data: Pictures, out: Path) -> FitResult:
        """Train any module that takes (x, t, y) as `run` trains a backbone. It ends with its averaged weights."""
        Distill(fit=self.fit).check(model, data)
        backbone, kept = model.backbone, tensors_hash(student.state_dict())
        with borrowed(backbone):
            states = partial(noised, model.process, self.null_share, backbone.condition)
            weight = self.variance_weight if model.process.has_variance else 0.0
            task = _Matching(student, backbone, weight, states)
            identity = f"{model.identity.backbone} {kept} {self.variance_weight} {self.null_share}"
            result = fit(task, conditioned(data, backbone.condition), self.fit, Path(out), identity=identity)
        student.load_state_dict(result.ema)
        student.to(next(backbone.parameters()).device)
        return result


class _Matching(Task):
    """Task: train a student on its teacher's predictions."""

    def __init__(self, student: nn.Module, teacher: nn.Module, variance_weight: float, states: States) -> None:
        self.trainable, self.teacher, self.variance_weight, self.states = student, teacher, variance_weight, states

    def draw(self, x: Tensor, y: Rows, generator: torch.Generator) -> tuple[Tensor, Inputs]:
        """Make the inputs of the models.  x: (B, C, H, W), y: B rows."""
        return x, self.states(x, y, generator)

    def loss(
        self, module: nn.Module, x: Tensor, inputs: Inputs, _: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error on noise and variance outputs.  x: (B, C, H, W)."""
        with torch.no_grad():
            target = self.teacher.to(x.device)(inputs.x, inputs.t, inputs.y)
        noise, variance = halves(module(inputs.x, inputs.t, inputs.y) - target, x.shape[1]).mean(dim=0)
        return noise + self.variance_weight * variance, {"noise": noise.detach(), "variance": variance.detach()}
