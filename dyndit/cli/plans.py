"""The verb that makes plans: calibrate."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dyndit.cli.flags import AS_GIVEN, Json, Positional, StepChoice, Unnamed, decoder_of, goal_of, print_json
from dyndit.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from dyndit.analysis.metrics.extractors import Extractor
    from dyndit.models.dynamic import DynamicDepth
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.table import ShiftTable
    from dyndit.training.data import Pictures


@dataclass(frozen=True)
class Measuring:
    """What quality is measured with."""

    extractor: str = ""
    """digits, digits-lenet, resnet20-cifar10, vgg-cifar10 or inception (default: what the model's table was measured
    with, else digits for digits and inception for all others)."""
    extractor_weights: Path | None = None
    """Weights of the extractor, where they do not ship with the package."""
    reference: str = ""
    """Real pictures: "digits", or a picture folder."""


def calibrate(
    model: Positional[Path],
    /,
    budget: float | None = None,
    solver: str = "ddim",
    steps: int | None = None,
    choice: Unnamed[StepChoice] = AS_GIVEN,
    step_grid: tuple[int, ...] = (),
    out: Path | None = None,
    measuring: Unnamed[Measuring] = Measuring(),
    cfg_scale: float = 1.5,
    num_pictures: int = 512,
    table_steps: int = 10,
    num_bands: int = 10,
    num_depths: int = 8,
    own_guides: bool = False,
    forecast_ages: int = 0,
    refinements: int = 0,
    batch_size: int = 128,
    vae: Path | None = None,
    device: str = "cpu",
    fresh: bool = False,
    json_: Json = False,
) -> None:
    """Write the plan of least predicted Fréchet distance for a solver, a step count and a budget of time.

    The table of distribution shifts is measured once and stored with the model; other budgets, solvers and step
    counts are searched on it. With --latency-budget or --target-fd the step count is chosen too, among those that
    full depth was measured at.

    Args:
        model: A local model folder with exits; the table is written into it.
        budget: Share of full depth's time at the same steps, above 0 and at most 1.
        solver: ddpm, ddim, dpmpp, unipc or euler.
        steps: Sampling steps (default: 20, or chosen).
        choice: What steps are chosen for.
        step_grid: Step counts to measure full depth at and keep with the table, to choose among (default: 5 7 10 14 20
            where steps are to be chosen and the table has none of the solver's).
        out: Where the plan goes (default: beside the model).
        measuring: What quality is measured with.
        cfg_scale: Guidance scale; 1 for none.
        num_pictures: Seeds the table is measured on.
        table_steps: Sampling steps the table is measured at.
        num_bands: Bands of timesteps the table tells apart.
        num_depths: Conditional depths it tells apart, at most.
        refinements: With --budget, rounds in which the plan is measured and the prediction corrected by it.
        own_guides: It also holds guidance by the model's own exits, which costs a head instead of a second pass.
        forecast_ages: It also holds exits whose gap to full depth is forecast from up to so many steps ago; 0 for none.
        batch_size: Pictures at a time.
        vae: Folder of a diffusers AutoencoderKL, for a model of latents.
        device: cpu or cuda.
        fresh: Measure the table again even where one is there.
        json_: End with one line of JSON.
    """
    from dyndit.calibration import calibrate as calibration
    from dyndit.manifest import check_device
    from dyndit.progress import progress_bar
    from dyndit.sampling.loop import to_uint8
    from dyndit.sampling.solvers import make_scheduler
    from dyndit.storage import load as checkpoints
    from dyndit.training.latents import decode_latents

    goal = goal_of(choice, steps, budget=budget)
    if goal is None and budget is None:
        raise InputError("--budget: missing; expected one of --budget, --latency-budget and --target-fd")
    if goal is None and not 0 < budget <= 1:
        raise InputError(f"--budget {budget:g}: expected above 0 and at most 1")
    for flag, rounds in (("--refinements", refinements), ("--forecast-ages", forecast_ages)):
        if rounds < 0:
            raise InputError(f"{flag} {rounds}: expected at least 0")
    if goal is not None and refinements:
        raise InputError(f"--refinements {refinements}: expected --budget with it, not a choice of steps")
    steps = 20 if steps is None else steps
    make_scheduler(solver, steps)
    calibration.check_step_grid(step_grid)
    check_device(device)
    if not model.is_dir():
        raise InputError(
            f"{model}: the table is written into the model's folder; expected a local model folder, which "
            "`dyndit distill` or `dyndit convert` makes"
        )
    dynamic = checkpoints.load(model, device=device)
    if dynamic.exits is None:
        raise InputError(f"{model}: has no exits; expected a model that `dyndit distill` wrote")
    decoder = decoder_of(dynamic, model, vae, device)
    to_pictures = to_uint8 if decoder is None else lambda latents: decode_latents(decoder, latents)
    path = model / checkpoints.TABLE
    table = None if fresh else _known_table(path, dynamic, cfg_scale)
    extractor = _extractor(measuring, dynamic, table, device)
    if table is None:
        settings = calibration.CalibrationSettings(
            num_pictures,
            num_bands,
            batch_size,
            num_depths=num_depths,
            own_guides=own_guides,
            forecast_ages=forecast_ages,
        )
        real = _real_pictures(measuring, extractor, *_picture_shape(dynamic, decoder))
        with progress_bar("measuring distribution shifts") as advance:
            reducing, reference = calibration.reduced(extractor, real)
            table = calibration.measure_shifts(
                dynamic,
                reducing,
                reference,
                num_steps=table_steps,
                cfg_scale=cfg_scale,
                settings=settings,
                to_pictures=to_pictures,
                into=path,
                on_progress=advance,
            )
    drawing = {"solver": solver, "to_pictures": to_pictures, "batch_size": batch_size}
    if goal is not None and not any(name == solver for name, _ in table.bases):
        step_grid = step_grid or calibration.STEP_GRID
    if step_grid:
        with progress_bar("measuring full depth") as advance:
            table = calibration.measure_bases(
                dynamic, table, extractor, step_grid=step_grid, into=path, on_progress=advance, **drawing
            )
    measured = {"table": table, "extractor": extractor, **drawing}
    if goal is None:
        plan = calibration.calibrate(
            dynamic, budget=budget, num_steps=steps, cfg_scale=cfg_scale, refinements=refinements, **measured
        )
        target = out or model / f"plan-{solver}-{steps}-b{budget:g}.json"
    else:
        plan = calibration.calibrate_steps(dynamic, goal, **measured)
        _print_step_counts(calibration.table_for(dynamic, table, solver), plan)
        target = out or model / f"plan-{plan.router}-{solver}-{goal.label}.json"
    plan.save(target)
    _print_plan(plan, _distance_name(extractor, table))
    print(f"plan: {target}")
    if json_:
        print_json({"plan": str(target), **plan.figures})


def _known_table(path: Path, dynamic: "DynamicDepth", cfg_scale: float) -> "ShiftTable | None":
    """The table beside the model, where it is this model's at this guidance scale; says which it is."""
    from dyndit.plans.plan import REUSED
    from dyndit.plans.table import ShiftTable

    if not path.exists():
        return None
    table = ShiftTable.load(path)
    if table.cfg_scale != cfg_scale or table.exits != dynamic.exits_hash():
        print(f"{path}: measured at another guidance scale or on other exits; measured again")
        return None
    terms = ", own guides" if any(uncond < REUSED for _, uncond in table.pairs) else ""
    terms += f", forecasts from up to {max(table.ages)} steps ago" if table.ages else ""
    held = f"{table.num_pictures} seeds, {table.num_bands} bands{terms}"
    print(f"{path}: searched as it is ({held}); --fresh measures anew")
    return table


def _distance_name(extractor: "Extractor", table: "ShiftTable") -> str:
    """What the table's distances are called."""
    if table.projection is None:
        return extractor.metric_name
    return f"distance on {table.projection.shape[1]} leading components of {extractor.name}"


def _print_plan(plan: "DepthPlan", distance: str) -> None:
    """What a plan was predicted and measured to do."""
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


def _extractor(measuring: Measuring, dynamic: "DynamicDepth", table: "ShiftTable | None", device: str) -> "Extractor":
    """What the flags ask for, else what the table was measured with, else what suits the pictures' size."""
    from dyndit.analysis import load_extractor

    usual = "digits" if dynamic.backbone.image_size == 8 else "inception"
    name = measuring.extractor or (usual if table is None else table.extractor_name)
    return load_extractor(name, measuring.extractor_weights, device)


def _picture_shape(dynamic: "DynamicDepth", decoder: "AutoencoderKL | None") -> tuple[int, int]:
    """Pixels across, and channels, of the pictures that a model's sampling ends in."""
    size, channels = dynamic.backbone.image_size, dynamic.backbone.in_channels
    if decoder is None:
        return size, channels
    return size * 2 ** (len(decoder.config.block_out_channels) - 1), decoder.config.out_channels


def _real_pictures(measuring: Measuring, extractor: "Extractor", size: int, channels: int) -> "Tensor":
    """At most 5,000 pictures of the reference, as uint8."""
    from dyndit.training.data import open_data

    spec = measuring.reference or ("digits" if extractor.name == "digits" else "")
    if not spec:
        raise InputError("--reference: missing; expected a folder of real pictures")
    return _spread(open_data(spec, size, channels), 5000)


def _spread(pictures: "Pictures", most: int) -> "Tensor":
    """At most so many pictures, evenly spread over the set, as uint8."""
    count = len(pictures)
    return pictures.uint8() if count <= most else pictures.uint8([i * count // most for i in range(most)])


def _print_step_counts(table: "ShiftTable", plan: "DepthPlan") -> None:
    """What every step count could do in the chosen plan's time."""
    from dyndit.plans.step_counts import frontier

    f = plan.figures
    share = f.get("latency_budget", f["predicted_share_of_reference"])
    rows = frontier(table, plan.solver, (share,), int(f["reference_steps"]))
    print(f"within {share:.1%} of full depth's time at {f['reference_steps']:g} steps, by step count:")
    print(rows.drop(columns="latency_budget").to_string(index=False, float_format=lambda value: f"{value:.3f}"))
