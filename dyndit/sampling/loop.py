"""The one sampling loop: from noise to pictures, a step at a time.

Picture i is a function of (seed, class, index) alone. Its first noise comes from a generator of (seed, index). The
noise of step k of a stochastic solver comes from a generator of (seed, index, k + 1).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dyndit.clock import Clock
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.conditions import Condition
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.solvers import (
    AnySolver,
    calls_of,
    draws_noise,
    make_scheduler,
    solver_name,
    solvers_of,
    takes_variance,
    timesteps_of,
)


def full_plan(model: DynamicDepth, solver: AnySolver, num_steps: int, cfg_scale: float) -> DepthPlan:
    """Plan full depth at every step. Raises InputError if the model was not trained for the solver or the guidance."""
    given: Any = solver
    timesteps = timesteps_of(solver, num_steps, model.process)
    calls = tuple(map(len, calls_of(make_scheduler(solver, num_steps, model.process))))
    backbone, name = model.backbone, solver_name(solver)
    if cfg_scale != 1 and not backbone.condition.guided:
        raise InputError(f"--cfg-scale {cfg_scale:g}: this model was trained without a null class; expected 1")
    if not (isinstance(solver, str) or model.pixel_space) and given.config.get("clip_sample"):
        raise InputError(f"scheduler {name}: clips x0 to [-1, 1], this model makes latents; expected clip_sample=False")
    if takes_variance(solver):
        if backbone.out_channels == backbone.in_channels:
            others = ", ".join(other for other in solvers_of(model.process) if not takes_variance(other))
            raise InputError(f"--solver {name}: this model predicts no variance; expected one of {others}")
        whole = diffusers.DDPMScheduler | diffusers.DDPMParallelScheduler
        if name != "ddpm" and not isinstance(solver, whole) and backbone.in_channels != 3:
            # Multistep solvers with this setting cut every prediction to three channels.
            raise InputError(
                f"scheduler {name}: takes {given.config.variance_type} variances of 3 channels alone, the model "
                f"has {backbone.in_channels}; expected variance_type=None"
            )
    return DepthPlan.full(timesteps, model.num_blocks, name, cfg_scale, calls)


def picture_generator(*key: int) -> torch.Generator:
    """Make a CPU generator from a key alone: (seed, index), or (seed, index, step + 1)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def noise(seed: int | Sequence[int], indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal (B, *shape) on the CPU, row i from (seed, indices[i]) alone.

    seed: one for all rows, or one per row.
    """
    return torch.stack([torch.randn(shape, generator=picture_generator(*key)) for key in _keys(seed, indices)])


def _keys(seed: int | Sequence[int], indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip((seed,) * len(indices) if isinstance(seed, int) else seed, indices, strict=True)


@dataclass
class Trajectory:
    """The state of a sampling under way: x and the memories of solver and model.

    memory: value that the model's last step left for the next step (`DynamicDepth.predict`); None at the start.
    """

    x: Tensor
    scheduler: Any
    memory: Any = None

    def fork(self) -> "Trajectory":
        """Copy the trajectory, to continue it in another way."""
        return Trajectory(self.x, copy.deepcopy(self.scheduler), copy.deepcopy(self.memory))


@dataclass(frozen=True)
class Batch:
    """The pictures of a batch.

    condition: B rows on the model's device; indices: B host integers; seed: one for all pictures, or one per picture.
    generators: one for the batch, or a list of one per picture. They replace the generators of (seed, index).
    """

    condition: Condition
    indices: tuple[int, ...]
    seed: int | tuple[int, ...] = 0
    generators: torch.Generator | list[torch.Generator] | None = None

    @property
    def device(self) -> torch.device:
        """Return the condition's device. The pictures are drawn on it."""
        rows = self.condition
        return rows.device if isinstance(rows, Tensor) else next(iter(rows.rows.values())).device

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the first noise of every picture, standard normal (B, *shape)."""
        if self.generators is None:
            return noise(self.seed, self.indices, shape).to(self.device)
        return randn_tensor((len(self.indices), *shape), self.generators, self.device, torch.float32)

    def generators_of(self, step: int) -> torch.Generator | list[torch.Generator]:
        """Return the generators of a stochastic solver at a step: the given generators, or fresh ones."""
        if self.generators is not None:
            return self.generators
        return [picture_generator(*key, step + 1) for key in _keys(self.seed, self.indices)]


def batch_in_turn(model: DynamicDepth, indices: Sequence[int], seed: int) -> Batch:
    """Make the batch of pictures `indices` of an evaluation set: every class in turn."""
    condition = model.backbone.condition
    values = [value for index in indices for value in condition.in_turn(1, index)]
    return Batch(condition.of(values, next(model.parameters()).device), tuple(indices), seed)


StepHook = Callable[[int, float, float], None]
"""(step, seconds of the step, seconds of the network in it). The device is synchronised around both."""

StepEndHook = Callable[[int, Tensor, Tensor], Tensor | None]
"""(step, the scheduler's timestep, x after the step) -> the new x; None keeps x."""


@torch.inference_mode()
def start(
    model: DynamicDepth,
    batch: Batch,
    solver: AnySolver,
    num_steps: int,
    *,
    noise: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
) -> Trajectory:
    """Start a trajectory at the batch's own noise, or at `noise`, standard normal (B, C, H, W).

    shape: of a picture or clip, (C, ...); None is the model's `sample_shape`.
    """
    scheduler = make_scheduler(solver, num_steps, model.process)
    x = batch.noise(shape or model.backbone.sample_shape) if noise is None else noise
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
    """Run steps `first` to `stop - 1` of the plan on `trajectory`, in place. Every sampling runs this loop.

    The solver's state is kept in float32; the network computes in the precision of its weights. also_keep: exits whose
    gaps are stored at every full-depth step, even if the plan does not need them later.
    """
    scheduler, x, dtype = trajectory.scheduler, trajectory.x, next(model.parameters()).dtype
    with_variance, stochastic = takes_variance(scheduler), draws_noise(scheduler)
    conditions = [batch.condition]
    if guidance.scale != 1:
        conditions.append(model.backbone.condition.null(batch.condition))
    channels = model.backbone.in_channels
    clock = Clock(x.device) if on_step is not None else float
    time_dtype = torch.long if all(isinstance(t, int) for t in plan.timesteps) else x.dtype
    t: Any = None
    calls, k = calls_of(scheduler), first - 1
    for k in range(first, plan.num_steps if stop is None else stop):
        began, inside = clock(), 0.0
        timestep, work = plan.timesteps[k], plan.works[k]
        if also_keep and work.depths[0] == plan.num_blocks:
            work = work.keeping(tuple(also_keep))
        for t in scheduler.timesteps[calls[k].start : calls[k].stop]:
            x_t = model.process.network_input(x, t, scheduler)
            times = torch.full((len(x),), timestep, dtype=time_dtype, device=x.device)
            entered = clock()
            asked = x_t.to(dtype)
            branches = tuple(Inputs(asked, times, y) for y in conditions[: len(work.depths)])
            step = StepInputs(k, branches, work, plan.timesteps)
            predictions, trajectory.memory = model.predict(step, trajectory.memory)
            predictions = [p.to(x.dtype) for p in predictions]
            inside += clock() - entered
            prediction = predictions[0]
            if len(predictions) == 2:
                prediction = guidance.combine(*predictions, channels)
            if model.pixel_space:
                prediction = model.process.clamp(prediction, x_t, timestep, channels)
            if not with_variance:
                prediction = prediction[:, :channels]
            drawn = {"generator": batch.generators_of(k)} if stochastic else {}
            x = scheduler.step(prediction, t, x, return_dict=False, **drawn)[0]
        if on_step is not None:
            on_step(k, clock() - began, inside)
        if on_step_end is not None and (changed := on_step_end(k, t, x)) is not None:
            x = changed
    if k + 1 == plan.num_steps and not bool(torch.isfinite(x).all()):
        rows = torch.nonzero(~torch.isfinite(x).flatten(1).all(dim=1)).flatten().tolist()
        raise InputError(
            f"sampling: {len(rows)} pictures of the batch {batch.indices[0]} to {batch.indices[-1]} are not finite "
            f"after {plan.num_steps} steps; expected a model and a guidance scale that give finite numbers"
        )
    trajectory.x = x
    return trajectory


def to_uint8(x: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to 0..255, rounded without bias.  (B, C, ...) -> (B, C, ...) uint8."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
