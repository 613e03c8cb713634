"""Load pictures to train on (scikit-learn's digits, folders of class subfolders), and choose the batch of each step.

Captions of a picture folder are the names of its subfolders.

Picture i is always the same tensor, and the batch of step s is a pure function of (seed, s). So a training run
resumes exactly without storing any random state.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dyndit.errors import InputError
from dyndit.models.base import Backbone
from dyndit.models.conditions import ClassLabels, Condition, Conditioning, ConditionType
from dyndit.training import captioned

Size = int | tuple[int, int]
"""The side of a square, or (height, width)."""

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Pictures(Dataset, ABC):
    """Labelled pictures of one shape. Item i is `(x, label)`: x float32 (C, H, W) in [-1, 1], label int."""

    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int | tuple[int, int]
    labels: list[int]
    can_flip: bool  # does a mirrored picture still belong to its class?
    fingerprint: str  # sha256, hexadecimal; a run resumes, and a cache is reused, only on the same fingerprint

    @property
    def captions(self) -> list[str]:
        """Return the caption of every picture: the name of its class."""
        return [self.class_names[label] for label in self.labels]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of every picture."""
        return (self.channels, *size_pair(self.image_size))

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return picture `index`, (C, H, W) float32, and its label."""

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
    from sklearn import datasets

    bunch = datasets.load_digits()
    return _Digits(bunch.images.astype(np.float32), bunch.target)


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
    from sklearn import datasets

    bunch = datasets.load_digits()
    return _CaptionedDigits(bunch.images.astype(np.float32), bunch.target, repeats=4)


PACKAGED: dict[str, Callable[[], Pictures]] = {"digits": load_digits, "captioned-digits": load_captioned_digits}
"""Data sets that need no files, by name. All are of 8 x 8 pixels and one channel."""


class PictureFolder(Pictures):
    """A folder with one subfolder per class, in sorted order. Pictures may lie at any depth below a subfolder.

    Each picture is cropped at its centre to the shape of `image_size`, a side or (height, width), then resized to it
    (bicubic, antialiased). Default: a square, as wide as the shorter side of the first picture.

    Raises InputError for a folder without pictures or class subfolders. Reading a damaged picture raises it too.
    """

    def __init__(self, root: str | Path, image_size: Size | None = None, channels: int = 3, can_flip: bool = True):
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"{self.root}: expected a folder with a subfolder of pictures per class")
        if channels not in (1, 3):
            raise InputError(f"channels: found {channels}, expected 1 (grey) or 3 (colour)")
        if image_size is not None and min(size_pair(image_size)) < 1:
            raise InputError(f"image_size: found {image_size}, expected at least 1")
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise InputError(f"{self.root}: found no subfolder, expected one per class with pictures in it")

        self.class_names = tuple(folder.name for folder in folders)
        self.num_classes = len(folders)
        self.channels, self.can_flip = channels, can_flip
        self._paths: list[str] = []
        self.labels: list[int] = []
        digest = hashlib.sha256()
        for label, folder in enumerate(folders):
            files = _find_pictures(folder)
            if not files:
                known = ", ".join(suffix[1:] for suffix in PICTURE_SUFFIXES)
                raise InputError(f"{folder}: found no picture, expected {known} files in it")
            for path in files:
                name = os.path.relpath(path, self.root).replace(os.sep, "/")
                digest.update(f"{name}\0{Path(path).stat().st_size}\0".encode("utf-8", "surrogateescape"))
            self._paths += files
            self.labels += [label] * len(files)
        height, width = size_pair(image_size or min(read_picture(self._paths[0], channels).size))
        self.image_size = height if height == width else (height, width)
        # Hash names and sizes, not bytes: hashing the bytes of a large set would take an hour. Image size and
        # channels are hashed because they change the tensors.
        digest.update(f"{self.image_size} {channels}".encode())
        self.fingerprint = digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._read(index).float() / 127.5 - 1, self.labels[index]

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """Decode, crop and resize pictures, one after the other -> (N, C, H, W) uint8."""
        return torch.stack([self._read(i) for i in (range(len(self)) if indices is None else indices)])

    def _read(self, index: int) -> Tensor:
        picture = crop_and_resize(read_picture(self._paths[index], self.channels), self.image_size)
        array = np.array(picture).reshape(*size_pair(self.image_size), self.channels)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


class Some(Pictures):
    """The first `num` pictures of a set, every class in turn as far as it has pictures.

    Raises InputError if the set has fewer pictures.
    """

    def __init__(self, source: Pictures, num: int):
        if not 1 <= num <= len(source):
            raise InputError(f"data: asked for {num} pictures, found {len(source)}")
        of_class = [[i for i, y in enumerate(source.labels) if y == k] for k in range(source.num_classes)]
        rounds = zip_longest(*of_class)
        self.source, self._indices = source, [i for each in rounds for i in each if i is not None][:num]
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.channels, self.image_size, self.can_flip = source.channels, source.image_size, source.can_flip
        self.labels = [source.labels[i] for i in self._indices]
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {num}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[self._indices[index]]

    @property
    def captions(self) -> list[str]:
        """See `Pictures`."""
        captions = self.source.captions
        return [captions[i] for i in self._indices]

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """See `Pictures`."""
        wanted = range(len(self)) if indices is None else indices
        return self.source.uint8([self._indices[i] for i in wanted])


def open_data(spec: str, image_size: Size | None = None, channels: int | None = None) -> Pictures:
    """Open a data set of `PACKAGED`, or the path of a picture folder (see `PictureFolder`)."""
    if spec in PACKAGED:
        if image_size not in (None, 8, (8, 8)) or channels not in (None, 1):
            raise InputError(f"data {spec}: asked for size {image_size}, channels {channels}; it has 8 and 1")
        return PACKAGED[spec]()
    if not Path(spec).is_dir():
        names = " or ".join(map(repr, PACKAGED))
        raise InputError(f"data: found {spec!r}, expected {names} or a folder with a subfolder per class")
    return PictureFolder(spec, image_size, channels or 3)


def read_picture(path: str | Path, channels: int = 3) -> Image.Image:
    """Decode a picture file to 8-bit grey (1 channel) or RGB (3): upright, on white, 16 bits scaled to 8.

    Raises InputError if the file is truncated, no picture, or of a pixel depth without a known range.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... for damaged files
        raise InputError(f"{path}: cannot be read as a picture ({error})") from error
    if picture.mode.startswith("I;16") or (picture.mode == "I" and opened.format == "PNG"):
        # PIL's convert("L") clips 16-bit levels at 255 and so turns most pictures white.
        levels = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise InputError(f"{path}: found pixels of mode {picture.mode!r}, expected 8 or 16 bits a channel")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        # Composite on white: dropping alpha would show the colours of transparent pixels.
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")


def crop_and_resize(picture: Image.Image, size: Size) -> Image.Image:
    """Crop the largest centred part of this shape, and resize it. A picture of this size is returned unchanged.

    size: a side, or (height, width).
    """
    height, width = size_pair(size)
    scale = min(picture.width / width, picture.height / height)
    cut_width, cut_height = round(width * scale), round(height * scale)
    left, top = (picture.width - cut_width) // 2, (picture.height - cut_height) // 2
    part = picture.crop((left, top, left + cut_width, top + cut_height))
    return part if part.size == (width, height) else part.resize((width, height), Image.Resampling.BICUBIC)


def size_pair(size: Size) -> tuple[int, int]:
    """Return (height, width). An integer size is the side of a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_fit(data: Pictures, backbone: Backbone, *, exactly: bool = False) -> None:
    """Refuse pictures that do not fit a backbone.

    exactly: also refuse fewer classes than the backbone has.

    Raises InputError: another shape, more classes than the backbone has, or a caption that it does not know.
    """
    if data.shape != tuple(backbone.sample_shape):
        found, expected = (" x ".join(map(str, shape)) for shape in (data.shape, backbone.sample_shape))
        raise InputError(f"data: pictures of {found}, but the model takes {expected} (channels, height, width)")
    if not isinstance(backbone.condition, ClassLabels):
        backbone.condition.plain(list(dict.fromkeys(backbone.condition.values_of(data))))
        return
    known = backbone.condition.num_classes
    if data.num_classes > known or (exactly and data.num_classes != known):
        raise InputError(f"data: {data.num_classes} classes, but the model has {known}")


Rows = Tensor | dict[str, Tensor]
"""Conditions of a batch: labels (B,), words (B, S), or tensors of B rows by name."""


class Conditioned(Dataset):
    """Pictures with rows of a model's condition in place of labels. Item i is (x, row): a tensor, or tensors by name.

    The rows of each value are made once.
    """

    def __init__(self, pictures: Pictures, condition: ConditionType):
        self.pictures, self.values = pictures, condition.values_of(pictures)
        self.can_flip, self.fingerprint = pictures.can_flip, pictures.fingerprint
        self._rows: dict[object, Rows] = {}
        for value in dict.fromkeys(self.values):
            row = condition.of([value])
            named = isinstance(row, Conditioning)
            self._rows[value] = {name: part[0] for name, part in row.rows.items()} if named else row[0]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Rows]:
        return self.pictures[index][0], self._rows[self.values[index]]


def conditioned(pictures: Pictures, condition: ConditionType) -> Pictures | Conditioned:
    """Return the pictures with rows of `condition`. Class labels are the pictures' own."""
    return pictures if isinstance(condition, ClassLabels) else Conditioned(pictures, condition)


def as_condition(rows: Rows) -> Condition:
    """Return a batch of rows as the model takes it."""
    return Conditioning(rows) if isinstance(rows, dict) else rows


def _find_pictures(folder: Path) -> list[str]:
    found = []
    for parent, _, names in os.walk(folder):
        found += [
            os.path.join(parent, name)  # noqa: PTH118  strings: Path objects of a million files take 1 GB
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES  # noqa: PTH122
        ]
    return sorted(found)


@lru_cache(maxsize=4)
def _permutation(num_pictures: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pictures)


@dataclass(frozen=True)
class StepBatches(Sampler[list[int]]):
    """Choose the pictures of step s: a pure function of (seed, s), so a run can start at any step.

    Each epoch has one permutation, seeded by (seed, epoch). Joined, they make an endless stream; step s takes
    its positions [s·B, (s+1)·B). Each process gets `num_slices` equal micro-batches of a step. Together the processes
    see the same batch of B pictures for any number of processes.
    """

    num_pictures: int
    batch_size: int  # B: pictures per step, over all micro-batches and processes
    seed: int
    start: int = 0
    stop: int = 2**62
    num_slices: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.batch_size % (self.num_slices * self.world):
            raise InputError(
                f"batch_size: found {self.batch_size}, expected a multiple of accumulation x processes "
                f"({self.num_slices} x {self.world})"
            )

    def batch(self, step: int) -> np.ndarray:
        """Return the indices of the whole batch of `step`, (B,)."""
        parts, position, missing = [], step * self.batch_size, self.batch_size
        while missing:
            epoch, offset = divmod(position, self.num_pictures)
            part = _permutation(self.num_pictures, self.seed, epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            slices = self.batch(step).reshape(self.num_slices, self.world, -1)
            yield from slices[:, self.rank].tolist()

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.num_slices
