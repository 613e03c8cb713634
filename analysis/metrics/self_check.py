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
from dyndit.errors import InputError, first_line
from dyndit.files import sha256
from dyndit.progress import progress_bar
from dyndit.stats import frechet_distance, moments

PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the published file. Its name, weights-inception-2015-12-05-6726825d.pth, ends with the first digits."""
NUM, DIMS = 64, 2048
SIDE, TILES = 64, 8
SHARES = {"plain": 4, "dim": 3}
"""Sets of made pictures, and their brightness in quarters."""
PICTURES_SHA256 = "33dee556415e2f9630b5539c434e500565788df00c0f8bb1890e9bef933a7bc3"
TOLERANCE = 0.01
"""Largest difference of the two distances. Theirs takes roots of eigenvalues that rounding makes negative."""
CIFAR10_FID, CIFAR10_TOLERANCE, CIFAR10_NUM, CIFAR10_SEED = 10.3233274, 1e-4, 5_000, 2020
"""What torch-fidelity's own test expects of 5,000 train against 5,000 test pictures of CIFAR-10, and how close.

Its tests/tf1/numerical_precision/test_metric_fid_fidelity.py has the value, which the first TensorFlow code of FID
reproduces there. Its utils/util_dump_dataset_as_images.py draws the pictures: RandomState(2020), without replacement.
"""


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


def self_check(
    weights: Path, device: str = "cpu", cifar10: Path | None = None, num: int = NUM, dims: int = DIMS
) -> Iterator[Check]:
    """Yield the checks, one after the other. The command line takes 64 pictures and all 2,048 features.

    cifar10: the folder that holds CIFAR-10 as published, cifar-10-batches-py; compares a distance on it as well.

    Raises InputError, CheckpointError: the file is no weights of Inception, or the folder holds no CIFAR-10.
    """
    drawn = None if cifar10 is None else [_of_cifar10(cifar10, train) for train in (True, False)]
    sets = {name: made_pictures(name, num) for name in SHARES}
    found = hashlib.sha256(b"".join(made_pictures(name).numpy().tobytes() for name in SHARES)).hexdigest()
    yield Check("made pictures", found[:16], PICTURES_SHA256[:16], found == PICTURES_SHA256)
    extractor = load_extractor("inception", weights, device)
    found = sha256(weights)
    yield Check("SHA-256 of the weights", found, f"{PUBLISHED}, as published", found == PUBLISHED)
    ours = [extractor.features(pictures, batch_size=16)[:, :dims] for pictures in sets.values()]
    distance = frechet_distance(*map(moments, ours))
    with progress_bar("torch-fidelity's distance"):
        theirs = _theirs(list(sets.values()), weights, device, dims)
    close = abs(distance - theirs) <= TOLERANCE * max(1, theirs / 100)
    name = f"FID of {' and '.join(SHARES)}, {num} pictures each"
    yield Check(name, f"{distance:.4f}", f"{theirs:.4f} by torch-fidelity", close)
    if drawn is not None:
        ours = [extractor.features(pictures, batch_size=50)[:, :dims] for pictures in drawn]
        distance = frechet_distance(*map(moments, ours))
        close = abs(distance - CIFAR10_FID) <= CIFAR10_TOLERANCE
        expected = f"{CIFAR10_FID:.4f} in torch-fidelity's own test"
        yield Check(f"FID of CIFAR-10, {CIFAR10_NUM:,} train and test pictures", f"{distance:.4f}", expected, close)


def _of_cifar10(folder: Path, train: bool) -> Tensor:
    """Return the pictures that torch-fidelity's test draws, uint8 (5,000, 3, 32, 32)."""
    from torchvision.datasets import CIFAR10  # slow to import

    try:
        pictures = CIFAR10(str(folder), train=train).data  # (N, 32, 32, 3); compares the files with their hashes
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{folder}: found {first_line(error)}; expected CIFAR-10 as published, {CIFAR10.base_folder}/ in it"
        ) from None
    chosen = np.random.RandomState(CIFAR10_SEED).choice(len(pictures), CIFAR10_NUM, replace=False)
    return torch.from_numpy(pictures[chosen]).permute(0, 3, 1, 2).contiguous()


def _theirs(sets: list[Tensor], weights: Path, device: str, dims: int) -> float:
    """Return the distance that torch-fidelity computes from the same pictures and weights, on its own way."""
    from torch_fidelity import metric_fid, utils  # slow to import

    options = {"cuda": device.startswith("cuda"), "cache": False, "verbose": False, "batch_size": 16}
    options |= {"save_cpu_ram": True, "input1": _Items(sets[0]), "input2": _Items(sets[1])}
    options["feature_extractor_weights_path"] = str(weights)
    network = utils.create_feature_extractor("inception-v3-compat", ["2048"], **options)
    features = [utils.extract_featuresdict_from_input_id(number, network, **options)["2048"] for number in (1, 2)]
    statistics = [metric_fid.fid_features_to_statistics(part[:, :dims]) for part in features]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


class _Items(torch.utils.data.Dataset):
    """Pictures as torch-fidelity takes them: item i is uint8 (3, H, W)."""

    def __init__(self, pictures: Tensor) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self._pictures[index]
