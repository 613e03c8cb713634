"""The one sampling loop: from noise to pictures, a step at a time.

Picture i is a function of (seed, class, index) alone: its noise comes from a generator seeded with (seed, index), that
of a stochastic solver's step k from one seeded with (seed, index, k).
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, Step
from dyndit.plans.plan import REUSED, DepthPlan, guide_of
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.solvers import (
    AnySolver,
    draws_noise,
    make_scheduler,
    solver_name,
    solvers_of,
    takes_variance,
    timesteps_of,
)


def full_plan(model: DynamicDepth, solver: AnySolver, num_steps: int, cfg_scale: float) -> DepthPlan:
    """The original model at every step.

    Raises:
        InputError: the solver or the guidance asks for what the model was not trained to predict.
    """
    timesteps = timesteps_of(solver, num_steps, model.process)
    backbone, name = model.backbone, solver_name(solver)
    if cfg_scale != 1 and backbone.null_class is None:
        raise InputError(f"--cfg-scale {cfg_scale:g}: this model was trained without a null class; expected 1")
    if not (isinstance(solver, str) or model.pixel_space) and solver.config.get("clip_sample"):
        raise InputError(f"scheduler {name}: clips x0 to [-1, 1], this model makes latents; expected clip_sample=False")
    if takes_variance(solver):
        if backbone.out_channels == backbone.in_channels:
            others = ", ".join(other for other in solvers_of(model.process) if not takes_variance(other))
            raise InputError(f"--solver {name}: this model predicts no variance; expected one of {others}")
        whole = diffusers.DDPMScheduler | diffusers.DDPMParallelScheduler
        if name != "ddpm" and not isinstance(solver, whole) and backbone.in_channels != 3:
            # The multistep solvers that know the setting cut every prediction to three channels.
            raise InputError(
                f"scheduler {name}: takes {solver.config.variance_type} variances of 3 channels alone, the model "
                f"has {backbone.in_channels}; expected variance_type=None"
            )
    return DepthPlan.full(timesteps, model.num_blocks, name, cfg_scale)


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
    scheduler = make_scheduler(solver, num_steps, model.process)
    x = batch.noise(state_shape(model)) if noise is None else noise
    return Trajectory(model.process.first_state(x, scheduler), scheduler)


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
    time_dtype = torch.long if all(isinstance(t, int) for t in plan.timesteps) else x.dtype
    for k in range(first, plan.num_steps if stop is None else stop):
        began = clock()
        t, timestep = scheduler.timesteps[k], plan.timesteps[k]
        x_t = model.process.network_input(x, t, scheduler)
        times = torch.full_like(batch.labels, timestep, dtype=time_dtype)
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
            prediction = model.process.clamp(prediction, x_t, timestep, channels)
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


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] to 0..255, rounded without bias.  (B, C, H, W) -> (B, C, H, W) uint8."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
