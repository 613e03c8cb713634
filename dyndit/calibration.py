"""Calibration: measure the table of distribution shifts, search a plan on it, and measure that plan.

The seeds here are kept apart from those a result is scored on: calibration draws its noise from `CALIBRATION_SEED`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyndit.analysis.extractors import Extractor, as_rgb
from dyndit.analysis.fidelity import Moments, frechet_distance, moments
from dyndit.cost import CostModel, measure_cost
from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError
from dyndit.plan import DepthPlan
from dyndit.routers.searched import Pair, ShiftTable, search
from dyndit.sampler import (
    Batch,
    Guidance,
    Trajectory,
    advance,
    balanced_labels,
    full_plan,
    sample,
    start,
    to_uint8,
)

CALIBRATION_SEED = 1_000_003
MAX_FEATURES, NUM_COMPONENTS = 256, 64

ToPictures = Callable[[Tensor], Tensor]
"""(B, C, H, W) at the end of a sampling -> (B, C, H, W) uint8: `to_uint8`, or a decoder of latents."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What the table is measured on.

    num_bands: bands of steps that are replaced together; each costs one continuation at full depth per pair.
    pairs: (conditional, unconditional) depths to measure; empty means `default_pairs` on `num_depths` depths.
    """

    num_pictures: int = 512
    num_bands: int = 10
    batch_size: int = 128
    seed: int = CALIBRATION_SEED
    pairs: tuple[Pair, ...] = ()
    num_depths: int = 8


def default_pairs(depths: Sequence[int], guided: bool, num_depths: int = 8) -> tuple[Pair, ...]:
    """Pairs worth measuring: a thinned grid of conditional depths; unconditional ones equal, about half, or none."""
    full = depths[-1]
    grid = _thinned(depths, num_depths)
    if not guided:
        return tuple((d, 0) for d in grid if d != full)
    pairs: list[Pair] = []
    for depth in grid:
        half = max((d for d in grid if 2 * d <= depth), default=0)
        pairs += [(depth, uncond) for uncond in dict.fromkeys((depth, half, 0))]
    return tuple(pair for pair in pairs if pair != (full, full))


def _thinned(depths: Sequence[int], num: int) -> list[int]:
    """At most `num` depths, evenly spread; the shallowest and L stay."""
    if len(depths) <= num:
        return list(depths)
    picks = torch.linspace(0, len(depths) - 1, num).round().long().tolist()
    return [depths[i] for i in sorted(set(picks))]


def measure_shifts(
    model: DynamicDepth,
    extractor: Extractor,
    reference: Moments,
    *,
    solver: str = "ddim",
    num_steps: int = 10,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    settings: CalibrationSettings | None = None,
    to_pictures: ToPictures = to_uint8,
    cost: CostModel | None = None,
    partial: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShiftTable:
    """Measure the paired-seed distribution shifts of every (band, pair).

    For each batch of seeds the full trajectory is run once; at each band's first step it forks, the band is run at
    the pair's depths, the rest at full depth. Sums over batches are kept in `partial`, from which an interrupted
    measurement goes on. on_progress(done, all) counts continuations.
    """
    settings = settings or CalibrationSettings()
    if settings.num_pictures <= len(reference.mean) or len(reference.mean) > MAX_FEATURES:
        raise InputError(
            f"--num-pictures {settings.num_pictures}: {extractor.name} has {len(reference.mean)} features; expected "
            f"more pictures than features, and at most {MAX_FEATURES} features (see `reduced`)"
        )
    full = full_plan(model, solver, num_steps, cfg_scale)
    pairs = settings.pairs or default_pairs(model.depths, cfg_scale != 1, settings.num_depths)
    bands = [b.tolist() for b in torch.arange(num_steps).tensor_split(min(settings.num_bands, num_steps))]
    guidance, device = Guidance(cfg_scale, guided_channels), next(model.parameters()).device
    labels = balanced_labels(settings.num_pictures, model.backbone.num_classes)
    batches = [
        range(low, min(low + settings.batch_size, settings.num_pictures))
        for low in range(0, settings.num_pictures, settings.batch_size)
    ]
    sizes = [settings.batch_size, settings.seed, len(labels)]
    key = json.dumps([solver, full.timesteps, pairs, bands, cfg_scale, guided_channels, *sizes])
    key += model.trunk_hash() + model.exits_hash() + extractor.fingerprint
    sums, done = _restore(partial, key)
    total = len(batches) * len(bands) * len(pairs)

    def features(trajectory: Trajectory) -> Tensor:
        return extractor.features(as_rgb(to_pictures(trajectory.x).cpu()))

    for number, indices in enumerate(batches):
        if number < done:
            continue
        mine = torch.tensor([labels[i] for i in indices], device=device)
        batch = Batch(mine, tuple(indices), settings.seed)
        trajectory, forks = start(model, batch, solver, num_steps), []
        for band in bands:
            forks.append(trajectory.fork())
            advance(model, batch, trajectory, full, guidance, first=band[0], stop=band[-1] + 1)
        base = features(trajectory)
        changes = []
        for band, fork in zip(bands, forks, strict=True):
            for pair in pairs:
                chosen = [pair if k in band else p for k, p in enumerate(full.pairs)]
                end = advance(model, batch, fork.fork(), full.with_pairs(chosen), guidance, first=band[0])
                f = features(end)
                changes.append(((f - base).sum(0), f.T @ f - base.T @ base))
                if on_progress is not None:
                    on_progress(number * len(bands) * len(pairs) + len(changes), total)
        fresh = {
            "base.mean": base.sum(0),
            "base.second": base.T @ base,
            "mean": torch.stack([mean for mean, _ in changes]),
            "second": torch.stack([second for _, second in changes]),
        }
        sums = {name: fresh[name] + sums[name] if sums else fresh[name] for name in fresh}
        if partial is not None:
            save_file(sums, partial, metadata={"key": key, "done": str(number + 1)})
    if cost is None:
        cost = measure_cost(model, batch_size=max(1, settings.batch_size // 2), solver=solver, cfg_scale=cfg_scale)
    n, shape = len(labels), (len(bands), len(pairs))
    edges = (*(float(full.timesteps[band[0]]) for band in bands), 0.0)
    return ShiftTable(
        edges=edges,
        pairs=pairs,
        mean=sums["mean"].unflatten(0, shape) / n,
        second=sums["second"].unflatten(0, shape) / n,
        base=Moments(sums["base.mean"] / n, sums["base.second"] / n, n),
        reference=reference,
        cost=cost,
        num_blocks=model.num_blocks,
        solver=solver,
        num_steps=num_steps,
        cfg_scale=cfg_scale,
        seed=settings.seed,
        num_pictures=n,
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        trunk=model.trunk_hash(),
        exits=model.exits_hash(),
        projection=extractor.projection,
    )


def reduced(extractor: Extractor, pictures: Tensor) -> tuple[Extractor, Moments]:
    """An extractor that a table can be measured with, and the moments of these real pictures (N, C, H, W) uint8.

    Of more than `MAX_FEATURES` features the `NUM_COMPONENTS` leading principal components of the pictures' are kept:
    a table holds a matrix per entry, and the search diagonalises thousands of them.
    """
    features = extractor.features(as_rgb(pictures))
    if features.shape[1] > MAX_FEATURES:
        _, vectors = torch.linalg.eigh(torch.cov(features.T))
        extractor = extractor.projected(vectors[:, -NUM_COMPONENTS:])
        features = features @ extractor.projection
    return extractor, moments(features)


def measure_shifts_into(
    path: Path, model: DynamicDepth, extractor: Extractor, reference: Moments, **options: object
) -> ShiftTable:
    """`measure_shifts`, resumable, with its table in the file `path` at the end."""
    partial, temporary = path.with_suffix(".partial"), path.with_suffix(".tmp")
    table = measure_shifts(model, extractor, reference, partial=partial, **options)
    table.save(temporary)
    temporary.replace(path)
    partial.unlink(missing_ok=True)
    return table


def _restore(partial: Path | None, key: str) -> tuple[dict[str, Tensor], int]:
    """Sums and number of batches of an interrupted measurement of the very same table, or nothing."""
    if partial is None or not partial.exists():
        return {}, 0
    try:
        with safe_open(partial, "pt") as file:
            metadata = file.metadata() or {}
        return (load_file(partial), int(metadata["done"])) if metadata.get("key") == key else ({}, 0)
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}, 0


def measure_moments(
    model: DynamicDepth,
    extractor: Extractor,
    plan: DepthPlan,
    *,
    num_pictures: int,
    seed: int,
    guided_channels: int | None = None,
    batch_size: int = 128,
    to_pictures: ToPictures = to_uint8,
) -> Moments:
    """Moments of the features of `num_pictures` pictures drawn under `plan`, classes in turn."""
    result = sample(
        model,
        balanced_labels(num_pictures, model.backbone.num_classes),
        plan=plan,
        solver=plan.solver,
        num_steps=plan.num_steps,
        cfg_scale=plan.cfg_scale,
        guided_channels=guided_channels,
        seed=seed,
        batch_size=batch_size,
    )
    pictures = result.pictures if model.pixel_space else to_pictures(result.latents)
    return moments(extractor.features(as_rgb(pictures)))


def plan_on_table(
    model: DynamicDepth,
    table: ShiftTable,
    *,
    budget: float,
    solver: str,
    num_steps: int,
    base: Moments | None = None,
) -> DepthPlan:
    """Search a plan on a stored table, without running the model (but to time it on a device new to the table).

    base: moments of full depth at these very steps, where they were measured.

    Raises:
        InputError: the budget is out of range, or the table is another model's.
    """
    for name, mine, theirs in (
        ("trunk", table.trunk, model.trunk_hash()),
        ("exits", table.exits, model.exits_hash()),
    ):
        if mine != theirs:
            raise InputError(f"shift table: measured on {name} {mine}, but the model's are {theirs or 'absent'}")
    device = next(model.parameters()).device.type
    if table.cost.device != device:  # the shifts hold anywhere, the times do not
        batch_size = table.cost.batch_size
        cost = measure_cost(model, batch_size=batch_size, solver=solver, cfg_scale=table.cfg_scale)
        table = replace(table, cost=cost)
    return search(table, full_plan(model, solver, num_steps, table.cfg_scale), budget, base=base)


def calibrate(
    model: DynamicDepth,
    *,
    budget: float,
    solver: str = "ddim",
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    table: ShiftTable | None = None,
    extractor: Extractor | None = None,
    reference: Moments | Tensor | None = None,
    settings: CalibrationSettings | None = None,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
) -> DepthPlan:
    """Search a plan for (solver, steps, budget) and report its predicted and measured Fréchet distance.

    The prediction starts from full depth at these very steps, measured on the table's own seeds; the plan's
    measured distance is on fresh seeds (`table.seed` + 1), as is full depth's next to it. `plan.figures` holds
    predicted_fd, measured_fd, predicted_fd_full, measured_fd_full, predicted_share_of_time, share_of_blocks.
    With a table but no extractor nothing is measured. Without a table one is measured first, with `extractor`
    against `reference`: moments, or real pictures (N, C, H, W) uint8. Keep what `measure_shifts` gives to search
    other budgets, step counts and solvers on it.

    Raises:
        InputError: the budget is out of range, the table is another model's or of another guidance scale, or
            neither a table nor what it takes to measure one was given.
    """
    if table is None:
        if extractor is None or reference is None:
            raise InputError("calibrate: no table; expected one, or an extractor and a reference to measure it with")
        if isinstance(reference, Tensor):
            extractor, reference = reduced(extractor, reference)
        table = measure_shifts(
            model,
            extractor,
            reference,
            cfg_scale=cfg_scale,
            guided_channels=guided_channels,
            settings=settings,
            to_pictures=to_pictures,
        )
    if table.cfg_scale != cfg_scale:
        raise InputError(f"shift table: measured at guidance scale {table.cfg_scale:g}, not {cfg_scale:g}")
    plan = plan_on_table(model, table, budget=budget, solver=solver, num_steps=num_steps)
    if extractor is None:
        return plan
    if table.projection is not None and extractor.projection is None:
        extractor = extractor.projected(table.projection)
    if extractor.fingerprint != table.extractor_fingerprint:
        raise InputError(f"extractor {extractor.name}: the table was measured with {table.extractor}")
    full = full_plan(model, solver, num_steps, table.cfg_scale)

    def measured(wanted: DepthPlan, seed: int) -> Moments:
        return measure_moments(
            model,
            extractor,
            wanted,
            num_pictures=table.num_pictures,
            seed=seed,
            guided_channels=guided_channels,
            batch_size=batch_size,
            to_pictures=to_pictures,
        )

    if (solver, num_steps) != (table.solver, table.num_steps):
        plan = plan_on_table(
            model, table, budget=budget, solver=solver, num_steps=num_steps, base=measured(full, table.seed)
        )
    figures = {
        "measured_fd": frechet_distance(measured(plan, table.seed + 1), table.reference),
        "measured_fd_full": frechet_distance(measured(full, table.seed + 1), table.reference),
        "num_pictures": float(table.num_pictures),
    }
    return replace(plan, figures=plan.figures | figures)
