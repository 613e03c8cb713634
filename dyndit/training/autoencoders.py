"""Autoencoders of diffusers, between pictures in [-1, 1] and the latents that a DiT is trained on.

A latent is z = (sample - mean) · scale / std of what the encoder gives (Rombach et al. 2022, arXiv:2112.10752). The
mean is the autoencoder's `shift_factor`; or mean and std are its `latents_mean` and `latents_std`, one per channel.
`LatentSpace` says what differs between the classes; nothing else in the package asks for a class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from dyndit import files, seals
from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.models.identity import AutoencoderRecord, tensors_hash
from dyndit.progress import tracked

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderRAE")
"""Classes of diffusers that work."""


@dataclass(frozen=True)
class LatentSpace:
    """The latents of an autoencoder.

    pixels: pixels that a latent covers, along an edge. picture_size: the only size of pictures, if there is only one.
    unit_range: the class' pictures are in [0, 1], not in [-1, 1]. shift and scale: one number, or one per channel.
    """

    kind: str
    channels: int
    in_channels: int
    out_channels: int
    pixels: int
    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0
    picture_size: int | None = None
    unit_range: bool = False

    def scaled(self, z: Tensor) -> Tensor:
        """Scale encoded latents for a DiT.  (..., C, h, w) -> the same shape."""
        return (z - _per_channel(self.shift, z)) * _per_channel(self.scale, z)

    def unscaled(self, z: Tensor) -> Tensor:
        """Undo `scaled`.  (..., C, h, w) -> the same shape."""
        return z / _per_channel(self.scale, z) + _per_channel(self.shift, z)


def _per_channel(values: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    return (
        values
        if isinstance(values, float)
        else torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
    )


def latent_space(vae: Any) -> LatentSpace:
    """Describe the latents of an autoencoder of diffusers.

    Raises InputError: a class that is not in `KINDS`, or impossible numbers in its config.
    """
    kind, config = type(vae).__name__, vae.config
    if kind == "AutoencoderRAE":  # it scales by its own mean and deviation
        size = vae.decoder_image_size
        channels, colours = config.encoder_hidden_size, config.num_channels
        return LatentSpace(kind, channels, colours, colours, config.patch_size, 0.0, 1.0, size, unit_range=True)
    if kind == "AutoencoderDC":
        colours, pixels = (config.in_channels, config.in_channels), vae.spatial_compression_ratio
    elif kind in KINDS:
        widths = config.encoder_block_out_channels if kind == "AutoencoderTiny" else config.block_out_channels
        colours, pixels = (config.in_channels, config.out_channels), 2 ** (len(widths) - 1)
    else:
        raise InputError(f"vae: found a model {kind!r}, expected one of {', '.join(KINDS)}")
    return LatentSpace(kind, config.latent_channels, *colours, pixels, *_scales(config))


def _scales(config: Mapping[str, Any]) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """Return shift and scale. Raises InputError: the mean and deviation of other channels, or beside a shift."""
    factor, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return shift, factor
    channels = config["latent_channels"]
    mean, std = (torch.tensor(v).flatten().tolist() for v in (mean or [0.0] * channels, std or [1.0] * channels))
    if shift or not len(mean) == len(std) == channels or min(std) <= 0:
        found = f"latents_mean of {len(mean)}, latents_std of {len(std)} from {min(std):g}, shift_factor {shift:g}"
        raise InputError(f"vae: {found}; expected {channels} positive deviations and means, and no shift beside them")
    return tuple(mean), tuple(factor / deviation for deviation in std)


def load_autoencoder(folder: str | Path) -> ModelMixin:
    """Load the folder of an autoencoder of diffusers in fp32, in eval mode. Missing and extra weights are refused.

    Raises InputError if it is another kind of model, or if its weights are missing or damaged, or do not fit its
    config.json.
    """
    folder = Path(folder)
    try:
        config = files.read_json(folder / "config.json")
    except CheckpointError as error:
        raise InputError(f"{error}; expected the folder of a diffusers autoencoder ({', '.join(KINDS)})") from error
    if (kind := config.get("_class_name")) not in KINDS:
        raise InputError(f"{folder / 'config.json'}: found a model {kind!r:.60}, expected one of {', '.join(KINDS)}")
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        files.refuse_pointer(path)
    try:
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": bool(safe), "output_loading_info": True}
        vae, info = getattr(diffusers, kind).from_pretrained(folder, **options)
    except Exception as error:  # diffusers passes on OSError, SafetensorError, RuntimeError on shapes
        raise InputError(f"{folder}: the autoencoder cannot be loaded ({first_line(error)})") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} weights do not fit its config.json, the first is {wrong[0]}; "
            "expected the same names in both"
        )
    if odd := seals.first_not_finite(vae.state_dict()):
        raise InputError(f"{folder}: {odd} holds numbers that are not finite; expected finite numbers")
    # Classes without these arguments drop them.
    vae.register_to_config(**{name: config[name] for name in ("latents_mean", "latents_std") if config.get(name)})
    latent_space(vae)
    return vae.float().eval().requires_grad_(False)


def encode_batch(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pictures in [-1, 1], on their device -> mean and deviation of the unscaled latents, each (B, C, h, w).

    Raises InputError: they are not finite.
    """
    encoded = vae.encode((x + 1) / 2 if latent_space(vae).unit_range else x)
    if hasattr(encoded, "latent_dist"):
        z, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        std = torch.zeros_like(z)
    _check_finite({"latents": z, "their deviations": std})
    return z, std


def decode_batch(vae: Any, z: Tensor) -> Tensor:
    """Decode scaled latents on their own device.  (B, C, h, w) -> (B, 3, H, W) float32, about [-1, 1].

    Raises InputError: the pictures are not finite.
    """
    space = latent_space(vae)
    x = vae.decode(space.unscaled(z.to(vae.dtype))).sample.float()
    _check_finite({"pictures": x})  # as 8-bit levels NaN would be black
    return 2 * x - 1 if space.unit_range else x


def _check_finite(made: dict[str, Tensor]) -> None:
    if odd := seals.first_not_finite(made):
        raise InputError(f"autoencoder: {odd} of a batch of {len(made[odd])} are not finite; expected finite numbers")


@torch.no_grad()
def decode_latents(vae: nn.Module | str | Path, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Decode scaled latents to pictures, on the autoencoder's device.  (N, C, h, w) -> (N, 3, H, W) uint8."""
    network: Any = vae if isinstance(vae, nn.Module) else load_autoencoder(vae)
    decoded = []
    for z in tracked(latents.split(batch_size), "decoding", unit="batches"):
        x = decode_batch(network, z.to(network.device))
        decoded.append((127.5 * x + 128).clamp(0, 255).to(torch.uint8).cpu())  # adding 128 before truncation: unbiased
    return torch.cat(decoded)


def picture_size(vae: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the (height, width) of decoded latents of this size."""
    return tuple(side * latent_space(vae).pixels for side in size)


def check_channels(vae: Any, channels: int, origin: str = "vae") -> None:
    """Refuse an autoencoder whose latents have other channels than a model's."""
    if (found := latent_space(vae).channels) != channels:
        raise InputError(f"{origin}: {found} latent channels; the transformer's have {channels}")


def record(vae: Any, source: str = "") -> AutoencoderRecord:
    """Name an autoencoder: its class, and a hash over weights and scales.  source: a hub id, if it is from there."""
    space = latent_space(vae)
    return AutoencoderRecord(space.kind, tensors_hash(vae.state_dict(), json.dumps(asdict(space))), source)
