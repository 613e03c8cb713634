"""One comparison from trunk to report: what `dyndit quickstart` and `dyndit compare` run.

distil exits -> measure the shift table -> search plans -> sample every arm from the same fresh seeds -> report. Every
stage leaves its result on disk; what is there and valid is not done again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dyndit import checkpoints, manifest
from dyndit.analysis.extractors import Extractor, as_rgb, load_extractor
from dyndit.analysis.fidelity import Moments, frechet_distance, moments
from dyndit.analysis.frontier import append_run, measured
from dyndit.calibration import CalibrationSettings, measure_moments, measure_shifts
from dyndit.data import Pictures, open_data
from dyndit.dynamic import DynamicDepth
from dyndit.errors import CheckpointError, InputError
from dyndit.plan import DepthPlan
from dyndit.routers.schedules import constant, ramp, reversed_plan
from dyndit.routers.searched import Predictor, ShiftTable, search
from dyndit.sampler import balanced_labels, full_plan, sample
from dyndit.tasks import Distill, Train, exit_error_table


@dataclass(frozen=True)
class Controls:
    """Fixed schedules to hold the searched plan against, at one solver and step count, at equal time.

    depths: constant depths; each sets a budget (its own predicted time) for a searched plan, that plan's reversal,
    and the `num_ramps` ramps that come closest to the budget from below.
    """

    solver: str = "ddim"
    steps: int = 10
    depths: tuple[int, ...] = ()
    num_ramps: int = 10


@dataclass(frozen=True)
class Experiment:
    """What to compare, and on how many pictures. Scoring seeds are 0, 1, ...; calibration has its own."""

    model: str
    data: str
    extractor: str
    distill: Distill
    train: Train | None = None
    """How to train the trunk from scratch, where that is asked for."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    calibration_solver: str = "ddim"
    calibration_steps: int = 10
    solvers: tuple[str, ...] = ("ddim", "unipc")
    full_steps: tuple[int, ...] = (5, 6, 7, 8, 10, 12, 14, 17, 20)
    dynamic_steps: tuple[int, ...] = (10, 20)
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    controls: Controls | None = None
    cfg_scale: float = 1.5
    num_blocks: int = 5
    num_images: int = 600
    batch_size: int = 100
    margin: float = 0.05
    """Non-inferiority margin, as a share of full depth's Fréchet distance."""


@dataclass(frozen=True)
class Arm:
    """One thing that is measured."""

    name: str
    family: str
    plan: DepthPlan
    budget: float | None = None
    predicted_fd: float | None = None


@dataclass(frozen=True)
class Inputs:
    """What the user may put in place of the experiment's own choices."""

    model: str = ""
    data: str = ""
    extractor_weights: Path | None = None
    from_scratch: bool = False
    device: str = "cpu"


def run(experiment: Experiment, out: Path, inputs: Inputs | None = None, console: Console | None = None) -> Path:
    """Run the comparison in `out` and return it; `dyndit.analysis.read_runs(out)` has the figures.

    Raises:
        InputError: `out` holds another run, or an input does not fit.
    """
    inputs, console = inputs or Inputs(), console or Console(stderr=True)
    data = open_data(inputs.data or experiment.data)
    extractor = load_extractor(experiment.extractor, inputs.extractor_weights, inputs.device)
    settings = {"experiment": asdict(experiment), "inputs": asdict(inputs), "data": data.fingerprint}
    # The schedule's tables are constants of the code, not settings.
    for name in ("train", "distill"):
        if settings["experiment"][name]:
            settings["experiment"][name].pop("schedule", None)
    found = inputs.model or experiment.model
    trunk = None if inputs.from_scratch else checkpoints.load(found, device=inputs.device)
    if trunk is None and experiment.train is None:
        raise InputError("--from-scratch: this experiment has no recipe for its trunk")
    manifest.claim(out, settings)
    model = _model(experiment, inputs, trunk, data, out, console)
    reference = moments(extractor.features(as_rgb(data.uint8())))
    table = _table(experiment, model, extractor, reference, out, console)
    arms = _arms(experiment, model, extractor, table, out, console)
    _measure(experiment, model, extractor, reference, arms, out, console)
    _report(experiment, model, arms, out)
    return out


def _model(
    experiment: Experiment,
    inputs: Inputs,
    trunk: DynamicDepth | None,
    data: Pictures,
    out: Path,
    console: Console,
) -> DynamicDepth:
    """The trunk with its exits, from `out/model` where they are there and whole."""
    folder = out / "model"
    if (folder / checkpoints.EXITS).exists():
        console.print(f"trunk and exits: there already ({folder})")
        return checkpoints.load(folder, device=inputs.device)
    if trunk is None:
        console.print("training the trunk")
        trunk, _ = experiment.train.run(data, out / "training")
    console.print("distilling exits")
    model, _ = experiment.distill.run(trunk, data, out / "distillation")
    exit_error_table(model, data).to_csv(out / "exit-errors.csv", index=False)
    checkpoints.save(model, folder)
    return model.to(inputs.device)


def _table(
    experiment: Experiment,
    model: DynamicDepth,
    extractor: Extractor,
    reference: Moments,
    out: Path,
    console: Console,
) -> ShiftTable:
    path = out / "model" / checkpoints.TABLE
    if path.exists():
        try:
            table = ShiftTable.load(path)
        except CheckpointError as error:
            console.print(f"{error}: measured again")
        else:
            if (table.trunk, table.exits) == (model.trunk_hash(), model.exits_hash()):
                console.print(f"shift table: there already ({path})")
                return table
    with progress_bar("measuring distribution shifts", console) as advance:
        table = measure_shifts(
            model,
            extractor,
            reference,
            solver=experiment.calibration_solver,
            num_steps=experiment.calibration_steps,
            cfg_scale=experiment.cfg_scale,
            settings=experiment.calibration,
            partial=path.with_suffix(".partial"),
            on_progress=advance,
        )
    temporary = path.with_suffix(".tmp")
    table.save(temporary)
    temporary.replace(path)
    path.with_suffix(".partial").unlink(missing_ok=True)
    return table


def _arms(
    experiment: Experiment,
    model: DynamicDepth,
    extractor: Extractor,
    table: ShiftTable,
    out: Path,
    console: Console,
) -> list[Arm]:
    """Every arm of the comparison; the searched plans are written to `out` and read back where they are there."""
    arms = [
        Arm(f"full-{solver}-{steps}", "full", full_plan(model, solver, steps, experiment.cfg_scale))
        for solver, steps in product(experiment.solvers, experiment.full_steps)
    ]
    controls = experiment.controls
    wanted = list(product(experiment.solvers, experiment.dynamic_steps))
    grids = {key: list(experiment.budgets) for key in wanted}
    if controls is not None:
        full = full_plan(model, controls.solver, controls.steps, experiment.cfg_scale)
        depths = tuple(sorted({c for c, _ in table.pairs} | {model.num_blocks}))
        shares = {d: table.cost.share_of_time(constant(full, depths, d)) for d in controls.depths}
        grids.setdefault((controls.solver, controls.steps), []).extend(round(s, 3) for s in shares.values())
    with progress_bar("searching plans", console) as advance:
        for done, ((solver, steps), budgets) in enumerate(grids.items()):
            arms += _searched(experiment, model, extractor, table, out, solver, steps, budgets)
            advance(done + 1, len(grids))
    if controls is not None:
        base = _base(experiment, model, extractor, table, out, controls.solver, controls.steps)
        predictor = Predictor(table, full.timesteps, base)
        for depth, share in shares.items():
            budget = round(share, 3)
            searched = next(a.plan for a in arms if a.name == _searched_name(controls.solver, controls.steps, budget))
            plans = [constant(full, depths, depth), reversed_plan(searched)]
            plans += _ramps_within(full, depths, table, budget, controls.num_ramps)
            arms += [
                Arm(
                    f"{p.router}-{p.solver}-{p.num_steps}-b{budget:.3f}",
                    p.router.split("-")[0],
                    p,
                    budget,
                    predictor.predict(p),
                )
                for p in plans
            ]
    return arms


def _searched_name(solver: str, steps: int, budget: float) -> str:
    return f"searched-{solver}-{steps}-b{budget:g}"


def _searched(
    experiment: Experiment,
    model: DynamicDepth,
    extractor: Extractor,
    table: ShiftTable,
    out: Path,
    solver: str,
    steps: int,
    budgets: list[float],
) -> Iterator[Arm]:
    base = None
    full = full_plan(model, solver, steps, experiment.cfg_scale)
    for budget in budgets:
        path = out / f"plan-{solver}-{steps}-b{budget:g}.json"
        if path.exists():
            plan = DepthPlan.load(path)
            plan.check(depths=model.depths, trunk=model.trunk_hash(), exits=model.exits_hash(), origin=str(path))
        else:
            base = base or _base(experiment, model, extractor, table, out, solver, steps)
            plan = search(table, full, budget, base=base)
            plan.save(path)
        name = _searched_name(solver, steps, budget)
        yield Arm(name, "searched", plan, budget, plan.figures["predicted_fd"])


def _base(
    experiment: Experiment,
    model: DynamicDepth,
    extractor: Extractor,
    table: ShiftTable,
    out: Path,
    solver: str,
    steps: int,
) -> Moments:
    """Full depth's moments at these very steps, on the calibration seeds."""
    if (solver, steps) == (table.solver, table.num_steps):
        return table.base
    return measure_moments(
        model,
        extractor,
        full_plan(model, solver, steps, experiment.cfg_scale),
        num_pictures=table.num_pictures,
        seed=table.seed,
        batch_size=experiment.batch_size,
    )


def _ramps_within(
    full: DepthPlan, depths: tuple[int, ...], table: ShiftTable, budget: float, num: int
) -> list[DepthPlan]:
    """The `num` distinct ramps whose predicted time comes closest to the budget from below."""
    family: dict[tuple, DepthPlan] = {}
    for low, high, power in product(depths, depths, (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)):
        if low < high:
            plan = ramp(full, depths, low, high, power)
            family.setdefault(plan.pairs, plan)
    within = [p for p in family.values() if table.cost.share_of_time(p) <= budget * (1 + 1e-9)]
    return sorted(within, key=table.cost.share_of_time, reverse=True)[:num]


def _measure(
    experiment: Experiment,
    model: DynamicDepth,
    extractor: Extractor,
    reference: Moments,
    arms: list[Arm],
    out: Path,
    console: Console,
) -> None:
    """Sample and score every arm on every seed block; blocks go round the arms in changing order."""
    path = out / "runs.csv"
    done = measured(path) if path.exists() else set()
    labels = balanced_labels(experiment.num_images, model.backbone.num_classes)
    total, count = experiment.num_blocks * len(arms), len(done)
    warm = arms[0].plan
    draw_warm = labels[: experiment.batch_size]
    sample(
        model,
        draw_warm,
        plan=warm,
        solver=warm.solver,
        num_steps=warm.num_steps,
        cfg_scale=experiment.cfg_scale,
        batch_size=experiment.batch_size,
    )
    with progress_bar("sampling and scoring", console) as advance:
        for block in range(experiment.num_blocks):
            shift = block * len(arms) // experiment.num_blocks
            for arm in arms[shift:] + arms[:shift]:
                if (arm.name, block) in done:
                    continue
                result = sample(
                    model,
                    labels,
                    plan=arm.plan,
                    solver=arm.plan.solver,
                    num_steps=arm.plan.num_steps,
                    cfg_scale=experiment.cfg_scale,
                    seed=block,
                    batch_size=experiment.batch_size,
                    stats=True,
                )
                features = extractor.features(as_rgb(result.pictures))
                cond, uncond = arm.plan.mean_depth
                row = {
                    "run": out.name,
                    "machine": manifest.machine(),
                    "extractor": extractor.name,
                    "metric": extractor.metric_name,
                    "model": model.trunk_hash(),
                    "arm": arm.name,
                    "family": arm.family,
                    "solver": arm.plan.solver,
                    "steps": arm.plan.num_steps,
                    "budget": arm.budget,
                    "cfg_scale": experiment.cfg_scale,
                    "block": block,
                    "seed": block,
                    "num_images": len(labels),
                    "share_of_blocks": arm.plan.share_of_blocks,
                    "mean_depth_cond": cond,
                    "mean_depth_uncond": uncond,
                    "ms_per_picture": 1e3 * result.seconds / len(labels),
                    "ms_denoiser": 1e3 * sum(result.network_seconds) / len(labels),
                    "fd": frechet_distance(moments(features), reference),
                    "predicted_fd": arm.predicted_fd,
                    "role": "score",
                    "plan": f"plan-{arm.plan.solver}-{arm.plan.num_steps}-b{arm.budget:g}.json"
                    if arm.family == "searched"
                    else "",
                }
                append_run(path, row)
                count += 1
                advance(count, total)


def _report(experiment: Experiment, model: DynamicDepth, arms: list[Arm], out: Path) -> None:
    """Figures and pages from what lies in `out`."""
    from dyndit.analysis import figures, write_report

    searched = {a.name: a for a in arms if a.family == "searched"}
    shown = {name: asdict(a.plan) for name, a in searched.items()}
    figures.save(figures.plan_figure(shown), out / "plan.png")
    if (out / "exit-errors.csv").exists():
        errors = pd.read_csv(out / "exit-errors.csv")
        table = errors.pivot(index="depth", columns="log_snr_low", values="noise_error").sort_index(axis=1)
        figures.save(figures.error_figure(table, "mean squared error on the noise"), out / "errors.png")
    rows: dict[str, torch.Tensor] = {}
    for solver in experiment.solvers:
        steps = experiment.dynamic_steps[0]
        chosen = [a for a in arms if a.plan.solver == solver and a.plan.num_steps == steps]
        full = [a for a in chosen if a.family == "full"]
        dynamic = [a for a in chosen if a.name in searched]
        for arm in full[:1] + sorted(dynamic, key=lambda a: -a.budget):
            drawn = sample(
                model,
                balanced_labels(10, model.backbone.num_classes),
                plan=arm.plan,
                solver=solver,
                num_steps=steps,
                cfg_scale=experiment.cfg_scale,
                seed=0,
                batch_size=experiment.batch_size,
            )
            rows[arm.name] = drawn.pictures
    figures.save(figures.samples_figure(rows), out / "samples.png")
    write_report(out, out, margin=experiment.margin)


@contextmanager
def progress_bar(title: str, console: Console, every: float = 30.0) -> Iterator[Callable[[int, int], None]]:
    """A bar with elapsed and remaining time; yields `advance(done, total)`.

    Where standard error is no terminal, a plain line about every `every` seconds.
    """
    if not console.is_terminal:
        began = said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= every or done == total:
                left = (now - began) / max(done, 1) * (total - done)
                console.print(f"{title}: {done} of {total}, {now - began:.0f} s, about {left:.0f} s left")
                said = now

        yield say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
