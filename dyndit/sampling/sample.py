"""Draw pictures under a plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, Router, bind
from dyndit.plans.step import NoGuide
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start, to_uint8
from dyndit.sampling.solvers import AnySolver


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
    origin: str = "plan",
) -> DepthPlan:
    """Return the plan to run, bound to the model and the request. A router writes it; None is the full plan.

    Raises:
        PlanError: the plan is for another model, solver, guidance scale or step count.
    """
    full = full_plan(model, solver, num_steps, cfg_scale)
    if plan is None:
        return full
    written = plan(full, model.depths) if callable(plan) else plan
    return bind(written, model, full=full, cfg_scale=cfg_scale, origin=origin)


def check_request(model: DynamicDepth, labels: Sequence[int], batch_size: int, seed: int) -> None:
    """Refuse labels the model lacks (it would take them for others), no pictures, and empty batches.

    Raises:
        InputError: naming the flag.
    """
    model.backbone.condition.of(labels)
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
        batch = Batch(model.backbone.condition.of(mine, device), tuple(indices), seed)
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
    """The plan without guides, of the same guidance scale: the extreme of a guidance interval."""
    return plan.with_steps([replace(step, guide=NoGuide()) for step in plan.steps])
