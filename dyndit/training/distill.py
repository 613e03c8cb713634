"""What a recipe picks from: training a trunk (`Train`), distilling exits (`Distill`). Both run on `training.fit`."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor, nn

from dyndit.errors import InputError
from dyndit.models import Backbone, ClassConditionalDiT, Condition, DiTConfig, Inputs, tensors_hash
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.forecasts import GapRegression
from dyndit.plugin.adapters import adapt
from dyndit.plugin.hooks import Target, transformer_of
from dyndit.plugin.recording import RecordedCalls, recorded_sampling
from dyndit.process import Schedule
from dyndit.sampling.sample import Batch, Guidance, advance, balanced_labels, full_plan, start
from dyndit.storage import load as checkpoints
from dyndit.training.data import Pictures
from dyndit.training.fit import FitConfig, FitResult, fit
from dyndit.training.latents import LatentPictures
from dyndit.training.lora import trainable_copy, with_adapters
from dyndit.training.losses import deep_supervision_loss, denoising_loss, depth_errors, exit_errors, halves

Preview = Callable[[DynamicDepth, Path, int], None]

Rows = Tensor | dict[str, Tensor]
"""What comes with x in a batch of a data set: labels (B,), or tensors of B rows by name."""

States = Callable[[Tensor, Rows, torch.Generator], Inputs]
"""What exits are to be right on, made of a batch of the data: (x, rows, generator) -> inputs of the model."""


@dataclass(frozen=True)
class Train:
    """Train a class-conditional DiT, from scratch or on from given weights; where asked for with exits from the first
    step."""

    backbone: DiTConfig
    fit: FitConfig
    data: str = ""
    """"digits", or empty: the user names a picture folder."""
    schedule: Schedule = field(default_factory=Schedule)
    exits: ExitConfig | None = None
    """Exits that train with the trunk, on the same loss as it (deep supervision). None: the trunk alone."""
    exit_weight: float = 1.0
    """Weight of the mean of the exits' losses, relative to that of full depth."""

    def __post_init__(self) -> None:
        if self.exit_weight <= 0:
            raise InputError(f"exit_weight {self.exit_weight:g}: expected above 0")

    def check(self, data: Pictures) -> None:
        """Refuse pictures that are not the backbone's.

        Raises:
            InputError: another size, number of channels or of classes; an exit where there is no layer; or the first
                picture cannot be read.
        """
        config = self.backbone
        if self.exits is not None:
            self.exits.resolved(config.num_blocks)
        for name, found, expected in (
            ("picture size", data.image_size, config.image_size),
            ("channels", data.channels, config.in_channels),
            ("classes", data.num_classes, config.num_classes),
        ):
            if found != expected:
                raise InputError(f"data: {name} {found}, but the recipe's backbone expects {expected}")
        data[0]

    def run(
        self, data: Pictures, out: Path, *, trunk: DynamicDepth | None = None, preview: Preview | None = None
    ) -> tuple[DynamicDepth, FitResult]:
        """Return the model with the averaged (EMA) weights, in eval mode, and the loop's record.

        trunk: whose weights to start from, and to leave as they are; its exits, if any, are not taken over.

        Raises:
            InputError: as `check`; or the trunk is of another shape than the recipe's.
        """
        self.check(data)
        config = self.backbone
        if trunk is not None and not _is_shaped_as(trunk.backbone, config):
            found = {name: value for name, value in trunk.backbone.config().items() if value != vars(config).get(name)}
            raise InputError(f"--model: {type(trunk.backbone).__name__} with {found}; expected the recipe's {config}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.fit.seed)
            backbone = ClassConditionalDiT(config)
            if trunk is not None:
                backbone.load_state_dict(trunk.backbone.state_dict())
            exits = None if self.exits is None else Exits(backbone, self.exits)
        backbone.gradient_checkpointing = self.fit.gradient_checkpointing
        model = DynamicDepth(backbone, exits, pixel_space=not isinstance(data, LatentPictures))
        task = _Denoising(model, self.schedule, self.exit_weight, preview)
        identity = repr(config) if exits is None else f"{config!r} {exits.config} {self.exit_weight}"
        if trunk is not None:
            identity += f" on from {trunk.trunk_hash()}"
        result = fit(task, data, self.fit, out, identity=identity)
        task.trainable.load_state_dict(result.ema)
        return model.eval(), result


class _Denoising:
    """The task of training the trunk, with exits where the model has some."""

    def __init__(self, model: DynamicDepth, schedule: Schedule, exit_weight: float, preview: Preview | None) -> None:
        self.model, self.trainable = model, _trained_from_scratch(model)
        self.schedule, self.exit_weight, self._preview = schedule, exit_weight, preview

    def loss(
        self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x: (B, C, H, W), y: (B,). All randomness comes from `generator`."""
        t = torch.randint(self.schedule.num_timesteps, (len(x),), generator=generator).to(x.device)
        eps = torch.randn(x.shape, generator=generator).to(x.device)
        y = self.model.backbone.y_embedder.drop(y, generator)
        if self.model.exits is None:
            return denoising_loss(module, self.schedule, x, t, eps, y)
        return deep_supervision_loss(module, self.schedule, x, t, eps, y, self.exit_weight)

    def preview(self, out: Path, step: int, ema: dict[str, Tensor]) -> None:
        """Draw a sample grid with the averaged weights."""
        if self._preview is None:
            return
        model = copy.deepcopy(self.model)
        _trained_from_scratch(model).load_state_dict(ema)
        self._preview(model.eval(), out, step)


def _is_shaped_as(backbone: Backbone, config: DiTConfig) -> bool:
    return isinstance(backbone, ClassConditionalDiT) and backbone.config() == asdict(config)


def _trained_from_scratch(model: DynamicDepth) -> nn.Module:
    """The module whose call gives what `_Denoising` judges."""
    return model.backbone if model.exits is None else _EveryDepth(model)


class _EveryDepth(nn.Module):
    """A trunk and its exits; a call gives the predictions of all depths, rising."""

    def __init__(self, dynamic: DynamicDepth) -> None:
        super().__init__()
        self.dynamic = dynamic

    def forward(self, x_t: Tensor, t: Tensor, y: Condition) -> tuple[Tensor, ...]:
        """-> E + 1 times (B, C_out, H, W)."""
        return tuple(self.dynamic.every_exit(x_t, t, y).values())


_TRAJECTORIES_SEED = 2_000_003
"""Of the states to distil on; apart from those of calibration and of scoring."""
_NUM_FORECAST = 128
"""Trajectories that corrections of forecasts are learned on: eight numbers for each exit."""

_DISTILLING = FitConfig(
    steps=1_000, batch_size=64, learning_rate=1e-3, warmup_steps=25, schedule="cosine", ema_decay=0.99, flip=False
)


@dataclass(frozen=True)
class Distill:
    """Train every exit at once on the full model's own predictions; where asked for, the trunk with them.

    A trunk that trains is a copy. Its teacher is the original, frozen: exits are matched to the teacher's full depth,
    and so is the copy's own, so that full depth stays what it was.
    """

    exits: ExitConfig = field(default_factory=ExitConfig)
    fit: FitConfig = _DISTILLING
    data: str = ""
    variance_weight: float = 0.1
    """Weight of the error on the variance outputs, relative to that on the noise."""
    null_share: float = 0.3
    """Share of the labels replaced by the null label: guided sampling asks the exits for both branches. Recorded
    calls hold both as they come."""
    schedule: Schedule = field(default_factory=Schedule)
    trunk: Literal["frozen", "lora", "whole"] = "frozen"
    """What of the trunk trains: nothing; low-rank adapters on the blocks' linear maps, merged into them at the end; or
    everything."""
    hold: float = 10.0
    """Weight of full depth's error where the trunk trains, relative to that of one exit."""
    trunk_rate: float = 0.1
    """Learning rate of what trains of the trunk, as a factor of the exits'."""
    lora_rank: int = 8
    states: Literal["noised", "sampler"] = "noised"
    """What exits are to be right on: noised pictures, or the states that the full model's own sampler meets. Recorded
    calls are used as they are."""
    num_trajectories: int = 512
    """Of the sampler, every class in turn; each gives `num_steps` states of either guidance branch."""
    solver: str = "ddim"
    num_steps: int = 20
    cfg_scale: float = 1.5
    weighting: Literal["even", "path-kl"] = "even"
    """What an error weighs at its timestep: the same at all, or as in the KL between two processes' paths
    (`Schedule.path_kl_weights`)."""
    forecasts: bool = False
    """Whether the exits also learn to correct forecasts of what they lack (`dyndit.models.forecasts`), from the sampler's own
    trajectories."""

    def __post_init__(self) -> None:
        for name in ("trunk", "states", "weighting"):
            expected = get_args(get_type_hints(Distill)[name])
            if getattr(self, name) not in expected:
                raise InputError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(expected)}")
        for name in ("lora_rank", "num_trajectories"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.hold < 0 or self.trunk_rate <= 0:
            raise InputError(f"hold {self.hold:g}, trunk_rate {self.trunk_rate:g}: expected at least 0, and above 0")

    def check(self, model: DynamicDepth, data: Pictures | RecordedCalls) -> None:
        """Refuse data and exits that do not fit the model.

        Raises:
            InputError: another size or number of channels, more classes, another trunk's calls, an exit where there is
                no layer, a choice that the trunk's family does not allow; or the first item cannot be read.
        """
        backbone = model.backbone
        self.exits.resolved(backbone.num_blocks)
        self._check_family(backbone)
        if self.states == "sampler" or self.forecasts:
            full_plan(model, self.solver, self.num_steps, self.cfg_scale)
            if isinstance(data, RecordedCalls):
                wanted = "states 'sampler'" if self.states == "sampler" else "forecasts"
                raise InputError(f"{wanted}: recorded calls ({data.folder}) are states; expected pictures")
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

    def _check_family(self, backbone: Backbone) -> None:
        """Refuse what needs our own modules, sampler or schedule for a trunk that has others."""
        for name in ("trunk", "states", "weighting", "forecasts"):
            if getattr(self, name) != getattr(Distill, name) and not isinstance(backbone, ClassConditionalDiT):
                found = type(backbone).__name__
                raise InputError(f"{name} {getattr(self, name)!r}: needs a ClassConditionalDiT, found {found}")

    def run(self, model: DynamicDepth, data: Pictures | RecordedCalls, out: Path) -> tuple[DynamicDepth, FitResult]:
        """Return a model with trained exits on the same trunk, or on its trained copy, and the loop's record.

        data: pictures, which are noised, or recorded calls, which are used as they are. The trunk is borrowed: its
        flags, modes and device are afterwards what they were. The exits are in eval mode, in single precision, and so
        is a trunk that was trained.

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
                trunk = backbone if self.trunk == "frozen" else trainable_copy(backbone)
                adapters = with_adapters(trunk, self.lora_rank) if self.trunk == "lora" else None
            if trunk is not backbone:
                trunk.gradient_checkpointing = self.fit.gradient_checkpointing
            if self.states == "sampler":
                data = self._trajectories(model, Path(out))
            dynamic = DynamicDepth(trunk, exits, pixel_space=model.pixel_space)
            trained = _FrozenTrunk(dynamic) if trunk is backbone else _TaughtTrunk(dynamic, backbone)
            task = _Distillation(trained, self, self._states(backbone, data))
            identity = f"{model.trunk_hash()} {exits.config} {self._choices()}"
            result = fit(task, data, self.fit, Path(out), identity=identity, rates={"trunk.": self.trunk_rate})
            trained.load_state_dict(result.ema)
            if adapters is not None:
                adapters.merge_and_unload()
            dynamic.eval()
        dynamic.to(next(backbone.parameters()).device)
        if self.forecasts:
            dynamic.exits.gains = nn.Parameter(self._gains(dynamic))
        return dynamic, result

    def _choices(self) -> str:
        """What the result depends on besides the trunk, the exits, the data and `fit`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("exits", "fit", "data")}
        return " ".join(f"{name}={value}" for name, value in own.items())

    def _gains(self, dynamic: DynamicDepth) -> Tensor:
        """Corrections of forecasts, learned on guided trajectories of `num_steps` steps.  -> (E, 2, NUM_TERMS)."""
        regression, seed = GapRegression(dynamic.exits.layers), _TRAJECTORIES_SEED + 1 + self.fit.seed
        full, guidance = full_plan(dynamic, self.solver, self.num_steps, self.cfg_scale), Guidance(self.cfg_scale)
        device = next(dynamic.parameters()).device
        for low in range(0, _NUM_FORECAST, self.fit.batch_size):
            numbers = range(low, min(_NUM_FORECAST, low + self.fit.batch_size))
            labels = torch.tensor([i % dynamic.backbone.num_classes for i in numbers], device=device)
            batch = Batch(labels, tuple(numbers), seed)
            trajectory, gaps = start(dynamic, batch, self.solver, self.num_steps), []
            for k in range(self.num_steps):
                step = {"first": k, "stop": k + 1, "also_keep": dynamic.exits.layers}
                gaps.append(advance(dynamic, batch, trajectory, full, guidance, **step).memory[-1])
            regression.add(gaps)
        return regression.gains().to(device)

    def _trajectories(self, model: DynamicDepth, out: Path) -> RecordedCalls:
        """The states that the full model's sampler meets; drawn into `out`, once."""
        seed = _TRAJECTORIES_SEED + self.fit.seed
        name = f"states-{self.solver}-{self.num_steps}-{self.num_trajectories}-g{self.cfg_scale:g}-s{seed}"
        labels = balanced_labels(self.num_trajectories, model.backbone.num_classes)
        options = {"solver": self.solver, "num_steps": self.num_steps, "cfg_scale": self.cfg_scale, "seed": seed}
        with PartialState().main_process_first():
            return recorded_sampling(model, labels, out / name, **options)

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


class _Distillation:
    """The task of training exits, alone or with their trunk: `trained` says what."""

    def __init__(self, trained: "_FrozenTrunk | _TaughtTrunk", recipe: Distill, states: States) -> None:
        self.trainable, self.recipe, self.states = trained, recipe, states
        self.balance = recipe.schedule.path_kl_weights() if recipe.weighting == "path-kl" else None

    def loss(
        self, module: nn.Module, x: Tensor, y: Rows, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over depths of the squared error on noise and variance outputs.  x: (B, ...), y: B rows."""
        inputs, num_exits = self.states(x, y, generator), len(self.trainable.exits.layers)
        errors = module(inputs.x, inputs.t, inputs.y)  # those of the exits, and after them full depth's, where it moves
        noise, variance = errors[:num_exits].mean(dim=(0, 1)).detach()
        figures = {"noise": noise, "variance": variance}
        if len(errors) > num_exits:
            figures["full"] = errors[-1, :, 0].mean().detach()
        if self.balance is not None:
            errors = errors * self.balance[inputs.t.long().cpu()].to(errors)[None, :, None]
        depths = errors.new_tensor([1.0] * num_exits + [self.recipe.hold] * (len(errors) - num_exits))
        parts = errors.new_tensor([1.0, self.recipe.variance_weight])
        return (errors * depths[:, None, None] * parts).sum(dim=(0, 2)).mean(), figures

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
        # Exits are trained in single precision, whatever their trunk's: autocast meets in the trunk's.
        with _precision_of(dynamic.backbone):
            return torch.stack(list(exit_errors(dynamic, x_t, t, y).values()))


class _TaughtTrunk(nn.Module):
    """Registers the exits and their trunk; the teacher is kept out of the optimiser, the EMA and the checkpoints."""

    def __init__(self, dynamic: DynamicDepth, teacher: Backbone) -> None:
        super().__init__()
        self.exits, self.trunk = dynamic.exits, dynamic.backbone
        self.dynamic, self.teacher = [dynamic], [teacher]  # in lists, so that neither is a submodule

    def forward(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """-> (E + 1, B, 2) squared errors of E exits and of full depth against the teacher, see `depth_errors`."""
        teacher, x_t = self.teacher[0].to(x_t.device), x_t.float()
        with torch.no_grad(), _precision_of(teacher):
            target = teacher(x_t, t, y)
        return torch.stack(list(depth_errors(self.dynamic[0], target, x_t, t, y).values()))


def _precision_of(trunk: nn.Module) -> AbstractContextManager:
    """Autocast to a trunk's precision, where that is half."""
    parameter = next(trunk.parameters())
    halved = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(parameter.device.type, parameter.dtype) if halved else nullcontext()


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
    the noise channels), variance_error. A diagnostic: README says why plans are not chosen on it.
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
