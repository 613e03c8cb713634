"""The verb that draws pictures: sample."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dyndit.cli.flags import (
    AS_GIVEN,
    FULL_DEPTH,
    Json,
    PlanChoice,
    Positional,
    StepChoice,
    Unnamed,
    chosen_plan,
    decoder_of,
    goal_of,
    print_json,
    stored_table,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dyndit.plans.plan import DepthPlan


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
    depth: Unnamed[PlanChoice] = FULL_DEPTH,
    choice: Unnamed[StepChoice] = AS_GIVEN,
    strict: bool = False,
    stats: bool = False,
    num_heads: int | None = None,
    process: str = "",
    vae: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    json_: Json = False,
) -> None:
    """Draw pictures. Picture i depends on (seed, class, i) alone.

    Args:
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the pictures, a grid, an ADM-style .npz and the manifest.
        num_images: How many.
        solver: One of {solvers}.
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
        process: Process of a model that does not say its own, one of {processes}.
        vae: Folder of a diffusers AutoencoderKL that decodes latents.
        device: auto, cpu or cuda; auto is a GPU if there is one.
        dtype: Precision to compute in: auto, own, float32, bfloat16 or float16. own is the weights'; auto is bfloat16
            on a GPU that computes in it, else own.
        json_: End with one line of JSON.
    """
    from rich.console import Console

    from dyndit import files, manifest
    from dyndit.calibration.calibrate import table_for
    from dyndit.models.identity import tensors_hash
    from dyndit.progress import progress_bar
    from dyndit.runtime import chosen_device
    from dyndit.sampling import sample as sampling
    from dyndit.sampling.solvers import timesteps_of
    from dyndit.storage import load as checkpoints
    from dyndit.training.latents import decode_latents

    device = chosen_device(device)
    goal = goal_of(choice, steps, plan=depth.plan, budget=depth.budget, router=depth.router)
    loaded = checkpoints.inspect(model, num_heads=num_heads, process=process or None, device=device, dtype=dtype)
    dynamic = loaded.model
    decoder = decoder_of(dynamic, model, vae, device)
    folder = str(loaded.folder or model)
    if goal is None:
        steps = 20 if steps is None else steps
        plan = chosen_plan(dynamic, folder, depth, solver, steps, cfg_scale)
    else:
        table = table_for(dynamic, stored_table(folder), solver)
        plan = goal.choose(table, solver, partial(timesteps_of, solver, process=dynamic.process))
        steps = plan.num_steps
    labels = dynamic.backbone.condition.in_turn(num_images)
    if class_labels:
        labels = [class_labels[i % len(class_labels)] for i in range(num_images)]
    resolved = sampling.resolve_plan(dynamic, plan, solver, steps, cfg_scale)
    settings = {
        "verb": "sample",
        "model": dynamic.identity.backbone,
        "exits": dynamic.identity.exits,
        "solver": solver,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "guided_channels": guided_channels,
        "labels": class_labels or "in turn",
        "num_images": num_images,
        "seed": seed,
        "plan_steps": list(map(str, resolved.steps)),
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
    _write_pictures(pictures, labels, out)
    ms = 1e3 * seconds / num_images
    facts = {
        "machine": manifest.machine(device),
        "dtype": str(next(dynamic.parameters()).dtype).removeprefix("torch."),
        "ms_per_picture": ms,
        "ms_denoiser": 1e3 * sum(result.network_seconds) / num_images if stats else None,
        "plan": {
            "router": resolved.router,
            "settings": resolved.settings_text,
            "budget": resolved.budget,
            "predicted_fd": resolved.figures.get("predicted_fd"),
            "share_of_blocks": resolved.share_of_blocks,
            "mean_depth": resolved.mean_depth,
        },
    }
    files.write_json(out / manifest.MANIFEST, manifest.describe(settings, **facts))
    if goal is not None:
        _print_chosen(resolved)
    if stats:
        _print_stats(result)
    print(f"{num_images} pictures in {seconds:.2f} s, {ms:.2f} ms each: {out}")
    if json_:
        figures = {"out": str(out), "ms_per_picture": ms, "share_of_blocks": resolved.share_of_blocks, "steps": steps}
        print_json(figures | {"num_images": num_images, "seconds": seconds})


def _write_pictures(pictures: "Tensor", labels: list[int], out: Path) -> None:
    """A PNG each, a grid of the first, and all as ADM's evaluator takes them.  pictures: uint8 (N, C, H, W)."""
    import numpy as np
    from PIL import Image

    from dyndit.pictures import grid

    arrays = pictures.permute(0, 2, 3, 1).numpy()
    for index, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        squeezed = array[..., 0] if array.shape[-1] == 1 else array
        Image.fromarray(squeezed).save(out / f"{index:06d}-class{label}.png")
    grid(pictures[:64]).save(out / "grid.png")
    np.savez(out / "samples.npz", arr_0=arrays, arr_1=np.asarray(labels))


def _print_chosen(plan: "DepthPlan") -> None:
    f = plan.figures
    print(
        f"chosen: {plan.num_steps} steps, {plan.share_of_blocks:.0%} of the blocks; predicted: distance "
        f"{f['predicted_fd']:.2f} in {f['predicted_share_of_reference']:.1%} of full depth's time at "
        f"{f['reference_steps']:g} steps"
    )


def _print_stats(result: object) -> None:
    plan = result.plan
    print("  step     t       runs       ms")
    for k, (step, seconds) in enumerate(zip(plan.steps, result.step_seconds, strict=True)):
        print(f"  {k:4d}  {plan.timesteps[k]:4.0f}   {step!s:>8}  {1e3 * seconds:7.2f}")
