"""The verb that makes plans: calibrate."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dyndit.cli import flags
from dyndit.errors import InputError

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor

    from dyndit.analysis.metrics.extractors import Extractor
    from dyndit.calibration.measure import CalibrationSettings
    from dyndit.models.dynamic import DynamicDepth
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.table import ShiftTable
    from dyndit.process import Process


@flags.holds("model", make=False)
def calibrate(
    model: flags.Positional[Path],
    /,
    budget: float | None = None,
    solver: str = "",
    steps: int | None = None,
    choice: flags.Unnamed[flags.StepChoice] = flags.AS_GIVEN,
    step_grid: tuple[int, ...] = (),
    out: Path | None = None,
    extractor: str = "",
    extractor_weights: Path | None = None,
    reference: str = "",
    cfg_scale: flags.CfgScale = 1.5,
    num_pictures: int = 512,
    table_steps: int = 10,
    num_bands: int = 10,
    num_depths: int = 8,
    own_guides: bool = False,
    forecast_ages: int = 0,
    refinements: int = 0,
    search_only: bool = False,
    batch_size: flags.BatchSize = 128,
    process: str = "",
    vae: flags.Vae = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    reading: flags.Unnamed[flags.Reading] = flags.READING,
    fresh: bool = False,
    json_: flags.Json = False,
) -> None:
    """Write the plan of least predicted Fréchet distance for a solver, a step count and a budget of time.

    The table of distribution shifts is measured once and stored with the model. Other budgets, solvers and step
    counts are searched on it. With --latency-budget or --target-fd the step count is chosen too, among the step counts
    that full depth was measured at.

    Args:
        model: A local model folder with exits; the table is written into it.
        budget: Share of full depth's time at the same steps, above 0 and at most 1.
        solver: One of {solvers} (default: the usual solver of the model's process).
        steps: Sampling steps (default: 20, or chosen).
        choice: Goal to choose the steps for.
        step_grid: Step counts to choose among: full depth is measured at each and stored in the table (default: 5 7 10
            14 20 if steps are chosen and the table has no step count of the solver).
        out: File to write the plan to (default: in the model folder).
        extractor: Extractor that quality is measured with, one of {extractors} (default: the extractor of the model's
            table, else digits for digits, moving-digits for clips and inception for all others).
        extractor_weights: Weights of the extractor, if they do not ship with the package.
        reference: Real pictures: one of {data_sets}, or any that `dyndit evaluate` takes (default: the extractor's own
            data set, for a model of classes).
        num_pictures: Seeds to measure the table on.
        table_steps: Sampling steps to measure the table at.
        num_bands: Bands of timesteps in the table.
        num_depths: Conditional depths in the table, at most.
        refinements: With --budget, rounds that measure the plan and correct the prediction.
        search_only: Search on the stored table and draw nothing: seconds. The plan's distance is then predicted alone.
        own_guides: The table also holds guidance by the model's own exits, which costs a head and no second pass.
        forecast_ages: The table also holds exits with forecasts of their gap to full depth, from up to so many steps
            ago; 0 for no forecasts.
        process: Process of a model that does not say its own, one of {processes}.
        fresh: Measure the table again. A stored table is replaced once the new table has given its plan.
    """
    from dyndit import files
    from dyndit.calibration import calibrate as calibration
    from dyndit.plans.plan import file_name
    from dyndit.runtime import chosen_device
    from dyndit.sampling.loop import to_uint8
    from dyndit.sampling.solvers import make_scheduler
    from dyndit.storage import load as checkpoints
    from dyndit.training.autoencoders import decode_latents

    goal = None if choice == flags.AS_GIVEN else flags.goal_of(choice, steps, budget=budget)
    if goal is None and budget is None:
        raise InputError("--budget: missing; expected one of --budget, --latency-budget and --target-fd")
    for flag, value in {"refinements": refinements, "fresh": fresh, "step-grid": step_grid}.items():
        if search_only and value:
            raise InputError(f"--{flag} draws pictures, --search-only none; expected one of them")
    if goal is not None and refinements:
        raise InputError(f"--refinements {refinements}: expected --budget with it, not a choice of steps")
    steps = 20 if steps is None else steps
    device = chosen_device(device)
    loaded = checkpoints.inspect(model, process=process or None, device=device, dtype=dtype)
    dynamic = loaded.model
    for note in loaded.notes:
        print(note)
    solver = solver or dynamic.process.usual_solver
    make_scheduler(solver, steps, dynamic.process)
    if dynamic.exits is None:
        raise InputError(f"{model}: has no exits; expected a model that `dyndit distill` wrote")
    decoder = flags.decoder_of(dynamic, model, vae, device)
    to_pictures = to_uint8 if decoder is None else lambda latents: decode_latents(decoder, latents)
    files.sweep(model)
    path = model / checkpoints.TABLE
    # A stored table stays until a new one is whole and has given its plan.
    into = path.with_name(f"new-{path.name}") if fresh and path.exists() else path
    table = None if fresh else _known_table(path, dynamic, cfg_scale)
    network = None if search_only else _extractor(extractor, extractor_weights, dynamic, table, device)
    settings = calibration.CalibrationSettings(
        num_pictures,
        num_bands,
        batch_size,
        num_depths=num_depths,
        own_guides=own_guides,
        forecast_ages=forecast_ages,
    )
    if table is None and network is not None and into != path:
        table = _left_table(into, dynamic, network, settings, table_steps, cfg_scale)
    if table is None and network is not None:
        real = _real_pictures(reference, network, dynamic, *_picture_shape(dynamic, decoder), reading)
        reducing, moments = calibration.reduced(network, real)
        table = calibration.measure_shifts(
            dynamic,
            reducing,
            moments,
            num_steps=table_steps,
            cfg_scale=cfg_scale,
            settings=settings,
            to_pictures=to_pictures,
            into=into,
        )
    if table is None:
        raise InputError(f"{path}: no such file; expected the table that a call without --search-only measures")
    options: dict[str, Any] = {"solver": solver, "to_pictures": to_pictures, "batch_size": batch_size}
    if goal is not None and network is not None and not any(name == solver for name, _ in table.bases):
        step_grid = step_grid or calibration.STEP_GRID
    if step_grid and network is not None:
        table = calibration.measure_bases(dynamic, table, network, step_grid=step_grid, into=into, **options)
    measured: dict[str, Any] = {"table": table, "extractor": network, **options}
    if goal is None:
        assert budget is not None  # without a goal
        plan = calibration.calibrate(
            dynamic, budget=budget, num_steps=steps, cfg_scale=cfg_scale, refinements=refinements, **measured
        )
        target = out or model / file_name(solver, steps, budget or 0.0)
    else:
        plan = calibration.calibrate_steps(dynamic, goal, **measured)
        _print_step_counts(calibration.table_for(dynamic, table, solver), plan, dynamic.process)
        target = out or model / f"plan-{plan.router}-{solver}-{goal.label}.json"
    if into != path:
        files.move(into, path)
    plan.save(target)
    _print_plan(plan, _distance_name(table))
    print(f"plan: {target}")
    if json_:
        print(json.dumps({"plan": str(target), **plan.figures}))


def plan(
    action: flags.Positional[Literal["show", "edit"]],
    file: flags.Positional[Path],
    /,
    out: Path | None = None,
    step: tuple[str, ...] = (),
    unbind: bool = False,
) -> None:
    """Show a plan, or write an edited plan. An edited plan's router is "manual", wherever the plan is used.

    Args:
        action: show: print the plan; edit: write a plan with other steps.
        file: The plan file.
        out: File for the edited plan. An existing file is refused.
        step: Steps to set, by number from 0: "3=12|6" "4=8".
        unbind: The edited plan runs on any model of its depth, not only on the model that it was made for.
    """
    from dataclasses import replace

    from dyndit.files import check_free
    from dyndit.plans.plan import MANUAL, DepthPlan
    from dyndit.plans.step import Step

    found = DepthPlan.load(file)
    if action == "show":
        if out is not None or step or unbind:
            raise InputError("--out, --step, --unbind: expected them with `dyndit plan edit`")
        print(found)
        return
    if out is None:
        raise InputError("--out: missing; expected a file for the edited plan")
    check_free(out, folder=False)
    steps = list(found.steps)
    for text in step:
        number, _, word = text.partition("=")
        if not number.isdecimal() or not word or int(number) >= len(steps):
            raise InputError(f"--step {text}: expected NUMBER=STEP, numbers 0 to {len(steps) - 1}, such as 3=12|6")
        steps[int(number)] = Step.parse(word)
    identity = {"backbone": "", "exits": ""} if unbind or not (found.backbone and found.exits) else {}
    edited = replace(found, steps=tuple(steps), router=MANUAL, budget=None, figures={}, note="", **identity)
    edited.save(out)
    print(edited)
    print(f"plan: {out}")


def _known_table(path: Path, dynamic: "DynamicDepth", cfg_scale: float) -> "ShiftTable | None":
    """Load the model's table; None if it has none. Raises InputError: other exits or another guidance scale."""
    from dyndit import files
    from dyndit.models.identity import same
    from dyndit.plans.step import OwnExit
    from dyndit.plans.table import ShiftTable

    if not path.exists():
        return None
    table = ShiftTable.load(path)
    scales = f"--cfg-scale {table.cfg_scale:g}, now {cfg_scale:g}" if table.cfg_scale != cfg_scale else ""
    if scales or not same(table.exits, dynamic.identity.exits):
        raise InputError(f"{path}: measured at {scales or 'other exits'}; expected the same, or --fresh to replace it")
    files.remove(path.with_suffix(".partial"))  # of a run that was killed when the table was whole
    terms = ", own guides" if any(isinstance(choice.guide, OwnExit) for choice in table.choices) else ""
    terms += f", forecasts from up to {max(table.ages)} steps ago" if table.ages else ""
    held = f"{table.num_pictures} seeds, {table.num_bands} bands{terms}"
    print(f"{path}: searched as it is ({held}); --fresh measures anew")
    return table


def _left_table(
    path: Path,
    dynamic: "DynamicDepth",
    extractor: "Extractor",
    settings: "CalibrationSettings",
    num_steps: int,
    cfg_scale: float,
) -> "ShiftTable | None":
    """Return the table that a stopped --fresh left beside the stored one, if it is the table to measure."""
    from dyndit.calibration.measure import part_of
    from dyndit.calibration.samplers import OwnSampler
    from dyndit.errors import CheckpointError
    from dyndit.plans.table import ShiftTable

    if not path.exists():
        return None
    try:
        table = ShiftTable.load(path)
    except CheckpointError as error:
        print(f"{error}: measured again")
        return None
    network = extractor if table.projection is None else extractor.projected(table.projection)
    sampler = OwnSampler(dynamic, dynamic.process.usual_solver, num_steps, cfg_scale, seed=settings.seed)
    if table.extractor_fingerprint != network.fingerprint or part_of(table, sampler, settings) is None:
        return None
    print(f"{path}: measured already, not replacing the stored table yet")
    return table


def _distance_name(table: "ShiftTable") -> str:
    """Return the name of the table's distances."""
    if table.projection is None:
        return "FID" if table.extractor_name == "inception" else f"FD-{table.extractor_name}"
    return f"distance on {table.projection.shape[1]} leading components of {table.extractor_name}"


def _print_plan(plan: "DepthPlan", distance: str) -> None:
    """Print a plan with its predicted and measured figures."""
    f = plan.figures
    print(plan)
    if "measured_fd" not in f:  # only searched
        full = f"full depth {f['predicted_fd_full']:.2f} on the table's seeds"
        print(f"{distance}: {full}; plan {f['predicted_fd']:.2f} predicted, not measured")
        print(f"predicted time: {f['predicted_share_of_time']:.0%} of full depth's")
        return
    print(
        f"{distance}: full depth {f['predicted_fd_full']:.2f} on the table's seeds, {f['measured_fd_full']:.2f} on "
        f"fresh ones; plan {f['predicted_fd']:.2f} predicted, {f['measured_fd']:.2f} measured on fresh seeds"
    )
    print(f"predicted time: {f['predicted_share_of_time']:.0%} of full depth's")
    if "reference_steps" in f:  # its steps were chosen
        low, high = (f[f"measured_share_of_reference_{end}"] for end in ("low", "high"))
        print(
            f"of full depth's at {f['reference_steps']:g} steps: {f['predicted_share_of_reference']:.1%} predicted, "
            f"{f['measured_share_of_reference']:.1%} measured ({low:.1%} to {high:.1%}); {distance} there "
            f"{f['measured_fd_reference']:.2f} on fresh seeds"
        )


def _extractor(
    name: str, weights: Path | None, dynamic: "DynamicDepth", table: "ShiftTable | None", device: str
) -> "Extractor":
    """Load the extractor of the flags, else of the table, else the usual extractor for the pictures' shape."""
    from dyndit.analysis import load_extractor

    shape = dynamic.backbone.sample_shape
    usual = "moving-digits" if len(shape) == 4 else "digits" if shape[1:] == (8, 8) else "inception"
    return load_extractor(name or (usual if table is None else table.extractor_name), weights, device)


def _picture_shape(dynamic: "DynamicDepth", decoder: "ModelMixin | None") -> tuple[tuple[int, ...], int]:
    """Return (height, width), or (frames, height, width), and channels of a model's decoded pictures."""
    from dyndit.training.autoencoders import latent_space, picture_size

    channels, *size = dynamic.backbone.sample_shape
    if decoder is None:
        return tuple(size), channels
    return picture_size(decoder, tuple(size)), latent_space(decoder).out_channels


def _real_pictures(
    reference: str,
    extractor: "Extractor",
    dynamic: "DynamicDepth",
    size: Any,
    channels: int,
    reading: flags.Reading,
) -> "Tensor":
    """Read at most 5,000 pictures of the reference, evenly spread over the set, as uint8."""
    from dyndit.models.conditions import ClassLabels
    from dyndit.pictures.collection import said_of
    from dyndit.training.data import PACKAGED, open_data

    usual = extractor.name in PACKAGED and isinstance(dynamic.backbone.condition, ClassLabels)
    spec = reference or (extractor.name if usual else "")
    if not spec:
        raise InputError(f"--reference: missing; expected a folder of real pictures, or one of {', '.join(PACKAGED)}")
    options: dict[str, Any] = {"method": reading.resize_method, "skip_damaged": reading.skip_damaged, "labelled": False}
    pictures, most = open_data(spec, size, channels, **options), 5000
    pictures.check()
    flags.say(said_of(pictures.account))
    count = len(pictures)
    return pictures.uint8([i * count // most for i in range(most)] if count > most else None)


def _print_step_counts(table: "ShiftTable", plan: "DepthPlan", process: "Process") -> None:
    """Print the predictions for every step count within the chosen plan's time."""
    from dyndit.plans.step_counts import frontier
    from dyndit.sampling.solvers import timesteps_of

    f = plan.figures
    share = f.get("latency_budget", f["predicted_share_of_reference"])
    timesteps_at = partial(timesteps_of, plan.solver, process=process)
    rows = frontier(table, plan.solver, timesteps_at, (share,), int(f["reference_steps"]))
    print(f"within {share:.1%} of full depth's time at {f['reference_steps']:g} steps, by step count:")
    print(rows.drop(columns="latency_budget").to_string(index=False, float_format=lambda value: f"{value:.3f}"))
