"""The published DiT by its cards: where its weights and autoencoders lie, and the settings of its own sampling script.

Nothing is downloaded here. A missing file is named, with its place and its address.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndit.errors import InputError, did_you_mean
from dyndit.models.dit import CARDS, DiTConfig
from dyndit.storage import load as checkpoints
from dyndit.storage.reading import AskedProcess, Loaded

FOLDER = Path("pretrained_models")
"""Folder of the weights, in the working directory, as in the published code."""
WEIGHTS = {
    f"DiT-XL/2{suffix}": (
        f"DiT-XL-2-{side}x{side}.pt",
        f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{side}x{side}.pt",
    )
    for suffix, side in (("", 256), ("-512", 512))
}
"""Published weights by card: file and address."""
AUTOENCODERS = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("mse", "ema")}
"""The published autoencoders by the names of `--vae`, with their hub ids."""
CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)
"""ImageNet classes that the published script draws."""


@dataclass(frozen=True)
class Sampling:
    """Settings of a sampling that the user may leave open."""

    solver: str
    """Empty: the usual solver of the model's process."""
    steps: int
    cfg_scale: float
    guided_channels: int | None
    class_labels: tuple[int, ...]
    num_images: int


def usual_sampling(card: str, class_labels: tuple[int, ...], num_images: int | None) -> Sampling:
    """Return the usual settings: of the published scripts for a card, else of this package.

    A card without a number of pictures is drawn as by `sample.py`: a picture per class. With a number, it is drawn as
    by `sample_ddp.py`: at a lower scale, every class in turn.
    """
    if not card:
        return Sampling("", 20, 1.5, None, class_labels, 64 if num_images is None else num_images)
    if num_images is not None:
        return Sampling("ddpm", 250, 1.5, 3, class_labels, num_images)
    class_labels = class_labels or CLASSES
    return Sampling("ddpm", 250, 4.0, 3, class_labels, len(class_labels))


def card_of(name: str, image_size: int | None = None) -> str:
    """Return the card of a name and a size in pixels: "DiT-XL/2", 512 -> "DiT-XL/2-512".

    Raises:
        InputError: there is no such card.
    """
    if image_size not in (None, 256, 512):
        raise InputError(f"--image-size {image_size}: expected 256 or 512")
    card = f"{name}-512" if image_size == 512 and not name.endswith("-512") else name
    if card not in CARDS or (image_size == 256 and card.endswith("-512")):
        known = ", ".join(known for known in CARDS if known.startswith("DiT-") and not known.endswith("-512"))
        raise InputError(f"--model {name}: no such card; expected one of {known}{did_you_mean(name, CARDS)}")
    return card


def inspect(
    card: str,
    ckpt: Path | None = None,
    num_classes: int | None = None,
    *,
    process: AskedProcess = None,
    weights: str | None = None,
    device: str = "auto",
    dtype: str = "own",
) -> Loaded:
    """Load a card's weights.

    ckpt: the weights (default: the published weights in `FOLDER`). num_classes: default the card's.

    Raises:
        InputError: the weights are missing or of another architecture than the card.
    """
    config = CARDS[card]
    path = _published_weights(card) if ckpt is None else ckpt
    told: dict[str, Any] = {
        "num_heads": config.num_heads,
        "process": process,
        "weights": weights,
        "num_classes": num_classes,
    }
    loaded = checkpoints.inspect(path, device=device, dtype=dtype, **told)
    wanted = {
        "image_size": config.image_size,
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "width": config.width,
        "num_blocks": config.num_blocks,
        "num_classes": config.num_classes if num_classes is None else num_classes,
    }
    found = loaded.model.backbone.config()
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(f"{path}: {name} {found.get(name)}; expected {value}, as {card} has")
    return loaded


def _published_weights(card: str) -> Path:
    if card not in WEIGHTS:
        raise InputError(f"--ckpt: missing; no weights of {card} are published, expected a file of yours")
    file, address = WEIGHTS[card]
    if not (path := FOLDER / file).is_file():
        raise InputError(f"{path}: no such file; expected the published weights there ({address}), or --ckpt FILE")
    return path


def autoencoder(vae: Path) -> Path:
    """Return the folder of an autoencoder.  vae: the folder, or "mse" or "ema" for the published ones.

    Those are looked for in `FOLDER` and in the hub's cache.

    Raises:
        InputError: they are in neither.
    """
    if str(vae) not in AUTOENCODERS or vae.exists():
        return vae
    hub_id = AUTOENCODERS[str(vae)]
    if (folder := FOLDER / hub_id.partition("/")[2]).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        expected = f"expected the autoencoder {hub_id} there (https://huggingface.co/{hub_id}), or --vae FOLDER"
        raise InputError(f"{folder}: no such folder; {expected}") from error


def sample_folder(card: str, ckpt: Path | None, vae: Path, cfg_scale: float, seed: int) -> str:
    """Name a folder of samples as the published code does: DiT-XL-2-pretrained-size-256-vae-mse-cfg-4.0-seed-42."""
    config: DiTConfig = CARDS[card]
    name, weights = card.removesuffix("-512").replace("/", "-"), "pretrained" if ckpt is None else ckpt.stem
    return f"{name}-{weights}-size-{8 * config.size[0]}-vae-{vae.name}-cfg-{float(cfg_scale)}-seed-{seed}"
