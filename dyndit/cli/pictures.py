"""The verbs that draw pictures: sample, and grid, which puts sets side by side."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dyndit.cli import flags
from dyndit.errors import InputError

if TYPE_CHECKING:
    from dyndit.plans.plan import DepthPlan


def sample(
    model: flags.Positional[str] = "",
    /,
    out: Path | None = None,
    num_images: Annotated[int | None, flags.also("num-fid-samples")] = None,
    solver: str = "",
    steps: Annotated[int | None, flags.also("num-sampling-steps")] = None,
    cfg_scale: float | None = None,
    guided_channels: int | None = None,
    class_labels: tuple[str, ...] = (),
    shape: tuple[int, ...] = (),
    prompt: tuple[str, ...] = (),
    seed: Annotated[int, flags.also("global-seed")] = 0,
    batch_size: Annotated[int, flags.also("per-proc-batch-size")] = 64,
    published: flags.Unnamed[flags.PublishedSampling] = flags.NOT_PUBLISHED,
    depth: flags.Unnamed[flags.PlanChoice] = flags.FULL_DEPTH,
    choice: flags.Unnamed[flags.StepChoice] = flags.AS_GIVEN,
    strict: bool = False,
    stats: bool = False,
    num_heads: flags.NumHeads = None,
    process: str = "",
    weights: flags.Weights = None,
    vae: flags.Vae = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    json_: flags.Json = False,
) -> None:
    """Draw pictures or clips. Picture i depends on (seed, class, i) alone. A stopped run continues.

    A clip is a PNG of all its frames; the first 64 clips are GIF and MP4 files too.

    Args:
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the pictures, a grid, an ADM-style .npz and the manifest.
        num_images: Number of pictures (default: 64).
        solver: One of {solvers} (default: the plan file's, else the usual solver of the model's process).
        steps: Sampling steps (default: the plan file's, else 20, or chosen).
        cfg_scale: Guidance scale; 1 is unguided (default: the plan file's, else 1.5).
        guided_channels: Guide only the first so many channels (the published DiT guides 3); default all.
        class_labels: Classes, taken in turn; balanced (the default): all of the model's in turn; random: drawn for each
            picture.
        prompt: Captions of a model of captions, taken in turn, such as "number seven, bold"; default the model's own.
        shape: Frames, height and width of the clips, of a model of clips (default: the model's own).
        seed: Seed.
        batch_size: Pictures at a time.
        published: Flags of the published code's scripts.
        depth: Which depths to run.
        choice: Goal that steps and depths are chosen for, on the model's stored table.
        strict: Pad every batch to --batch-size. At one batch size, pictures are then bit-equal however they are
            grouped. Without it, or at another batch size, a pixel may differ by one level of 255.
        stats: Print depth and time per step.
        process: Process of a model that does not say its own, one of {processes}.
    """
    from dyndit.calibration.calibrate import table_for
    from dyndit.pictures.clips import NO_MP4, writes_mp4
    from dyndit.plans.plan import DepthPlan
    from dyndit.runtime import chosen_device
    from dyndit.sampling.sample import sample_into
    from dyndit.sampling.solvers import timesteps_of
    from dyndit.storage import load as checkpoints
    from dyndit.storage import published as cards
    from dyndit.training.autoencoders import decode_latents, record

    device, card = chosen_device(device), published.card
    if prompt and (class_labels or card):
        other = "--class-labels" if class_labels else f"--model {card}"
        raise InputError(f"{other} and --prompt: both given; expected one of them")
    others = {"plan": depth.plan, "budget": depth.budget, "router": depth.router}
    goal = None if choice == flags.AS_GIVEN else flags.goal_of(choice, steps, **others)
    if bool(card) == bool(model):
        raise InputError(f"MODEL {model!r} and --model {published.model!r}: expected one of them")
    classes = _classes(class_labels)
    usual = cards.usual_sampling(card, classes if isinstance(classes, tuple) else (), num_images)
    classes = classes if class_labels else usual.class_labels
    given = None
    if depth.plan is not None and depth.budget is None and depth.router is None:
        given = DepthPlan.load(depth.plan)  # its solver, steps and scale are the defaults
    solver, num_images = solver or (given.solver if given else usual.solver), usual.num_images
    cfg_scale = (usual.cfg_scale if given is None else given.cfg_scale) if cfg_scale is None else cfg_scale
    guided_channels = usual.guided_channels if guided_channels is None else guided_channels
    vae = Path("mse") if card and vae is None else vae
    if out is None:
        if not card:
            raise InputError("--out: missing; expected a folder for the pictures")
        out = published.sample_dir / cards.sample_folder(card, published.ckpt, vae or Path("mse"), cfg_scale, seed)
    published.set_precision()
    options: dict[str, Any] = {"process": process or None, "device": device, "dtype": dtype, "weights": weights}
    if card:
        loaded = cards.inspect(card, published.ckpt, published.num_classes, **options)
        model = str(published.ckpt or card)
    else:
        loaded = checkpoints.inspect(model, num_heads=num_heads, **options)
    dynamic = loaded.model
    solver = solver or dynamic.process.usual_solver
    decoder = flags.decoder_of(dynamic, model, vae, device)
    folder = str(loaded.folder or model)
    if goal is None:
        steps = (usual.steps if given is None else given.num_steps) if steps is None else steps
        plan = given or flags.chosen_plan(dynamic, folder, depth, solver, steps, cfg_scale)
    else:
        table = table_for(dynamic, flags.stored_table(folder), solver)
        plan = goal.choose(table, solver, partial(timesteps_of, solver, process=dynamic.process))
        steps = plan.num_steps
    for note in loaded.notes:
        print(note)
    stored = sample_into(
        out,
        dynamic,
        classes or prompt or None,
        num_images,
        plan=plan,
        solver=solver,
        num_steps=steps,
        cfg_scale=cfg_scale,
        guided_channels=guided_channels,
        seed=seed,
        batch_size=batch_size,
        strict=strict,
        stats=stats,
        shape=(dynamic.backbone.in_channels, *shape) if shape else None,
        to_pictures=None if decoder is None else lambda latents: decode_latents(decoder, latents, batch_size),
        origin=str(depth.plan or "plan"),
        autoencoder="" if decoder is None else record(decoder).hash,
    )
    facts, plan = stored.manifest, stored.plan
    if goal is not None:
        _print_chosen(plan)
    if stats:
        _print_stats(plan, facts["step_seconds"])
    if stored.num_drawn < num_images:
        print(f"{num_images - stored.num_drawn} of {num_images} pictures were there already")
    if len(dynamic.backbone.sample_shape) == 4 and not writes_mp4():
        print(NO_MP4)
    print(f"{num_images} pictures in {facts['seconds']:.2f} s, {facts['ms_per_picture']:.2f} ms each: {out}")
    if json_:
        figures = {name: facts[name] for name in ("ms_per_picture", "seconds")}
        figures |= {"out": str(out), "share_of_blocks": plan.share_of_blocks, "steps": steps}
        print(json.dumps(figures | {"num_images": num_images}))


def grid(
    sets: flags.Positional[tuple[Path, ...]],
    /,
    out: Path,
    num_images: int = 10,
) -> None:
    """Put sets of pictures that share seeds side by side: a row per set, the same picture in the same column.

    Args:
        sets: Folders of `dyndit sample`, or any pictures that `dyndit evaluate` takes; the first is the top row.
        out: The PNG to write.
        num_images: Pictures of each set, from the first.
    """
    from dyndit.analysis.metrics.paired import check_same_seeds
    from dyndit.analysis.metrics.sets import read_set
    from dyndit.pictures import write_png
    from dyndit.pictures.rows import in_rows

    if not sets:
        raise InputError("grid: no sets; expected folders of pictures")
    found = {}
    for folder in sets:
        check_same_seeds(sets[0], folder)
        given = read_set(folder, str(folder))
        if given.source is None:
            raise InputError(f"{folder}: holds statistics; expected pictures")
        name = folder.name if folder.name not in found else str(folder)
        found[name] = next(given.batches(num_images))[:num_images]
    write_png(out, in_rows(found))
    print(f"{len(sets)} sets side by side: {out}")


def _classes(given: tuple[str, ...]) -> "tuple[int, ...] | Literal['random'] | None":
    """Read --class-labels; None takes every class in turn."""
    if given in ((), ("balanced",)):
        return None
    if given == ("random",):
        return "random"
    if odd := next((text for text in given if not text.isdecimal()), None):
        raise InputError(f"--class-labels {odd}: expected balanced, random, or the numbers of classes")
    return tuple(map(int, given))


def _print_chosen(plan: "DepthPlan") -> None:
    f = plan.figures
    print(
        f"chosen: {plan.num_steps} steps, {plan.share_of_blocks:.0%} of the blocks; predicted: distance "
        f"{f['predicted_fd']:.2f} in {f['predicted_share_of_reference']:.1%} of full depth's time at "
        f"{f['reference_steps']:g} steps"
    )


def _print_stats(plan: "DepthPlan", step_seconds: "list[float] | None") -> None:
    if step_seconds is None:
        print("times per step: not taken while these pictures were drawn; expected --stats from the start")
        return
    print("  step     t       runs       ms")
    for k, (step, seconds) in enumerate(zip(plan.steps, step_seconds, strict=True)):
        print(f"  {k:4d}  {plan.timesteps[k]:4.0f}   {step!s:>8}  {1e3 * seconds:7.2f}")
