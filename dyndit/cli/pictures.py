"""The verb that draws pictures: sample."""

import time
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
    device: str = "cpu",
    json_: Json = False,
) -> None:
    """Draw pictures. Picture i depends on (seed, class, i) alone.

    Args:
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the pictures, a grid, an ADM-style .npz and the manifest.
        num_images: How many.
        solver: ddpm, ddim, dpmpp, unipc or euler; of a rectified flow: flow-euler.
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
        process: Process of a model that does not say its own: ddpm or flow.
        vae: Folder of a diffusers AutoencoderKL that decodes latents.
        device: cpu or cuda.
        json_: End with one line of JSON.
    """
    from rich.console import Console

    from dyndit import manifest
    from dyndit.calibration.calibrate import table_for
    from dyndit.models import tensors_hash
    from dyndit.progress import progress_bar
    from dyndit.sampling import sample as sampling
    from dyndit.storage import load as checkpoints
    from dyndit.training.latents import decode_latents

    manifest.check_device(device)
    goal = goal_of(choice, steps, plan=depth.plan, budget=depth.budget, ramp=depth.ramp)
    loaded = checkpoints.inspect(model, num_heads=num_heads, process=process or None, device=device)
    dynamic = loaded.model
    decoder = decoder_of(dynamic, model, vae, device)
    folder = str(loaded.folder or model)
    if goal is None:
        steps = 20 if steps is None else steps
        plan = chosen_plan(dynamic, folder, depth, solver, steps, cfg_scale)
    else:
        plan = goal.choose(table_for(dynamic, stored_table(folder), solver), solver, dynamic.process)
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
    _write_pictures(pictures, labels, out)
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
    from dyndit.plans.plan import written, written_cond

    plan = result.plan
    print("  step     t   cond uncond     ms")
    for k, ((cond, uncond), seconds) in enumerate(zip(plan.pairs, result.step_seconds, strict=True)):
        print(
            f"  {k:4d}  {plan.timesteps[k]:4.0f}   {written_cond(cond):>4} {written(uncond):>6}  {1e3 * seconds:7.2f}"
        )
