"""Find the autoencoder of a model's latents: the pipeline's own, a folder, or a hub id."""

from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from dyndit import files
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import hub
from dyndit.storage.published import autoencoder
from dyndit.training.autoencoders import KINDS, check_channels, latent_space, load_autoencoder, picture_size, record

SUBFOLDER = "vae"
"""Subfolder of a pipeline with its autoencoder."""


def open_autoencoder(spec: str | Path | None, model: DynamicDepth, origin: str | Path) -> ModelMixin | None:
    """Load the autoencoder of a model, and record it in the model. A model of pixels gives None.

    spec: an autoencoder's folder or hub id (`org/name`, `org/name@revision`), or a pipeline's folder or hub id with
    `vae/`; None takes the pipeline's own. origin: the path or hub id that the model was loaded from.

    Raises InputError: there is none, it is of another kind, or its latents have other channels than the model's.
    """
    if model.pixel_space:
        if spec is not None:
            raise InputError(f"--vae {spec}: {origin} makes pixels; expected no autoencoder")
        return None
    folder, source = find(origin, optional=True) if spec is None else find(spec)
    if folder is None:
        known = model.autoencoder
        was = "" if known is None else f", made by a {known.kind} of hash {known.hash}"
        where = f" ({known.source})" if known is not None and known.source else ""
        raise InputError(
            f"--vae: missing; {origin} makes latents{was}{where}, expected the folder or hub id of their autoencoder"
        )
    vae = load_autoencoder(folder)
    check_channels(vae, model.backbone.in_channels, f"--vae {spec or folder}")
    only, size = latent_space(vae).picture_size, picture_size(vae, model.backbone.sample_shape[1:])
    if only is not None and size != (only, only):
        raise InputError(f"--vae {spec or folder}: makes pictures of {only} px; the model's have {size[0]} x {size[1]}")
    if model.autoencoder is None:
        model.autoencoder = record(vae, source)
    return vae


def differs(vae: Any, model: DynamicDepth) -> tuple[str, ...]:
    """Return a note if a model's latents were made by another autoencoder than this one."""
    found, known = record(vae), model.autoencoder
    if known is None or known.hash == found.hash:
        return ()
    return (f"--vae: a {found.kind} of hash {found.hash}; the model records a {known.kind} of hash {known.hash}",)


def find(spec: str | Path, *, optional: bool = False) -> tuple[Path | None, str]:
    """Return the folder of an autoencoder, and the hub id it came from ("" for a local folder).

    spec: a folder, a hub id, or "mse" or "ema" for the published ones. optional: a pipeline without one gives None.

    Raises InputError: no such folder and no hub id.
    """
    path = autoencoder(Path(spec))
    if path.exists():
        own = _within(path)
        return (own, "") if own is not None or optional else (path, "")
    wanted = hub.parse(str(spec))
    if wanted is None:
        if optional:
            return None, ""
        raise InputError(f"--vae {spec}: no such folder, and no hub id; expected one of {', '.join(KINDS)}")
    try:
        folder = hub.fetch_autoencoder(wanted)
    except CheckpointError:
        if optional:
            return None, ""
        raise
    own = _within(folder)
    if own is None and not optional:
        raise InputError(f"--vae {spec}: holds no autoencoder; expected one of {', '.join(KINDS)}, or {SUBFOLDER}/")
    return own, f"{wanted.name}@{folder.name}"


def _within(folder: Path) -> Path | None:
    """Return the folder if it is an autoencoder's, or its subfolder `vae`; None if there is none."""
    for path in (folder / SUBFOLDER, folder):
        config = path / "config.json"
        if config.is_file() and str(files.read_json(config).get("_class_name")).startswith("Autoencoder"):
            return path
    return None
