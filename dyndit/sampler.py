"""From noise to pictures under a plan, on a diffusers scheduler: the one sampling loop.

Picture i is a function of (seed, class, index) alone: its noise comes from a generator seeded with (seed, index), that
of a stochastic solver's step k from one seeded with (seed, index, k).
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import diffusers
import numpy as np
import torch
from torch import Tensor

from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError, PlanError
from dyndit.objectives import Schedule
from dyndit.plan import DepthPlan

SCHEDULE = Schedule()


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler and its settings.

    Clamping of x0 is done here, in the loop, alike for every solver, so the schedulers' own is off. Spacings give
    the timesteps linspace(999, 0, K + 1)[:-1] or their nearest in the class: no step is spent at t = 0.
    """

    scheduler: type
    options: dict[str, object]
    takes_variance: bool = False
    """Whether `step` wants the learned-variance half."""
    stochastic: bool = False


_MULTISTEP = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}

SOLVERS: dict[str, Solver] = {
    # The published process: spaced timesteps down to t = 0, learned variance (iDDPM).
    "ddpm": Solver(
        diffusers.DDPMScheduler,
        {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"},
        takes_variance=True,
        stochastic=True,
    ),
    # DDIM with eta = 0 is DPM-Solver++ of order 1 (Lu et al. 2022, arXiv:2211.01095, Section 4); this class steps
    # exactly between any two timesteps, where DDIMScheduler takes the previous one to be t - 1000 // K.
    "ddim": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 1, **_MULTISTEP}),
    "dpmpp": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "unipc": Solver(diffusers.UniPCMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "euler": Solver(diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
}


def make_scheduler(solver: str, num_steps: int) -> object:
    """A fresh scheduler with its timesteps set.

    Raises:
        InputError: unknown solver, or a step count outside 1..1000.
    """
    if solver not in SOLVERS:
        raise InputError(f"--solver {solver}: expected one of {', '.join(SOLVERS)}")
    if not 1 <= num_steps <= SCHEDULE.num_timesteps:
        raise InputError(f"--steps {num_steps}: expected 1 to {SCHEDULE.num_timesteps}")
    chosen = SOLVERS[solver]
    if num_steps == SCHEDULE.num_timesteps and chosen.options.get("final_sigmas_type"):
        raise InputError(f"--steps {num_steps}: --solver {solver} has no {num_steps} distinct timesteps; expected less")
    scheduler = chosen.scheduler(
        num_train_timesteps=SCHEDULE.num_timesteps,
        beta_start=SCHEDULE.beta_start,
        beta_end=SCHEDULE.beta_end,
        beta_schedule="linear",
        **chosen.options,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def timesteps_of(solver: str, num_steps: int) -> tuple[int, ...]:
    """The timesteps of a solver, falling."""
    return tuple(int(t) for t in make_scheduler(solver, num_steps).timesteps)


def log_snr_of(solver: str, num_steps: int) -> tuple[float, ...]:
    """log(alpha_bar / (1 - alpha_bar)) at every step of a solver, rising from noise to picture."""
    return tuple(SCHEDULE.log_snr(torch.tensor(timesteps_of(solver, num_steps))).tolist())


def full_plan(model: DynamicDepth, solver: str, num_steps: int, cfg_scale: float) -> DepthPlan:
    """The original model at every step.

    Raises:
        InputError: the solver or the guidance asks for what the model was not trained to predict.
    """
    backbone, timesteps = model.backbone, timesteps_of(solver, num_steps)
    if cfg_scale != 1 and backbone.null_class is None:
        raise InputError(f"--cfg-scale {cfg_scale:g}: this model was trained without a null class; expected 1")
    if SOLVERS[solver].takes_variance and backbone.out_channels == backbone.in_channels:
        others = ", ".join(name for name, s in SOLVERS.items() if not s.takes_variance)
        raise InputError(f"--solver {solver}: this model predicts no variance; expected one of {others}")
    return DepthPlan.full(timesteps, model.num_blocks, solver, cfg_scale)


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


def _generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone: (seed, index), or (seed, index, step + 1)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (B, *shape), row i from (seed, indices[i]) alone. Drawn on the CPU on any device."""
    return torch.stack([torch.randn(shape, generator=_generator(seed, index)) for index in indices])


@dataclass
class Trajectory:
    """Where a sampling stands: the state and the solver's memory. `fork` makes an independent continuation."""

    x: Tensor
    scheduler: object

    def fork(self) -> "Trajectory":
        """A copy that can be continued another way."""
        return Trajectory(self.x, copy.deepcopy(self.scheduler))


@dataclass(frozen=True)
class Batch:
    """Which pictures a batch holds.  labels: (B,) on the model's device; indices: B host integers."""

    labels: Tensor
    indices: tuple[int, ...]
    seed: int


StepHook = Callable[[int, float, float], None]
"""(step, seconds of the step, seconds of those in the network); the device is synchronised around both."""


@torch.inference_mode()
def start(model: DynamicDepth, batch: Batch, solver: str, num_steps: int) -> Trajectory:
    """A trajectory at pure noise."""
    scheduler, backbone = make_scheduler(solver, num_steps), model.backbone
    shape = (backbone.in_channels, backbone.image_size, backbone.image_size)
    x = noise(batch.seed, batch.indices, shape).to(batch.labels.device)
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
) -> Trajectory:
    """Run steps `first` to `stop - 1` of the plan on `trajectory`, in place. The loop every sampling goes through."""
    solver, scheduler, x = SOLVERS[plan.solver], trajectory.scheduler, trajectory.x
    null = None if guidance.scale == 1 else torch.full_like(batch.labels, model.backbone.null_class)
    channels = model.backbone.in_channels
    clock = _clock(x) if on_step is not None else float
    for k in range(first, plan.num_steps if stop is None else stop):
        began = clock()
        t = scheduler.timesteps[k]
        x_t = scheduler.scale_model_input(x, t)
        times = torch.full_like(batch.labels, plan.timesteps[k])
        cond, uncond = plan.pairs[k]
        entered = clock()
        both = uncond > 0 and guidance.scale != 1
        labels, depths = ([batch.labels, null], [cond, uncond]) if both else ([batch.labels], [cond])
        predictions = model.branches(x_t, times, labels, depths)
        left = clock()
        prediction = guidance.combine(*predictions, channels) if both else predictions[0]
        if model.pixel_space:
            prediction = _clamp_x_0(prediction, x_t, plan.timesteps[k], channels)
        if not solver.takes_variance:
            prediction = prediction[:, :channels]
        x = _solver_step(solver, scheduler, prediction, t, x, batch, k)
        if on_step is not None:
            on_step(k, clock() - began, left - entered)
    trajectory.x = x
    return trajectory


def _clock(x: Tensor) -> Callable[[], float]:
    """Seconds, once the device has done what it was given."""

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def _clamp_x_0(prediction: Tensor, x_t: Tensor, timestep: int, channels: int) -> Tensor:
    """The noise prediction whose x0 is the given one's, clamped to [-1, 1]. The timestep is the host's: no wait."""
    eps, alpha_bar = prediction[:, :channels], SCHEDULE.alphas_bar[timestep].item()
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_0 = ((x_t - sigma * eps) / signal).clamp(-1, 1)
    return torch.cat([(x_t - signal * x_0) / sigma, prediction[:, channels:]], dim=1)


def _solver_step(
    solver: Solver, scheduler: object, prediction: Tensor, t: Tensor, x: Tensor, batch: Batch, k: int
) -> Tensor:
    if not solver.stochastic:
        return scheduler.step(prediction, t, x, return_dict=False)[0]
    # A scheduler draws from the generators it is given, one per picture: fresh ones for every step.
    generators = [_generator(batch.seed, index, k + 1) for index in batch.indices]
    return scheduler.step(prediction, t, x, generator=generators, return_dict=False)[0]


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
    model: DynamicDepth, plan: DepthPlan | None, solver: str, num_steps: int, cfg_scale: float
) -> DepthPlan:
    """The plan to run, checked against the model and the request. None is the full plan.

    Raises:
        PlanError: the plan is for another model, solver or step count, or is unguided where guidance is asked for.
    """
    full = full_plan(model, solver, num_steps, cfg_scale)
    if plan is None:
        return full
    bound = bool(plan.trunk or plan.exits)
    plan.check(
        depths=model.depths,
        trunk=model.trunk_hash() if bound else None,
        exits=model.exits_hash() if bound else None,
        timesteps=full.timesteps,
        solver=solver,
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
    plan: DepthPlan | None = None,
    solver: str = "ddim",
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
    `stats` times every step. on_batch(n) is called after each batch of n pictures.

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
            "solver": solver,
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
