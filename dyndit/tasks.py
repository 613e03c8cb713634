"""What a recipe picks from: training a trunk (`Train`), distilling exits (`Distill`). Both run on `training.fit`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor, nn

from dyndit import checkpoints
from dyndit.adapters import adapt
from dyndit.backbones import Backbone, ClassConditionalDiT, Condition, DiTConfig, Inputs, tensors_hash
from dyndit.data import Pictures
from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError
from dyndit.exits import ExitConfig, Exits
from dyndit.hooks import Target, transformer_of
from dyndit.latents import LatentPictures
from dyndit.losses import denoising_loss, exit_errors, halves
from dyndit.objectives import Schedule
from dyndit.recording import RecordedCalls
from dyndit.training import FitConfig, FitResult, fit

Preview = Callable[[DynamicDepth, Path, int], None]

Rows = Tensor | dict[str, Tensor]
"""What comes with x in a batch of a data set: labels (B,), or tensors of B rows by name."""

States = Callable[[Tensor, Rows, torch.Generator], Inputs]
"""What exits are to be right on, made of a batch of the data: (x, rows, generator) -> inputs of the model."""


@dataclass(frozen=True)
class Train:
    """Train a class-conditional DiT from scratch."""

    backbone: DiTConfig
    fit: FitConfig
    data: str = ""
    """"digits", or empty: the user names a picture folder."""
    schedule: Schedule = field(default_factory=Schedule)

    def check(self, data: Pictures) -> None:
        """Refuse pictures that are not the backbone's.

        Raises:
            InputError: another size, number of channels or of classes; or the first picture cannot be read.
        """
        config = self.backbone
        for name, found, expected in (
            ("picture size", data.image_size, config.image_size),
            ("channels", data.channels, config.in_channels),
            ("classes", data.num_classes, config.num_classes),
        ):
            if found != expected:
                raise InputError(f"data: {name} {found}, but the recipe's backbone expects {expected}")
        data[0]

    def run(self, data: Pictures, out: Path, *, preview: Preview | None = None) -> tuple[DynamicDepth, FitResult]:
        """Return the model with the averaged (EMA) weights, in eval mode, and the loop's record.

        Raises:
            InputError: as `check`.
        """
        self.check(data)
        config = self.backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.fit.seed)
            backbone = ClassConditionalDiT(config)
        backbone.gradient_checkpointing = self.fit.gradient_checkpointing
        model = DynamicDepth(backbone, pixel_space=not isinstance(data, LatentPictures))
        task = _Denoising(model, self.schedule, preview)
        result = fit(task, data, self.fit, out, identity=repr(config))
        backbone.load_state_dict(result.ema)
        return model.eval(), result


class _Denoising:
    """The task of training the trunk."""

    def __init__(self, model: DynamicDepth, schedule: Schedule, preview: Preview | None) -> None:
        self.trainable, self.pixel_space = model.backbone, model.pixel_space
        self.schedule, self._preview = schedule, preview

    def loss(
        self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x: (B, C, H, W), y: (B,). All randomness comes from `generator`."""
        t = torch.randint(self.schedule.num_timesteps, (len(x),), generator=generator).to(x.device)
        eps = torch.randn(x.shape, generator=generator).to(x.device)
        y = self.trainable.y_embedder.drop(y, generator)
        return denoising_loss(module, self.schedule, x, t, eps, y)

    def preview(self, out: Path, step: int, ema: dict[str, Tensor]) -> None:
        """Draw a sample grid with the averaged weights."""
        if self._preview is None:
            return
        with torch.random.fork_rng(devices=[]):
            backbone = ClassConditionalDiT.from_config(self.trainable.config())
        backbone.load_state_dict(ema)
        model = DynamicDepth(backbone, pixel_space=self.pixel_space).eval()
        self._preview(model.to(next(self.trainable.parameters()).device), out, step)


_DISTILLING = FitConfig(
    steps=1_000, batch_size=64, learning_rate=1e-3, warmup_steps=25, schedule="cosine", ema_decay=0.99, flip=False
)


@dataclass(frozen=True)
class Distill:
    """Train every exit at once on the frozen full model's own predictions."""

    exits: ExitConfig = field(default_factory=ExitConfig)
    fit: FitConfig = _DISTILLING
    data: str = ""
    variance_weight: float = 0.1
    """Weight of the error on the variance outputs, relative to that on the noise."""
    null_share: float = 0.3
    """Share of the labels replaced by the null label: guided sampling asks the exits for both branches. Recorded
    calls hold both as they come."""
    schedule: Schedule = field(default_factory=Schedule)

    def check(self, model: DynamicDepth, data: Pictures | RecordedCalls) -> None:
        """Refuse data and exits that do not fit the model.

        Raises:
            InputError: another size or number of channels, more classes, another trunk's calls, an exit where there is
                no layer; or the first item cannot be read.
        """
        backbone = model.backbone
        self.exits.resolved(backbone.num_blocks)
        if isinstance(data, RecordedCalls):
            data.check(model)
        elif (data.channels, data.image_size) != (backbone.in_channels, backbone.image_size):
            raise InputError(
                f"data: pictures of {data.channels} x {data.image_size} px, but the model takes "
                f"{backbone.in_channels} x {backbone.image_size} px"
            )
        elif data.num_classes > backbone.num_classes:
            raise InputError(f"data: classes {data.num_classes}, but the model has {backbone.num_classes}")
        data[0]

    def run(self, model: DynamicDepth, data: Pictures | RecordedCalls, out: Path) -> tuple[DynamicDepth, FitResult]:
        """Return a model with the same trunk and trained exits, and the loop's record.

        data: pictures, which are noised, or recorded calls, which are used as they are. The trunk is borrowed: its
        flags, modes and device are afterwards what they were. The exits are in eval mode, in single precision.

        Raises:
            InputError: as `check`; or the trunk lies on several devices.
        """
        self.check(model, data)
        backbone = model.backbone
        with borrowed(backbone):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.fit.seed)
                # A trunk's heads may be in half precision, and frozen; so would be the copies that exits start from.
                exits = Exits(backbone, self.exits).float().requires_grad_(True)
            dynamic = DynamicDepth(backbone, exits, pixel_space=model.pixel_space)
            task = _ExitDistillation(dynamic, self.variance_weight, self._states(backbone, data))
            identity = f"{model.trunk_hash()} {exits.config} {self.variance_weight} {self.null_share}"
            result = fit(task, data, self.fit, Path(out), identity=identity)
            exits.load_state_dict({k.removeprefix("exits."): v for k, v in result.ema.items()})
            dynamic.eval()
        exits.to(next(backbone.parameters()).device)
        return dynamic, result

    def _states(self, backbone: Backbone, data: Pictures | RecordedCalls) -> States:
        """How to make states of this data."""
        if isinstance(data, RecordedCalls):
            return lambda x, rows, _: data.inputs(x, rows)
        return partial(_noised, self.schedule, self.null_share, backbone.null_class)


def distill_exits(
    target: Target, calls: RecordedCalls | str | Path, recipe: Distill | None = None, out: str | Path = "exits"
) -> Exits:
    """Train exits for a transformer of diffusers, in place, on calls that `record_calls` recorded.

    target: the pipeline or its transformer, which is only borrowed. out: the folder for checkpoints and the log, where
    a run that was stopped goes on; at the end it holds `exits.safetensors`, bound to the trunk.

    Raises:
        InputError: no adapter serves the transformer, or the calls are not its own.
    """
    model = DynamicDepth(adapt(transformer_of(target)), pixel_space=False)
    calls = calls if isinstance(calls, RecordedCalls) else RecordedCalls(calls)
    dynamic, _ = (recipe or Distill()).run(model, calls, Path(out))
    if PartialState().is_main_process:
        checkpoints.save_exits(dynamic.exits, Path(out) / checkpoints.EXITS, model.trunk_hash())
    return dynamic.exits


@contextmanager
def borrowed(trunk: nn.Module) -> Iterator[None]:
    """Freeze a trunk, in eval mode; give it back with the flags, the modes and on the device that it came with.

    Raises:
        InputError: it lies on several devices.
    """
    devices = {tensor.device for tensor in (*trunk.parameters(), *trunk.buffers())}
    if len(devices) > 1:
        raise InputError(f"trunk: lies on {', '.join(sorted(map(str, devices)))}; expected one device")
    flags = {parameter: parameter.requires_grad for parameter in trunk.parameters()}
    modes = {module: module.training for module in trunk.modules()}
    trunk.eval().requires_grad_(False)
    try:
        yield
    finally:
        trunk.to(*devices)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def _noised(
    schedule: Schedule, null_share: float, null_class: int | None, x: Tensor, y: Tensor, generator: torch.Generator
) -> Inputs:
    """Pictures at random timesteps, some of their labels replaced by the null label.  x: (B, C, H, W), y: (B,)."""
    t = torch.randint(schedule.num_timesteps, (len(x),), generator=generator).to(x.device)
    eps = torch.randn(x.shape, generator=generator).to(x.device)
    lost = torch.rand(len(y), generator=generator) < null_share
    if null_class is not None:
        y = torch.where(lost.to(y.device), null_class, y)
    return Inputs(schedule.add_noise(x, eps, t), t, y)


class _ExitDistillation:
    """The task of training exits: the trainable part is a wrapper that holds the exits alone."""

    def __init__(self, dynamic: DynamicDepth, variance_weight: float, states: States) -> None:
        self.trainable, self.variance_weight, self.states = _FrozenTrunk(dynamic), variance_weight, states

    def loss(
        self, module: nn.Module, x: Tensor, y: Rows, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over exits of the squared error on noise and variance outputs.  x: (B, ...), y: B rows."""
        inputs = self.states(x, y, generator)
        errors = module(inputs.x, inputs.t, inputs.y)
        weights = errors.new_tensor([1.0, self.variance_weight])
        noise, variance = errors.mean(dim=(0, 1)).detach()
        return (errors * weights).sum(dim=(0, 2)).mean(), {"noise": noise, "variance": variance}

    def preview(self, out: Path, step: int, ema: dict[str, Tensor]) -> None:
        """Exits have no preview: their verdict is the table of errors."""


class _FrozenTrunk(nn.Module):
    """Registers the exits as parameters and keeps the trunk out of the optimiser, the EMA and the checkpoints."""

    def __init__(self, dynamic: DynamicDepth) -> None:
        super().__init__()
        self.exits = dynamic.exits
        self.dynamic = [dynamic]  # in a list, so that the trunk is no submodule

    def forward(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """-> (E, B, 2) squared errors of E exits, see `exit_errors`."""
        dynamic = self.dynamic[0]
        dynamic.backbone.to(x_t.device)
        dtype = next(dynamic.backbone.parameters()).dtype
        # Exits are trained in single precision, whatever their trunk's: autocast meets in the trunk's.
        halved = torch.autocast(x_t.device.type, dtype) if dtype in (torch.float16, torch.bfloat16) else nullcontext()
        with halved:
            return torch.stack(list(exit_errors(dynamic, x_t, t, y).values()))


@dataclass(frozen=True)
class Match:
    """Train a student trunk on a frozen full model's predictions: what `Distill` does to exits, to a whole model."""

    fit: FitConfig = _DISTILLING
    variance_weight: float = 0.1
    null_share: float = 0.3
    schedule: Schedule = field(default_factory=Schedule)

    def run(self, model: DynamicDepth, student: Backbone, data: Pictures, out: Path) -> tuple[DynamicDepth, FitResult]:
        """Return the student with its averaged weights, in eval mode, and the loop's record. It is trained in place.

        Raises:
            InputError: the data do not fit the model.
        """
        Distill(fit=self.fit).check(model, data)
        backbone, kept = model.backbone, tensors_hash(student.state_dict())
        with borrowed(backbone):
            states = partial(_noised, self.schedule, self.null_share, backbone.null_class)
            task = _Matching(student, backbone, self.variance_weight, states)
            identity = f"{model.trunk_hash()} {kept} {self.variance_weight} {self.null_share}"
            result = fit(task, data, self.fit, Path(out), identity=identity)
        student.load_state_dict(result.ema)
        student.to(next(backbone.parameters()).device)
        return DynamicDepth(student, pixel_space=model.pixel_space).eval(), result


class _Matching:
    """The task of training a student on its teacher's predictions."""

    def __init__(self, student: nn.Module, teacher: nn.Module, variance_weight: float, states: States) -> None:
        self.trainable, self.teacher, self.variance_weight, self.states = student, teacher, variance_weight, states

    def loss(
        self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error on noise and variance outputs.  x: (B, C, H, W), y: (B,)."""
        inputs = self.states(x, y, generator)
        with torch.no_grad():
            target = self.teacher.to(x.device)(inputs.x, inputs.t, inputs.y)
        noise, variance = halves(module(inputs.x, inputs.t, inputs.y) - target, x.shape[1]).mean(dim=0)
        return noise + self.variance_weight * variance, {"noise": noise.detach(), "variance": variance.detach()}

    def preview(self, out: Path, step: int, ema: dict[str, Tensor]) -> None:
        """A student has no preview."""


@torch.no_grad()
def exit_error_table(
    model: DynamicDepth, data: Pictures, *, num_pictures: int = 512, num_bands: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Each exit's error against the full model, per band of log-SNR.

    Bands are equal in timesteps. Columns: depth, band, log_snr_low, log_snr_high, noise_error (mean square on
    the noise channels), variance_error. A diagnostic: DESIGN and README say why plans are not chosen on it.
    Measured on the device that `Distill` trains on.
    """
    schedule, generator = Schedule(), torch.Generator().manual_seed(seed)
    device = PartialState().device
    pick = torch.randperm(len(data), generator=generator)[:num_pictures].tolist()
    items = [data[i] for i in pick]
    x_0, y = torch.stack([x for x, _ in items]), torch.tensor([label for _, label in items])
    edges = torch.linspace(0, schedule.num_timesteps, num_bands + 1).long()
    rows = []
    home = next(model.parameters()).device
    model.to(device)
    for band, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        t = torch.randint(low, high, (len(x_0),), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        errors = exit_errors(model, schedule.add_noise(x_0, eps, t).to(device), t.to(device), y.to(device))
        snr = schedule.log_snr(torch.tensor([high - 1, low])).tolist()
        rows += [
            {
                "depth": depth,
                "band": band,
                "log_snr_low": snr[0],
                "log_snr_high": snr[1],
                "noise_error": error[:, 0].mean().item(),
                "variance_error": error[:, 1].mean().item(),
            }
            for depth, error in errors.items()
        ]
    model.to(home)
    return pd.DataFrame(rows)
