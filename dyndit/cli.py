"""The command line. Every verb is a thin function over the package; what it does, a notebook can call too."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dyndit.errors import InputError
from dyndit.runtime import keep_freed_memory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from dyndit.analysis.extractors import Extractor
    from dyndit.data import Pictures
    from dyndit.dynamic import DynamicDepth
    from dyndit.plan import DepthPlan
    from dyndit.routers.searched import ShiftTable
    from dyndit.routers.steps import Goal

Positional = tyro.conf.Positional


def train(
    recipe: Positional[str],
    /,
    out: Path,
    data: str = "",
    model: str = "",
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    sample_every: int | None = None,
    vae: Path | None = None,
) -> None:
    """Train a backbone, from scratch or on from given weights. A run that was stopped goes on where it was.

    Args:
        recipe: A recipe's name (digits, cifar10) or a Python file that defines `train`.
        out: Folder for the model, checkpoints, losses and TensorBoard logs.
        data: "digits", or a folder of pictures with a subfolder per class (default: the recipe's).
        model: Weights to start from: a model folder, a published DiT .pt, "digits", or a hub id. Default: random ones.
        steps: Updates, in place of the recipe's.
        batch_size: Pictures per update, in place of the recipe's.
        seed: Seed, in place of the recipe's.
        sample_every: Draw a sample grid every so many steps; 0 for never.
        vae: Folder of a diffusers AutoencoderKL: train on its latents, encoded once and cached in the run's folder.
    """
    from accelerate import PartialState

    from dyndit import checkpoints, manifest
    from dyndit.recipe_files import find
    from dyndit.tasks import Train

    chosen = find(recipe, "train", Train)
    with PartialState().main_process_first():  # latents are encoded once
        backbone = chosen.backbone
        pictures = _training_data(data or chosen.data, backbone.image_size, backbone.in_channels, vae, out)
    chosen.check(pictures)
    trunk = checkpoints.load(model) if model else None
    settings = {"verb": "train", "recipe": recipe, "data": pictures.fingerprint}
    if trunk is not None:
        settings["from"] = trunk.trunk_hash()
    with PartialState().main_process_first():
        manifest.claim(out, settings, shared=("latents",))
    changes = {"steps": steps, "batch_size": batch_size, "seed": seed, "sample_every": sample_every}
    fit = replace(chosen.fit, **{k: v for k, v in changes.items() if v is not None})
    chosen = replace(chosen, fit=fit)
    model, result = chosen.run(pictures, out, trunk=trunk, preview=_preview)
    if not PartialState().is_main_process:
        return
    checkpoints.save(model, out)
    facts = {"fit": vars(fit), "seconds": result.seconds, "trunk": model.trunk_hash()}
    manifest.write_json(out / "manifest.json", manifest.describe(settings, **facts))
    losses = result.losses["loss"]
    window = min(20, len(losses))
    print(
        f"loss: mean of the first {window} steps {losses[:window].mean():.4f}, "
        f"of the last {window} {losses[-window:].mean():.4f}"
    )
    print(f"model: {out}")


def distill(
    recipe: Positional[str],
    /,
    model: str,
    out: Path,
    data: str = "",
    steps: int | None = None,
    batch_size: int | None = None,
    num_heads: int | None = None,
    vae: Path | None = None,
) -> None:
    """Train exits on a model's own predictions, and write the model with them.

    The trunk stays as it is, bit for bit, unless the recipe trains a copy of it too.

    Args:
        recipe: A recipe's name (digits, cifar10, finetune_exits) or a Python file that defines `distill`.
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the model with its exits.
        data: "digits", or a folder of pictures with a subfolder per class (default: the recipe's).
        steps: Updates, in place of the recipe's.
        batch_size: Pictures per update, in place of the recipe's.
        num_heads: Attention heads of a .pt whose width does not tell them.
        vae: Folder of a diffusers AutoencoderKL, for a model of latents.
    """
    from accelerate import PartialState

    from dyndit import checkpoints, manifest
    from dyndit.recipe_files import find
    from dyndit.tasks import Distill, exit_error_table

    chosen = find(recipe, "distill", Distill)
    loaded = checkpoints.inspect(model, num_heads=num_heads)
    for note in loaded.notes:
        print(note)
    backbone = loaded.model.backbone
    with PartialState().main_process_first():
        pictures = _training_data(data or chosen.data, backbone.image_size, backbone.in_channels, vae, out)
    chosen.check(loaded.model, pictures)
    settings = {"verb": "distill", "recipe": recipe, "data": pictures.fingerprint, "model": loaded.model.trunk_hash()}
    with PartialState().main_process_first():
        manifest.claim(out, settings, shared=("latents",))
    changes = {"steps": steps, "batch_size": batch_size}
    fit = replace(chosen.fit, **{k: v for k, v in changes.items() if v is not None})
    dynamic, result = replace(chosen, fit=fit).run(loaded.model, pictures, out / "distillation")
    if not PartialState().is_main_process:
        return
    checkpoints.save(dynamic, out)
    errors = exit_error_table(dynamic, pictures)
    errors.to_csv(out / "exit-errors.csv", index=False)
    facts = {"fit": vars(fit), "seconds": result.seconds, "exits": dynamic.exits_hash(), "trunk": dynamic.trunk_hash()}
    manifest.write_json(out / "manifest.json", manifest.describe(settings, **facts))
    if dynamic.trunk_hash() != loaded.model.trunk_hash():
        moved = result.losses["full"].iloc[-20:].mean()
        print(f"trunk: trained too; full depth's error against the original's noise {moved:.3g} (last 20 steps)")
    print("error of each exit on the noise, by band of log-SNR (from noisy to clean):")
    table = errors.pivot(index="depth", columns="log_snr_low", values="noise_error")
    print(table.sort_index(axis=1).to_string(float_format=lambda v: f"{v:.4f}"))
    print(f"model: {out}")


@dataclass(frozen=True)
class Measuring:
    """What quality is measured with."""

    extractor: str = ""
    """digits, resnet20-cifar10 or inception (default: what the model's table used, or digits for digits)."""
    extractor_weights: Path | None = None
    """Weights of the extractor, where they do not ship with the package."""
    reference: str = ""
    """Real pictures: "digits", or a picture folder."""


@dataclass(frozen=True)
class StepChoice:
    """A time or a quality, in place of a budget at given steps: the step count is chosen with the plan."""

    latency_budget: float | None = None
    """Share of the reference time, above 0 and at most 1, for the least predicted distance."""
    target_fd: float | None = None
    """Predicted Fréchet distance to reach in the least time."""
    reference_steps: int | None = None
    """Steps of full depth whose time is the reference (default: those the table was measured at)."""


def calibrate(
    model: Positional[Path],
    /,
    budget: float | None = None,
    solver: str = "ddim",
    steps: int | None = None,
    choice: Annotated[StepChoice, tyro.conf.arg(name="")] = StepChoice(),
    step_grid: tuple[int, ...] = (),
    out: Path | None = None,
    measuring: Annotated[Measuring, tyro.conf.arg(name="")] = Measuring(),
    cfg_scale: float = 1.5,
    num_pictures: int = 512,
    table_steps: int = 10,
    num_bands: int = 10,
    num_depths: int = 8,
    own_guides: bool = False,
    second_order: bool = False,
    forecast_ages: int = 0,
    refinements: int = 0,
    batch_size: int = 128,
    vae: Path | None = None,
    device: str = "cpu",
    fresh: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
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
        second_order: It also holds what neighbouring bands do together, which takes nearly twice the time to measure.
        forecast_ages: It also holds exits whose gap to full depth is forecast from up to so many steps ago; 0 for none.
        batch_size: Pictures at a time.
        vae: Folder of a diffusers AutoencoderKL, for a model of latents.
        device: cpu or cuda.
        fresh: Measure the table again even where one is there.
        json_: End with one line of JSON.
    """
    from rich.console import Console

    from dyndit import calibration, checkpoints
    from dyndit.latents import decode_latents, load_autoencoder
    from dyndit.manifest import check_device
    from dyndit.progress import progress_bar
    from dyndit.routers.searched import ShiftTable
    from dyndit.sampler import make_scheduler, to_uint8

    goal = _goal(choice, steps, budget=budget)
    if goal is None and budget is None:
        raise InputError("--budget: missing; expected one of --budget, --latency-budget and --target-fd")
    for flag, rounds in (("--refinements", refinements), ("--forecast-ages", forecast_ages)):
        if rounds < 0:
            raise InputError(f"{flag} {rounds}: expected at least 0")
    steps = 20 if steps is None else steps
    make_scheduler(solver, steps)
    calibration.check_step_grid(step_grid)
    check_device(device)
    if goal is None and not 0 < budget <= 1:
        raise InputError(f"--budget {budget:g}: expected above 0 and at most 1")
    if not model.is_dir():
        raise InputError(
            f"{model}: the table is written into the model's folder; expected a local model folder, which "
            "`dyndit distill` or `dyndit convert` makes"
        )
    dynamic = checkpoints.load(model, device=device)
    if dynamic.exits is None:
        raise InputError(f"{model}: has no exits; expected a model that `dyndit distill` wrote")
    if not dynamic.pixel_space and vae is None:
        raise InputError(f"--vae: missing; {model} makes latents, expected the folder of their AutoencoderKL")
    decoder = None if vae is None else load_autoencoder(vae).to(device)
    to_pictures = to_uint8 if decoder is None else lambda latents: decode_latents(decoder, latents)
    path = model / checkpoints.TABLE
    table = ShiftTable.load(path) if path.exists() and not fresh else None
    if table is not None and (table.cfg_scale != cfg_scale or table.exits != dynamic.exits_hash()):
        print(f"{path}: measured at another guidance scale or on other exits; measured again")
        table = None
    extractor = _extractor(measuring, dynamic, device)
    if table is None:
        settings = calibration.CalibrationSettings(
            num_pictures,
            num_bands,
            batch_size,
            num_depths=num_depths,
            own_guides=own_guides,
            second_order=second_order,
            forecast_ages=forecast_ages,
        )
        size, channels = dynamic.backbone.image_size, dynamic.backbone.in_channels
        if decoder is not None:
            size, channels = _picture_size(decoder, dynamic), decoder.config.out_channels
        real = _real_pictures(measuring, extractor, size, channels)
        with progress_bar("measuring distribution shifts", Console(stderr=True)) as advance:
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
    else:
        terms = "" if table.interactions is None else ", second-order terms"
        terms += f", forecasts from up to {max(table.ages)} steps ago" if table.ages else ""
        held = f"{table.num_pictures} seeds, {table.num_bands} bands{terms}"
        print(f"{path}: searched as it is ({held}); --fresh measures anew")
    drawing = {"solver": solver, "to_pictures": to_pictures, "batch_size": batch_size}
    if goal is not None and not any(name == solver for name, _ in table.bases):
        step_grid = step_grid or calibration.STEP_GRID
    if step_grid:
        with progress_bar("measuring full depth", Console(stderr=True)) as advance:
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
    name = extractor.metric_name
    if table.projection is not None:
        name = f"distance on {table.projection.shape[1]} leading components of {extractor.name}"
    f = plan.figures
    print(plan)
    print(
        f"{name}: full depth {f['predicted_fd_full']:.2f} on the table's seeds, {f['measured_fd_full']:.2f} on fresh "
        f"ones; plan {f['predicted_fd']:.2f} predicted, {f['measured_fd']:.2f} measured on fresh seeds"
    )
    print(f"predicted time: {f['predicted_share_of_time']:.0%} of full depth's")
    if goal is not None:
        low, high = (f[f"measured_share_of_reference_{end}"] for end in ("low", "high"))
        print(
            f"of full depth's at {f['reference_steps']:g} steps: {f['predicted_share_of_reference']:.1%} predicted, "
            f"{f['measured_share_of_reference']:.1%} measured ({low:.1%} to {high:.1%}); {name} there "
            f"{f['measured_fd_reference']:.2f} on fresh seeds"
        )
    print(f"plan: {target}")
    if json_:
        _print_json({"plan": str(target), **f})


@dataclass(frozen=True)
class PlanChoice:
    """Which depths to run. Without `--dynamic`, `--plan` or `--budget`: the full model."""

    dynamic: bool = False
    """Run a plan: the given one, or the one for `--budget`."""
    budget: float | None = None
    """Share of full depth's time; the plan is searched on the model's stored table."""
    plan: Path | None = None
    """A plan file."""
    ramp: int | None = None
    """Depth of the first step, of a plan that rises evenly to full depth at the last; needs no calibration."""


def sample(
    model: Positional[str],
    /,
    out: Path,
    num_images: int = 64,
    solver: str = "ddim",
    steps: int | None = None,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    class_labels: tuple[int, ...] = (),
    seed: int = 0,
    batch_size: int = 64,
    depth: Annotated[PlanChoice, tyro.conf.arg(name="")] = PlanChoice(),
    choice: Annotated[StepChoice, tyro.conf.arg(name="")] = StepChoice(),
    strict: bool = False,
    stats: bool = False,
    num_heads: int | None = None,
    vae: Path | None = None,
    device: str = "cpu",
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Draw pictures. Picture i depends on (seed, class, i) alone.

    Args:
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the pictures, a grid, an ADM-style .npz and the manifest.
        num_images: How many.
        solver: ddpm, ddim, dpmpp, unipc or euler.
        steps: Sampling steps (default: 20, or chosen).
        cfg_scale: Guidance scale; 1 for none.
        guided_channels: Guide only the first so many channels (the published DiT guides 3); default all.
        class_labels: Classes, taken in turn; default all of the model's.
        seed: Seed.
        batch_size: Pictures at a time.
        depth: Which depths to run.
        choice: What steps and depths are chosen for, on the model's stored table.
        strict: Pad every batch to one size, so that pictures are bit-equal however they are grouped.
        stats: Print depth and time per step.
        num_heads: Attention heads of a .pt whose width does not tell them.
        vae: Folder of a diffusers AutoencoderKL that decodes latents.
        device: cpu or cuda.
        json_: End with one line of JSON.
    """
    import numpy as np
    from PIL import Image
    from rich.console import Console

    from dyndit import checkpoints, manifest
    from dyndit import sampler as sampling
    from dyndit.backbones import tensors_hash
    from dyndit.calibration import table_for
    from dyndit.latents import decode_latents, load_autoencoder
    from dyndit.pictures import grid
    from dyndit.progress import progress_bar

    manifest.check_device(device)
    goal = _goal(choice, steps, plan=depth.plan, budget=depth.budget, ramp=depth.ramp)
    loaded = checkpoints.inspect(model, num_heads=num_heads, device=device)
    dynamic = loaded.model
    if not dynamic.pixel_space and vae is None:
        raise InputError(f"--vae: missing; {model} makes latents, expected the folder of their AutoencoderKL")
    decoder = None if vae is None or dynamic.pixel_space else load_autoencoder(vae).to(device)
    folder = str(loaded.folder or model)
    if goal is None:
        steps = 20 if steps is None else steps
        plan = _chosen_plan(dynamic, folder, depth, solver, steps, cfg_scale)
    else:
        plan = goal.choose(table_for(dynamic, _stored_table(folder), solver), solver)
        steps = plan.num_steps
    classes = class_labels or tuple(range(dynamic.backbone.num_classes))
    labels = [classes[i % len(classes)] for i in range(num_images)]
    resolved = sampling.resolve_plan(dynamic, plan, solver, steps, cfg_scale)
    settings = {
        "verb": "sample",
        "model": dynamic.trunk_hash(),
        "exits": dynamic.exits_hash(),
        "solver": solver,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "guided_channels": guided_channels,
        "labels": classes,
        "num_images": num_images,
        "seed": seed,
        "pairs": resolved.pairs,
        "autoencoder": "" if decoder is None else tensors_hash(decoder.state_dict()),
    }
    sampling.check_request(dynamic, labels, batch_size, seed)
    manifest.claim(out, settings)
    for note in loaded.notes:
        print(note)
    with progress_bar("sampling", Console(stderr=True)) as advance:
        count = 0

        def on_batch(kept: int) -> None:
            nonlocal count
            count += kept
            advance(count, num_images)

        result = sampling.sample(
            dynamic,
            labels,
            plan=plan,
            solver=solver,
            num_steps=steps,
            cfg_scale=cfg_scale,
            guided_channels=guided_channels,
            seed=seed,
            batch_size=batch_size,
            strict=strict,
            stats=stats,
            on_batch=on_batch,
        )
    began = time.perf_counter()
    pictures = result.pictures if decoder is None else decode_latents(decoder, result.latents, batch_size)
    seconds = result.seconds + time.perf_counter() - began
    arrays = pictures.permute(0, 2, 3, 1).numpy()
    for index, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        squeezed = array[..., 0] if array.shape[-1] == 1 else array
        Image.fromarray(squeezed).save(out / f"{index:06d}-class{label}.png")
    grid(pictures[:64]).save(out / "grid.png")
    np.savez(out / "samples.npz", arr_0=arrays, arr_1=np.asarray(labels))
    ms = 1e3 * seconds / num_images
    facts = {
        "machine": manifest.machine(device),
        "ms_per_picture": ms,
        "ms_denoiser": 1e3 * sum(result.network_seconds) / num_images if stats else None,
        "plan": {
            "router": resolved.router,
            "budget": resolved.budget,
            "predicted_fd": resolved.figures.get("predicted_fd"),
            "share_of_blocks": resolved.share_of_blocks,
            "mean_depth": resolved.mean_depth,
        },
    }
    manifest.write_json(out / "manifest.json", manifest.describe(settings, **facts))
    if goal is not None:
        _print_chosen(resolved)
    if stats:
        _print_stats(result)
    print(f"{num_images} pictures in {seconds:.2f} s, {ms:.2f} ms each: {out}")
    if json_:
        figures = {"out": str(out), "ms_per_picture": ms, "share_of_blocks": resolved.share_of_blocks, "steps": steps}
        _print_json(figures | {"num_images": num_images, "seconds": seconds})


@dataclass(frozen=True)
class MoreSets:
    """What some metrics compare with besides the reference."""

    train: Path | None = None
    """Training pictures, for memorisation (default: the reference)."""
    held_out: Path | None = None
    """Real pictures that were not trained on, for memorisation."""
    full: Path | None = None
    """The full model's pictures of the same seeds, for paired."""
    lpips_weights: Path | None = None
    """VGG16 and LPIPS weights in one file: adds LPIPS to paired."""


def evaluate(
    samples: Positional[Path],
    /,
    reference: str,
    extractor: str = "inception",
    extractor_weights: Path | None = None,
    metrics: tuple[str, ...] = ("fd", "kid", "is", "prc"),
    more: Annotated[MoreSets, tyro.conf.arg(name="")] = MoreSets(),
    force: bool = False,
    save_reference: Path | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compare a sample set with real pictures. A distance on other features than Inception's is never called FID.

    Features are computed once per set of pictures and kept, by content.

    Args:
        samples: Folder of pictures (searched in depth) or an .npz file.
        reference: The same of real pictures, an .npz of ADM (pictures or statistics), or "digits".
        extractor: inception, digits or resnet20-cifar10.
        extractor_weights: Its weights, where they do not ship with the package.
        metrics: Any of fd kid is prc sfid fd-infinity memorisation paired.
        more: What some metrics compare with besides the reference.
        force: Compute the distance even of fewer pictures than features; the figures are marked as forced.
        save_reference: An .npz for the reference's statistics, which can stand for it later (fd, sfid, fd-infinity).
        cache: Folder to keep features in (default: $DYNDIT_CACHE, else $XDG_CACHE_HOME/dyndit, else ~/.cache/dyndit).
        out: Folder of a run: the figures become a row of its runs.csv, for `dyndit report`. Samples that share a seed
            are one seed block.
        device: cpu or cuda.
        json_: End with one line of JSON.
    """
    from dyndit.analysis import append_run, load_extractor, save_statistics
    from dyndit.analysis.features import cache_folder
    from dyndit.analysis.frontier import RUNS, row_of_samples
    from dyndit.analysis.quality import evaluate as compare
    from dyndit.analysis.quality import reference_statistics
    from dyndit.data import open_data
    from dyndit.manifest import check_device

    check_device(device)
    real = open_data("digits").uint8() if reference == "digits" else Path(reference)
    kept = cache or cache_folder()
    network = load_extractor(extractor, extractor_weights, device)
    figures = compare(samples, real, network, metrics, force, cache=kept, **vars(more))
    _print_figures(figures)
    if save_reference is not None:
        save_statistics(save_reference, reference_statistics(real, network, "sfid" in metrics, kept))
        print(f"statistics of the reference: {save_reference}")
    if out is not None:
        row = row_of_samples(samples, figures, run=out.name)
        out.mkdir(parents=True, exist_ok=True)
        append_run(out / RUNS, row)
        print(f"row of {row['arm']}, seed {row['seed']}: {out / RUNS}")
    if json_:
        _print_json(figures)


def bench(
    model: Positional[str] = "",
    /,
    depth: Annotated[PlanChoice, tyro.conf.arg(name="")] = PlanChoice(),
    solver: str = "ddim",
    steps: int = 20,
    cfg_scale: float = 1.5,
    batch_size: tuple[int, ...] = (1, 8, 64),
    rounds: int = 9,
    until: float = 0.02,
    max_rounds: int | None = None,
    num_heads: int | None = None,
    device: str = "cpu",
    dtype: Literal["", "float32", "bfloat16", "float16"] = "",
    vae: str = "",
    in_pipeline: bool = False,
    compile: bool = False,
    self_check: bool = False,
    out: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Time a plan against full depth: paired, alternating, warmed up; end to end, the denoiser and the decoder.

    Full depth is timed twice under two names: the ratio of the two is the error of the method itself. Rounds go on
    until the 95% interval of every ratio is narrow enough, or the report says which was not. Beside the times stand
    multiply-accumulates and FLOPs, peak memory, joules where the machine counts them, the time that the plan's blocks
    and the measured times of the parts promise, and the time saved as a multiple of that.

    Args:
        model: A model folder, a published DiT .pt, "digits"; or "random:" and a card's name (random:DiT-S/4).
        depth: Which depths to run beside full depth.
        solver: ddpm, ddim, dpmpp, unipc or euler.
        steps: Sampling steps.
        cfg_scale: Guidance scale; 1 for none.
        batch_size: Pictures at a time; several are timed one after the other.
        rounds: Timed rounds at least; each runs every arm once.
        until: Go on until the interval (from its low to its high end) of each ratio is below this share of it; 0 times
            exactly --rounds.
        max_rounds: Rounds at most (default: 60, or --rounds where that is more).
        num_heads: Attention heads of a .pt whose width does not tell them.
        device: cpu or cuda.
        dtype: Precision to compute in (default: the weights' own).
        vae: Folder of a diffusers AutoencoderKL that decodes latents, or "random:f8" for one of random weights.
        in_pipeline: Time the plug-in inside diffusers' unmodified DiTPipeline, beside the pipeline without it.
        compile: Compile every block and exit head first, for all arms alike.
        self_check: Only check the timing itself on what is known (the same twice, a sleep, twice the work); exit
            status 1 where it fails.
        out: Where the table of raw times goes (CSV; its columns are in dyndit.benchmark.COLUMNS).
        json_: End with one line of JSON.
    """
    import torch

    from dyndit import benchmark, checkpoints
    from dyndit.analysis.latency import Repeats
    from dyndit.manifest import check_device
    from dyndit.sampler import full_plan, resolve_plan

    check_device(device)
    if self_check:
        _self_check(device, json_)
        return
    if not model:
        raise InputError("MODEL: missing; expected a model to time, or --self-check")
    if out is not None and out.is_dir():
        raise InputError(f"--out {out}: is a folder; expected a file for the table")
    most = max(rounds, 60) if max_rounds is None else max_rounds
    settings = benchmark.Bench(tuple(batch_size), Repeats(rounds, until, most), compile, in_pipeline)
    name = model
    if model.startswith(benchmark.RANDOM):
        dynamic = benchmark.random_model(model, device)
    else:
        loaded = checkpoints.inspect(model, num_heads=num_heads, device=device)
        dynamic, model = loaded.model, str(loaded.folder or model)
    full = full_plan(dynamic, solver, steps, cfg_scale)
    plan = _chosen_plan(dynamic, model, depth, solver, steps, cfg_scale)
    resolve_plan(dynamic, plan, solver, steps, cfg_scale)
    if dtype:
        for part in dynamic.children():
            part.to(getattr(torch, dtype))
    if vae:
        settings = replace(settings, decoder=benchmark.open_decoder(vae, dynamic))
    plans = {benchmark.FULL: full, benchmark.AGAIN: full} | ({plan.router: plan} if plan is not None else {})
    times = benchmark.measure(dynamic, plans, settings, name=name)
    print("\n".join(benchmark.lines(times, until)))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        times.to_csv(out, index=False)
    if json_:
        table = benchmark.verdict(times)
        rows = table.drop(columns=["ratio", "width"])
        rows[["ratio", "ratio_low", "ratio_high"]] = [[r.mean, r.low, r.high] for r in table["ratio"]]
        shared = ("machine", "device", "dtype", "threads", "compiled")
        recorded = json.loads(times[list(shared)].iloc[0].to_json())
        _print_json(recorded | {"arms": json.loads(rows.to_json(orient="records"))})


def _self_check(device: str, json_: bool) -> None:
    """Print what the timing finds of what is known; exit status 1 where it is wrong."""
    from dyndit.benchmark import known_work, self_check

    checks = self_check(known_work(device))
    for check in checks:
        print(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.found}; expected {check.expected}")
    if json_:
        _print_json({"checks": [vars(check) for check in checks]})
    if not all(check.passed for check in checks):
        sys.exit(1)


def report(
    runs: Positional[tuple[Path, ...]] = (),
    /,
    out: Path | None = None,
    margin: float = 0.05,
    verify: Path | None = None,
) -> None:
    """Write a report (Markdown, HTML, figures) from runs.csv files and print the tables; or check one.

    Args:
        runs: Folders of runs (or their runs.csv, or runs.parquet).
        out: Folder for the report.
        margin: Non-inferiority margin, as a share of full depth's Fréchet distance.
        verify: A report, or its folder: compute every printed number again from the raw rows, print a line per
            mismatch, and exit with status 1 if there is any.
    """
    from rich.console import Console

    from dyndit.analysis import read_runs, summary, terminal_table, write_report
    from dyndit.analysis.frontier import GROUP
    from dyndit.analysis.verify import verify as mismatches

    if verify is not None:
        if wrong := mismatches(verify):
            print("\n".join(wrong))
            raise SystemExit(1)
        print(f"{verify}: every number follows from the raw rows")
        return
    if out is None or not runs:
        raise InputError("report: expected folders of runs and --out DIR, or --verify REPORT")
    write_report(list(runs), out, margin=margin)
    for path in runs:
        for _, rows in read_runs(path).groupby(GROUP, sort=False):
            if (rows["role"] == "score").any():
                Console().print(terminal_table(summary(rows, margin)))
    print(f"report: {out / 'report.html'}")


def quickstart(
    out: Path = Path("runs/quickstart"),
    from_scratch: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Make the digits model dynamic and measure what that saves: a few minutes on two CPU cores.

    Args:
        out: Folder of the run; what is there and valid is not done again.
        from_scratch: Train the trunk too, in place of the one that ships with the package.
        json_: End with one line of JSON.
    """
    _compare("digits", "quickstart", out, from_scratch=from_scratch, json_=json_)


def compare(
    recipe: Positional[str],
    /,
    out: Path,
    model: str = "",
    data: str = "",
    extractor_weights: Path | None = None,
    device: str = "cpu",
    from_scratch: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Run a recipe's whole comparison: exits, plans, every arm, the report. Resumable.

    Args:
        recipe: A recipe's name (digits_frontier) or a Python file that defines `experiment`.
        out: Folder of the run; what is there and valid is not done again.
        model: A model in place of the recipe's. A folder's exits and shift table are taken as they are.
        data: Pictures in place of the recipe's.
        extractor_weights: Weights of the extractor, where they do not ship with the package.
        device: cpu or cuda.
        from_scratch: Train the trunk first.
        json_: End with one line of JSON.
    """
    _compare(
        recipe,
        "experiment",
        out,
        json_=json_,
        model=model,
        data=data,
        extractor_weights=extractor_weights,
        device=device,
        from_scratch=from_scratch,
    )


def _compare(recipe: str, attribute: str, out: Path, *, json_: bool, **inputs: object) -> None:
    from rich.console import Console

    from dyndit import comparison
    from dyndit.analysis import read_runs, summary, terminal_table
    from dyndit.experiment import Experiment, Inputs
    from dyndit.recipe_files import find

    chosen = find(recipe, attribute, Experiment)
    comparison.run(chosen, out, Inputs(**inputs))
    table = summary(read_runs(out), chosen.margin)
    Console().print(terminal_table(table))
    print(f"report: {out / 'report.html'}")
    if json_:
        rows = table[["arm", "solver", "steps", "share_of_blocks", "ms", "time_saved"]].copy()
        for name in ("fd", "fd_diff", "time_saved_equal_fd"):
            rows[name] = [[i.mean, i.low, i.high] for i in table[name]]
        _print_json({"report": str(out / "report.html"), "arms": json.loads(rows.to_json(orient="records"))})


def convert(
    source: Positional[str],
    target: Positional[Path],
    /,
    to: Literal["native", "official", "diffusers"] = "native",
    num_heads: int | None = None,
    revision: str | None = None,
) -> None:
    """Write a model in another format, whole or not at all, and say how far it drifts where it is loaded plainly.

    Args:
        source: A model folder, a published DiT .pt, a diffusers transformer or pipeline folder, "digits", or a hub id.
        target: Folder to write, or file for --to official; nothing is overwritten.
        to: native: a model folder with its card; official: a published DiT .pt; diffusers: the folder of a
            DiTTransformer2DModel.
        num_heads: Attention heads of a .pt whose width does not tell them.
        revision: Branch, tag or commit of a hub id.
    """
    from dyndit.convert import convert as convert_model

    for note in convert_model(source, target, to, num_heads=num_heads, revision=revision):
        print(note)
    print(f"model: {target}")


VERBS: dict[str, Callable[..., None]] = {
    verb.__name__: verb
    for verb in (train, distill, calibrate, sample, evaluate, bench, report, compare, convert, quickstart)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb; bad input is one line and exit status 2, with a traceback only under `--debug`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    keep_freed_memory()
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="dyndit",
            description="Diffusion Transformers that stop early. --debug before or after a verb shows tracebacks.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except InputError as error:
        if debug:
            raise
        print(f"dyndit: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"dyndit: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dyndit: stopped", file=sys.stderr)
        sys.exit(130)


def _training_data(spec: str, image_size: int, channels: int, vae: Path | None, out: Path) -> object:
    from dyndit.data import open_data

    if not spec:
        raise InputError("--data: missing; expected a folder of pictures with a subfolder per class, or 'digits'")
    if vae is None and channels not in (1, 3):
        raise InputError(f"--vae: missing; latents of {channels} channels, expected the folder of their AutoencoderKL")
    if vae is None:
        return open_data(spec, None if spec == "digits" else image_size, channels)
    from dyndit.latents import encode_latents, load_autoencoder

    encoder = load_autoencoder(vae)
    factor = 2 ** (len(encoder.config.block_out_channels) - 1)
    return encode_latents(open_data(spec, image_size * factor, encoder.config.in_channels), vae, out / "latents", 16)


def _preview(model: "DynamicDepth", out: Path, step: int) -> None:
    """A sample grid on the way: DDIM, 20 steps, every class."""
    from dyndit.pictures import grid
    from dyndit.sampler import balanced_labels
    from dyndit.sampler import sample as draw

    if model.pixel_space:
        labels = balanced_labels(40, model.backbone.num_classes)
        folder = out / "previews"
        folder.mkdir(exist_ok=True)
        scale = 1.5 if model.backbone.null_class is not None else 1.0
        grid(draw(model, labels, num_steps=20, cfg_scale=scale, batch_size=40).pictures).save(
            folder / f"step-{step:06d}.png"
        )


def _extractor(measuring: Measuring, dynamic: "DynamicDepth", device: str) -> "Extractor":
    from dyndit.analysis import load_extractor

    name = measuring.extractor or ("digits" if dynamic.backbone.image_size == 8 else "inception")
    return load_extractor(name, measuring.extractor_weights, device)


def _picture_size(decoder: "AutoencoderKL", dynamic: "DynamicDepth") -> int:
    """Pixels across a picture whose latents the model makes."""
    return dynamic.backbone.image_size * 2 ** (len(decoder.config.block_out_channels) - 1)


def _real_pictures(measuring: Measuring, extractor: "Extractor", size: int, channels: int) -> "Tensor":
    """At most 5,000 pictures of the reference, as uint8."""
    from dyndit.data import open_data

    spec = measuring.reference or ("digits" if extractor.name == "digits" else "")
    if not spec:
        raise InputError("--reference: missing; expected a folder of real pictures")
    return _spread(open_data(spec, size, channels), 5000)


def _spread(pictures: "Pictures", most: int) -> "Tensor":
    """At most so many pictures, evenly spread over the set, as uint8."""
    count = len(pictures)
    return pictures.uint8() if count <= most else pictures.uint8([i * count // most for i in range(most)])


def _chosen_plan(
    dynamic: "DynamicDepth", model: str, depth: PlanChoice, solver: str, steps: int, cfg_scale: float
) -> "DepthPlan | None":
    """The plan the flags ask for; None is the full model."""
    from dyndit.calibration import plan_on_table
    from dyndit.plan import DepthPlan
    from dyndit.routers.schedules import ramp
    from dyndit.sampler import full_plan, timesteps_of

    given = [flag for flag in ("plan", "budget", "ramp") if getattr(depth, flag) is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if depth.ramp is not None:
        if not 1 <= depth.ramp <= dynamic.num_blocks:
            raise InputError(f"--ramp {depth.ramp}: expected 1 to {dynamic.num_blocks}")
        return ramp(full_plan(dynamic, solver, steps, cfg_scale), dynamic.depths, depth.ramp)
    if depth.plan is not None:
        plan = DepthPlan.load(depth.plan)
        bound = (dynamic.trunk_hash(), dynamic.exits_hash()) if plan.trunk else (None, None)
        timesteps = timesteps_of(solver, steps)
        plan.check(
            depths=dynamic.depths,
            trunk=bound[0],
            exits=bound[1],
            timesteps=timesteps,
            solver=solver,
            origin=str(depth.plan),
        )
        return plan
    if depth.budget is None and not depth.dynamic:
        return None
    budget = 0.6 if depth.budget is None else depth.budget
    return plan_on_table(dynamic, _stored_table(model), budget=budget, solver=solver, num_steps=steps)


def _stored_table(model: str) -> "ShiftTable":
    from dyndit import checkpoints
    from dyndit.routers.searched import ShiftTable

    path = Path(model) / checkpoints.TABLE
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the table that `dyndit calibrate {model}` writes")
    return ShiftTable.load(path)


def _goal(choice: StepChoice, steps: int | None, **others: object) -> "Goal | None":
    """What steps are to be chosen for; None where the flags leave them as given. others: flags it excludes."""
    from dyndit.routers.steps import LatencyBudget, TargetFD

    wanted = {"latency-budget": choice.latency_budget, "target-fd": choice.target_fd}
    asked = [flag for flag, value in wanted.items() if value is not None]
    given = [flag for flag, value in (wanted | others).items() if value is not None]
    if not asked:
        if choice.reference_steps is not None:
            raise InputError(
                f"--reference-steps {choice.reference_steps}: expected --latency-budget or --target-fd with it"
            )
        return None
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if steps is not None:
        raise InputError(f"--steps {steps}: --{asked[0]} chooses the step count; expected one of them")
    if choice.target_fd is not None:
        return TargetFD(choice.target_fd, choice.reference_steps)
    return LatencyBudget(choice.latency_budget, choice.reference_steps)


def _print_chosen(plan: "DepthPlan") -> None:
    f = plan.figures
    print(
        f"chosen: {plan.num_steps} steps, {plan.share_of_blocks:.0%} of the blocks; predicted: distance "
        f"{f['predicted_fd']:.2f} in {f['predicted_share_of_reference']:.1%} of full depth's time at "
        f"{f['reference_steps']:g} steps"
    )


def _print_step_counts(table: "ShiftTable", plan: "DepthPlan") -> None:
    """What every step count could do in the chosen plan's time."""
    from dyndit.routers.steps import frontier

    f = plan.figures
    share = f.get("latency_budget", f["predicted_share_of_reference"])
    rows = frontier(table, plan.solver, (share,), int(f["reference_steps"]))
    print(f"within {share:.1%} of full depth's time at {f['reference_steps']:g} steps, by step count:")
    print(rows.drop(columns="latency_budget").to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _print_stats(result: object) -> None:
    from dyndit.plan import written

    plan = result.plan
    print("  step     t   cond uncond     ms")
    for k, ((cond, uncond), seconds) in enumerate(zip(plan.pairs, result.step_seconds, strict=True)):
        print(f"  {k:4d}  {plan.timesteps[k]:4d}   {cond:4d} {written(uncond):>6}  {1e3 * seconds:7.2f}")


def _print_figures(figures: dict[str, object]) -> None:
    """A line per figure of `evaluate`, intervals beside their figures, paired distances apart."""
    ends = ("_low", "_high")
    shown = {k: v for k, v in figures.items() if k not in ("metric", "extractor") and not k.endswith(ends)}
    names = {"fd": figures["metric"], "fd_infinity": f"{figures['metric']}, N=inf", "sfid": f"s{figures['metric']}"}
    paired = {k: v for k, v in shown.items() if k.startswith("paired_")}
    for name, value in shown.items():
        if name in paired or (name == "forced" and not value):
            continue
        limits = [f"{figures[name + end]:.4g}" for end in ends if name + end in figures]
        between = f"  [{', '.join(limits)}]" if limits else ""
        text = f"{value:.5g}" if isinstance(value, float) else "unknown" if value is None else str(value)
        print(f"{names.get(name, name):>22}  {text}{between}")
    if paired:
        print("\nmoved from the full model's pictures of the same seeds (median, worst 5%); not a verdict:")
        for name in dict.fromkeys(k.rsplit("_", 1)[0] for k in paired):
            print(f"{name.removeprefix('paired_'):>22}  {paired[f'{name}_median']:.5g}, {paired[f'{name}_worst']:.5g}")


def _print_json(figures: dict[str, object]) -> None:
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
