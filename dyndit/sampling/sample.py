"""Draw pictures under a plan."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dyndit import bounds, manifest
from dyndit.errors import InputError
from dyndit.locks import locked
from dyndit.models.conditions import Value
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, Router, bind
from dyndit.plans.table import ShiftTable
from dyndit.progress import Advance, progress_bar
from dyndit.sampling.budget import plan_within
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, full_plan, start, to_uint8
from dyndit.sampling.loop import advance as run
from dyndit.sampling.samples import Samples
from dyndit.sampling.solvers import AnySolver
from dyndit.sampling.store import TIMES, Drawn, Store, added


def resolve_plan(
    model: DynamicDepth,
    plan: DepthPlan | Router | None,
    solver: AnySolver,
    num_steps: int,
    cfg_scale: float,
    *,
    origin: str = "plan",
) -> DepthPlan:
    """Return the plan to run, checked by `bind`. A router writes it; None is the full plan."""
    full = full_plan(model, solver, num_steps, cfg_scale)
    if plan is None:
        return full
    written = plan(full, model.depths) if callable(plan) else plan
    return bind(written, model, full=full, cfg_scale=cfg_scale, origin=origin)


def check_shape(model: DynamicDepth, shape: tuple[int, ...] | None) -> None:
    """Raise InputError for a shape (C, ...) that the backbone does not take. None is the model's own."""
    if shape is not None and not model.backbone.accepts(shape):
        found, usual = (" ".join(map(str, each[1:])) for each in (shape, model.backbone.sample_shape))
        raise InputError(f"--shape {found}: expected {usual}, or another shape that this model takes")


def check_request(model: DynamicDepth, labels: Sequence[Value], batch_size: int, seed: int) -> None:
    """Raise InputError for labels that the model lacks (it would use wrong classes), no pictures, or empty batches."""
    model.backbone.condition.plain(labels)
    if not labels:
        raise InputError("--num-images 0: expected at least 1")
    bounds.check(batch_size=batch_size, seed=seed)


@dataclass(frozen=True)
class Sampling:
    """Settings of a sampling.

    plan: a plan, or a router that writes one; None is the full plan. solver: a name of `SOLVERS`, or a diffusers
    scheduler; None is the usual one of the model's process. guided_channels: see `Guidance`. strict: pad every batch to
    `batch_size`. Kernels then see one shape, and pictures are bit-equal in any grouping at this batch size; else they
    are equal to 1/255. stats: time every step. shape: (C, ...) of a picture or clip, for a model that takes
    several; None is the model's own.
    """

    plan: DepthPlan | Router | None = None
    solver: AnySolver | None = None
    num_steps: int = 20
    cfg_scale: float = 1.5
    guided_channels: int | None = None
    seed: int = 0
    batch_size: int = 64
    strict: bool = False
    stats: bool = False
    shape: tuple[int, ...] | None = None

    def bound(self, model: DynamicDepth, labels: Sequence[Value], origin: str = "plan") -> Self:
        """Check the request, and return the settings with the plan to run: `check_request`, `resolve_plan`."""
        check_request(model, labels, self.batch_size, self.seed)
        if not bounds.is_number(self.cfg_scale):
            raise InputError(f"cfg_scale {self.cfg_scale}: expected a finite number")
        bounds.check(cfg_scale=self.cfg_scale, guided_channels=self.guided_channels)
        if (self.guided_channels or 0) > (most := model.backbone.in_channels):
            raise InputError(f"--guided-channels {self.guided_channels}: expected at most {most}, as the model has")
        check_shape(model, self.shape)
        solver = self.solver or model.process.usual_solver
        plan = resolve_plan(model, self.plan, solver, self.num_steps, self.cfg_scale, origin=origin)
        return replace(self, plan=plan, solver=solver)

    @property
    def running(self) -> DepthPlan:
        """Return the plan to run. Raises TypeError before `bound` has resolved it."""
        if not isinstance(self.plan, DepthPlan):
            raise TypeError("plan: not bound yet; expected `Sampling.bound` before")
        return self.plan

    def batches(
        self, model: DynamicDepth, labels: Sequence[Value], ids: Sequence[int], advance: Advance | None = None
    ) -> Iterator[Drawn]:
        """Draw one picture per label, numbered `ids`, and yield each batch. The settings come from `bound`.

        advance: told the sampling steps of all batches.
        """
        guidance, device = Guidance(self.cfg_scale, self.guided_channels), next(model.parameters()).device
        timed: list[tuple[float, float]] = []
        on_step = (lambda _, *seconds: timed.append(seconds)) if self.stats else None
        starts, done = range(0, len(ids), self.batch_size), 0

        def stepped(*_: object) -> None:
            nonlocal done
            done += 1
            if advance is not None:
                advance(done, len(starts) * self.running.num_steps)

        for low in starts:
            part = slice(low, low + self.batch_size)
            mine, indices = tuple(labels[part]), tuple(ids[part])
            padding = self.strict * (self.batch_size - len(mine))
            condition = model.backbone.condition.of(mine + mine[-1:] * padding, device)
            batch = Batch(condition, indices + indices[-1:] * padding, self.seed)
            timed.clear()
            began = time.perf_counter()
            trajectory = start(
                model, batch, self.solver or model.process.usual_solver, self.running.num_steps, shape=self.shape
            )
            x = run(model, batch, trajectory, self.running, guidance, on_step=on_step, on_step_end=stepped).x
            x = to_uint8(x).cpu() if model.pixel_space else x.cpu()
            seconds = time.perf_counter() - began
            yield Drawn(indices, mine, x[: len(mine)], seconds, *zip(*timed, strict=True))


def sample(
    model: DynamicDepth,
    labels: Sequence[Value],
    *,
    plan: DepthPlan | Router | str | Path | None = None,
    budget: float | None = None,
    table: ShiftTable | str | Path | None = None,
    solver: AnySolver | None = None,
    num_steps: int | None = None,
    cfg_scale: float | None = None,
    guided_channels: int | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = 64,
    strict: bool = False,
    stats: bool = False,
    shape: tuple[int, ...] | None = None,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
    on_batch: Callable[[int], None] | None = None,
    progress: bool = True,
) -> Samples:
    """Draw one picture per label, and hold all of them in memory.

        drawn = dyndit.sample(model, labels=[3, 7], num_steps=20)                      # full depth
        quick = dyndit.sample(model, labels=[3, 7], plan=plan, num_steps=20)           # under a plan, same seeds
        drawn.pictures                                                                 # (2, C, H, W) uint8

    model: from `dyndit.load`, from training, or `DynamicDepth(backbone)`.
    labels: the class of each picture; captions for a model of captions.
    plan: a `DepthPlan`, its file ("plan.json"), or a router that writes one, such as `functools.partial(dyndit.ramp,
    start=4)`. None: full depth at every step.
    budget: a share of full depth's time, in place of a plan; a plan is searched in seconds.
    table: the shift table to search on, its file or its folder. None: the one in the folder that the model is from.
    solver: a name, such as "ddim", "unipc", "ddpm" or "flow-euler", or a scheduler of diffusers. None: the plan's, else
    the usual one of the model's process: "ddim" or "flow-euler".
    num_steps: sampling steps. None: the plan's, else 20.
    cfg_scale: scale of classifier-free guidance; 1 is unguided, and costs one pass a step in place of two. None: the
    plan's, else 1.5.
    guided_channels: guide only the first so many channels (the published DiT guides 3). None: all.
    seed: picture i depends on the seed, its label and its index alone, not on the batch that it is drawn in.
    first_index: index of the first picture; picture i has index first_index + i.
    batch_size: pictures at a time. All are in memory at the end.
    strict: pad every batch to `batch_size`. Pictures are then bit-equal in any grouping; else equal to 1/255.
    stats: time every step, in `step_seconds` and `network_seconds` of the result.
    shape: (C, ...) of a picture or clip, for a model that takes several shapes. None: the model's own.
    to_pictures: decoder of latents, (B, C, h, w) -> (B, 3, H, W) uint8. None: the result holds latents.
    on_batch: called with n after each batch of n pictures.
    progress: show how far the sampling is.

    `dyndit.sampling.sample.sample_into` draws a large set to disk, and `draw` yields batches.

    -> `Samples`: pictures (N, C, H, W) uint8, or latents of a model of latents; labels, plan and times.

    Raises:
        InputError: a label or setting out of range, a plan and a budget, no table, or a plan that does not fit
            (PlanError).
    """
    labels = tuple(model.backbone.condition.plain(labels))
    origin = str(plan) if isinstance(plan, str | Path) else "plan"
    plan = DepthPlan.load(Path(plan)) if isinstance(plan, str | Path) else plan
    if budget is not None or table is not None:
        if plan is not None or budget is None:
            raise InputError("plan, budget, table: expected a plan, or a budget with or without a table")
        plan = plan_within(
            model, budget, table, solver or model.process.usual_solver, 20 if num_steps is None else num_steps
        )
    usual = plan if isinstance(plan, DepthPlan) else None
    solver = solver or (usual.solver if usual else None)
    num_steps = num_steps if num_steps is not None else usual.num_steps if usual else 20
    cfg_scale = cfg_scale if cfg_scale is not None else usual.cfg_scale if usual else 1.5
    asked = Sampling(plan, solver, num_steps, cfg_scale, guided_channels, seed, batch_size, strict, stats, shape)
    asked, drawn = asked.bound(model, labels, origin), []
    ids = range(first_index, first_index + len(labels))
    with progress_bar(f"sampling {len(labels)} pictures", unit="steps", shown=progress) as advance:
        for batch in asked.batches(model, labels, ids, advance):
            drawn.append(batch)
            if on_batch is not None:
                on_batch(len(batch.ids))
    latents = None if model.pixel_space else torch.cat([batch.x for batch in drawn])
    if latents is None:
        pictures = torch.cat([batch.x for batch in drawn])
    else:
        pictures = torch.empty(0, dtype=torch.uint8) if to_pictures is None else to_pictures(latents).cpu()
    settings = run_settings(model, asked, labels, len(labels))
    return Samples(
        pictures=pictures,
        latents=latents,
        labels=labels,
        plan=asked.running,
        seed=seed,
        batch_seconds=tuple(batch.seconds for batch in drawn),
        step_seconds=added(batch.step_seconds for batch in drawn),
        network_seconds=added(batch.network_seconds for batch in drawn),
        settings=vars(asked) | {"solver": asked.running.solver, "first_index": first_index},
        run=settings | ({"first_index": first_index} if first_index else {}),
        facts=_facts(asked.running),
        device=str(next(model.parameters()).device),
    )


def draw(
    model: DynamicDepth, labels: Sequence[Value], *, ids: Sequence[int] | None = None, **settings: Any
) -> Iterator[Drawn]:
    """Draw one picture per label and yield each batch. `sample` collects them.

    ids: the pictures' numbers (default: 0, 1, ...). Picture i is a function of (seed, label, i) alone, so
    processes can share the numbers: `draw(model, labels[a:b], ids=range(a, b))`. settings: see `Sampling`.

    Raises:
        InputError: raised at the call, as `sample`; or numbers below 0, or another number of ids than labels.
    """
    labels = tuple(model.backbone.condition.plain(labels))
    asked = Sampling(**settings).bound(model, labels)
    ids = range(len(labels)) if ids is None else ids
    if len(ids) != len(labels) or min(ids) < 0:
        raise InputError(f"ids: {len(ids)} from {min(ids, default=0)} on; expected {len(labels)}, a number per label")
    return asked.batches(model, labels, ids)


@dataclass(frozen=True)
class Stored:
    """A set of pictures on disk, complete or not.

    manifest: read from the folder. If "complete" is true, all pictures exist, and the manifest holds their times.
    num_drawn: number of pictures that this call added.
    """

    folder: Path
    plan: DepthPlan
    manifest: dict[str, Any]
    num_drawn: int


def sample_into(
    out: Path,
    model: DynamicDepth,
    classes: Sequence[Value] | Literal["random"] | None,
    num_images: int,
    *,
    ids: Sequence[int] | None = None,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
    autoencoder: str = "",
    origin: str = "plan",
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Stored:
    """Draw a set of pictures into the folder `out`. Existing pictures stay; a finished set does not change.

    Picture i has class classes[i % len(classes)] and is a function of (seed, class, i) alone. classes: numbers of
    classes, or captions; None takes every class, or the model's own prompts, in turn; "random" draws the class of
    picture i from (seed, i).
    ids: the numbers to draw, of 0 to num_images - 1 (default: all). Processes can share the numbers and draw into one
    folder: `ids=range(0, 25_000)`, `ids=range(25_000, 50_000)`. The process that adds the last picture finishes the
    set. Both processes draw a batch that they share, so cut at multiples of batch_size.
    to_pictures: the decoder of latents, (B, C, h, w) -> uint8 (B, 3, H, W). autoencoder: its hash, for the manifest.
    origin: the plan's name in messages. on_progress(done, all) counts pictures. settings: see `Sampling`.

    Raises:
        InputError: before any write: see `sample`, or `out` holds another run or other files, or another process draws
            there. Later: the disk is full, or a picture of the folder is damaged.
    """
    if classes == "random":
        labels = random_labels(model, num_images, settings.get("seed", 0))
    else:
        labels = model.backbone.condition.in_turn(num_images) if classes is None else classes
    labels = model.backbone.condition.plain([labels[i % len(labels)] for i in range(num_images)] if labels else [])
    asked = Sampling(**settings).bound(model, labels, origin)
    decode = to_uint8 if to_pictures is None else to_pictures
    if not model.pixel_space and to_pictures is None:
        raise InputError("to_pictures: missing; the model makes latents, expected their decoder")
    wanted = set(range(num_images) if ids is None else ids)
    if odd := sorted(wanted - set(range(num_images))):
        raise InputError(f"ids: {odd[0]}; expected 0 to {num_images - 1}")
    plan = asked.running
    run = run_settings(model, asked, classes, num_images, autoencoder)
    store, facts = Store(Path(out), tuple(labels)), dict[str, Any](plan=_facts(plan))
    # Processes that share the numbers hold the folder together, once one of them has claimed it.
    with locked(store.folder, shared=ids is not None, wait=0.0 if ids is None else 10.0) as lock:
        found = manifest.claim(store.folder, run, complete=False, **facts)
        if ids is not None:
            lock.share()
        missing = store.missing()
        if found is not None and found.get("complete") is True:
            if not missing and store.has_overviews:
                store.drop_times()
                return Stored(store.folder, plan, found, 0)
            facts |= {name: found[name] for name in TIMES if name in found}
            store.describe(run, complete=False, **facts)
        todo = {i // asked.batch_size for i in missing & wanted}
        numbers = [i for i in range(num_images) if i // asked.batch_size in todo]  # whole batches of the whole set
        machine, done = manifest.machine(str(next(model.parameters()).device)), num_images - len(missing)
        part = hashlib.sha256(json.dumps(sorted(wanted)).encode()).hexdigest()[:8]  # names this process's file of times
        if on_progress is not None:
            on_progress(done, num_images)
        labels = [labels[i] for i in numbers]
        with progress_bar(f"sampling {len(numbers)} pictures", unit="steps") as advance:
            for drawn in asked.batches(model, labels, numbers, advance):
                began = time.perf_counter()
                pictures = drawn.x if model.pixel_space else decode(drawn.x)
                # Write times before pictures: every batch on disk then has its time.
                store.note(part, drawn, machine, drawn.seconds + time.perf_counter() - began)
                rows = [row for row, i in enumerate(drawn.ids) if i in wanted and i in missing]
                store.add([drawn.ids[row] for row in rows], pictures[rows])
                done += len(rows)
                if on_progress is not None:
                    on_progress(done, num_images)
        if not store.missing():
            store.finish(run, facts)
        return Stored(store.folder, plan, store.manifest, done - num_images + len(missing))


def random_labels(model: DynamicDepth, num: int, seed: int) -> list[int]:
    """Draw a class for each picture, uniformly; picture i's is a function of (seed, i)."""
    classes = getattr(model.backbone.condition, "num_classes", 0)
    if not classes:
        raise InputError("--class-labels random: the model has no classes; expected no class labels")
    digests = (hashlib.sha256(f"label {seed} {i}".encode()).digest() for i in range(num))
    return [int.from_bytes(digest, "big") % classes for digest in digests]


def run_settings(
    model: DynamicDepth,
    asked: Sampling,
    classes: Sequence[Value] | Literal["random"] | None,
    num_images: int,
    autoencoder: str = "",
) -> dict[str, Any]:
    """Return the settings that make a set of pictures, for its manifest.  asked: from `Sampling.bound`."""
    run: dict[str, Any] = {
        "verb": "sample",
        "model": model.identity.backbone,
        "exits": model.identity.exits,
        "solver": asked.running.solver,
        "steps": asked.num_steps,
        "cfg_scale": asked.cfg_scale,
        "guided_channels": asked.guided_channels,
        "labels": "in turn" if classes is None else classes if classes == "random" else tuple(classes),
        "num_images": num_images,
        "seed": asked.seed,
        "plan_steps": list(map(str, asked.running.steps)),
        "autoencoder": autoencoder,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    return run if asked.shape is None else run | {"shape": asked.shape}


def _facts(plan: DepthPlan) -> dict[str, Any]:
    """Return the facts about a plan that a manifest holds."""
    return {
        "router": plan.router,
        "note": plan.note,
        "settings": plan.settings_text,
        "budget": plan.budget,
        "predicted_fd": plan.figures.get("predicted_fd"),
        "share_of_blocks": plan.share_of_blocks,
        "mean_depth": plan.mean_depth,
    }


def unguided(plan: DepthPlan) -> DepthPlan:
    """Return the plan without guides at the same guidance scale: an empty guidance interval."""
    return plan.with_steps([step.unguided() for step in plan.steps])
