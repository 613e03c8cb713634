"""Load pictures and clips to train on: the packaged sets of digits, or pictures from any place.

Picture i is always the same tensor. Captions of a picture folder are the names of its subfolders.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dyndit.errors import InputError
from dyndit.models.base import Backbone
from dyndit.models.conditions import ClassLabels
from dyndit.pictures.check import DAMAGED, FRAMES, check_contents, refuse_damaged
from dyndit.pictures.collection import account_of, as_array, open_source, read_image
from dyndit.pictures.decode import SUFFIXES
from dyndit.pictures.resize import Resize, Size, size_pair
from dyndit.progress import tracked
from dyndit.training import captioned, moving

BESIDE = "pictures beside class folders"


class Pictures(Dataset[Any], ABC):
    """Labelled pictures of one shape, or clips. Item i is `(x, label)`: x float32 (C, H, W) in [-1, 1], label int.

    Clips are (C, T, H, W). They may have several shapes; `shape` is the usual one.
    """

    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int | tuple[int, ...]  # a side, (height, width), or (frames, height, width)
    labels: list[int]
    can_flip: bool  # does a mirrored picture still belong to its class?
    fingerprint: Any  # sha256, hexadecimal; a run resumes, and a cache is reused, only on the same fingerprint

    groups: tuple[tuple[int, ...], ...] = ()
    """Numbers of the items of each shape, the usual shape first. A batch is of one group. Empty: one shape."""
    account: Any = {}  # noqa: RUF012  never written to
    """What was read and what was skipped, for manifests; see `account_of`."""

    @property
    def captions(self) -> list[str]:
        """Return the caption of every picture: the name of its class."""
        return [self.class_names[label] for label in self.labels]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (C, H, W) of every picture, or the usual shape (C, T, H, W) of a clip."""
        size = self.image_size
        return (self.channels, *((size, size) if isinstance(size, int) else size))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of all items, the usual shape first."""
        return (self.shape,)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return picture `index`, (C, H, W) float32, and its label."""

    def check(self) -> None:
        """Look at the contents of all pictures, once. Raises InputError: some are damaged."""
        self.fingerprint  # noqa: B018  hashes them

    @property
    def size(self) -> tuple[int, ...]:
        """Return (H, W) of every picture, or the usual (T, H, W) of a clip."""
        return self.shape[1:]

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Read the pictures in order, as uint8 (B, C, H, W)."""
        for low in range(0, len(self), batch_size):
            yield self.uint8(range(low, min(low + batch_size, len(self))))

    @abstractmethod
    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """Return a reference set for a metric: (N, C, H, W) uint8. Without `indices`, all pictures."""


class _Digits(Pictures):
    num_classes, channels, image_size = 10, 1, 8
    class_names = tuple("0123456789")
    can_flip = False

    def __init__(self, levels: np.ndarray, labels: np.ndarray):
        self._levels = torch.from_numpy(levels)  # (N, 8, 8) float32, whole numbers 0 to 16
        self._x = (self._levels / 8 - 1).unsqueeze(1)
        self.labels = labels.tolist()
        content = levels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._x[index], self.labels[index]

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        levels = self._levels if indices is None else self._levels[list(indices)]
        return (levels * 255 / 16).round().to(torch.uint8).unsqueeze(1)


def load_digits() -> Pictures:
    """Load scikit-learn's 1,797 scanned digits: 8x8, one channel, 10 classes. Ink 0 to 16 becomes -1 to 1."""
    return _Digits(*_scans())


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Read the scans and their digits, once: (1797, 8, 8) float32 and (1797,)."""
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    return bunch.images.astype(np.float32), bunch.target


class _CaptionedDigits(_Digits):
    """Every scan `repeats` times, in a style of its own each time."""

    class_names = captioned.NAMES

    def __init__(self, levels: np.ndarray, labels: np.ndarray, repeats: int):
        levels, labels = np.tile(levels, (repeats, 1, 1)), np.tile(labels, repeats)
        found = [captioned.styled(scan, label, i) for i, (scan, label) in enumerate(zip(levels, labels, strict=True))]
        super().__init__(np.stack([scan for scan, _ in found]), labels)
        self._captions = [caption for _, caption in found]
        self.fingerprint = hashlib.sha256("\n".join([self.fingerprint, *self._captions]).encode()).hexdigest()

    @property
    def captions(self) -> list[str]:
        return self._captions


def load_captioned_digits() -> Pictures:
    """Load 7,188 digits with captions such as "number seven, bold, tilted": the 1,797 scans in four styles each."""
    return _CaptionedDigits(*_scans(), repeats=4)


class _MovingDigits(Pictures):
    """Clips (1, T, 16, 16) of bouncing scans. A reference set has the usual shape throughout."""

    num_classes, channels, image_size = 10, 1, moving.SHAPES[0]
    class_names = tuple("0123456789")
    can_flip = False

    def __init__(self, levels: np.ndarray, labels: np.ndarray, num: int):
        self._levels, self._scans_of = levels, [np.flatnonzero(labels == k) for k in range(10)]
        self.labels = [i % 10 for i in range(num)]
        number_of = np.array([moving.shape_number(i) for i in range(num)])
        self.groups = tuple(tuple(np.flatnonzero(number_of == k).tolist()) for k in range(len(moving.SHAPES)))
        drawn = np.concatenate([self._clip(i).ravel() for i in range(0, num, 80)])  # a sample: it shows other motion
        self.fingerprint = hashlib.sha256(levels.tobytes() + labels.tobytes() + drawn.tobytes()).hexdigest()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple((1, *shape) for shape in moving.SHAPES)

    def _clip(self, index: int, shape: Any = None) -> np.ndarray:
        shape = shape or moving.SHAPES[moving.shape_number(index)]
        return moving.clip(self._levels, self._scans_of[self.labels[index]], index, shape)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._clip(index)).float().unsqueeze(0) / 8 - 1, self.labels[index]

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        wanted = range(len(self)) if indices is None else indices
        levels = torch.from_numpy(np.stack([self._clip(i, self.image_size) for i in wanted]))
        return (levels.float() * 255 / 16).round().to(torch.uint8).unsqueeze(1)


def load_moving_digits() -> Pictures:
    """Load 4,800 clips of one or two bouncing scans of a class: 8 frames of 16 x 16, and other shapes."""
    levels, labels = (values.astype(np.uint8) for values in _scans())
    return _MovingDigits(levels, labels, moving.NUM_CLIPS)


PACKAGED: dict[str, Callable[[], Pictures]] = {
    "digits": load_digits,
    "captioned-digits": load_captioned_digits,
    "moving-digits": load_moving_digits,
}
"""Data sets that need no files, by name."""


class PictureFolder(Pictures):
    """Pictures by class, from any place that `open_source` opens: a folder with a subfolder per class, an archive, ...

    Classes are those that the place states, else the first folders in sorted order; pictures may lie at any depth below
    a folder, and pictures beside class folders are left out. Pictures without any folder are of one class. labelled:
    False takes every picture, as a set without classes.

    Each picture is cropped and resized to `image_size`, a side or (height, width), by `method` (see `Resize`). Default:
    a square, as wide as the shorter side of the first picture. skip_damaged: leave damaged pictures out, after reading
    all; otherwise `fingerprint` reads all, and refuses damaged ones.

    Raises InputError for a place without pictures, or a class folder without pictures.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: Size | None = None,
        channels: int = 3,
        can_flip: bool = True,
        *,
        method: str = "bicubic",
        skip_damaged: bool = False,
        labelled: bool = True,
    ):
        self.root = Path(root)
        if channels not in (1, 3):
            raise InputError(f"channels: found {channels}, expected 1 (grey) or 3 (colour)")
        if image_size is not None:
            Resize(image_size, method)
        self.channels, self.can_flip = channels, can_flip
        self._source = open_source(self.root)
        self._left_out: dict[str, list[str]] = {}
        names = self._source.names
        if labelled:
            self._numbers, self.labels, self.class_names = self._classes()
        else:
            self._numbers, self.labels, self.class_names = list(range(len(names))), [0] * len(names), ("",)
        self.num_classes = len(self.class_names)
        if skip_damaged:
            self._leave_damaged_out()
        first = read_image(self._source, self._numbers[0], channels)
        self._resize = Resize(image_size or min(first.size), method)
        height, width = size_pair(self._resize.size)
        self.image_size = height if height == width else (height, width)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the pictures' names and contents, and of what changes their tensors.

        The first call reads every picture that was not read before, see `check_contents`. Raises InputError for damaged
        pictures.
        """
        found = check_contents(self._source)
        kept = [found[number] for number in self._numbers]
        refuse_damaged(self._source, kept)
        frames = [self._source.name(n) for n, one in zip(self._numbers, kept, strict=True) if one.frames]
        self._left_out |= {FRAMES: frames} if frames else {}
        digest = hashlib.sha256()
        for number, label, one in zip(self._numbers, self.labels, kept, strict=True):
            digest.update(f"{self._source.names[number]}\0{one.sha256}\0{label}\0".encode("utf-8", "surrogateescape"))
        digest.update(f"{self._resize} {self.channels}".encode())
        return digest.hexdigest()

    @property
    def account(self) -> dict[str, Any]:
        """Return what was read and what was skipped, for manifests."""
        return account_of(self._source, len(self), self._left_out, self._resize)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._read(index).float() / 127.5 - 1, self.labels[index]

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """Decode, crop and resize pictures, one after the other -> (N, C, H, W) uint8."""
        wanted = range(len(self)) if indices is None else indices
        return torch.stack([self._read(i) for i in tracked(wanted, "reading pictures", unit="pictures")])

    def _read(self, index: int) -> Tensor:
        picture = self._resize(read_image(self._source, self._numbers[index], self.channels))
        return torch.from_numpy(np.array(as_array(picture))).permute(2, 0, 1).contiguous()

    def _classes(self) -> tuple[list[int], list[int], tuple[str, ...]]:
        """Return the numbers of the pictures with a class, their classes, and the classes' names."""
        source, names = self._source, self._source.names
        if source.labels is not None:
            return list(range(len(names))), source.labels, source.class_names
        tops = [name.split("/", 1)[0] if "/" in name else "" for name in map(str, names)]
        folders = sorted(set(source.folders) | set(tops) - {""})
        if not folders:
            return list(range(len(names))), [0] * len(names), (self.root.stem,)
        if empty := sorted(set(folders) - set(tops)):
            known = ", ".join(suffix[1:] for suffix in SUFFIXES)
            raise InputError(f"{self.root / empty[0]}: found no picture, expected {known} files in it")
        labels = {folder: label for label, folder in enumerate(folders)}
        if loose := [str(name) for name, top in zip(names, tops, strict=True) if not top]:
            self._left_out[BESIDE] = loose
        kept = [number for number, top in enumerate(tops) if top]
        return kept, [labels[tops[number]] for number in kept], tuple(folders)

    def _leave_damaged_out(self) -> None:
        found = check_contents(self._source)
        pairs = list(zip(self._numbers, self.labels, strict=True))
        whole = [(number, label) for number, label in pairs if not found[number].problem]
        if len(whole) == len(pairs):
            return
        self._left_out[DAMAGED] = [self._source.name(number) for number, _ in pairs if found[number].problem]
        left = {label for _, label in whole}
        if gone := sorted({label for _, label in pairs} - left):
            raise InputError(f"{self.root}: all pictures of class {self.class_names[gone[0]]} are damaged")
        self._numbers, self.labels = map(list, zip(*whole, strict=True))


def open_data(
    spec: str,
    image_size: int | tuple[int, ...] | None = None,
    channels: int | None = None,
    *,
    method: str = "bicubic",
    skip_damaged: bool = False,
    labelled: bool = True,
) -> Pictures:
    """Open pictures to train on, or to measure against.

        pictures = dyndit.open_data("pictures/", 32)           # a folder with a subfolder per class
        pictures = dyndit.open_data("digits")                  # 1,797 scanned digits, which ship with scikit-learn
        x, label = pictures[0]                                 # (C, H, W) in [-1, 1]
        real = pictures.uint8()                                # (N, C, H, W) uint8

    spec: "digits", "captioned-digits" or "moving-digits"; or the path of a folder, a .zip, .tar or .npz, or a data set
    of Hugging Face (see `PictureFolder`).
    image_size: a side, or (height, width), to crop and resize to. None: a square as wide as the first picture's shorter
    side.
    channels: 1 (grey) or 3 (colour). None: 3, or the packaged set's own.
    method: how pictures are resized: "bicubic", "adm" or "clean-fid".
    skip_damaged: leave damaged pictures out; else they are refused.
    labelled: False takes every picture, as a set without classes.

    Raises:
        InputError: no such place, no pictures in it, or a packaged set of another size or number of channels.
    """
    if spec in PACKAGED:
        data = PACKAGED[spec]()
        if image_size not in (None, data.image_size, data.shape[1:]) or channels not in (None, data.channels):
            found = f"{data.image_size} and {data.channels}"
            raise InputError(f"data {spec}: asked for size {image_size}, channels {channels}; it has {found}")
        return data
    if isinstance(image_size, tuple) and len(image_size) == 3:
        raise InputError(f"data {spec}: a folder of pictures, but the model takes clips; expected 'moving-digits'")
    options: dict[str, Any] = {"method": method, "skip_damaged": skip_damaged, "labelled": labelled}
    try:
        size: Size | None = size_pair(image_size) if isinstance(image_size, tuple) else image_size
        return PictureFolder(spec, size, channels or 3, **options)
    except InputError as error:
        if Path(spec).exists():
            raise
        names = " or ".join(map(repr, PACKAGED))
        raise InputError(f"data: {error}; or {names}") from error


def check_fit(data: Pictures, backbone: Backbone, *, exactly: bool = False) -> None:
    """Refuse pictures that do not fit a backbone.

    exactly: also refuse fewer classes than the backbone has.

    Raises InputError: another shape, more classes than the backbone has, or a caption that it does not know.
    """
    refused = [shape for shape in data.shapes[1:] if not backbone.accepts(shape)]
    if data.shape != tuple(backbone.sample_shape) or refused:
        shapes = (data.shape if data.shape != tuple(backbone.sample_shape) else refused[0], backbone.sample_shape)
        found, expected = (" x ".join(map(str, shape)) for shape in shapes)
        axes = "channels, height, width" if len(backbone.sample_shape) == 3 else "channels, frames, height, width"
        raise InputError(f"data: pictures of {found}, but the model takes {expected} ({axes})")
    if not isinstance(backbone.condition, ClassLabels):
        backbone.condition.plain(list(dict.fromkeys(backbone.condition.values_of(data))))
        return
    known = backbone.condition.num_classes
    if data.num_classes > known or (exactly and data.num_classes != known):
        raise InputError(f"data: {data.num_classes} classes, but the model has {known}")
