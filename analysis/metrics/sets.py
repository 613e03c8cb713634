"""Read sets of pictures, also of `dyndit sample`, and statistics that stand for a set."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dyndit.analysis.metrics.statistics import Statistics, has_statistics, read_statistics, save_statistics
from dyndit.errors import InputError
from dyndit.pictures.arrays import PICTURES, headers_of
from dyndit.pictures.collection import PictureFiles
from dyndit.pictures.resize import Resize

__all__ = ["PictureSet", "Statistics", "read_pictures", "read_set", "save_statistics"]


class Batches(Protocol):
    """Pictures that are read batch by batch: `PictureFiles`, or `Pictures` to train on."""

    size: tuple[int, ...]

    def __len__(self) -> int: ...

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Yield the pictures in order, uint8 (B, 1 or 3, H, W)."""


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Pictures, or statistics of their features, or both.  name: for messages.

    source: uint8 (N, C, H, W), or pictures that are read batch by batch.
    """

    name: str
    source: Tensor | Batches | None = None
    statistics: Statistics | None = None

    @cached_property
    def pictures(self) -> Tensor | None:
        """Return all pictures in memory, uint8 (N, C, H, W)."""
        if self.source is None or isinstance(self.source, Tensor):
            return self.source
        parts = list(self.source.batches())
        channels = max(part.shape[1] for part in parts)
        return torch.cat([part.expand(-1, channels, *part.shape[2:]) for part in parts])

    @property
    def size(self) -> tuple[int, ...]:
        """Return the pictures' size, (H, W), or (T, H, W) of clips."""
        return tuple(self.source.shape[2:]) if isinstance(self.source, Tensor) else tuple(self.source.size)

    @property
    def account(self) -> dict[str, object]:
        """Return what was read and what was skipped; empty for pictures in memory."""
        return dict(getattr(self.source, "account", {}))

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Yield the pictures in order, uint8 (B, 1 or 3, H, W). Files are read one batch at a time."""
        if isinstance(self.source, Tensor):
            return iter(self.source.split(batch_size))
        return self.source.batches(batch_size)


def read_set(
    source: Path | Tensor | Batches, name: str, resize: Resize | None = None, *, skip_damaged: bool = False
) -> PictureSet:
    """Open pictures or statistics by their path, or wrap a tensor or `Batches`.

    resize: how pictures on disk come to one size. skip_damaged: leave damaged pictures out. Raises InputError as
    `read_pictures`.
    """
    if not isinstance(source, str | Path):
        return PictureSet(name, source)
    path = Path(source)
    statistics = read_statistics(path) if has_statistics(path) else None
    if statistics is not None and not _has_pictures(path):
        return PictureSet(str(path), None, statistics)
    return PictureSet(str(path), PictureFiles.of(path, resize, skip_damaged=skip_damaged), statistics)


def read_pictures(path: Path) -> Tensor:
    """Return the pictures of any place that `dyndit.pictures.collection.open_source` opens: uint8 (N, C, H, W).

    Clips are uint8 (N, C, T, H, W). Overview pictures (grid.png, samples.png) are skipped. Raises InputError: missing,
    unreadable, or of different sizes.
    """
    found = read_set(path, "").pictures
    if found is None:
        raise InputError(f"{path}: holds statistics, expected pictures, an array 'arr_0' or 'images'")
    return found


def _has_pictures(path: Path) -> bool:
    return path.suffix == ".npz" and bool(set(PICTURES) & headers_of(path).keys())
