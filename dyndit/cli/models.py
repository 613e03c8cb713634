"""Verbs that make models: train, distill, convert."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dyndit.cli import flags
from dyndit.errors import InputError

if TYPE_CHECKING:
    from dyndit.models.dynamic import DynamicDepth


@flags.holds("out")
def train(
    recipe: flags.Positional[str],
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
    """Train a backbone, from scratch or from given weights. A stopped run resumes at its last checkpoint.

    Args:
        recipe: A recipe's name, such as cifar10, or a Python file that defines `train`. Recipes: {recipes}.
        out: Folder for the model, checkpoints, losses and TensorBoard logs.
        data: "digits", or a folder of pictures with a subfolder per class (default: the recipe's).
        model: Weights to start from: a model folder, a published DiT .pt, "digits", or a hub id (default: random
            weights). Their process must be the recipe's.
        steps: Updates (default: the recipe's).
        batch_size: Pictures per update (default: the recipe's).
        seed: Seed (default: the recipe's).
        sample_every: Draw a sample grid after every so many steps; 0 for never.
        vae: Folder of a diffusers AutoencoderKL: train on its latents, encoded once and cached in the run's folder.
    """
    from accelerate import PartialState

    from dyndit import files, manifest
    from dyndit.cli.recipes import find
    from dyndit.storage import load as checkpoints
    from dyndit.training.train import Train

    chosen = find(recipe, "train", Train)
    with PartialState().main_process_first():  # encode latents once
        pictures = _training_data(data or chosen.data, chosen.outline().sample_shape, vae, out)
    chosen.check(pictures)
    start = checkpoints.load(model, process=chosen.process) if model else None
    settings = {"verb": "train", "recipe": recipe, "data": pictures.fingerprint}
    if start is not None:
        settings["from"] = start.identity.backbone
    with PartialState().main_process_first():
        manifest.claim(out, settings, shared=("latents",))
    changes = {"steps": steps, "batch_size": batch_size, "seed": seed, "sample_every": sample_every}
    fit = replace(chosen.fit, **{k: v for k, v in changes.items() if v is not None})
    chosen = replace(chosen, fit=fit)
    model, result = chosen.run(pictures, out, start=start, preview=_preview)
    if not PartialState().is_main_process:
        return
    checkpoints.save(model, out)
    facts = {"fit": vars(fit), "seconds": result.seconds, "trunk": model.identity.backbone}
    files.write_json(out / manifest.MANIFEST, manifest.describe(settings, **facts))
    losses = result.losses["loss"]
    window = min(20, len(losses))
    print(
        f"loss: mean of the first {window} steps {losses[:window].mean():.4f}, "
        f"of the last {window} {losses[-window:].mean():.4f}"
    )
    print(f"model: {out}")


@flags.holds("out")
def distill(
    recipe: flags.Positional[str],
    /,
    model: str,
    out: Path,
    data: str = "",
    steps: int | None = None,
    batch_size: int | None = None,
    num_heads: flags.NumHeads = None,
    process: str = "",
    vae: Path | None = None,
) -> None:
    """Train exits on a model's own predictions, and write the model with its exits.

    The backbone stays the same, bit for bit, unless the recipe also trains a copy of it.

    Args:
        recipe: A recipe's name, such as finetune_exits, or a Python file that defines `distill`. Exits have one of the
            heads {heads}. Recipes: {recipes}.
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the model with its exits.
        data: "digits", or a folder of pictures with a subfolder per class (default: the recipe's).
        steps: Updates (default: the recipe's).
        batch_size: Pictures per update (default: the recipe's).
        process: Process of a model that does not say its own, one of {processes}.
        vae: Folder of a diffusers AutoencoderKL, for a model of latents.
    """
    from accelerate import PartialState

    from dyndit import files, manifest
    from dyndit.cli.recipes import find
    from dyndit.storage import load as checkpoints
    from dyndit.training.distill import Distill
    from dyndit.training.exit_errors import exit_error_table

    chosen = find(recipe, "distill", Distill)
    loaded = checkpoints.inspect(model, num_heads=num_heads, process=process or None)
    for note in loaded.notes:
        print(note)
    with PartialState().main_process_first():
        pictures = _training_data(data or chosen.data, loaded.model.backbone.sample_shape, vae, out)
    chosen.check(loaded.model, pictures)
    original = loaded.model.identity.backbone
    settings = {"verb": "distill", "recipe": recipe, "data": pictures.fingerprint, "model": original}
    with PartialState().main_process_first():
        manifest.claim(out, settings, shared=("latents",))
    changes = {"steps": steps, "batch_size": batch_size}
    fit = replace(chosen.fit, **{k: v for k, v in changes.items() if v is not None})
    dynamic, result = replace(chosen, fit=fit).run(loaded.model, pictures, out / "distillation")
    if not PartialState().is_main_process:
        return
    checkpoints.save(dynamic, out)
    errors = exit_error_table(dynamic, pictures)
    files.write_text(out / "exit-errors.csv", errors.to_csv(index=False))
    identity = dynamic.identity
    facts = {"fit": vars(fit), "seconds": result.seconds, "exits": identity.exits, "trunk": identity.backbone}
    files.write_json(out / manifest.MANIFEST, manifest.describe(settings, **facts))
    if identity.backbone != original:
        moved = result.losses["full"].iloc[-20:].mean()
        print(f"backbone: trained too; full depth's error against the original's noise {moved:.3g} (last 20 steps)")
    print("error of each exit on the noise, by band of log-SNR (from noisy to clean):")
    table = errors.pivot(index="depth", columns="log_snr_low", values="noise_error")
    print(table.sort_index(axis=1).to_string(float_format=lambda v: f"{v:.4f}"))
    print(f"model: {out}")


def convert(
    source: flags.Positional[str],
    target: flags.Positional[Path],
    /,
    to: Literal["native", "official", "diffusers"] = "native",
    num_heads: flags.NumHeads = None,
    process: str = "",
    revision: str | None = None,
) -> None:
    """Write a model in another format, whole or not at all, and print how far it drifts if it is loaded plainly.

    Args:
        source: A model folder, a published DiT .pt, a diffusers transformer or pipeline folder, "digits", or a hub id.
        target: Folder to write, or file for --to official. An existing target is refused.
        to: native: a model folder with its card; official: a published DiT .pt; diffusers: the folder of a
            DiTTransformer2DModel.
        process: Process of a model that does not say its own, one of {processes}.
        revision: Branch, tag or commit of a hub id.
    """
    from dyndit.analysis.report.card import card_extras
    from dyndit.storage.convert import convert as convert_model

    options = {"num_heads": num_heads, "revision": revision, "process": process or None}
    for note in convert_model(source, target, to, card_extras=card_extras, **options):
        print(note)
    print(f"model: {target}")


def _training_data(spec: str, shape: tuple[int, ...], vae: Path | None, out: Path) -> object:
    from dyndit.training.data import open_data

    if not spec:
        raise InputError("--data: missing; expected a folder of pictures with a subfolder per class, or 'digits'")
    channels, *size = shape
    if vae is None and channels not in (1, 3):
        raise InputError(f"--vae: missing; latents of {channels} channels, expected the folder of their AutoencoderKL")
    if vae is None:
        return open_data(spec, None if spec == "digits" else tuple(size), channels)
    from dyndit.training.latents import encode_latents, load_autoencoder

    encoder = load_autoencoder(vae)
    factor = 2 ** (len(encoder.config.block_out_channels) - 1)
    return encode_latents(
        open_data(spec, tuple(side * factor for side in size), encoder.config.in_channels), vae, out / "latents", 16
    )


def _preview(model: "DynamicDepth", out: Path, step: int) -> None:
    """Draw a sample grid in 20 steps, every class in turn."""
    from dyndit.pictures import grid, write_png
    from dyndit.sampling.sample import sample as draw

    if model.pixel_space:
        labels = model.backbone.condition.in_turn(40)
        scale = 1.5 if model.backbone.condition.guided else 1.0
        options = {"solver": model.process.usual_solver, "num_steps": 20, "cfg_scale": scale, "batch_size": 40}
        pictures = draw(model, labels, **options).pictures
        write_png(out / "previews" / f"step-{step:06d}.png", grid(pictures))
