"""The verb that makes plans: calibrate."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dyndit.cli import flags
from dyndit.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from dyndit.analysis.metrics.extractors import Extractor
    from dyndit.models.dynamic import DynamicDepth
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.table import ShiftTable
    from dyndit.process import Process


def calibrate(
    model: flags.Positional[Path],
    /,
    budget: float | None = None,
    solver: str = "ddim",
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
    batch_size: flags.BatchSize = 128,
    process: str = "",
    vae: Path | None = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
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
        solver: One of {solvers}.
        steps: Sampling steps (default: 20, or chosen).
        choice: Goal to choose the steps for.
        step_grid: Step counts to choose among: full depth is measured at each and stored in the table (default: 5 7 10
            14 20 if steps are chosen and the table has no step count of the solver).
        out: File to write the plan to (default: in the model folder).
        extractor: Extractor that quality is measured with, one of {extractors} (default: the extractor of the model's
            table, else digits for digits and inception for all others).
        extractor_weights: Weights of the extractor, if they do not ship with the package.
        reference: Real pictures: "digits", or a picture folder.
        num_pictures: Seeds to measure the table on.
        table_steps: Sampling steps to measure the table at.
        num_bands: Bands of timesteps in the table.
        num_depths: Conditional depths in the table, at most.
        refinements: With --budget, rounds that measure the plan and correct the prediction.
        own_guides: The table also holds guidance by the model's own exits, which costs a head and no second pass.
        forecast_ages: The table also holds exits with forecasts of their gap to full depth, from up to so many steps
            ago; 0 for no forecasts.
        process: Process of a model that does not say its own, one of {processes}.
        vae: Folder of a diffusers AutoencoderKL, for a model of latents.
        fresh: Measure the table again even if there is a table.
    """
    from dyndit.calibration import calibrate as calibration
    from dyndit.progress import progress_bar
    from dyndit.runtime import chosen_device
    from dyndit.sampling.loop import to_uint8
    from dyndit.sampling.solvers import make_scheduler
    from dyndit.storage import load as checkpoints
    from dyndit.training.latents import decode_latents

    goal = None if choice == flags.AS_GIVEN else flags.goal_of(choice, steps, budget=budget)
    if goal is None and budget is None:
        raise InputError("--budget: missing; expected one of --budget, --latency-budget and --target-fd")
    if goal is not None and refinements:
        raise InputError(f"--refinements {refinements}: expected --budget with it, not a choice of steps")
    steps = 20 if steps is None else steps
    device = chosen_device(device)
    dynamic = checkpoints.load(model, process=process or None, device=device, dtype=dtype)
    make_scheduler(solver, steps, dynamic.process)
    if dynamic.exits is None:
        raise InputError(f"{model}: has no exits; expected a model that `dyndit distill` wrote")
    decoder = flags.decoder_of(dynamic, model, vae, device)
    to_pictures = to_uint8 if decoder is None else lambda latents: decode_latents(decoder, latents)
    path = model / checkpoints.TABLE
    table = None if fresh else _known_table(path, dynamic, cfg_scale)
    network = _extractor(extractor, extractor_weights, dynamic, table, device)
    if table is None:
        settings = calibration.CalibrationSettings(
            num_pictures,
            num_bands,
            batch_size,
            num_depths=num_depths,
            own_guides=own_guides,
            forecast_ages=forecast_ages,
        )
        real = _real_pictures(reference, network, *_picture_shape(dynamic, decoder))
        with progress_bar("measuring distribution shifts") as advance:
            reducing, moments = calibration.reduced(network, real)
            table = calibration.measure_shifts(
                dynamic,
                reducing,
                moments,
                num_steps=table_steps,
                cfg_scale=cfg_scale,
                settings=settings,
                to_pictures=to_pictures,
                into=path,
                on_progress=advance,
            )
    options = {"solver": solver, "to_pictures": to_pictures, "batch_size": batch_size}
    if goal is not None and not any(name == solver for name, _ in table.bases):
        step_grid = step_grid or calibration.STEP_GRID
    if step_grid:
        with progress_bar("measuring full depth") as advance:
            table = calibration.measure_bases(
                dynamic, table, network, step_grid=step_grid, into=path, on_progress=advance, **options
            )
    measured = {"table": table, "extractor": network, **options}
    if goal is None:
        plan = calibration.calibrate(
            dynamic, budget=budget, num_steps=steps, cfg_scale=cfg_scale, refinements=refinements, **measured
        )
        target = out or model / f"plan-{solver}-{steps}-b{budget:g}.json"
    else:
        plan = calibration.calibrate_steps(dynamic, goal, **measured)
        _print_step_counts(calibration.table_for(dynamic, table, solver), plan, dynamic.process)
        target = out or model / f"plan-{plan.router}-{solver}-{goal.label}.json"
    plan.save(target)
    _print_plan(plan, _distance_name(network, table))
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
    """Load the model's table if it fits the exits and the guidance scale, else None. Print which."""
    from dyndit.models.identity import same
    from dyndit.plans.step import OwnExit
    from dyndit.plans.table import ShiftTable

    if not path.exists():
        return None
    table = ShiftTable.load(path)
    if table.cfg_scale != cfg_scale or not same(table.exits, dynamic.identity.exits):
        print(f"{path}: measured at another guidance scale or on other exits; measured again")
        return None
    terms = ", own guides" if any(isinstance(choice.guide, OwnExit) for choice in table.choices) else ""
    terms += f", forecasts from up to {max(table.ages)} steps ago" if table.ages else ""
    held = f"{table.num_pictures} seeds, {table.num_bands} bands{terms}"
    print(f"{path}: searched as it is ({held}); --fresh measures anew")
    return table


def _distance_name(extractor: "Extractor", table: "ShiftTable") -> str:
    """Return the name of the table's distances."""
    if table.projection is None:
        return extractor.metric_name
    return f"distance on {table.projection.shape[1]} leading components of {extractor.name}"


def _print_plan(plan: "DepthPlan", distance: str) -> None:
    """Print a plan with its predicted and measured figures."""
    f = plan.figures
    print(plan)
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
    """Load the extractor of the flags, else of the table, else the usual extractor for the pictures' size."""
    from dyndit.analysis import load_extractor

    usual = "digits" if dynamic.backbone.sample_shape[1:] == (8, 8) else "inception"
    return load_extractor(name or (usual if table is None else table.extractor_name), weights, device)


def _picture_shape(dynamic: "DynamicDepth", decoder: "AutoencoderKL | None") -> tuple[tuple[int, ...], int]:
    """Return (height, width) and channels of a model's decoded pictures."""
    channels, *size = dynamic.backbone.sample_shape
    if decoder is None:
        return tuple(size), channels
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    return tuple(side * factor for side in size), decoder.config.out_channels


def _real_pictures(reference: str, extractor: "Extractor", size: tuple[int, ...], channels: int) -> "Tensor":
    """Read at most 5,000 pictures of the reference, evenly spread over the set, as uint8."""
    from dyndit.training.data import open_data

    spec = reference or ("digits" if extractor.name == "digits" else "")
    if not spec:
        raise InputError("--reference: missing; expected a folder of real pictures")
    pictures, most = open_data(spec, size, channels), 5000
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
