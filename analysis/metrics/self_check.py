"""Check that a user's FID is everyone's FID: Inception's weights, its features and the distance, on made pictures.

The pictures are made of hashes, so they are the same on every machine. torch-fidelity computes the same distance with
the same file of weights; the two have to agree.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.files import sha256
from dyndit.stats import frechet_distance

PUBLISHED = "6726825d"
"""The published file's name, weights-inception-2015-12-05-6726825d.pth, ends with the first digits of its SHA-256."""
NUM = 64
SIDE, TILES = 64, 8
SHARES = {"plain": 4, "dim": 3}
"""Sets of made pictures, and their brightness in quarters."""
PICTURES_SHA256 = "33dee556415e2f9630b5539c434e500565788df00c0f8bb1890e9bef933a7bc3"
TOLERANCE = 0.01
"""Largest difference of the two distances. Theirs takes roots of eigenvalues that rounding makes negative."""


@dataclass(frozen=True)
class Check:
    """One check of the weights and the arithmetic."""

    name: str
    found: str
    expected: str
    passed: bool


def made_pictures(name: str, num: int = NUM) -> Tensor:
    """Make the pictures of one of `SHARES`: 8 x 8 tiles of random colours, uint8 (num, 3, 64, 64)."""
    size = TILES * TILES * 3
    digests = [hashlib.shake_256(f"{name} {number}".encode()).digest(size) for number in range(num)]
    tiles = np.frombuffer(b"".join(digests), np.uint8).reshape(num, 3, TILES, TILES)
    tiles = (tiles.astype(np.uint16) * SHARES[name] // 4).astype(np.uint8)
    return torch.from_numpy(tiles.repeat(SIDE // TILES, 2).repeat(SIDE // TILES, 3))


def self_check(weights: Path, device: str = "cpu", num: int = NUM) -> Iterator[Check]:
    """Yield the checks, one after the other. `num` is 64 on the command line.

    Raises InputError, CheckpointError: the file is no weights of Inception.
    """
    sets = {name: made_pictures(name, num) for name in SHARES}
    found = hashlib.sha256(b"".join(made_pictures(name).numpy().tobytes() for name in SHARES)).hexdigest()
    yield Check("made pictures", found[:16], PICTURES_SHA256[:16], found == PICTURES_SHA256)
    extractor = load_extractor("inception", weights, device)
    found = sha256(weights)[: len(PUBLISHED)]
    yield Check("SHA-256 of the weights, first digits", found, f"{PUBLISHED}, as published", found == PUBLISHED)
    ours = [Measured(PictureSet(name, pictures), extractor) for name, pictures in sets.items()]
    same = frechet_distance(ours[0].moments(), ours[0].moments())
    yield Check("FID of a set with itself", f"{same:.6f}", f"0 ± {TOLERANCE}", abs(same) <= TOLERANCE)
    distance = frechet_distance(*(part.moments() for part in ours))
    theirs = _theirs(list(sets.values()), weights, device)
    close = abs(distance - theirs) <= TOLERANCE * max(1, theirs / 100)
    name = f"FID of {' and '.join(SHARES)}, {num} pictures each"
    yield Check(name, f"{distance:.4f}", f"{theirs:.4f} by torch-fidelity", close)


def _theirs(sets: list[Tensor], weights: Path, device: str) -> float:
    """Return the distance that torch-fidelity computes from pictures to number."""
    from torch_fidelity import calculate_metrics  # slow to import
    from torch_fidelity.metric_fid import KEY_METRIC_FID

    found = calculate_metrics(
        input1=_Items(sets[0]),
        input2=_Items(sets[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=device.startswith("cuda"),
        fid=True,
        cache=False,
        verbose=False,
        batch_size=16,
        save_cpu_ram=True,
    )
    return found[KEY_METRIC_FID]


class _Items(torch.utils.data.Dataset):
    """Pictures as torch-fidelity takes them: item i is uint8 (3, H, W)."""

    def __init__(self, pictures: Tensor) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self._pictures[index]
