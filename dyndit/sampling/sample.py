"""From noise to pictures under a plan, on a diffusers scheduler: the one sampling loop.

Picture i is a function of (seed, class, index) alone: its noise comes from a generator seeded with (seed, index), that
of a stochastic solver's step k from one seeded with (seed, index, k).
"""

import copy
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dyndit.errors import InputError, PlanError
from dyndit.models.dynamic import DynamicDepth, Step
from dyndit.plans.plan import REUSED, DepthPlan, Router, guide_of
from dyndit.process import Schedule

SCHEDULE = Schedule()


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler and its settings.

    Clamping of x0 is done here, in the loop, alike for every solver, so the schedulers' own is off. Spacings give
    the timesteps linspace(999, 0, K + 1)[:-1] or their nearest in the class: no step is spent at t = 0.
    """

    scheduler: type[SchedulerMixin]
    options: dict[str, object]

    def build(self) -> SchedulerMixin:
        """A scheduler on the models' training schedule, its timesteps not set yet."""
        return self.scheduler(
            num_train_timesteps=SCHEDULE.num_timesteps,
            beta_start=SCHEDULE.beta_start,
            beta_end=SCHEDULE.beta_end,
            beta_schedule="linear",
            **self.options,
        )


_MULTISTEP = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}

SOLVERS: dict[str, Solver] = {
    # The published process: spaced timesteps down to t = 0, learned variance (iDDPM).
    "ddpm": Solver(
        diffusers.DDPMScheduler,
        {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"},
    ),
    # DDIM with eta = 0 is DPM-Solver++ of order 1 (Lu et al. 2022, arXiv:2211.01095, Section 4); this class steps
    # exactly between any two timesteps, where DDIMScheduler takes the previous one to be t - 1000 // K.
    "ddim": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 1, **_MULTISTEP}),
    "dpmpp": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "unipc": Solver(diffusers.UniPCMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "euler": Solver(diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
}

AnySolver = str | SchedulerMixin
"""A name of `SOLVERS`, or any noise-predicting diffusers scheduler on the models' training schedule."""


def solver_name(solver: AnySolver) -> str:
    """What plans record: the name in `SOLVERS` of these very settings, else the scheduler's class."""
    if isinstance(solver, str):
        return solver
    mine = (type(solver), _settings(solver))
    named = ((name, (known.scheduler, _settings(_built(name)))) for name, known in SOLVERS.items())
    return next((name for name, theirs in named if theirs == mine), type(solver).__name__)


@functools.cache
def _built(name: str) -> SchedulerMixin:
    return SOLVERS[name].build()


def _settings(scheduler: SchedulerMixin) -> dict[str, object]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def takes_variance(solver: AnySolver) -> bool:
    """Whether `step` wants the learned-variance half of a prediction."""
    scheduler = _built(solver) if isinstance(solver, str) else solver
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def draws_noise(scheduler: SchedulerMixin) -> bool:
    """Whether `step` may draw noise, and wants generators for it.

    Those known to draw none as they are called here (Euler without churn, DDIM with eta = 0, DPM-Solver on the ODE)
    take a generator too; making one per picture and step would be for nothing.
    """
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler | diffusers.DDIMScheduler):
        return False
    if str(scheduler.config.get("algorithm_type", "sde")).startswith("dpmsolver"):
        return False
    return "generator" in _step_parameters(type(scheduler))


@functools.cache
def _step_parameters(scheduler: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(scheduler.step).parameters)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that does not step the process these models predict the noise of.

    Raises:
        InputError: it is no scheduler, runs the network twice a step (Heun, KDPM2), is one of flow matching or of
            another prediction, wants more than a prediction to step, or has other betas than the training schedule:
            its x_t would hold another share of noise than the network takes it to at that timestep.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(f"scheduler {name}: expected a diffusers scheduler")
    if getattr(scheduler, "order", 1) != 1:
        raise InputError(f"scheduler {name}: runs the model {scheduler.order} times a step; expected one of order 1")
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, Tensor) or scheduler.config.get("use_flow_sigmas"):
        raise InputError(f"scheduler {name}: of another process; expected one of noise prediction (DDPM)")
    needed = [
        n for n, p in _step_parameters(type(scheduler)).items() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    if len(needed) != 4:  # self, prediction, timestep, x
        raise InputError(
            f"scheduler {name}: its step needs {', '.join(needed[1:])}; expected a prediction, t and x alone"
        )
    if (found := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
        raise InputError(f"scheduler {name}: prediction_type {found}; expected epsilon")
    if betas.shape != SCHEDULE.betas.shape or not torch.allclose(betas.double().cpu(), SCHEDULE.betas, rtol=1e-4):
        raise InputError(
            f"scheduler {name}: {len(betas)} {scheduler.config.get('beta_schedule', '')} betas from {betas[0]:.3g} to "
            f"{betas[-1]:.3g}; expected the training schedule's {SCHEDULE.num_timesteps} linear ones from "
            f"{SCHEDULE.beta_start:g} to {SCHEDULE.beta_end:g}"
        )


def make_scheduler(solver: AnySolver, num_steps: int) -> SchedulerMixin:
    """A fresh scheduler with its timesteps set; one that is given is left as it is.

    Raises:
        InputError: unknown solver, a scheduler that `check_scheduler` refuses or that repeats timesteps, or a step
            count outside 1..1000.
    """
    if isinstance(solver, str) and solver not in SOLVERS:
        raise InputError(f"--solver {solver}: expected one of {', '.join(SOLVERS)}")
    if not 1 <= num_steps <= SCHEDULE.num_timesteps:
        raise InputError(f"--steps {num_steps}: expected 1 to {SCHEDULE.num_timesteps}")
    if isinstance(solver, str):
        if num_steps == SCHEDULE.num_timesteps and SOLVERS[solver].options.get("final_sigmas_type"):
            raise InputError(
                f"--steps {num_steps}: --solver {solver} has no {num_steps} distinct timesteps; expected less"
            )
        scheduler = SOLVERS[solver].build()
        scheduler.set_timesteps(num_steps)
        return scheduler
    check_scheduler(solver)
    name, scheduler = type(solver).__name__, type(solver).from_config(solver.config)
    try:
        scheduler.set_timesteps(num_steps)
    except ValueError as error:
        raise InputError(f"scheduler {name}: no {num_steps} steps ({str(error).splitlines()[0]})") from error
    times = scheduler.timesteps.tolist()
    if len(times) != num_steps or any(a <= b for a, b in itertools.pairwise(times)):
        found = ", ".join(f"{t:g}" for t in times[:3])
        raise InputError(
            f"scheduler {name}: {len(times)} timesteps ({found}, ...) for {num_steps} steps; expected as many, falling"
        )
    return scheduler


def timesteps_of(solver: AnySolver, num_steps: int) -> tuple[float, ...]:
    """The timesteps of a solver, falling; whole ones are integers."""
    times = make_scheduler(solver, num_steps).timesteps.tolist()
    return tuple(int(t) if float(t).is_integer() else t for t in times)


def log_snr_of(solver: AnySolver, num_steps: int) -> tuple[float, ...]:
    """log(alpha_bar / (1 - alpha_bar)) at every step of a solver, rising from noise to picture."""
    return tuple(SCHEDULE.log_snr(torch.tensor(timesteps_of(solver, num_steps))).tolist())


def full_plan(model: DynamicDepth, solver: AnySolver, num_steps: int, cfg_scale: float) -> DepthPlan:
    """The original model at every step.

    Raises:
        InputError: the solver or the guidance asks for what the model was not trained to predict.
    """
    backbone, timesteps, name = model.backbone, timesteps_of(solver, num_steps), solver_name(solver)
    if cfg_scale != 1 and backbone.null_class is None:
        raise InputError(f"--cfg-scale {cfg_scale:g}: this model was trained without a null class; expected 1")
    if not (isinstance(solver, str) or model.pixel_space) and solver.config.get("clip_sample"):
        raise InputError(f"scheduler {name}: clips x0 to [-1, 1], this model makes latents; expected clip_sample=False")
    if takes_variance(solver):
        if backbone.out_channels == backbone.in_channels:
            others = ", ".join(other for other in SOLVERS if not takes_variance(other))
            raise InputError(f"--solver {name}: this model predicts no variance; expected one of {others}")
        whole = diffusers.DDPMScheduler | diffusers.DDPMParallelScheduler
        if name != "ddpm" and not isinstance(solver, whole) and backbone.in_channels != 3:
            # The multistep solvers that know the setting cut every prediction to three channels.
            raise InputError(
                f"scheduler {name}: takes {solver.config.variance_type} variances of 3 channels alone, the model "
                f"has {backbone.in_channels}; expected variance_type=None"
            )
    return DepthPlan.full(timesteps, model.num_blocks, name, cfg_scale)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): eps = eps_u + scale * (eps_c - eps_u).

    channels: how many channels are guided; None for all. The published DiT guides the first 3 of its 4.
    """

    scale: float = 1.0
    channels: int | None = None

    def combine(self, cond: Tensor, uncond: Tensor, num_channels: int) -> Tensor:
        """cond, uncond: (B, C_out, H, W) -> (B, C_out, H, W). Unguided channels, and the variance, are cond's."""
        guided = min(num_channels, num_channels if self.channels is None else self.channels)
        head = uncond[:, :guided] + self.scale * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([head, cond[:, guided:]], dim=1)


def picture_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone: (seed, index), or (seed, index, step + 1)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def noise(seed: int | Sequence[int], indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (B, *shape), row i from (seed, indices[i]) alone. Drawn on the CPU on any device.

    seed: of all rows, or one per row.
    """
    keys = zip(_per_row(seed, len(indices)), indices, strict=True)
    return torch.stack([torch.randn(shape, generator=picture_generator(*key)) for key in keys])


def _per_row(seed: int | Sequence[int], rows: int) -> Sequence[int]:
    return (seed,) * rows if isinstance(seed, int) else seed


@dataclass
class Trajectory:
    """Where a sampling stands: the state, and the solver's memory. `fork` makes an independent continuation.

    memory: the model's, which its last step left for the next (`DynamicDepth.predict`); None where there is none.
    guided: the predictions of the last step that ran both branches, conditional first; None where there is none.
    """

    x: Tensor
    scheduler: object
    memory: object = None
    guided: list[Tensor] | None = None

    def fork(self) -> "Trajectory":
        """A copy that can be continued another way."""
        # What is kept of the branches is read, never written to: it can be shared.
        return Trajectory(self.x, copy.deepcopy(self.scheduler), copy.deepcopy(self.memory), self.guided)


@dataclass(frozen=True)
class Batch:
    """Which pictures a batch holds.

    labels: (B,) on the model's device; indices: B host integers; seed: of all pictures, or one per picture.
    generators: draw all noise where given, instead of those that (seed, index) makes: one for the batch, or a list
    of one per picture.
    """

    labels: Tensor
    indices: tuple[int, ...]
    seed: int | tuple[int, ...] = 0
    generators: torch.Generator | list[torch.Generator] | None = None

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape) on the labels' device: what every picture starts from."""
        if self.generators is None:
            return noise(self.seed, self.indices, shape).to(self.labels.device)
        return randn_tensor((len(self.indices), *shape), self.generators, self.labels.device, torch.float32)

    def generators_of(self, step: int) -> torch.Generator | list[torch.Generator]:
        """What a stochastic solver draws from at a step: fresh ones, or those given."""
        if self.generators is not None:
            return self.generators
        keys = zip(_per_row(self.seed, len(self.indices)), self.indices, strict=True)
        return [picture_generator(*key, step + 1) for key in keys]


StepHook = Callable[[int, float, float], None]
"""(step, seconds of the step, seconds of those in the network); the device is synchronised around both."""

StepEndHook = Callable[[int, Tensor, Tensor], Tensor | None]
"""(step, its timestep as the scheduler has it, x after the step) -> what x is from there on; None keeps it."""


def state_shape(model: DynamicDepth) -> tuple[int, int, int]:
    """(C, H, W) of a sampling's state."""
    backbone = model.backbone
    return backbone.in_channels, backbone.image_size, backbone.image_size


@torch.inference_mode()
def start(
    model: DynamicDepth, batch: Batch, solver: AnySolver, num_steps: int, *, noise: Tensor | None = None
) -> Trajectory:
    """A trajectory at pure noise: the batch's own, or `noise`, standard normal (B, C, H, W)."""
    scheduler = make_scheduler(solver, num_steps)
    x = batch.noise(state_shape(model)) if noise is None else noise
    return Trajectory(x * scheduler.init_noise_sigma, scheduler)


@torch.inference_mode()
def advance(
    model: DynamicDepth,
    batch: Batch,
    trajectory: Trajectory,
    plan: DepthPlan,
    guidance: Guidance,
    *,
    first: int = 0,
    stop: int | None = None,
    on_step: StepHook | None = None,
    on_step_end: StepEndHook | None = None,
    also_keep: Sequence[int] = (),
) -> Trajectory:
    """Run steps `first` to `stop - 1` of the plan on `trajectory`, in place. The loop every sampling goes through.

    The solver's state is kept in float32; the network computes in the precision of its weights. also_keep: exits whose
    gaps are remembered at every step at full depth, whether later steps of the plan need them or not.
    """
    scheduler, x, dtype = trajectory.scheduler, trajectory.x, next(model.parameters()).dtype
    with_variance, stochastic = takes_variance(scheduler), draws_noise(scheduler)
    null = None if guidance.scale == 1 else torch.full_like(batch.labels, model.backbone.null_class)
    channels, kept = model.backbone.in_channels, plan.kept
    clock = device_clock(x) if on_step is not None else float
    for k in range(first, plan.num_steps if stop is None else stop):
        began = clock()
        t, timestep = scheduler.timesteps[k], plan.timesteps[k]
        x_t = scheduler.scale_model_input(x, t)
        times = torch.full_like(batch.labels, timestep, dtype=torch.long if isinstance(timestep, int) else x.dtype)
        cond, uncond = plan.pairs[k]
        entered = clock()
        both, guide = (uncond > 0, guide_of(uncond)) if guidance.scale != 1 else (False, 0)
        labels, depths = ((batch.labels, null), (cond, uncond)) if both else ((batch.labels,), (abs(cond),))
        keep = {*kept[k], *(also_keep if cond == plan.num_blocks else ())}
        step = Step(k, x_t.to(dtype), times, labels, depths, plan.timesteps, guide, cond < 0, tuple(sorted(keep)))
        predictions, trajectory.memory = model.predict(step, trajectory.memory)
        predictions = [p.to(x.dtype) for p in predictions]
        left = clock()
        prediction = predictions[0]
        if both:
            trajectory.guided = predictions
        if both or guide:
            prediction = guidance.combine(*predictions, channels)
        elif uncond == REUSED and trajectory.guided is not None:
            with_then, without_then = trajectory.guided
            prediction = guidance.combine(prediction, prediction - (with_then - without_then), channels)
        if model.pixel_space:
            prediction = _clamp_x_0(prediction, x_t, timestep, channels)
        if not with_variance:
            prediction = prediction[:, :channels]
        drawn = {"generator": batch.generators_of(k)} if stochastic else {}
        x = scheduler.step(prediction, t, x, return_dict=False, **drawn)[0]
        if on_step is not None:
            on_step(k, clock() - began, left - entered)
        if on_step_end is not None and (changed := on_step_end(k, t, x)) is not None:
            x = changed
    trajectory.x = x
    return trajectory


def device_clock(x: Tensor) -> Callable[[], float]:
    """A clock that reads seconds once the device of `x` has done what it was given."""

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def _clamp_x_0(prediction: Tensor, x_t: Tensor, timestep: float, channels: int) -> Tensor:
    """The noise prediction whose x0 is the given one's, clamped to [-1, 1]. The timestep is the host's: no wait."""
    eps, alpha_bar = prediction[:, :channels], SCHEDULE.alpha_bar(timestep)
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_0 = ((x_t - sigma * eps) / signal).clamp(-1, 1)
    return torch.cat([(x_t - signal * x_0) / sigma, prediction[:, channels:]], dim=1)


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] to 0..255, rounded without bias.  (B, C, H, W) -> (B, C, H, W) uint8."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Samples:
    """What a sampling gives.

    pictures: (N, C, H, W) uint8 (pixel-space models; else `latents` holds what a decoder takes), labels: (N,),
    batch_seconds: wall time from noise to uint8, per batch; step_seconds and network_seconds: per step, summed over
    batches, where `stats` was asked for.
    """

    pictures: Tensor
    latents: Tensor | None
    labels: tuple[int, ...]
    plan: DepthPlan
    seed: int
    batch_seconds: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    network_seconds: tuple[float, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of all batches."""
        return sum(self.batch_seconds)


def resolve_plan(
    model: DynamicDepth,
    plan: DepthPlan | Router | None,
    solver: AnySolver,
    num_steps: int,
    cfg_scale: float,
    *,
    check_trunk: bool = True,
) -> DepthPlan:
    """The plan to run, checked against the model and the request. A router writes it; None is the full plan.

    check_trunk: refuse a plan of another trunk or set of exits; it hashes the weights, some seconds of a large model's.

    Raises:
        PlanError: the plan is for another model, solver or step count, or is unguided where guidance is asked for.
    """
    full = full_plan(model, solver, num_steps, cfg_scale)
    if plan is None:
        return full
    if callable(plan):
        plan = plan(full, model.depths)
    bound = check_trunk and bool(plan.trunk or plan.exits)
    plan.check(
        depths=model.depths,
        trunk=model.trunk_hash() if bound else None,
        exits=model.exits_hash() if bound else None,
        timesteps=full.timesteps,
        solver=full.solver,
    )
    if cfg_scale != plan.cfg_scale and (plan.trunk or 1 in (cfg_scale, plan.cfg_scale)):
        raise PlanError(f"plan: made for guidance scale {plan.cfg_scale:g}, but --cfg-scale {cfg_scale:g} is asked for")
    return plan


def check_request(model: DynamicDepth, labels: Sequence[int], batch_size: int, seed: int) -> None:
    """Refuse labels the model lacks (it would take them for others), no pictures, and empty batches.

    Raises:
        InputError: naming the flag.
    """
    if bad := [label for label in labels if not 0 <= label < model.backbone.num_classes]:
        raise InputError(f"--class-labels {bad[0]}: expected 0 to {model.backbone.num_classes - 1}")
    if not labels:
        raise InputError("--num-images 0: expected at least 1")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected at least 1")
    if seed < 0:
        raise InputError(f"--seed {seed}: expected at least 0")


def sample(
    model: DynamicDepth,
    labels: Sequence[int],
    *,
    plan: DepthPlan | Router | None = None,
    solver: AnySolver = "ddim",
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = 64,
    strict: bool = False,
    stats: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Samples:
    """Draw one picture per label.

    Picture i has index first_index + i. `strict` pads every batch to `batch_size`, so that kernels see one shape
    and pictures are bit-equal however they are grouped; without it they are equal to 1/255.
    solver: a name of `SOLVERS`, or a diffusers scheduler. `stats` times every step. on_batch(n) is called after each
    batch of n pictures.

    Raises:
        InputError: a label or setting out of range, or a plan that does not fit (PlanError).
    """
    labels = [int(label) for label in labels]
    check_request(model, labels, batch_size, seed)
    plan = resolve_plan(model, plan, solver, num_steps, cfg_scale)
    guidance, device = Guidance(cfg_scale, guided_channels), next(model.parameters()).device
    pictures, times, per_step, in_network = [], [], [0.0] * num_steps, [0.0] * num_steps

    def on_step(k: int, seconds: float, network: float) -> None:
        per_step[k] += seconds
        in_network[k] += network

    for low in range(0, len(labels), batch_size):
        mine = list(labels[low : low + batch_size])
        indices = [first_index + low + i for i in range(len(mine))]
        kept = len(mine)
        if strict:
            mine += [mine[-1]] * (batch_size - kept)
            indices += [indices[-1]] * (batch_size - kept)
        batch = Batch(torch.tensor(mine, device=device), tuple(indices), seed)
        began = time.perf_counter()
        x = advance(
            model,
            batch,
            start(model, batch, solver, num_steps),
            plan,
            guidance,
            on_step=on_step if stats else None,
        ).x
        x = to_uint8(x).cpu() if model.pixel_space else x.cpu()
        times.append(time.perf_counter() - began)
        pictures.append(x[:kept])
        if on_batch is not None:
            on_batch(kept)
    result = torch.cat(pictures)
    empty = torch.empty(0, dtype=torch.uint8)
    return Samples(
        pictures=result if model.pixel_space else empty,
        latents=None if model.pixel_space else result,
        labels=tuple(labels),
        plan=plan,
        seed=seed,
        batch_seconds=tuple(times),
        step_seconds=tuple(per_step) if stats else (),
        network_seconds=tuple(in_network) if stats else (),
        settings={
            "solver": plan.solver,
            "num_steps": num_steps,
            "cfg_scale": cfg_scale,
            "guided_channels": guided_channels,
            "seed": seed,
            "first_index": first_index,
            "batch_size": batch_size,
            "strict": strict,
        },
    )


def balanced_labels(num_images: int, num_classes: int) -> list[int]:
    """Every class in turn: the labels of an evaluation set."""
    return [i % num_classes for i in range(num_images)]


def unguided(plan: DepthPlan) -> DepthPlan:
    """The plan without its unconditional branch, of the same guidance scale: the extreme of a guidance interval."""
    return replace(plan, uncond=(0,) * plan.num_steps)
