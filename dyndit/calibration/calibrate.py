"""Calibration: measure the table of distribution shifts, search a plan on it, and measure that plan.

Two things can be calibrated, by the same functions: our own sampling (`calibrate`), and a user's pipeline with the
plug-in on it (`calibrate_pipeline`). What differs is how pictures are drawn: see `drawing.Drawing`.

The seeds here are kept apart from those a result is scored on: calibration draws its noise from `CALIBRATION_SEED`; in
a pipeline the user's own function says what is drawn.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor, as_rgb
from dyndit.analysis.metrics.fidelity import Moments, frechet_distance, moments
from dyndit.analysis.metrics.intervals import Interval
from dyndit.analysis.metrics.latency import paired_times, summarise
from dyndit.calibration.drawing import (
    CALIBRATION_SEED,
    Call,
    Drawing,
    NativeDrawing,
    PipelineDrawing,
    ToPictures,
    batches_of,
)
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import REUSED, DepthPlan, forecast, own_exit
from dyndit.plans.refined import refined
from dyndit.plans.search import Pair, ShiftTable, search
from dyndit.plans.step_counts import Goal
from dyndit.plugin.apply import DynDiTHandle
from dyndit.sampling.sample import SCHEDULE, AnySolver, balanced_labels, full_plan, sample, solver_name, to_uint8
from dyndit.storage import load as checkpoints

MAX_FEATURES, NUM_COMPONENTS = 256, 64
STEP_GRID = (5, 7, 10, 14, 20)
"""Step counts worth choosing among: neighbours differ by about 1.4 in time."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationSettings:
    """What the table is measured on.

    num_bands: bands of steps that are replaced together; each costs one continuation at full depth per pair.
    pairs: (conditional, unconditional) depths to measure; empty means `default_pairs` on `num_depths` depths.
    reuse: whether those have pairs that reuse the guidance of earlier steps (`plan.REUSED`).
    own_guides: whether those have pairs that are guided by the branch's own exits (`plan.own_exit`).
    forecast_ages: how many steps ago full depth may have been where an exit's gap to it is forecast (`plan.forecast`);
    those pairs are measured at each age from 1 on, and want a band for each step. 0: no forecasts.
    seed: of our own sampling; a pipeline's noise is the business of who calls it.
    """

    num_pictures: int = 512
    num_bands: int = 10
    batch_size: int = 128
    seed: int = CALIBRATION_SEED
    pairs: tuple[Pair, ...] = ()
    num_depths: int = 8
    reuse: bool = False
    own_guides: bool = False
    forecast_ages: int = 0


def default_pairs(
    depths: Sequence[int], guided: bool, num_depths: int = 8, *, reuse: bool = False, own_guides: bool = False
) -> tuple[Pair, ...]:
    """Pairs worth measuring: a thinned grid of conditional depths; unconditional ones equal, about half, or none.

    reuse: for each conditional depth also guidance reused from earlier steps. own_guides: also guidance by its own exit
    at about three quarters and half of it: the shallower the guide, the stronger it guides.
    """
    full = depths[-1]
    grid = _thinned(depths, num_depths)
    if not guided:
        return tuple((d, 0) for d in grid if d != full)
    pairs: list[Pair] = []
    for depth in grid:
        half = max((d for d in grid if 2 * d <= depth), default=0)
        others = [REUSED] if reuse else []
        if own_guides:
            below = [max((d for d in depths if d <= share * depth), default=0) for share in (0.75, 0.5)]
            others += [own_exit(guide) for guide in below if 0 < guide < depth]
        pairs += [(depth, uncond) for uncond in dict.fromkeys((depth, half, 0, *others))]
    return tuple(pair for pair in pairs if pair != (full, full))


def forecast_pairs(depths: Sequence[int], guided: bool, num_depths: int = 8) -> tuple[Pair, ...]:
    """Pairs worth measuring that forecast: exits up to half of L, without guidance and with that of earlier steps."""
    shallow = [d for d in _thinned(depths, num_depths) if 2 * d <= depths[-1]]
    return tuple((forecast(d), uncond) for d in shallow for uncond in ((0, REUSED) if guided else (0,)))


def _thinned(depths: Sequence[int], num: int) -> list[int]:
    """At most `num` depths, evenly spread; the shallowest and L stay."""
    if len(depths) <= num:
        return list(depths)
    picks = torch.linspace(0, len(depths) - 1, num).round().long().tolist()
    return [depths[i] for i in sorted(set(picks))]


def measure_table(
    drawing: Drawing,
    extractor: Extractor,
    reference: Moments,
    *,
    settings: CalibrationSettings | None = None,
    cost: CostModel | None = None,
    partial: Path | None = None,
    on_progress: OnProgress | None = None,
) -> ShiftTable:
    """Measure the paired-seed distribution shifts of every (band, pair) of a drawing.

    Sums over batches are kept in `partial`, from which an interrupted measurement goes on. on_progress(done, all)
    counts batches of pictures with a band replaced.

    Raises:
        InputError: fewer pictures than features, or too many features; or forecasts with fewer bands than steps.
    """
    settings = settings or CalibrationSettings()
    if settings.num_pictures <= len(reference.mean) or len(reference.mean) > MAX_FEATURES:
        raise InputError(
            f"--num-pictures {settings.num_pictures}: {extractor.name} has {len(reference.mean)} features; expected "
            f"more pictures than features, and at most {MAX_FEATURES} features (see `reduced`)"
        )
    full, n = drawing.full, settings.num_pictures
    pairs, ages = _entries(drawing, settings)
    bands = _bands(full, settings)
    batches = batches_of(range(n), settings.batch_size)
    sizes = [settings.batch_size, drawing.seed, n]
    key = json.dumps([full.solver, full.timesteps, pairs, bands, full.cfg_scale, drawing.setting, *sizes])
    key += drawing.trunk + drawing.exits + extractor.fingerprint + (json.dumps(ages) if ages else "")
    sums, done = _restore(partial, key)
    total = len(batches) * len(bands) * len(pairs)
    for number, indices in enumerate(batches):
        if number < done:
            continue
        drawn = drawing.replaced(indices, bands, pairs, ages)
        features = (extractor.features(as_rgb(pictures)) for pictures in drawn)
        base = next(features)
        changes = []
        for f in features:
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
    mean, second = (sums[name].unflatten(0, (len(bands), len(pairs))) / n for name in ("mean", "second"))
    return ShiftTable(
        edges=_edges(full, bands),
        pairs=pairs,
        ages=ages,
        mean=mean,
        second=second,
        base=Moments(sums["base.mean"] / n, sums["base.second"] / n, n),
        reference=reference,
        cost=drawing.cost(max(1, settings.batch_size // 2)) if cost is None else cost,
        num_blocks=full.num_blocks,
        solver=full.solver,
        num_steps=full.num_steps,
        cfg_scale=full.cfg_scale,
        seed=drawing.seed,
        num_pictures=n,
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        trunk=drawing.trunk,
        exits=drawing.exits,
        projection=extractor.projection,
    )


def part_of(table: ShiftTable, drawing: Drawing, settings: CalibrationSettings) -> ShiftTable | None:
    """What `measure_table` would measure, taken from a table that holds it already; None where this one does not."""
    full = drawing.full
    mine = (full.solver, full.num_steps, full.cfg_scale, drawing.trunk, drawing.exits, drawing.seed)
    mine += (settings.num_pictures, _edges(full, _bands(full, settings)))
    theirs = (table.solver, table.num_steps, table.cfg_scale, table.trunk, table.exits, table.seed)
    theirs += (table.num_pictures, table.edges)
    return table.part(*_entries(drawing, settings)) if mine == theirs else None


def _bands(full: DepthPlan, settings: CalibrationSettings) -> list[list[int]]:
    """The steps of each band."""
    return [
        band.tolist() for band in torch.arange(full.num_steps).tensor_split(min(settings.num_bands, full.num_steps))
    ]


def _edges(full: DepthPlan, bands: list[list[int]]) -> tuple[float, ...]:
    """As of `ShiftTable`."""
    return (*(float(full.timesteps[band[0]]) for band in bands), 0.0)


def _entries(drawing: Drawing, settings: CalibrationSettings) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
    """The pairs to measure, those that forecast at every age, and the ages; none where nothing is forecast."""
    pairs = settings.pairs or default_pairs(
        drawing.depths,
        drawing.full.cfg_scale != 1,
        settings.num_depths,
        reuse=settings.reuse,
        own_guides=settings.own_guides,
    )
    if not settings.forecast_ages:
        if bad := [pair for pair in pairs if pair[0] < 0]:
            raise InputError(f"pairs: {bad[0]} forecasts; expected forecast_ages of at least 1")
        return pairs, ()
    if settings.num_bands < drawing.full.num_steps:
        raise InputError(
            f"--num-bands {settings.num_bands}: forecasts are measured step by step; expected at least the "
            f"{drawing.full.num_steps} steps"
        )
    given = tuple(pair for pair in pairs if pair[0] < 0)
    forecasts = given or forecast_pairs(drawing.depths, drawing.full.cfg_scale != 1, settings.num_depths)
    plain = tuple(pair for pair in pairs if pair[0] > 0)
    aged = [(pair, age) for pair in forecasts for age in range(1, settings.forecast_ages + 1)]
    return plain + tuple(pair for pair, _ in aged), (0,) * len(plain) + tuple(age for _, age in aged)


def measure_table_into(
    path: Path, drawing: Drawing, extractor: Extractor, reference: Moments, **options: object
) -> ShiftTable:
    """`measure_table`, resumable, with its table in the file `path` at the end."""
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_whole(measure_table(drawing, extractor, reference, partial=partial, **options), path)
    partial.unlink(missing_ok=True)
    return ShiftTable.load(path)  # rounded as in the file: what is made of it is the same when a run goes on


def _save_whole(table: ShiftTable, path: Path) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    table.save(temporary)
    temporary.replace(path)


def measure_shifts(
    model: DynamicDepth,
    extractor: Extractor,
    reference: Moments,
    *,
    solver: AnySolver = "ddim",
    num_steps: int = 10,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    settings: CalibrationSettings | None = None,
    to_pictures: ToPictures = to_uint8,
    into: Path | None = None,
    **options: object,
) -> ShiftTable:
    """`measure_table` of our own sampling.

    For each batch of seeds the full trajectory is run once; at each band's first step it forks, the band is run at
    the pair's depths, the rest at full depth. into: a file for the table, beside which an interrupted measurement goes
    on. options: as of `measure_table`.
    """
    settings = settings or CalibrationSettings()
    drawing = NativeDrawing(model, solver, num_steps, cfg_scale, guided_channels, to_pictures, settings.seed)
    measure = measure_table if into is None else functools.partial(measure_table_into, into)
    return measure(drawing, extractor, reference, settings=settings, **options)


def measure_bases(
    model: DynamicDepth,
    table: ShiftTable,
    extractor: Extractor,
    *,
    solver: AnySolver = "ddim",
    step_grid: Sequence[int] = STEP_GRID,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
    into: Path | None = None,
    on_progress: OnProgress | None = None,
) -> ShiftTable:
    """The table with full depth's moments at these step counts too, so that it can choose among them.

    They are drawn on the table's own seeds; those that it holds already are kept. into: the table's file, which is
    written again after each step count. on_progress(done, all) counts sampling steps.

    Raises:
        InputError: the table is another model's or another extractor's, or a step count is out of range.
    """
    check_step_grid(step_grid)
    full = {steps: full_plan(model, solver, steps, table.cfg_scale) for steps in dict.fromkeys(step_grid)}
    drawing = NativeDrawing(model, solver, table.num_steps, table.cfg_scale)
    _check_identity(drawing, table)
    extractor, name = _judge_of(table, extractor), solver_name(solver)
    missing = [steps for steps in full if table.base_at(name, steps) is None]
    for number, steps in enumerate(missing):
        drawing = NativeDrawing(
            model, solver, steps, table.cfg_scale, guided_channels, to_pictures, table.seed, batch_size
        )
        base = _moments(drawing, extractor, full[steps], table.num_pictures, fresh=False)
        table = replace(table, bases={**table.bases, (name, steps): base})
        if into is not None:
            _save_whole(table, into)
        if on_progress is not None:
            on_progress(sum(missing[: number + 1]), sum(missing))
    return table


def check_step_grid(step_grid: Sequence[int]) -> None:
    """Refuse step counts that no solver has.

    Raises:
        InputError: naming the flag.
    """
    if bad := [steps for steps in step_grid if not 1 <= steps <= SCHEDULE.num_timesteps]:
        raise InputError(f"--step-grid {bad[0]}: expected 1 to {SCHEDULE.num_timesteps}")


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
    drawing = NativeDrawing(
        model, plan.solver, plan.num_steps, plan.cfg_scale, guided_channels, to_pictures, seed, batch_size
    )
    return _moments(drawing, extractor, plan, num_pictures, fresh=False)


def _moments(drawing: Drawing, extractor: Extractor, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Moments:
    return moments(extractor.features(as_rgb(drawing.drawn(plan, num_pictures, fresh=fresh))))


def plan_on_table(
    model: DynamicDepth,
    table: ShiftTable,
    *,
    budget: float,
    solver: AnySolver,
    num_steps: int,
    base: Moments | None = None,
    check_trunk: bool = True,
) -> DepthPlan:
    """Search a plan on a stored table, without running the model (but to time it on a device new to the table).

    base: moments of full depth at these very steps, where they were measured. check_trunk: refuse the table of
    another model; it hashes the weights, some seconds of a large model's.

    Raises:
        InputError: the budget is out of range, or the table is another model's.
    """
    drawing = NativeDrawing(model, solver, num_steps, table.cfg_scale)
    return _searched(drawing, table, budget, base, check_trunk=check_trunk)


def _searched(
    drawing: Drawing, table: ShiftTable, budget: float, base: Moments | None = None, *, check_trunk: bool = True
) -> DepthPlan:
    """`plan_on_table`, of any drawing."""
    table = _fitting(drawing, table, check_trunk=check_trunk)
    return search(table, drawing.full, budget, base=base)


def table_for(model: DynamicDepth, table: ShiftTable, solver: AnySolver = "ddim") -> ShiftTable:
    """The table, with the times of the model's device where it was measured on another.

    Raises:
        InputError: the table is another model's.
    """
    return _fitting(NativeDrawing(model, solver, table.num_steps, table.cfg_scale), table)


def _fitting(drawing: Drawing, table: ShiftTable, *, check_trunk: bool = True) -> ShiftTable:
    """`table_for`, of any drawing."""
    if check_trunk:
        _check_identity(drawing, table)
    if table.cost.device != drawing.device:  # the shifts hold anywhere, the times do not
        table = replace(table, cost=drawing.cost(table.cost.batch_size))
    return table


def _check_identity(drawing: Drawing, table: ShiftTable) -> None:
    for name, mine in (("trunk", table.trunk), ("exits", table.exits)):
        if mine != (theirs := getattr(drawing, name)):
            raise InputError(f"shift table: measured on {name} {mine}, but the model's are {theirs or 'absent'}")


def _judge_of(table: ShiftTable, extractor: Extractor) -> Extractor:
    """The extractor as the table was measured with it, its features reduced where they were."""
    if table.projection is not None and extractor.projection is None:
        extractor = extractor.projected(table.projection)
    if extractor.fingerprint != table.extractor_fingerprint:
        found = table.extractor if table.extractor != extractor.name else f"other weights of {table.extractor}"
        raise InputError(
            f"--extractor {extractor.name}: the table was measured with {found}; expected that, or --fresh"
        )
    return extractor


def _planned(
    drawing: Drawing, table: ShiftTable, budget: float, extractor: Extractor | None, refinements: int = 0
) -> DepthPlan:
    """Search a plan on the table and, with an extractor, measure it; first to correct it, where that is asked for."""
    full = drawing.full
    if table.cfg_scale != full.cfg_scale:
        raise InputError(f"shift table: measured at guidance scale {table.cfg_scale:g}, not {full.cfg_scale:g}")
    if extractor is None:
        return _searched(drawing, table, budget)
    table, extractor = _fitting(drawing, table), _judge_of(table, extractor)

    def measure(plan: DepthPlan) -> Moments:
        return _moments(drawing, extractor, plan, table.num_pictures, fresh=False)

    known = table.base_at(full.solver, full.num_steps)
    base = measure(full) if known is None else known
    if refinements:
        plan = refined(table, full, budget, measure, rounds=refinements, base=base)
    else:
        plan = search(table, full, budget, base=base)
    return _measured(drawing, table, plan, extractor)


def _measured(drawing: Drawing, table: ShiftTable, plan: DepthPlan, extractor: Extractor) -> DepthPlan:
    """The plan with its distance and full depth's, on fresh pictures, among its figures."""

    def distance(wanted: DepthPlan) -> float:
        return frechet_distance(_moments(drawing, extractor, wanted, table.num_pictures, fresh=True), table.reference)

    figures = {
        "measured_fd": distance(plan),
        "measured_fd_full": distance(drawing.full),
        "num_pictures": float(table.num_pictures),
    }
    return replace(plan, figures=plan.figures | figures)


def calibrate(
    model: DynamicDepth,
    *,
    budget: float,
    solver: AnySolver = "ddim",
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    table: ShiftTable | None = None,
    extractor: Extractor | None = None,
    reference: Moments | Tensor | None = None,
    settings: CalibrationSettings | None = None,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
    refinements: int = 0,
) -> DepthPlan:
    """Search a plan for (solver, steps, budget) and report its predicted and measured Fréchet distance.

    The prediction starts from full depth at these very steps, measured on the table's own seeds; the plan's
    measured distance is on fresh seeds (`table.seed` + 1), as is full depth's next to it. `plan.figures` holds
    predicted_fd, measured_fd, predicted_fd_full, measured_fd_full, predicted_share_of_time, share_of_blocks.
    refinements: rounds in which the plan is measured on the table's seeds and the prediction corrected by it.
    With a table but no extractor nothing is measured. Without a table one is measured first, with `extractor`
    against `reference`: moments, or real pictures (N, C, H, W) uint8. Keep what `measure_shifts` gives to search
    other budgets, step counts and solvers on it.

    Raises:
        InputError: the budget is out of range, the table is another model's or of another guidance scale, or
            neither a table nor what it takes to measure one was given.
    """
    if table is None:
        extractor, reference = _to_measure_with(extractor, reference)
        table = measure_shifts(
            model,
            extractor,
            reference,
            cfg_scale=cfg_scale,
            guided_channels=guided_channels,
            settings=settings,
            to_pictures=to_pictures,
        )
    seed = table.seed
    drawing = NativeDrawing(model, solver, num_steps, cfg_scale, guided_channels, to_pictures, seed, batch_size)
    return _planned(drawing, table, budget, extractor, refinements)


def calibrate_steps(
    model: DynamicDepth,
    goal: Goal,
    *,
    table: ShiftTable,
    solver: AnySolver = "ddim",
    extractor: Extractor | None = None,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
    rounds: int = 9,
) -> DepthPlan:
    """Choose the step count with the plan, for a `LatencyBudget` or a `TargetFD`, and measure what was found.

    It is chosen among the step counts at which the table has full depth's moments with this solver: see
    `measure_bases`. Besides `calibrate`'s figures `plan.figures` holds reference_steps, predicted_share_of_reference,
    measured_fd_reference (full depth at the reference's steps, fresh seeds) and measured_share_of_reference with
    its interval's _low and _high: times of one batch of the table's size, in `rounds` paired rounds, decoding left out.
    Without an extractor nothing is measured.

    Raises:
        InputError: the table is another model's or has no moments to choose by, or the goal is out of reach.
    """
    table = table_for(model, table, solver)
    plan = goal.choose(table, solver)
    if extractor is None:
        return plan
    extractor = _judge_of(table, extractor)
    options = (table.cfg_scale, guided_channels, to_pictures, table.seed, batch_size)
    plan = _measured(NativeDrawing(model, solver, plan.num_steps, *options), table, plan, extractor)
    reference = NativeDrawing(model, solver, int(plan.figures["reference_steps"]), *options)
    of_reference = _moments(reference, extractor, reference.full, table.num_pictures, fresh=True)
    share = _share_of_time(model, plan, reference.full, solver, table.cost.batch_size, rounds)
    figures = {
        "measured_fd_reference": frechet_distance(of_reference, table.reference),
        "measured_share_of_reference": share.mean,
        "measured_share_of_reference_low": share.low,
        "measured_share_of_reference_high": share.high,
    }
    return replace(plan, figures=plan.figures | figures)


def _share_of_time(
    model: DynamicDepth, plan: DepthPlan, reference: DepthPlan, solver: AnySolver, batch_size: int, rounds: int
) -> Interval:
    """Measured time of one batch under a plan as a share of that under another."""
    labels = balanced_labels(batch_size, model.backbone.num_classes)

    def drawing(of: DepthPlan) -> Callable[[], object]:
        unbound = replace(of, trunk="", exits="")  # weights are not hashed per call
        options = {"num_steps": of.num_steps, "cfg_scale": of.cfg_scale, "batch_size": batch_size}
        return lambda: sample(model, labels, plan=unbound, solver=solver, **options)

    arms = {"reference": drawing(reference), "plan": drawing(plan)}
    times = paired_times(arms, rounds=rounds, warmup=1)  # pictures end on the host: nothing is under way after a call
    return summarise(times, "reference").loc["plan", "median_ratio"]


def calibrate_pipeline(
    pipe: DiffusionPipeline,
    handle: DynDiTHandle,
    call: Call,
    *,
    budget: float,
    extractor: Extractor | None = None,
    reference: Moments | Tensor | None = None,
    num_pictures: int = 256,
    cfg_scale: float = 1.0,
    num_bands: int = 5,
    num_depths: int = 4,
    pairs: tuple[Pair, ...] = (),
    batch_size: int = 8,
    table: ShiftTable | None = None,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> DepthPlan:
    """`calibrate`, for a user's pipeline with the plug-in on it: `handle.plan = calibrate_pipeline(pipe, handle, ...)`.

    call: see `Call`. cfg_scale: the guidance scale that it runs with, 1 where it runs no second branch (as with the
    distilled guidance of Flux). Without a table one is measured: num_bands times the number of pairs runs of the
    pipeline for each picture, besides one at full depth; with `out` it is kept in that folder, where an interrupted
    measurement goes on and a whole one is used again for other budgets and step counts. on_progress(done, all)
    counts batches. The handle's plan is afterwards what it was.

    Raises:
        InputError: as `calibrate`; or `call` does not return a picture for each number, or is not guided as said.
    """
    before = handle.router or handle.plan
    path = None if out is None else Path(out) / checkpoints.TABLE
    try:
        drawing = PipelineDrawing(pipe, handle, call, cfg_scale=cfg_scale, batch_size=batch_size)
        if table is None and path is not None and path.exists():
            there, mine = ShiftTable.load(path), (drawing.trunk, drawing.exits, cfg_scale)
            table = there if (there.trunk, there.exits, there.cfg_scale) == mine else None
        if table is None:
            extractor, reference = _to_measure_with(extractor, reference)
            settings = CalibrationSettings(num_pictures, num_bands, batch_size, pairs=pairs, num_depths=num_depths)
            measure = measure_table if path is None else functools.partial(measure_table_into, path)
            table = measure(drawing, extractor, reference, settings=settings, on_progress=on_progress)
        return _planned(drawing, table, budget, extractor)
    finally:
        handle.plan = before


def _to_measure_with(extractor: Extractor | None, reference: Moments | Tensor | None) -> tuple[Extractor, Moments]:
    """What a table is measured with.

    Raises:
        InputError: one of them is missing.
    """
    if extractor is None or reference is None:
        raise InputError("calibrate: no table; expected one, or an extractor and a reference to measure it with")
    return reduced(extractor, reference) if isinstance(reference, Tensor) else (extractor, reference)
