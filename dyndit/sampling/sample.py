"""Draw pictures under a plan."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dyndit import manifest
from dyndit.errors import InputError
from dyndit.models.conditions import Value
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, Router, bind
from dyndit.plans.step import NoGuide
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start, to_uint8
from dyndit.sampling.solvers import AnySolver
from dyndit.sampling.store import TIMES, Drawn, Store, added


@dataclass(frozen=True)
class Samples:
    """Result of a sampling.

    pictures: (N, C, H, W) uint8 of a pixel-space model; other models give `latents` for a decoder. labels: the class or
    the caption of each picture.
    batch_seconds: wall time from noise to uint8, per batch. step_seconds, network_seconds: per step, summed over
    batches, if `stats` is set.
    """

    pictures: Tensor
    latents: Tensor | None
    labels: tuple[Value, ...]
    plan: DepthPlan
    seed: int
    batch_seconds: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    network_seconds: tuple[float, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Return the wall time of all batches."""
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


def check_request(model: DynamicDepth, labels: Sequence[Value], batch_size: int, seed: int) -> list[Value]:
    """Refuse labels that the model lacks (it would use wrong classes), no pictures, and empty batches.

    -> the labels as plain numbers or text.

    Raises:
        InputError: names the flag.
    """
    labels = model.backbone.condition.plain(labels)
    if not labels:
        raise InputError("--num-images 0: expected at least 1")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected at least 1")
    if seed < 0:
        raise InputError(f"--seed {seed}: expected at least 0")
    return labels


def sample(
    model: DynamicDepth,
    labels: Sequence[Value],
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
    """Draw one picture per label: the number of a class, or a caption for a model of captions.

    Picture i has index first_index + i. `strict` pads every batch to `batch_size`: kernels then see one shape, and
    pictures are bit-equal in any grouping. Without `strict` they are equal to 1/255.
    solver: a name of `SOLVERS`, or a diffusers scheduler. `stats` times every step. on_batch(n) is called after each
    batch of n pictures. All pictures are in memory at the end; `draw` holds one batch, `sample_into` writes to disk.

    Raises:
        InputError: a label or setting out of range, or a plan that does not fit (PlanError).
    """
    labels = check_request(model, labels, batch_size, seed)
    plan = resolve_plan(model, plan, solver, num_steps, cfg_scale)
    drawn = []
    options = {"batch_size": batch_size, "strict": strict, "stats": stats}
    ids = range(first_index, first_index + len(labels))
    for batch in batches(model, labels, ids, plan, Guidance(cfg_scale, guided_channels), solver, seed, **options):
        drawn.append(batch)
        if on_batch is not None:
            on_batch(len(batch.ids))
    result = torch.cat([batch.x for batch in drawn])
    empty = torch.empty(0, dtype=torch.uint8)
    return Samples(
        pictures=result if model.pixel_space else empty,
        latents=None if model.pixel_space else result,
        labels=tuple(labels),
        plan=plan,
        seed=seed,
        batch_seconds=tuple(batch.seconds for batch in drawn),
        step_seconds=added(batch.step_seconds for batch in drawn),
        network_seconds=added(batch.network_seconds for batch in drawn),
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


def draw(
    model: DynamicDepth,
    labels: Sequence[Value],
    *,
    ids: Sequence[int] | None = None,
    plan: DepthPlan | Router | None = None,
    solver: AnySolver = "ddim",
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    strict: bool = False,
    stats: bool = False,
) -> Iterator[Drawn]:
    """Draw one picture per label and yield each batch. `sample` collects them.

    ids: the pictures' numbers (default: 0, 1, ...). Picture i is a function of (seed, label, i) alone, so
    processes can share the numbers: `draw(model, labels[a:b], ids=range(a, b))`.

    Raises:
        InputError: raised at the call, as `sample`; or numbers below 0, or another number of ids than labels.
    """
    labels = check_request(model, labels, batch_size, seed)
    ids = range(len(labels)) if ids is None else ids
    if len(ids) != len(labels) or min(ids) < 0:
        raise InputError(f"ids: {len(ids)} from {min(ids, default=0)} on; expected {len(labels)}, a number per label")
    plan, guidance = resolve_plan(model, plan, solver, num_steps, cfg_scale), Guidance(cfg_scale, guided_channels)
    options = {"batch_size": batch_size, "strict": strict, "stats": stats}
    return batches(model, labels, ids, plan, guidance, solver, seed, **options)


def batches(
    model: DynamicDepth,
    labels: Sequence[Value],
    ids: Sequence[int],
    plan: DepthPlan,
    guidance: Guidance,
    solver: AnySolver,
    seed: int,
    *,
    batch_size: int,
    strict: bool = False,
    stats: bool = False,
) -> Iterator[Drawn]:
    """Draw as `draw`, for a checked request and a plan from `resolve_plan`."""
    device = next(model.parameters()).device
    for low in range(0, len(ids), batch_size):
        mine, indices = list(labels[low : low + batch_size]), list(ids[low : low + batch_size])
        kept, per_step, in_network = len(mine), [0.0] * plan.num_steps, [0.0] * plan.num_steps
        if strict:
            mine += [mine[-1]] * (batch_size - kept)
            indices += [indices[-1]] * (batch_size - kept)

        def on_step(k: int, seconds: float, network: float, per_step=per_step, in_network=in_network) -> None:
            per_step[k], in_network[k] = seconds, network

        batch = Batch(model.backbone.condition.of(mine, device), tuple(indices), seed)
        began = time.perf_counter()
        trajectory = start(model, batch, solver, plan.num_steps)
        x = advance(model, batch, trajectory, plan, guidance, on_step=on_step if stats else None).x
        x = to_uint8(x).cpu() if model.pixel_space else x.cpu()
        seconds = time.perf_counter() - began
        times = (tuple(per_step), tuple(in_network)) if stats else ((), ())
        yield Drawn(tuple(indices[:kept]), tuple(mine[:kept]), x[:kept], seconds, *times)


@dataclass(frozen=True)
class Stored:
    """A set of pictures on disk, complete or not.

    manifest: read from the folder. If "complete" is true, all pictures exist, and the manifest holds their times.
    num_drawn: number of pictures that this call added.
    """

    folder: Path
    plan: DepthPlan
    manifest: dict[str, object]
    num_drawn: int


def sample_into(
    out: Path,
    model: DynamicDepth,
    classes: Sequence[Value] | None,
    num_images: int,
    *,
    ids: Sequence[int] | None = None,
    plan: DepthPlan | Router | None = None,
    solver: AnySolver = "ddim",
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    strict: bool = False,
    stats: bool = False,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
    autoencoder: str = "",
    origin: str = "plan",
    on_progress: Callable[[int, int], None] | None = None,
) -> Stored:
    """Draw a set of pictures into the folder `out`. Existing pictures stay; a finished set does not change.

    Picture i has class classes[i % len(classes)] and is a function of (seed, class, i) alone. classes: numbers of
    classes, or captions; None takes every class, or the model's own prompts, in turn.
    ids: the numbers to draw, of 0 to num_images - 1 (default: all). Processes can share the numbers and draw into one
    folder: `ids=range(0, 25_000)`, `ids=range(25_000, 50_000)`. The process that adds the last picture finishes the
    set. Both processes draw a batch that they share, so cut at multiples of batch_size.
    to_pictures: the decoder of latents, (B, C, h, w) -> uint8 (B, 3, H, W). autoencoder: its hash, for the manifest.
    origin: the plan's name in messages. on_progress(done, all) counts pictures. Other options: see `sample`.

    Raises:
        InputError: before any write: see `sample`, or `out` holds another run or other files. Later: the disk is full,
            or a picture of the folder is damaged.
    """
    labels = model.backbone.condition.in_turn(num_images) if classes is None else classes
    labels = [labels[i % len(labels)] for i in range(num_images)] if labels else []
    labels = check_request(model, labels, batch_size, seed)
    if not model.pixel_space and to_pictures is None:
        raise InputError("to_pictures: missing; the model makes latents, expected their decoder")
    wanted = set(range(num_images) if ids is None else ids)
    if odd := sorted(wanted - set(range(num_images))):
        raise InputError(f"ids: {odd[0]}; expected 0 to {num_images - 1}")
    plan = resolve_plan(model, plan, solver, num_steps, cfg_scale, origin=origin)
    settings = {
        "verb": "sample",
        "model": model.identity.backbone,
        "exits": model.identity.exits,
        "solver": plan.solver,
        "steps": num_steps,
        "cfg_scale": cfg_scale,
        "guided_channels": guided_channels,
        "labels": "in turn" if classes is None else tuple(classes),
        "num_images": num_images,
        "seed": seed,
        "plan_steps": list(map(str, plan.steps)),
        "autoencoder": autoencoder,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    store, facts = Store(Path(out), tuple(labels)), {"plan": _facts(plan)}
    found = manifest.claim(store.folder, settings, complete=False, **facts)
    missing = store.missing()
    if found is not None and found.get("complete") is True:
        if not missing and store.has_overviews:
            store.drop_times()
            return Stored(store.folder, plan, found, 0)
        facts |= {name: found[name] for name in TIMES if name in found}
        store.describe(settings, complete=False, **facts)
    todo = [batch for batch in store.batches(batch_size) if not missing.isdisjoint(wanted.intersection(batch))]
    numbers = [i for batch in todo for i in batch]  # whole batches; only the last batch of the set may be smaller
    guidance, device = Guidance(cfg_scale, guided_channels), str(next(model.parameters()).device)
    options = {"batch_size": batch_size, "strict": strict, "stats": stats}
    drawing = batches(model, [labels[i] for i in numbers], numbers, plan, guidance, solver, seed, **options)
    machine, part, done = manifest.machine(device), _name(wanted), num_images - len(missing)
    if on_progress is not None:
        on_progress(done, num_images)
    for drawn in drawing:
        began = time.perf_counter()
        pictures = drawn.x if model.pixel_space else to_pictures(drawn.x)
        # Write times before pictures: every batch on disk then has its time.
        store.note(part, drawn, machine, drawn.seconds + time.perf_counter() - began)
        rows = [row for row, i in enumerate(drawn.ids) if i in wanted and i in missing]
        store.add([drawn.ids[row] for row in rows], pictures[rows])
        done += len(rows)
        if on_progress is not None:
            on_progress(done, num_images)
    if not store.missing():
        store.finish(settings, facts)
    return Stored(store.folder, plan, store.manifest, done - num_images + len(missing))


def _facts(plan: DepthPlan) -> dict[str, object]:
    """Return the facts about a plan that a manifest holds."""
    return {
        "router": plan.router,
        "settings": plan.settings_text,
        "budget": plan.budget,
        "predicted_fd": plan.figures.get("predicted_fd"),
        "share_of_blocks": plan.share_of_blocks,
        "mean_depth": plan.mean_depth,
    }


def _name(ids: set[int]) -> str:
    """Name some of a set's numbers. Each process writes its times to a file of this name."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:8]


def unguided(plan: DepthPlan) -> DepthPlan:
    """Return the plan without guides at the same guidance scale: an empty guidance interval."""
    return plan.with_steps([replace(step, guide=NoGuide()) for step in plan.steps])
