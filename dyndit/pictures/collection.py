"""Open pictures wherever they lie, and read them as arrays of one size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from dyndit.errors import InputError
from dyndit.pictures import as_nchw
from dyndit.pictures.archives import Tars, Zip
from dyndit.pictures.arrays import Arrays
from dyndit.pictures.check import DAMAGED, FRAMES, check_contents
from dyndit.pictures.clips import ENTRY, cut
from dyndit.pictures.decode import decode, has_frames
from dyndit.pictures.resize import Resize
from dyndit.pictures.sources import KINDS, OVERVIEW, Files, Folder, Source, at_least_one, read_bytes
from dyndit.pictures.tables import Table, table_files

MOST_LISTED = 100
"""Most names that an account lists for each reason."""


def open_source(path: str | Path) -> Source:
    """Find the pictures in a folder, an archive, an array or a table; a pattern ("train-*.tar") names several files.

    Raises InputError: nothing is there, it is of another kind, or holds no picture.
    """
    path = Path(path)
    if not path.exists() and set(path.name) & set("*?["):
        found = sorted(path.parent.glob(path.name))
        for suffix, kind in ((".tar", Tars), (".parquet", lambda files: Table(path.parent, files))):
            if found and all(file.suffix == suffix for file in found):
                return at_least_one(kind(found))
        raise InputError(f"{path}: {len(found)} files, expected at least one, all .tar or all .parquet")
    return at_least_one(_folder(path) if path.is_dir() else _file(path))


def _folder(path: Path) -> Source:
    if tables := table_files(path):
        return Table(path, tables)
    folder = Folder(path)
    shards = () if folder.names else sorted(path.glob("*.tar"))
    return Tars(shards) if shards else folder


def _file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        return Arrays(path)
    if not path.exists():
        raise InputError(f"{path}: no such folder, expected {KINDS}")
    if suffix == ".zip":
        return Zip(path)
    if suffix == ".tar":
        return Tars([path])
    if suffix in (".parquet", ".arrow"):
        return Table(path, [path])
    raise InputError(f"{path}: a file of no known kind, expected {KINDS}")


def read_image(source: Source, number: int, channels: int | None = None) -> Image.Image:
    """Decode picture `number` of a source, see `decode`. Raises InputError, also for a clip."""
    image = _image(source.contents(number), source.name(number), channels)
    if ENTRY in image.info:
        raise InputError(f"{source.name(number)}: a clip, expected a picture")
    return image


def read_picture(path: str | Path, channels: int | None = 3) -> Image.Image:
    """Decode a picture file to 8-bit grey (1 channel) or RGB (3): upright, on white, 16 bits scaled to 8.

    Raises InputError if the file is truncated, no picture, or of a pixel depth without a known range.
    """
    return decode(read_bytes(path), str(path), channels)


def _image(contents: bytes | np.ndarray, name: str, channels: int | None = None) -> Image.Image:
    if isinstance(contents, bytes):
        return decode(contents, name, channels)
    if contents.ndim == 4:
        raise InputError(f"{name}: a clip, expected a picture")
    image = Image.fromarray(np.ascontiguousarray(contents[..., 0] if contents.shape[2] == 1 else contents))
    return image if channels is None else image.convert("L" if channels == 1 else "RGB")


def as_array(image: Image.Image) -> np.ndarray:
    """Return a picture's levels, uint8 (H, W, 1 or 3)."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def account_of(
    source: Source, num: int, left_out: Mapping[str, Sequence[str]], resize: Resize | None
) -> dict[str, Any]:
    """Say for a manifest what was read and what was not: counts, and the first names for each reason."""
    skipped = {k: {"number": len(v), "names": list(v[:MOST_LISTED])} for k, v in {**source.skipped, **left_out}.items()}
    return {
        "source": str(source.root),
        "pictures": num,
        "resize": str(resize or ""),
        "skipped": skipped,
    }


def said_of(account: Mapping[str, Any]) -> list[str]:
    """Write an account as lines for the user; none if nothing was skipped."""
    lines = []
    for reason, found in account.get("skipped", {}).items():
        if reason == OVERVIEW:  # expected: counted in the account, and not worth a line
            continue
        names, number = found["names"], found["number"]
        more = ", ..." if number > 3 else ""
        lines.append(f"{account['source']}: skipped {number} {reason} ({', '.join(map(str, names[:3]))}{more})")
    return lines


@dataclass(frozen=True, eq=False)
class PictureFiles:
    """Pictures or clips of one size, read on demand. Ways to resize bring every frame of a clip to one size.

    resize: how they come to one size; None: they have it. numbers: which pictures of the source; None: all. left_out:
    names of the others, by reason.
    """

    source: Source
    resize: Resize | None = None
    numbers: Sequence[int] | None = None
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _with_frames: dict[str, None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, place: str | Path, resize: Resize | None = None, *, skip_damaged: bool = False) -> Self:
        """Open a place, see `open_source`. All its pictures count, whatever folders they lie in.

        skip_damaged: read all pictures first, and leave the damaged ones out. Raises InputError: none is left.
        """
        files = cls(open_source(place), resize)
        return files.without_damaged() if skip_damaged else files

    @classmethod
    def at(cls, paths: Sequence[Path]) -> Self:
        """Take files by their paths."""
        return cls(Files(paths))

    def __len__(self) -> int:
        return len(self.source.names if self.numbers is None else self.numbers)

    def name(self, number: int) -> str:
        """Return a picture's name for messages."""
        return self.source.name(number if self.numbers is None else self.numbers[number])

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Return (H, W) of the first picture, brought to size, or (T, H, W) of a clip. All pictures have this size."""
        return next(self._in_order()).shape[:-1]

    @property
    def account(self) -> dict[str, Any]:
        """Return what was read so far and what was skipped, see `account_of`."""
        frames = {FRAMES: list(self._with_frames)} if self._with_frames else {}
        return account_of(self.source, len(self), {**self.left_out, **frames}, self.resize)

    def without_damaged(self) -> Self:
        """Return the pictures that can be decoded. Raises InputError: none can."""
        found = check_contents(self.source)
        kept = [i for i, one in enumerate(found) if not one.problem]
        if not kept:
            raise InputError(f"{self.source.root}: all {len(found)} pictures are damaged, expected whole ones")
        damaged = [self.source.name(i) for i, one in enumerate(found) if one.problem]
        return replace(self, numbers=kept, left_out={DAMAGED: damaged} if damaged else {})

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Read the pictures in order, as uint8 (B, C, H, W). C is 3 if a picture of the batch has colour, else 1.

        Clips are (B, C, T, H, W).

        Raises:
            InputError: a picture is unreadable, or of another size than the first.
        """
        part: list[np.ndarray] = []
        for number, picture in enumerate(self._in_order()):
            part.append(self._fitting(number, picture))
            if len(part) == batch_size:
                yield _stacked(part)
                part = []
        if part:
            yield _stacked(part)

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read some pictures, as uint8 (B, C, H, W), or clips (B, C, T, H, W). Raises InputError as `batches`."""
        return _stacked([self._fitting(number, self._picture(number)) for number in numbers])

    def _in_order(self) -> Iterator[np.ndarray]:
        if self.numbers is not None:
            yield from map(self._picture, range(len(self)))
            return
        for number, contents in enumerate(self.source.in_order()):
            yield self._array(contents, number)

    def _picture(self, number: int) -> np.ndarray:
        within = number if self.numbers is None else self.numbers[number]
        return self._array(self.source.contents(within), number)

    def _array(self, contents: bytes | np.ndarray, number: int) -> np.ndarray:
        if self.resize is None and not isinstance(contents, bytes):
            return contents
        if not isinstance(contents, bytes) and contents.ndim == 4:
            return np.stack([self._array(frame, number) for frame in contents])
        image = _image(contents, self.name(number))
        if isinstance(contents, bytes) and has_frames(contents):
            self._with_frames[self.name(number)] = None
        if ENTRY in image.info:
            return self._array(cut(as_array(image), image.info[ENTRY], self.name(number)), number)
        return as_array(image if self.resize is None else self.resize(image))

    def _fitting(self, number: int, picture: np.ndarray) -> np.ndarray:
        if picture.shape[:-1] != self.size:
            found, expected = ("x".join(map(str, size)) for size in (picture.shape[:-1], self.size))
            raise InputError(
                f"{self.name(number)}: {found} pixels, expected {expected} as in {Path(self.name(0)).name}; "
                "--resize-and-crop SIZE brings pictures to one size"
            )
        return picture


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    channels = max(picture.shape[-1] for picture in pictures)
    shape = (*pictures[0].shape[:-1], channels)
    return as_nchw(np.stack([np.broadcast_to(picture, shape) for picture in pictures]))
