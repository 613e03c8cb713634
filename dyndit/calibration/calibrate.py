"""Search a plan on a table, and measure the plan."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndit import bounds
from dyndit.calibration.extractor import FeatureExtractor
from dyndit.calibration.measure import CalibrationSettings, OnProgress, measure_shifts, reduced
from dyndit.calibration.samplers import OwnSampler, Sampler, ToPictures, batches_of
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures import as_rgb
from dyndit.plans.plan import DepthPlan, file_name
from dyndit.plans.refined import refined
from dyndit.plans.search import search
from dyndit.plans.step_counts import Goal
from dyndit.plans.table import FILE, ShiftTable
from dyndit.process import Process
from dyndit.progress import progress_bar, tracked
from dyndit.rounds import paired_times, summarise
from dyndit.sampling.budget import table_for
from dyndit.sampling.loop import full_plan, to_uint8
from dyndit.sampling.sample import sample
from dyndit.sampling.solvers import AnySolver, solver_name, timesteps_of
from dyndit.stats import Interval, Moments, frechet_distance, moments

STEP_GRID = (5, 7, 10, 14, 20)
"""Step counts to choose among: neighbours differ by a factor of about 1.4 in time."""


@bounds.checked
def measure_bases(
    model: DynamicDepth,
    table: ShiftTable,
    extractor: FeatureExtractor,
    *,
    solver: AnySolver | None = None,
    step_grid: Sequence[int] = STEP_GRID,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
    into: Path | None = None,
    on_progress: OnProgress | None = None,
) -> ShiftTable:
    """Add full depth's moments at these step counts to the table, so that it can choose among them.

    The pictures are drawn on the table's own seeds. Existing moments are kept. into: the table's file, rewritten after
    each step count. on_progress(done, all) counts sampling steps.

    Raises InputError: the table belongs to another model or extractor, or a step count is out of range.
    """
    check_step_grid(step_grid)
    solver = solver or model.process.usual_solver
    full = {steps: full_plan(model, solver, steps, table.cfg_scale) for steps in dict.fromkeys(step_grid)}
    if any(plan.calls for plan in full.values()):
        raise InputError(f"--step-grid: {solver_name(solver)} calls the network twice a step; expected a solver of one")
    model.check_identity(table.backbone, table.exits, origin="shift table")
    extractor, name = _extractor_of(table, extractor), solver_name(solver)
    missing = [steps for steps in full if table.base_at(name, steps) is None]
    options = (table.cfg_scale, guided_channels, to_pictures, table.seed, batch_size)
    with progress_bar(f"measuring full depth at {', '.join(map(str, missing))} steps", unit="steps") as advance:
        advance(0, sum(missing))
        for number, steps in enumerate(missing, 1):
            sampler = OwnSampler(model, solver, steps, *options)
            base = _moments(sampler, extractor, full[steps], table.num_pictures, fresh=False)
            table = replace(table, bases={**table.bases, (name, steps): base})
            if into is not None:
                table.save(into)
            advance(sum(missing[:number]), sum(missing))
            if on_progress is not None:
                on_progress(sum(missing[:number]), sum(missing))
    return table


def check_step_grid(step_grid: Sequence[int]) -> None:
    """Refuse step counts that no solver supports. Raises InputError naming the flag."""
    if bad := [steps for steps in step_grid if not 1 <= steps <= Process.num_timesteps]:
        raise InputError(f"--step-grid {bad[0]}: expected 1 to {Process.num_timesteps}")


@bounds.checked
def measure_moments(
    model: DynamicDepth,
    extractor: FeatureExtractor,
    plan: DepthPlan,
    *,
    num_pictures: int,
    seed: int,
    guided_channels: int | None = None,
    batch_size: int = 128,
    to_pictures: ToPictures = to_uint8,
) -> Moments:
    """Measure the features' moments on `num_pictures` pictures drawn under `plan`, classes in turn."""
    sampler = OwnSampler(
        model, plan.solver, plan.num_steps, plan.cfg_scale, guided_channels, to_pictures, seed, batch_size
    )
    return _moments(sampler, extractor, plan, num_pictures, fresh=False)


def measure_around(
    model: DynamicDepth,
    extractor: FeatureExtractor,
    plan: DepthPlan,
    others: Sequence[DepthPlan],
    *,
    num_pictures: int,
    seed: int,
    batch_size: int = 128,
    to_pictures: ToPictures = to_uint8,
) -> list[Moments]:
    """Measure the moments of `num_pictures` pictures under `plan`, then under each of `others`, classes in turn."""
    options = (None, to_pictures, seed, batch_size)
    sampler = OwnSampler(model, plan.solver, plan.num_steps, plan.cfg_scale, *options)
    parts: list[list[Tensor]] = [[] for _ in range(1 + len(others))]
    for indices in batches_of(range(num_pictures), batch_size):
        for part, pictures in zip(parts, sampler.variations(indices, plan, others), strict=True):
            part.append(extractor.features(as_rgb(pictures)))
    return [moments(torch.cat(part)) for part in parts]


def _moments(
    sampler: Sampler, extractor: FeatureExtractor, plan: DepthPlan, num_pictures: int, *, fresh: bool
) -> Moments:
    return moments(extractor.features(as_rgb(sampler.drawn(plan, num_pictures, fresh=fresh))))


def _fitting(sampler: Sampler, table: ShiftTable) -> ShiftTable:
    """Return the table with the times of the sampler's device, as `table_for` does for a model."""
    sampler.bind(table)
    if table.cost.device != sampler.device:  # shifts hold on any device, times do not
        table = replace(table, cost=sampler.cost(table.cost.batch_size))
    return table


def _extractor_of(table: ShiftTable, extractor: FeatureExtractor) -> FeatureExtractor:
    """Return the extractor with the table's reduction of features, and refuse another extractor."""
    if table.projection is not None and extractor.fingerprint != table.extractor_fingerprint:
        extractor = extractor.projected(table.projection)
    if extractor.fingerprint != table.extractor_fingerprint:
        found = table.extractor if table.extractor != extractor.name else f"other weights of {table.extractor}"
        raise InputError(
            f"--extractor {extractor.name}: the table was measured with {found}; expected that, or --fresh"
        )
    return extractor


def planned(
    sampler: Sampler, table: ShiftTable, budget: float, extractor: FeatureExtractor | None, refinements: int = 0
) -> DepthPlan:
    """Search a plan on the table. With an extractor, correct it by `refinements` and measure it."""
    full = sampler.full
    if table.cfg_scale != full.cfg_scale:
        raise InputError(f"shift table: measured at guidance scale {table.cfg_scale:g}, not {full.cfg_scale:g}")
    table = _fitting(sampler, table)
    if extractor is None:
        return search(table, full, budget)
    extractor = _extractor_of(table, extractor)

    def measure(plan: DepthPlan) -> Moments:
        return _moments(sampler, extractor, plan, table.num_pictures, fresh=False)

    base = table.base_at(full.solver, full.num_steps)
    if base is None:
        with progress_bar(f"measuring full depth at {full.num_steps} steps"):
            base = measure(full)
    if refinements:
        plan = refined(table, full, budget, measure, rounds=refinements, base=base)
    else:
        plan = search(table, full, budget, base=base)
    return _measured(sampler, table, plan, extractor)


def _measured(sampler: Sampler, table: ShiftTable, plan: DepthPlan, extractor: FeatureExtractor) -> DepthPlan:
    """Add the distances of the plan and of full depth on fresh pictures to the plan's figures."""

    def distance(wanted: DepthPlan) -> float:
        return frechet_distance(_moments(sampler, extractor, wanted, table.num_pictures, fresh=True), table.reference)

    wanted = {"measured_fd": plan, "measured_fd_full": sampler.full}
    of = tracked(list(wanted), "measuring the plan, then full depth, on fresh pictures", unit="plans")
    figures = {name: distance(wanted[name]) for name in of}
    return replace(plan, figures=plan.figures | figures | {"num_pictures": float(table.num_pictures)})


@bounds.checked
def calibrate(
    model: DynamicDepth,
    *,
    budget: float,
    solver: AnySolver | None = None,
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    table: ShiftTable | None = None,
    extractor: FeatureExtractor | None = None,
    reference: Moments | Tensor | None = None,
    settings: CalibrationSettings | None = None,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
    refinements: int = 0,
    out: str | Path | None = None,
) -> DepthPlan:
    """Search the plan of least predicted Fréchet distance within a budget of time.

        extractor, real = dyndit.load_extractor("digits"), dyndit.open_data("digits").uint8()
        plan = dyndit.calibrate(model, budget=0.6, num_steps=20, extractor=extractor, reference=real)
        print(plan, plan.figures["predicted_fd"], plan.figures["measured_fd"])
        plan.save("plan.json")

    model: a model with exits, from `Distill`.
    budget: share of full depth's time at the same solver and steps, above 0 and at most 1.
    solver: a name, such as "ddim" or "unipc", or a scheduler of diffusers. None: the usual one of the model's process.
    num_steps: sampling steps of the plan.
    cfg_scale: guidance scale; 1 is unguided.
    table: the shift table to search on, from `dyndit.calibration.measure.measure_shifts`. It serves other budgets, step
    counts and solvers too. None: a table is measured first, which takes most of the time.
    extractor: the network whose features quality is measured by, from `dyndit.load_extractor`. With a table but without
    an extractor, nothing is measured.
    reference: the real pictures, (N, C, H, W) uint8, or the moments of their features. Needed without a table.
    settings: how a table is measured: seeds, bands, depths (`CalibrationSettings`). None: the defaults.
    guided_channels: guide only the first so many channels. None: all.
    to_pictures: turns the sampler's last state into pictures, (B, C, H, W) -> (B, 3, H, W) uint8: for latents, their
    decoder.
    batch_size: pictures at a time, when plans are measured.
    refinements: rounds that measure the plan on the table's seeds and correct the prediction.
    out: a folder, for example the model's. As `dyndit calibrate` does there, it leaves `shift-table.safetensors` and
    `plan-ddim-20-b0.6.json`. An interrupted measurement resumes; a table that is there already is searched.

    The prediction starts from full depth at these steps, measured on the table's own seeds. The plan and full depth are
    measured on fresh seeds (`table.seed` + 1).

    -> the plan. Its `figures` hold predicted_fd, measured_fd, predicted_fd_full, measured_fd_full,
    predicted_share_of_time and share_of_blocks.

    Raises:
        InputError: the budget is out of range, the table belongs to another model or guidance scale, or without a
            table the extractor or the reference is missing. Or the table in `out` has other numbers of pictures or
            bands than `settings`.
    """
    path = None if out is None else Path(out) / FILE
    if table is None and path is not None and path.exists():
        table = _asked_for(ShiftTable.load(path), path, settings)
    if table is None:
        extractor, reference = to_measure_with(extractor, reference)
        table = measure_shifts(
            model,
            extractor,
            reference,
            cfg_scale=cfg_scale,
            guided_channels=guided_channels,
            settings=settings,
            to_pictures=to_pictures,
            into=path,
        )
    seed, solver = table.seed, solver or model.process.usual_solver
    sampler = OwnSampler(model, solver, num_steps, cfg_scale, guided_channels, to_pictures, seed, batch_size)
    plan = planned(sampler, table, budget, extractor, refinements)
    if path is not None:
        if not path.exists():
            table.save(path)
        plan.save(path.with_name(file_name(plan.solver, num_steps, budget)))
    return plan


def _asked_for(table: ShiftTable, path: Path, settings: CalibrationSettings | None) -> ShiftTable:
    """Return a stored table, or refuse one of other pictures or bands than asked for. None asks for nothing."""
    if settings is not None:
        bands = min(settings.num_bands, table.num_steps)
        wanted = {"pictures": (settings.num_pictures, table.num_pictures), "bands": (bands, table.num_bands)}
        for name, (asked, found) in wanted.items():
            if asked != found:
                expected = f"{asked} asked for; expected the same, or another folder"
                raise InputError(f"{path}: measured with {found} {name}, but {expected}")
    return table


@bounds.checked
def calibrate_steps(
    model: DynamicDepth,
    goal: Goal,
    *,
    table: ShiftTable,
    solver: AnySolver | None = None,
    extractor: FeatureExtractor | None = None,
    guided_channels: int | None = None,
    to_pictures: ToPictures = to_uint8,
    batch_size: int = 128,
    rounds: int = 9,
) -> DepthPlan:
    """Choose the step count with the plan, for a `LatencyBudget` or a `TargetFD`, and measure the plan.

    Candidates are the step counts at which the table has full depth's moments with this solver (`measure_bases`).
    `plan.figures` holds the figures of `calibrate`, reference_steps and predicted_share_of_reference. It also holds
    measured_fd_reference (full depth at the reference's steps, fresh seeds) and measured_share_of_reference, with the
    limits _low and _high. The share compares times of one batch of the table's size in `rounds` paired rounds, without
    decoding. Without an extractor, nothing is measured.

    Raises InputError: the table belongs to another model or has no moments to choose by, or the goal is out of reach.
    """
    solver = solver or model.process.usual_solver
    table = table_for(model, table, solver)
    plan = goal.choose(table, solver_name(solver), functools.partial(timesteps_of, solver, process=model.process))
    if extractor is None:
        return plan
    extractor = _extractor_of(table, extractor)
    options = (table.cfg_scale, guided_channels, to_pictures, table.seed, batch_size)
    plan = _measured(OwnSampler(model, solver, plan.num_steps, *options), table, plan, extractor)
    reference = OwnSampler(model, solver, int(plan.figures["reference_steps"]), *options)
    with progress_bar("measuring full depth at the reference's steps"):
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
    """Measure the time of one batch under a plan as a share of its time under the reference plan."""
    labels = model.backbone.condition.in_turn(batch_size)

    def drawing(of: DepthPlan) -> Callable[[], object]:
        options: dict[str, Any] = {"num_steps": of.num_steps, "cfg_scale": of.cfg_scale, "batch_size": batch_size}
        return lambda: sample(model, labels, plan=of, solver=solver, **options)

    arms = {"reference": drawing(reference), "plan": drawing(plan)}
    # Pictures end on the host, so each call has finished.
    times = paired_times(arms, rounds=rounds, warmup=1, title="timing the plan")
    return summarise(times, "reference").loc["plan", "median_ratio"]


def to_measure_with(
    extractor: FeatureExtractor | None, reference: Moments | Tensor | None
) -> tuple[FeatureExtractor, Moments]:
    """Return the extractor and the reference moments to measure a table with.

    Raises InputError: the extractor or the reference is missing.
    """
    if extractor is None or reference is None:
        raise InputError("calibrate: no table; expected one, or an extractor and a reference to measure it with")
    return reduced(extractor, reference) if isinstance(reference, Tensor) else (extractor, reference)
