"""Encode pictures to the latents of a diffusers `AutoencoderKL`, once, and cache them. Latent DiTs train on them.

A latent is z = (sample - shift) · scale of the posterior N(mean, std²) of a picture (Rombach et al. 2022,
arXiv:2112.10752), with the autoencoder's own `shift_factor` (0 if it has none) and `scaling_factor`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor

from dyndit import files
from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.progress import tracked
from dyndit.training.data import Pictures

INDEX = "latents.json"


@dataclass(frozen=True)
class _Identity:
    """Identify the sources of a cache. A cache of other sources is refused."""

    vae_sha256: str
    data_fingerprint: str
    scaling_factor: float
    shift_factor: float
    num_pictures: int
    pictures_per_shard: int


class LatentPictures(Pictures):
    """The latents of `source`, (C, h, w) float32, read from a cache that `encode_latents` made.

    Item i is a sample of picture i's posterior, the same at every call. With `use_mode`, it is the posterior's mean.
    Latents are never flipped: the latent of a mirrored picture is not the mirrored latent.
    """

    can_flip = False

    def __init__(self, folder: Path, source: Pictures, use_mode: bool = False):
        self.folder, self.source, self.use_mode = Path(folder), source, use_mode
        index = files.read_json(self.folder / INDEX)
        self._identity = _Identity(**index["made_from"])
        self._names: list[str] = list(index["sha256"])
        self._shards: dict[int, safe_open] = {}
        self.num_classes, self.class_names, self.account = source.num_classes, source.class_names, source.account
        _, self.channels, height, width = self._shard(0).get_slice("mean").get_shape()
        self.image_size = height if height == width else (height, width)
        # Include the shards' hashes: another machine encodes the same pictures to other last bits.
        content = json.dumps([index, use_mode], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @property
    def captions(self) -> list[str]:
        """Return the pictures' captions."""
        return self.source.captions

    def __len__(self) -> int:
        return self._identity.num_pictures

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, row = divmod(index, self._identity.pictures_per_shard)
        opened = self._shard(shard)
        z = opened.get_slice("mean")[row]
        if not self.use_mode:
            generator = torch.Generator().manual_seed(index)
            z = z + opened.get_slice("std")[row] * torch.randn(z.shape, generator=generator)
        z = (z - self._identity.shift_factor) * self._identity.scaling_factor
        return z, int(opened.get_slice("label")[row])

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """Return the pictures themselves, so that a reference set has no errors of the autoencoder."""
        return self.source.uint8(indices)

    def _shard(self, number: int) -> safe_open:
        if number not in self._shards:
            self._shards[number] = safe_open(self.folder / self._names[number], framework="pt")
        return self._shards[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # a worker process opens the files itself


def load_autoencoder(folder: str | Path) -> AutoencoderKL:
    """Load a diffusers `AutoencoderKL` folder in fp32, in eval mode. Missing and extra weights are refused.

    Raises InputError if it is another kind of model, or if its weights are missing or damaged, or do not fit its
    config.json.
    """
    folder = Path(folder)
    try:
        kind = files.read_json(folder / "config.json").get("_class_name")
    except CheckpointError as error:
        raise InputError(f"{error}; expected a diffusers AutoencoderKL folder") from error
    if kind != "AutoencoderKL":
        raise InputError(f"{folder / 'config.json'}: found a model {kind!r}, expected 'AutoencoderKL'")
    try:
        vae, info = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # diffusers passes on OSError, SafetensorError, RuntimeError on shapes
        raise InputError(f"{folder}: the autoencoder cannot be loaded ({first_line(error)})") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} weights do not fit its config.json, the first is {wrong[0]}; "
            "expected the same names in both"
        )
    return vae.float().eval().requires_grad_(False)


def encode_latents(
    pictures: Pictures,
    vae_folder: str | Path,
    out: str | Path,
    batch_size: int = 16,
    *,
    use_mode: bool = False,
    pictures_per_shard: int = 4096,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> LatentPictures:
    """Encode all pictures into the cache folder `out`, 8 bytes a latent value.

    Intact shards are kept, so a stopped run goes on. Missing and damaged shards are encoded again.
    Raises InputError if the cache belongs to another autoencoder or to other pictures, or if the pictures do not
    fit the autoencoder.
    """
    vae = load_autoencoder(vae_folder)
    _check_fit(pictures, vae)
    identity = _Identity(
        _hash_folder(Path(vae_folder)),
        pictures.fingerprint,
        vae.config.scaling_factor,
        vae.config.shift_factor or 0.0,
        len(pictures),
        pictures_per_shard,
    )
    folder = Path(out)
    hashes = _open_cache(folder, identity)
    starts = range(0, len(pictures), pictures_per_shard)
    names = [f"shard-{number:05d}-of-{len(starts):05d}.safetensors" for number in range(len(starts))]
    todo = [
        (name, start)
        for name, start in zip(names, starts, strict=True)
        if not (folder / name).is_file() or files.sha256(folder / name) != hashes.get(name)
    ]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vae.to(device)
    for name, start in tracked(todo, "encoding", shown=progress and bool(todo)):
        shard = range(start, min(start + pictures_per_shard, len(pictures)))
        files.write_safetensors(folder / name, _encode(pictures, shard, vae, batch_size))
        hashes[name] = files.sha256(folder / name)
        _write_index(folder, identity, {n: hashes[n] for n in names if n in hashes})
    return LatentPictures(folder, pictures, use_mode)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL | str | Path, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Decode scaled latents to pictures, on the autoencoder's device.  (N, C, h, w) -> (N, 3, H, W) uint8."""
    if not isinstance(vae, AutoencoderKL):
        vae = load_autoencoder(vae)
    decoded = []
    for z in latents.split(batch_size):
        x = decode_batch(vae, z.to(vae.device))
        decoded.append((127.5 * x + 128).clamp(0, 255).to(torch.uint8).cpu())  # adding 128 before truncation: unbiased
    return torch.cat(decoded)


def decode_batch(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Decode scaled latents on their own device.  (B, C, h, w) -> (B, 3, H, W) float32, about [-1, 1]."""
    z = z.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(z).sample.float()


@torch.no_grad()
def _encode(pictures: Pictures, indices: range, vae: AutoencoderKL, batch_size: int) -> dict[str, Tensor]:
    """Encode pictures to their posteriors -> mean and std (n, C, h, w), label (n,)."""
    means, stds, labels = [], [], []
    for first in range(0, len(indices), batch_size):
        items = [pictures[i] for i in indices[first : first + batch_size]]
        posterior = vae.encode(torch.stack([x for x, _ in items]).to(vae.device)).latent_dist
        means.append(posterior.mean.cpu().contiguous())
        stds.append(posterior.std.cpu().contiguous())
        labels += [label for _, label in items]
    return {"mean": torch.cat(means), "std": torch.cat(stds), "label": torch.tensor(labels)}


def _open_cache(folder: Path, identity: _Identity) -> dict[str, str]:
    """Return the hash of each shard in the folder. Write an empty index into a new folder."""
    path = folder / INDEX
    files.sweep(folder)
    if not path.exists():
        if folder.exists() and any(not files.is_draft(Path(entry.name)) for entry in folder.iterdir()):
            raise InputError(f"{folder}: holds other files, expected a latent cache or an empty folder")
        _write_index(folder, identity, {})
        return {}
    try:
        index = files.read_json(path)
        found, hashes = _Identity(**index["made_from"]), dict(index["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete {folder} to encode again") from error
    for field, then in asdict(found).items():
        if (now := asdict(identity)[field]) != then:
            raise InputError(
                f"{path}: the cache was made with {field} {then!r}, found {now!r}; "
                "expected the same, or another folder for the cache"
            )
    return hashes


def _write_index(folder: Path, identity: _Identity, hashes: dict[str, str]) -> None:
    files.write_json(folder / INDEX, {"made_from": asdict(identity), "sha256": hashes})


def _check_fit(pictures: Pictures, vae: AutoencoderKL) -> None:
    if pictures.channels != vae.config.in_channels:
        raise InputError(
            f"data: found pictures of {pictures.channels} channels, the autoencoder expects {vae.config.in_channels}"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if any(side % factor for side in pictures.shape[1:]):
        raise InputError(
            f"data: found pictures of {pictures.image_size} px, the autoencoder expects multiples of {factor}"
        )


def _hash_folder(folder: Path) -> str:
    """Hash the autoencoder's weights and its configuration."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {files.sha256(path)}\n".encode())
    return digest.hexdigest()
