"""Train a backbone, alone or with its exits."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dyndit.errors import InputError
from dyndit.models.base import Architecture, Backbone, BackboneConfig
from dyndit.models.conditions import Condition
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.process import DDPM, Process
from dyndit.training.conditioned import Rows, as_condition, conditioned
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures, check_fit
from dyndit.training.fit import FitResult, Task, fit
from dyndit.training.latents import LatentPictures
from dyndit.training.losses import deep_supervision_loss, denoising_loss

Preview = Callable[[DynamicDepth, Path, int], None]


@dataclass(frozen=True)
class Train:
    """Train a backbone of any family, from scratch or from given weights.

        recipe = dyndit.Train(DiTConfig(32, 4, 3, width=192, num_blocks=12, num_heads=3, num_classes=10), fit)
        model, result = recipe.run(pictures, "runs/backbone")

    backbone: the architecture, a config such as `dyndit.models.dit.DiTConfig`; `CARDS["digits"]`; or one of your own,
    `MyDiT.architecture(num_blocks=12)`.
    fit: the training loop: steps, batch size, learning rate (`FitConfig`).
    data: a recipe's data set, such as "digits", for the command line. Empty: the user names pictures.
    process: the process that noises pictures and defines the target of the prediction: `DDPM()` or `RectifiedFlow()`.
    exits: exits that train with the backbone, on the same loss (deep supervision). None: the backbone alone.
    exit_weight: weight of the exits' mean loss, relative to full depth's loss.
    """

    backbone: BackboneConfig
    fit: FitConfig
    data: str = ""
    process: Process = DDPM()
    exits: ExitConfig | None = None
    exit_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.exit_weight <= 0:
            raise InputError(f"exit_weight {self.exit_weight:g}: expected above 0")
        if self.backbone.learn_variance and not self.process.has_variance:
            raise InputError(f"learn_variance True: the process {self.process.name} has no variance; expected False")

    def under(self, process: Process) -> Self:
        """Return the recipe under another process. A process without a variance gets a backbone without one."""
        backbone: Any = self.backbone
        own = isinstance(backbone, Architecture)
        if backbone.learn_variance and not process.has_variance and not own:
            backbone = replace(backbone, learn_variance=False)
        return replace(self, process=process, backbone=backbone)

    def with_backbone(self, **changes: Any) -> Self:
        """Return the recipe with other fields of its backbone's config, for example conditioning="adaln".

        Raises:
            InputError: the config has no such field, or the value is impossible.
        """
        if isinstance(self.backbone, Architecture):
            return replace(self, backbone=self.backbone.changed(**changes))
        config: Any = self.backbone  # a dataclass
        if odd := sorted(changes.keys() - {field.name for field in fields(config)}):
            family = type(config).__name__
            raise InputError(f"--{odd[0]} {changes[odd[0]]}: a {family} has no such choice; expected none")
        return replace(self, backbone=replace(config, **changes))

    def check(self, data: Pictures) -> None:
        """Refuse pictures and exits that do not fit the backbone.

        Raises:
            InputError: another size, number of channels or of classes; an exit after a missing layer; or the first
                picture cannot be read.
        """
        if self.exits is not None:
            self.exits.resolved(self.backbone.num_blocks)
        check_fit(data, self.outline(), exactly=True)
        data[0]

    def outline(self) -> Backbone:
        """Build the backbone without weights, on the meta device. It shows the shape and condition that it takes."""
        if isinstance(self.backbone, Architecture):
            return self.backbone.outline
        return self._outline

    @cached_property
    def _outline(self) -> Backbone:
        config: Any = self.backbone
        with torch.device("meta"):
            return config.build()

    def run(
        self,
        data: Pictures,
        out: str | Path,
        *,
        start: DynamicDepth | None = None,
        preview: Preview | None = None,
        extend: bool = False,
    ) -> tuple[DynamicDepth, FitResult]:
        """Return the model with the averaged (EMA) weights, in eval mode, and the loop's record.

        data: labelled pictures, from `dyndit.open_data`. out: the folder for checkpoints and the log; a stopped run
        resumes there. start: model to copy the backbone's first weights from; its exits are ignored. preview: called
        with the model, `out` and the step, to draw a grid. extend: take up a finished run of fewer steps in `out`, see
        `training.fit.fit`: `replace(recipe, fit=replace(recipe.fit, steps=20_000))`.

        Raises InputError: see `check`; or `start` is of another shape or process than the recipe's.
        """
        self.check(data)
        config = self.backbone
        if start is not None and start.backbone.config() != (wanted := self.outline().config()):
            found = {name: value for name, value in start.backbone.config().items() if value != wanted.get(name)}
            raise InputError(f"--model: {type(start.backbone).__name__} with {found}; expected the recipe's {config}")
        if start is not None and start.process != self.process:
            raise InputError(f"--model: of the process {start.process}; expected the recipe's, {self.process}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.fit.seed)
            backbone = config.build()
            if start is not None:
                backbone.load_state_dict(start.backbone.state_dict())
            exits = None if self.exits is None else Exits(backbone, self.exits)
        backbone.gradient_checkpointing = self.fit.gradient_checkpointing
        pixels = not isinstance(data, LatentPictures)
        model = DynamicDepth(backbone, exits, pixel_space=pixels, process=self.process)
        task = _Denoising(model, self.exit_weight, preview)
        identity = f"{config!r} {self.process!r}"
        if exits is not None:
            identity += f" {exits.config} {self.exit_weight}"
        if start is not None:
            identity += f" on from {start.identity.backbone}"
        result = fit(task, conditioned(data, backbone.condition), self.fit, Path(out), identity=identity, extend=extend)
        task.trainable.load_state_dict(result.ema)
        return model.eval(), result


class _Denoising(Task):
    """Task: train the backbone, with its exits if the model has exits."""

    def __init__(self, model: DynamicDepth, exit_weight: float, preview: Preview | None) -> None:
        self.model, self.trainable = model, _trained_from_scratch(model)
        self.exit_weight, self._preview = exit_weight, preview

    def draw(self, x: Tensor, y: Rows, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Condition]]:
        """Draw timesteps, noise, and conditions to drop.  x: (B, C, H, W), y: B rows -> x, (t, eps, y)."""
        t = self.model.process.sample_timesteps(len(x), generator).to(x.device)
        eps = torch.randn(x.shape, generator=generator).to(x.device)
        return x, (t, eps, self.model.backbone.condition.dropped(as_condition(y), generator))

    def loss(
        self, module: nn.Module, x: Tensor, drawn: tuple[Tensor, Tensor, Condition], _: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts.  x: (B, C, H, W), drawn: see `draw`."""
        process, (t, eps, y) = self.model.process, drawn
        if self.model.exits is None:
            return denoising_loss(module, process, x, t, eps, y)
        return deep_supervision_loss(module, process, x, t, eps, y, self.exit_weight)

    def preview(self, out: Path, step: int, ema: dict[str, Tensor]) -> None:
        """Draw a sample grid with the averaged weights."""
        if self._preview is None:
            return
        model = copy.deepcopy(self.model)
        _trained_from_scratch(model).load_state_dict(ema)
        self._preview(model.eval(), out, step)


def _trained_from_scratch(model: DynamicDepth) -> nn.Module:
    """Return the module that `_Denoising` trains."""
    return model.backbone if model.exits is None else _EveryDepth(model)


class _EveryDepth(nn.Module):
    """Predict at every depth with a backbone and its exits."""

    def __init__(self, dynamic: DynamicDepth) -> None:
        super().__init__()
        self.dynamic = dynamic

    def forward(self, x_t: Tensor, t: Tensor, y: Condition) -> tuple[Tensor, ...]:
        """Return E + 1 predictions (B, C_out, H, W), by rising depth."""
        return tuple(self.dynamic.every_exit(x_t, t, y).values())
