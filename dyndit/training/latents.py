"""Encode pictures to the latents of an autoencoder, once, and cache them. Latent DiTs train on them.

The cache holds the posterior N(mean, std²) of each picture, unscaled (`dyndit.training.autoencoders`). An autoencoder
without a posterior has std 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dyndit import files
from dyndit.errors import CheckpointError, InputError
from dyndit.progress import progress_bar
from dyndit.training.autoencoders import encode_batch, latent_space, load_autoencoder
from dyndit.training.data import Pictures

INDEX = "latents.json"


@dataclass(frozen=True)
class _Identity:
    """Identify the sources of a cache. A cache of other sources is refused."""

    vae_sha256: str
    data_fingerprint: str
    scaling_factor: float | list[float]
    shift_factor: float | list[float]
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
        z = (z - self._per_channel("shift_factor")) * self._per_channel("scaling_factor")
        return z, int(opened.get_slice("label")[row])

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """Return the pictures themselves, so that a reference set has no errors of the autoencoder."""
        return self.source.uint8(indices)

    def _per_channel(self, name: str) -> float | Tensor:
        value = getattr(self._identity, name)
        return torch.tensor(value)[:, None, None] if isinstance(value, list) else value

    def _shard(self, number: int) -> safe_open:
        if number not in self._shards:
            self._shards[number] = safe_open(self.folder / self._names[number], framework="pt")
        return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a worker process opens the files itself


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
    space = latent_space(vae)
    _check_fit(pictures, vae)
    identity = _Identity(
        _hash_folder(Path(vae_folder)),
        pictures.fingerprint,
        list(space.scale) if isinstance(space.scale, tuple) else space.scale,
        list(space.shift) if isinstance(space.shift, tuple) else space.shift,
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
    network: Any = vae
    network.to(device)
    shards = [range(start, min(start + pictures_per_shard, len(pictures))) for _, start in todo]
    total = sum(map(len, shards))
    with progress_bar("encoding", unit="pictures", shown=progress) as advance:
        for number, ((name, _), shard) in enumerate(zip(todo, shards, strict=True)):
            before = sum(map(len, shards[:number]))
            encoded = _encode(pictures, shard, vae, batch_size, lambda n, before=before: advance(before + n, total))
            files.write_safetensors(folder / name, encoded)
            hashes[name] = files.sha256(folder / name)
            _write_index(folder, identity, {n: hashes[n] for n in names if n in hashes})
    return LatentPictures(folder, pictures, use_mode)


@torch.no_grad()
def _encode(
    pictures: Pictures, indices: range, vae: Any, batch_size: int, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Encode pictures to their posteriors -> mean and std (n, C, h, w), label (n,).  advance: told the count."""
    means, stds, labels = [], [], []
    for first in range(0, len(indices), batch_size):
        advance(first)
        items = [pictures[i] for i in indices[first : first + batch_size]]
        mean, std = encode_batch(vae, torch.stack([x for x, _ in items]).to(vae.device))
        means.append(mean.cpu().contiguous())
        stds.append(std.cpu().contiguous())
        labels += [label for _, label in items]
    advance(len(indices))
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


def _check_fit(pictures: Pictures, vae: nn.Module) -> None:
    space = latent_space(vae)
    if pictures.channels != space.in_channels:
        raise InputError(
            f"data: found pictures of {pictures.channels} channels, the autoencoder expects {space.in_channels}"
        )
    only = space.picture_size
    if only is not None and tuple(pictures.shape[1:]) != (only, only):
        raise InputError(f"data: found pictures of {pictures.image_size} px, the autoencoder expects {only}")
    if any(side % space.pixels for side in pictures.shape[1:]):
        raise InputError(
            f"data: found pictures of {pictures.image_size} px, the autoencoder expects multiples of {space.pixels}"
        )


def _hash_folder(folder: Path) -> str:
    """Hash the autoencoder's weights and its configuration."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{path.name} {files.sha256(path)}\n".encode())
    return digest.hexdigest()
