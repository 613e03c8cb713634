"""Distil exits: train them on the full model's own predictions."""

import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dyndit.errors import InputError, expected_one_of
from dyndit.models.base import Backbone, Inputs
from dyndit.models.conditions import Condition
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.forecasts import GapRegression
from dyndit.process import Process
from dyndit.progress import tracked
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import advance, batch_in_turn, full_plan, start
from dyndit.training.borrowed import borrowed, precision_of
from dyndit.training.conditioned import Rows, conditioned
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures, check_fit
from dyndit.training.fit import FitResult, Task, fit
from dyndit.training.lora import trainable_copy, with_adapters
from dyndit.training.losses import depth_errors, exit_errors
from dyndit.training.recall import RECALLING, train_recall, trajectories
from dyndit.training.recorded import RecordedCalls, recorded_sampling
from dyndit.training.states import TRAJECTORIES_SEED, States, noised

_NUM_FORECAST = 128
"""Number of trajectories to learn corrections of forecasts on: eight numbers for each exit."""

RECALL = "recall"
"""Folder of the training of learned forecasts, in the folder of the exits'."""

DISTILLING = FitConfig(
    steps=1_000, batch_size=64, learning_rate=1e-3, warmup_steps=25, schedule="cosine", ema_decay=0.99, flip=False
)


@dataclass(frozen=True)
class Distill:
    """Train every exit at once on the full model's own predictions. If asked for, train the backbone with them.

        recipe = dyndit.Distill(fit=dyndit.FitConfig(steps=1_000, batch_size=64, learning_rate=1e-3))
        model, result = recipe.run(model, pictures, "runs/exits")

    exits: where exits stand, and their heads (`ExitConfig`).
    fit: the training loop: steps, batch size, learning rate (`FitConfig`).
    data: a recipe's data set, such as "digits", for the command line.
    variance_weight: weight of the variance outputs' error, relative to the noise's error. 0 if the process has no
    variance.
    null_share: share of labels replaced by the null label: guided sampling runs exits on both branches. Recorded calls
    hold both branches already.
    backbone: the trained part of the backbone: "frozen", nothing; "whole", everything; "lora", low-rank adapters on the
    blocks' linear maps, merged at the end.
    hold: weight of full depth's error if the backbone trains, relative to one exit's error.
    backbone_rate: learning rate of the backbone's trained part, as a factor of the exits' learning rate.
    lora_rank: rank of the adapters.
    states: inputs to train exits on: "noised" pictures, or the states that the full model's own "sampler" meets.
    Recorded calls are used as they are.
    num_trajectories: trajectories of the sampler, every class in turn. Each gives `num_steps` states of either guidance
    branch. solver, num_steps, cfg_scale: of that sampler. solver: None is the usual one of the model's process.
    weighting: weight of an error by timestep: "even", or as in the KL between two paths, "path-kl"
    (`Process.path_kl_weights`).
    forecasts: also learn to correct the exits' forecasts (`models.forecasts`), from the sampler's trajectories.
    guides: exits that learn what full depth predicts without the condition, whatever branch they stand in. As own exits
    they then guide in place of the unconditional pass ("12|e5"). They are no good to leave at, and nothing in the
    model's files says so. Distilling takes a second pass of the backbone. Needs a frozen native backbone.

    recall_fit: the training of the heads of learned forecasts (`ExitConfig(recall=...)`), after the exits', on the
    tokens of `num_trajectories` pictures of the sampler. These are held in memory: 2 (E + 1) K N D bytes for each
    picture, with E such heads and K sampling steps. Its seed counts on from that of `fit`.

    The backbone that trains is a copy; its teacher is the frozen original. The exits and the copy's full depth are
    both matched to the teacher's full depth, so that full depth stays close to the original.
    """

    exits: ExitConfig = field(default_factory=ExitConfig)
    fit: FitConfig = DISTILLING
    data: str = ""
    variance_weight: float = 0.1
    null_share: float = 0.3
    backbone: Literal["frozen", "lora", "whole"] = "frozen"
    hold: float = 10.0
    backbone_rate: float = 0.1
    lora_rank: int = 8
    states: Literal["noised", "sampler"] = "noised"
    num_trajectories: int = 512
    solver: str | None = None
    num_steps: int = 20
    cfg_scale: float = 1.5
    weighting: Literal["even", "path-kl"] = "even"
    forecasts: bool = False
    guides: tuple[int, ...] = ()
    recall_fit: FitConfig = RECALLING

    def __post_init__(self) -> None:
        for name in ("backbone", "states", "weighting"):
            expected = get_args(get_type_hints(Distill)[name])
            if getattr(self, name) not in expected:
                raise InputError(f"{name} {getattr(self, name)!r}: {expected_one_of(getattr(self, name), expected)}")
        for name in ("lora_rank", "num_trajectories"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.hold < 0 or self.backbone_rate <= 0:
            raise InputError(
                f"hold {self.hold:g}, backbone_rate {self.backbone_rate:g}: expected at least 0, and above 0"
            )

    def in_precision(self, precision: Literal["fp32", "bf16"]) -> "Distill":
        """Return the recipe with both of its trainings in a precision."""
        fits = {name: replace(getattr(self, name), precision=precision) for name in ("fit", "recall_fit")}
        return replace(self, **fits)

    def _solver(self, process: Process) -> str:
        return self.solver or process.usual_solver

    def check(self, model: DynamicDepth, data: Pictures | RecordedCalls) -> None:
        """Refuse data and exits that do not fit the model.

        Raises:
            InputError: another size or number of channels, more classes, another backbone's calls, an exit after a
                missing layer, a choice that the backbone's family does not allow; or the first item cannot be read.
        """
        backbone = model.backbone
        layers = self.exits.resolved(backbone.num_blocks).layers
        self._check_family(backbone)
        if missing := sorted(set(self.guides) - set(layers)):
            raise InputError(f"guides {missing}: no exits there; expected some of {', '.join(map(str, layers))}")
        if self.guides and self.backbone != "frozen":
            raise InputError(f"guides: backbone {self.backbone!r}; expected 'frozen'")
        if self.guides and not backbone.condition.guided:
            raise InputError("guides: this model was trained without a null condition; expected none")
        if self.states == "sampler" or self.forecasts or self.exits.recall:
            full_plan(model, self._solver(model.process), self.num_steps, self.cfg_scale)
            if isinstance(data, RecordedCalls):
                wanted = "recall" if self.exits.recall else "forecasts"
                wanted = "states 'sampler'" if self.states == "sampler" else wanted
                raise InputError(f"{wanted}: recorded calls ({data.folder}) are states; expected pictures")
        if isinstance(data, RecordedCalls):
            data.check(model)
        else:
            check_fit(data, backbone)
        data[0]

    def _check_family(self, backbone: Backbone) -> None:
        """Refuse choices that need a native backbone's sampler or schedule, or adapters on a DiT's blocks."""
        found = type(backbone)
        if self.backbone == "lora" and not issubclass(found, ClassConditionalDiT):
            raise InputError(f"backbone 'lora': needs a ClassConditionalDiT, found {found.__name__}")
        if self.exits.recall and backbone.foreign:
            raise InputError(f"recall {list(self.exits.recall)}: needs a native backbone, found {found.__name__}")
        for name in ("backbone", "states", "weighting", "forecasts", "guides"):
            if getattr(self, name) != getattr(Distill, name) and backbone.foreign:
                raise InputError(f"{name} {getattr(self, name)!r}: needs a native backbone, found {found.__name__}")

    def run(
        self, model: DynamicDepth, data: Pictures | RecordedCalls, out: str | Path, *, extend: bool = False
    ) -> tuple[DynamicDepth, FitResult]:
        """Return a model with trained exits on the same backbone, or on its trained copy, and the loop's record.

        model: its own exits are ignored. The backbone's flags, modes and device are restored at the end.
        data: pictures, which are noised, or recorded calls, which are used as they are.
        out: the folder for checkpoints and the log; a stopped run resumes there. `save_pretrained` saves the model.
        extend: take up a finished run of fewer steps in `out`, see `training.fit.fit`.

        The exits are in eval mode, in single precision, and so is a trained backbone.

        Raises InputError: see `check`; or the backbone lies on several devices.
        """
        self.check(model, data)
        original = model.backbone
        with borrowed(original):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.fit.seed)
                # Exits start as copies of the backbone's head, which may be in half precision and frozen.
                exits = Exits(original, replace(self.exits, recall=())).float().requires_grad_(True)
                backbone = original if self.backbone == "frozen" else trainable_copy(original)
                adapted: Any = backbone  # a ClassConditionalDiT, as `check` has seen
                adapters = with_adapters(adapted, self.lora_rank) if self.backbone == "lora" else None
            if backbone is not original:
                backbone.gradient_checkpointing = self.fit.gradient_checkpointing
            if self.states == "sampler":
                data = self._trajectories(model, Path(out))
            items = conditioned(data, original.condition) if isinstance(data, Pictures) else data
            dynamic = DynamicDepth(backbone, exits, pixel_space=model.pixel_space, process=model.process)
            frozen = backbone is original
            trained = _FrozenBackbone(dynamic, self.guides) if frozen else _TaughtBackbone(dynamic, original)
            task = _Distillation(trained, self, model.process, self._states(model, data))
            others = ("exits", "fit", "data", "recall_fit")
            own = (f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name not in others)
            identity = f"{model.identity.backbone} {exits.config} {' '.join(own)}"
            rates = {"backbone.": self.backbone_rate}
            result = fit(task, items, self.fit, Path(out), identity=identity, rates=rates, extend=extend)
            trained.load_state_dict(result.ema)
            if adapters is not None:
                adapters.merge_and_unload()
            dynamic.eval()
        dynamic.to(next(original.parameters()).device)
        began, more = time.monotonic(), 0.0
        if self.forecasts:
            exits.gains = nn.Parameter(self._gains(dynamic))
            more = time.monotonic() - began
        if self.exits.recall:
            dynamic, seconds = self._with_recall(dynamic, Path(out) / RECALL)
            more += seconds
        return dynamic, replace(result, beside=more)

    def _with_recall(self, model: DynamicDepth, out: Path) -> tuple[DynamicDepth, float]:
        """Add the heads of learned forecasts, and train them on guided trajectories of `num_steps` steps.

        -> the model, and the seconds that this took.
        """
        assert model.exits is not None
        seed, before = self.fit.seed, model.exits
        device = next(before.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            exits = Exits(model.backbone, self.exits).float()
        exits.gains = before.gains
        exits.load_state_dict(before.state_dict(), strict=False)
        model = DynamicDepth(model.backbone, exits, pixel_space=model.pixel_space, process=model.process).eval()
        model.to(device)
        solver, steps, scale = self._solver(model.process), self.num_steps, self.cfg_scale
        how: dict[str, Any] = {"solver": solver, "num_steps": steps, "cfg_scale": scale, "batch_size": 64}
        how |= {"seed": TRAJECTORIES_SEED + 2 + seed, "precision": self.recall_fit.precision}
        with borrowed(model.backbone):
            began = time.monotonic()
            data = trajectories(model, exits.config.recall, self.num_trajectories, **how)
            sampled = time.monotonic() - began
            fit = replace(self.recall_fit, seed=self.recall_fit.seed + seed)
            result = train_recall(model, data, fit, self.variance_weight, out)
        return model.to(device), sampled + result.whole(fit.steps)

    def _gains(self, dynamic: DynamicDepth) -> Tensor:
        """Learn corrections of forecasts on guided trajectories of `num_steps` steps.  -> (E, 2, NUM_TERMS)."""
        layers = dynamic.depths[:-1]
        regression, seed = GapRegression(layers, dynamic.process), TRAJECTORIES_SEED + 1 + self.fit.seed
        solver, guidance = self._solver(dynamic.process), Guidance(self.cfg_scale)
        full = full_plan(dynamic, solver, self.num_steps, self.cfg_scale)
        device = next(dynamic.parameters()).device
        lows = range(0, _NUM_FORECAST, self.fit.batch_size)
        for low in tracked(lows, "learning forecasts", unit="batches"):
            numbers = range(low, min(_NUM_FORECAST, low + self.fit.batch_size))
            batch = batch_in_turn(dynamic, numbers, seed)
            trajectory, gaps = start(dynamic, batch, solver, self.num_steps), []
            for k in range(self.num_steps):
                step: dict[str, Any] = {"first": k, "stop": k + 1, "also_keep": layers}
                gaps.append(advance(dynamic, batch, trajectory, full, guidance, **step).memory.gaps[-1])
            regression.add(gaps)
        return regression.gains().to(device)

    def _trajectories(self, model: DynamicDepth, out: Path) -> RecordedCalls:
        """Return the states that the full model's sampler meets. They are drawn into `out` once."""
        seed, solver = TRAJECTORIES_SEED + self.fit.seed, self._solver(model.process)
        name = f"states-{solver}-{self.num_steps}-{self.num_trajectories}-g{self.cfg_scale:g}-s{seed}"
        labels = model.backbone.condition.in_turn(self.num_trajectories)
        options = {"solver": solver, "num_steps": self.num_steps, "cfg_scale": self.cfg_scale, "seed": seed}
        with PartialState().main_process_first():
            return recorded_sampling(model, labels, out / name, **options)

    def _states(self, model: DynamicDepth, data: Pictures | RecordedCalls) -> States:
        """Return the function that makes inputs of this data."""
        if isinstance(data, RecordedCalls):
            return lambda x, rows, _: data.inputs(x, rows)
        return partial(noised, model.process, self.null_share, model.backbone.condition)


class _Distillation(Task):
    """Task: train exits, alone or with their backbone, as `trained` says."""

    def __init__(
        self, trained: "_FrozenBackbone | _TaughtBackbone", recipe: Distill, process: Process, states: States
    ) -> None:
        self.trainable: Any = trained
        self.recipe, self.states = recipe, states
        self.variance_weight = recipe.variance_weight if process.has_variance else 0.0
        self.balance = process.path_kl_weights() if recipe.weighting == "path-kl" else None

    def draw(self, x: Tensor, y: Rows, generator: torch.Generator) -> tuple[Tensor, Inputs]:
        """Make the inputs of the model.  x: (B, ...), y: B rows."""
        return x, self.states(x, y, generator)

    def loss(
        self, module: nn.Module, x: Tensor, inputs: Inputs, _: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the squared error on noise and variance outputs over depths.  x: (B, ...)."""
        num_exits = len(self.trainable.exits.layers)
        errors = module(inputs.x, inputs.t, inputs.y)  # of the exits, then of full depth if it trains
        noise, variance = errors[:num_exits].mean(dim=(0, 1)).detach()
        figures = {"noise": noise, "variance": variance}
        if len(errors) > num_exits:
            figures["full"] = errors[-1, :, 0].mean().detach()
        if self.balance is not None:
            errors = errors * self.balance[inputs.t.long().cpu()].to(errors)[None, :, None]
        depths = errors.new_tensor([1.0] * num_exits + [self.recipe.hold] * (len(errors) - num_exits))
        parts = errors.new_tensor([1.0, self.variance_weight])
        return (errors * depths[:, None, None] * parts).sum(dim=(0, 2)).mean(), figures


class _FrozenBackbone(nn.Module):
    """Register the exits as parameters. Keep the backbone out of the optimiser, the EMA and the checkpoints."""

    def __init__(self, dynamic: DynamicDepth, guides: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.exits, self.guides = dynamic.exits, guides
        self.dynamic = [dynamic]  # in a list, so that the backbone is no submodule

    def forward(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """Return squared errors (E, B, 2) of E exits, see `exit_errors`."""
        dynamic = self.dynamic[0]
        dynamic.backbone.to(x_t.device)
        # Exits train in single precision. Autocast runs them in the backbone's precision.
        with precision_of(dynamic.backbone):
            return torch.stack(list(exit_errors(dynamic, x_t, t, y, self.guides).values()))


class _TaughtBackbone(nn.Module):
    """Register the exits and their backbone. Keep the teacher out of the optimiser, the EMA and the checkpoints."""

    def __init__(self, dynamic: DynamicDepth, teacher: Backbone) -> None:
        super().__init__()
        self.exits, self.backbone = dynamic.exits, dynamic.backbone
        self.dynamic, self.teacher = [dynamic], [teacher]  # in lists, so that they are no submodules

    def forward(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """Return squared errors (E + 1, B, 2) of E exits and of full depth against the teacher, see `depth_errors`."""
        teacher, x_t = self.teacher[0].to(x_t.device), x_t.float()
        with torch.no_grad(), precision_of(teacher):
            target = teacher(x_t, t, y)
        return torch.stack(list(depth_errors(self.dynamic[0], target, x_t, t, y).values()))
