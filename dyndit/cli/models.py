"""Verbs that make models: train, distill, convert."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dyndit.cli import flags, trainings
from dyndit.errors import InputError, expected_one_of

if TYPE_CHECKING:
    from dyndit.models.dynamic import DynamicDepth
    from dyndit.models.identity import AutoencoderRecord
    from dyndit.process import Process
    from dyndit.training.data import Pictures
    from dyndit.training.train import Train


@flags.holds("out")
def train(
    recipe: flags.Positional[str] = "published",
    /,
    out: Annotated[Path | None, flags.also("results-dir")] = None,
    data: Annotated[str, flags.also("data-path")] = "",
    model: str = "",
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: Annotated[int | None, flags.also("global-batch-size")] = None,
    seed: Annotated[int | None, flags.also("global-seed")] = None,
    sample_every: int | None = None,
    weights: flags.Weights = None,
    process: str = "",
    text_encoder: Path | None = None,
    log_every: int | None = None,
    checkpoint_every: Annotated[int | None, flags.also("ckpt-every")] = None,
    num_workers: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    conditioning: str = "",
    vae: Path | None = None,
    device: flags.Device = "auto",
    dtype: trainings.Precision = "own",
    tracker: trainings.Tracker = "tensorboard",
    extend: trainings.Extend = False,
    reading: flags.Unnamed[flags.Reading] = flags.READING,
) -> None:
    """Train a backbone, from scratch or from given weights. A stopped run resumes at its last checkpoint.

    Args:
        recipe: A recipe's name, such as cifar10, or a Python file that defines `train`. Recipes: {recipes}.
        out: Folder for the model, checkpoints, losses and the tracker's logs (always needed).
        data: One of {data_sets}, or pictures: a folder with a subfolder per class or one flat folder, .zip, .tar, .npz,
            or a data set of Hugging Face (default: the recipe's).
        model: A card, such as DiT-B/4: train its architecture from random weights. Or weights to start from: a model
            folder, a published DiT .pt, "digits", or a hub id; their process must be the recipe's.
        steps: Updates (default: the recipe's).
        epochs: Passes over the data, in place of --steps.
        batch_size: Pictures per update (default: the recipe's).
        seed: Seed (default: the recipe's).
        sample_every: Draw a sample grid after every so many steps; 0 for never.
        process: Process to train under, one of {processes} (default: the recipe's).
        text_encoder: Folder of a frozen text encoder of transformers, with its tokenizer: a model of captions takes its
            features in place of embedding the words itself.
        log_every: Log the losses after every so many steps.
        checkpoint_every: Write a checkpoint after every so many steps.
        num_workers: Processes that read pictures.
        image_size: Side of a card's pictures: 256 (the default) or 512.
        num_classes: Classes of the backbone (default: the recipe's, or 1000 of a card).
        conditioning: How blocks learn of timestep and label, one of {conditionings} (default: the recipe's).
        vae: Folder or hub id of an autoencoder of diffusers: train on its latents, encoded once and cached in the run's
            folder. mse or ema for the published ones (default of a card: ema).
    """
    from accelerate import PartialState

    from dyndit import files, manifest
    from dyndit.cli.recipes import find
    from dyndit.models.dit import CARDS
    from dyndit.progress import progress_bar
    from dyndit.storage import load as checkpoints
    from dyndit.storage.published import card_of
    from dyndit.training.train import Train

    if out is None:
        raise InputError("--out: missing; expected a folder for the run")
    precision = trainings.training(device, dtype)
    if steps is not None and epochs is not None:
        raise InputError(f"--steps {steps} and --epochs {epochs}: both given; expected one of them")
    chosen, card = find(recipe, "train", Train), ""
    if model.startswith("DiT-") and not Path(model).exists():
        card, model = card_of(model, image_size), ""
        chosen = replace(chosen, backbone=CARDS[card])
        vae = vae or Path("ema")
    elif image_size is not None:
        raise InputError(f"--image-size {image_size}: belongs to a card; expected --model CARD with it")
    shape = {"conditioning": conditioning or None, "num_classes": num_classes}
    shape = {name: value for name, value in shape.items() if value is not None}
    chosen = _changed(chosen.with_backbone(**shape), recipe, process, text_encoder)
    with PartialState().main_process_first():  # encode latents once
        pictures, made_by = _training_data(data or chosen.data, chosen.outline().sample_shape, vae, out, reading)
    chosen.check(pictures)
    checkpoints.check_savable(chosen.outline(), out)
    start = _start(model, chosen.process, weights) if model else None
    settings = {"verb": "train", "recipe": recipe, "data": pictures.fingerprint}
    settings |= shape | ({"card": card} if card else {})
    if start is not None:
        settings["from"] = start.identity.backbone
    if process:
        settings["process"] = process
    if text_encoder is not None:
        backbone: Any = chosen.backbone
        settings["text_encoder"] = backbone.text_encoder_hash
    with PartialState().main_process_first():
        manifest.claim(out, settings, shared=("latents",), pictures=pictures.account)
    if epochs is not None:
        steps = max(1, epochs * len(pictures) // (batch_size or chosen.fit.batch_size))
    changes = {
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "sample_every": sample_every,
        "log_every": log_every,
        "checkpoint_every": checkpoint_every,
        "num_workers": num_workers,
        "tracker": tracker,
    }
    fit = replace(chosen.fit, **precision | {k: v for k, v in changes.items() if v is not None})
    chosen = replace(chosen, fit=fit)
    trained, result = chosen.run(pictures, out, start=start, preview=_preview, extend=extend)
    if not PartialState().is_main_process:
        return
    trained.autoencoder = made_by
    with progress_bar("saving the model"):
        checkpoints.save(trained, out)
        facts = {"fit": vars(fit), "seconds": result.seconds, "trunk": trained.identity.backbone}
    facts |= {"pictures": pictures.account, "extended": list(result.extended)}
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
    weights: flags.Weights = None,
    vae: flags.Vae = None,
    device: flags.Device = "auto",
    dtype: trainings.Precision = "own",
    tracker: trainings.Tracker = "tensorboard",
    extend: trainings.Extend = False,
    reading: flags.Unnamed[flags.Reading] = flags.READING,
) -> None:
    """Train exits on a model's own predictions, and write the model with its exits.

    The backbone stays the same, bit for bit, unless the recipe also trains a copy of it.

    Args:
        recipe: A recipe's name, such as finetune_exits, or a Python file that defines `distill`. Exits have one of the
            heads {heads}. Recipes: {recipes}.
        model: A model folder (native or diffusers), a published DiT .pt, "digits", or a hub id (org/name@revision).
        out: Folder for the model with its exits.
        data: One of {data_sets}, or pictures: a folder with a subfolder per class or one flat folder, .zip, .tar, .npz,
            or a data set of Hugging Face (default: the recipe's).
        steps: Updates (default: the recipe's).
        batch_size: Pictures per update (default: the recipe's).
        process: Process of a model that does not say its own, one of {processes}.
    """
    from accelerate import PartialState

    from dyndit import files, manifest, sealed_csv
    from dyndit.cli.recipes import find
    from dyndit.progress import progress_bar
    from dyndit.storage import load as checkpoints
    from dyndit.training import exit_errors
    from dyndit.training.distill import Distill

    changes = trainings.training(device, dtype, steps=steps, batch_size=batch_size, tracker=tracker)
    chosen = find(recipe, "distill", Distill)
    told: dict[str, Any] = {"num_heads": num_heads, "process": process or None, "weights": weights}
    loaded = checkpoints.inspect(model, device=device, **told)
    for note in loaded.notes:
        print(note)
    with PartialState().main_process_first():
        shape = loaded.model.backbone.sample_shape
        pictures, made_by = _training_data(data or chosen.data, shape, vae, out, reading, model)
    chosen.check(loaded.model, pictures)
    original = loaded.model.identity.backbone
    settings = {"verb": "distill", "recipe": recipe, "data": pictures.fingerprint, "model": original}
    with PartialState().main_process_first():
        manifest.claim(out, settings, shared=("latents",), pictures=pictures.account)
    if "precision" in changes:
        chosen = chosen.in_precision(changes["precision"])
    fit = replace(chosen.fit, **changes)
    dynamic, result = replace(chosen, fit=fit).run(loaded.model, pictures, out / "distillation", extend=extend)
    if not PartialState().is_main_process:
        return
    known = loaded.model.autoencoder
    if known is not None and made_by is not None and known.hash != made_by.hash:
        print(f"--vae: latents of a {made_by.kind} of hash {made_by.hash}; the model records hash {known.hash}")
    dynamic.autoencoder = made_by
    with progress_bar("saving the model"):
        checkpoints.save(dynamic, out)
    errors = exit_errors.exit_error_table(dynamic, pictures)
    sealed_csv.write(out / exit_errors.FILE, errors)
    identity = dynamic.identity
    seconds = result.seconds + result.beside
    facts = {"fit": vars(fit), "seconds": seconds, "exits": identity.exits, "trunk": identity.backbone}
    facts |= {"pictures": pictures.account, "extended": list(result.extended)}
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
    weights: flags.Weights = None,
    num_classes: flags.NumClasses = None,
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

    options: dict[str, Any] = {"num_heads": num_heads, "revision": revision, "process": process or None}
    options |= {"weights": weights, "num_classes": num_classes}
    for note in convert_model(source, target, to, card_extras=card_extras, **options):
        print(note)
    print(f"model: {target}")


def _changed(chosen: "Train", recipe: str, process: str, text_encoder: Path | None) -> "Train":
    """Return a recipe under another process, or with features of a text encoder."""
    from dyndit.models.captions import encoder_condition
    from dyndit.models.mmdit import MMDiTConfig, with_text_encoder
    from dyndit.process import processes

    if process:
        if process not in processes():
            raise InputError(f"--process {process}: {expected_one_of(process, processes())}")
        chosen = chosen.under(processes()[process]())
    if text_encoder is not None:
        if not isinstance(chosen.backbone, MMDiTConfig):
            kind = type(chosen.backbone).__name__
            raise InputError(f"--text-encoder {text_encoder}: {recipe} trains a {kind}; expected an MMDiTConfig")
        chosen = replace(chosen, backbone=with_text_encoder(chosen.backbone, encoder_condition(text_encoder)))
    return chosen


def _start(model: str, process: "Process", weights: str | None) -> "DynamicDepth":
    """Load weights to start from, and print what was assumed."""
    from accelerate import PartialState

    from dyndit.storage import load as checkpoints

    loaded = checkpoints.inspect(model, process=process, weights=weights)
    for note in loaded.notes if PartialState().is_main_process else ():
        print(note)
    return loaded.model


def _training_data(
    spec: str, shape: tuple[int, ...], vae: Path | None, out: Path, reading: flags.Reading, model: str = ""
) -> "tuple[Pictures, AutoencoderRecord | None]":
    """Open the pictures to train on, check all their contents, and say what is skipped.

    model: the path or hub id of the model, whose own autoencoder is the default. -> the pictures, or their latents, and
    the autoencoder of latents.
    """
    from dyndit.pictures.collection import said_of
    from dyndit.training.data import PACKAGED, open_data

    if not spec:
        names = ", ".join(PACKAGED)
        raise InputError(
            f"--data: missing; expected a folder of pictures with a subfolder per class, or one of {names}"
        )
    channels, *sides = shape
    size: Any = None if spec in PACKAGED else tuple(sides)
    encode: Any = None
    made_by = None
    if vae is not None or channels not in (1, 3):
        from dyndit.storage.autoencoder import find
        from dyndit.training.autoencoders import check_channels, latent_space, load_autoencoder, picture_size, record
        from dyndit.training.latents import encode_latents

        folder, source = find(vae or model, optional=vae is None)
        if folder is None:
            raise InputError(
                f"--vae: missing; latents of {channels} channels, expected the folder of their autoencoder"
            )
        encoder = load_autoencoder(folder)
        check_channels(encoder, channels, f"--vae {folder}")
        size, channels = picture_size(encoder, shape[1:]), latent_space(encoder).in_channels
        made_by = record(encoder, source)
        encode = partial(encode_latents, vae_folder=folder, out=out / "latents", batch_size=16)
    pictures = open_data(spec, size, channels, method=reading.resize_method, skip_damaged=reading.skip_damaged)
    pictures.check()
    flags.say(said_of(pictures.account))
    return (pictures if encode is None else encode(pictures)), made_by


def _preview(model: "DynamicDepth", out: Path, step: int) -> None:
    """Draw a sample grid in 20 steps, every class in turn."""
    from dyndit.pictures import grid, write_png
    from dyndit.sampling.sample import sample as draw

    if model.pixel_space:
        labels = model.backbone.condition.in_turn(40)
        scale = 1.5 if model.backbone.condition.guided else 1.0
        solver = model.process.usual_solver
        pictures = draw(model, labels, solver=solver, num_steps=20, cfg_scale=scale, batch_size=40).pictures
        write_png(out / "previews" / f"step-{step:06d}.png", grid(pictures))
