"""List pictures wherever they lie: folders here; archives, arrays and tables in the files beside.

A source lists what it skips, by reason, and never follows a loop. Names are relative and their order is fixed.
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyndit.errors import InputError
from dyndit.pictures.decode import MOST_BYTES, SUFFIXES, is_picture

OVERVIEWS = {"grid.png", "samples.png"}
"""Names of the overviews that `dyndit sample` and the reports write beside single pictures."""
BESIDES = {"manifest.json", "samples.npz"}
"""Other files that `dyndit sample` writes beside pictures."""
KINDS = "a folder of pictures, .zip, .tar (WebDataset), .npz, or a folder or .parquet of Hugging Face's datasets"

HIDDEN, FOREIGN, OVERVIEW = "hidden files", "files that are no pictures", "files that go with pictures"
LINKS, BROKEN = "links to folders, not followed", "links to nothing"


class Source(ABC):
    """Pictures in one place.

    names: one per picture, relative, unique. skipped: names passed over, by reason. labels, class_names: the classes
    that the source states; None: classes are the first folders of the names. folders: the first folders, empty ones
    too.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.names: Sequence[Any] = ()
        self.labels: list[int] | None = None
        self.class_names: tuple[str, ...] = ()
        self.folders: tuple[str, ...] = ()
        self.skipped: dict[str, list[str]] = {}

    def skip(self, reason: str, name: str) -> None:
        """Note a name that is passed over."""
        self.skipped.setdefault(reason, []).append(name)

    def name(self, number: int) -> str:
        """Return the name of a picture for messages."""
        return f"{self.root}: {self.names[number]}"

    @abstractmethod
    def contents(self, number: int) -> bytes | np.ndarray:
        """Return a picture's file, or its levels, uint8 (H, W, 1 or 3). Raises InputError."""

    @abstractmethod
    def stamp(self, number: int) -> tuple[int, ...]:
        """Return numbers that change when a picture's file is written again: sizes and times. Raises InputError."""

    def in_order(self) -> Iterator[bytes | np.ndarray]:
        """Yield the contents of all pictures in order."""
        return map(self.contents, range(len(self.names)))


def stamp_of(path: str | Path) -> tuple[int, ...]:
    """Return size, times and inode of a file. Raises InputError if it is gone."""
    try:
        found = os.stat(path)  # noqa: PTH116  strings: Path objects of a million files take 1 GB
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected the picture that was listed") from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Read a picture's file. Raises InputError if it cannot be read, is no regular file, or has over `most` bytes."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:  # noqa: PTH123  of a handle
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path}: no regular file, expected a whole picture")
            if found.st_size > most:
                raise InputError(f"{path}: {found.st_size:,} bytes, expected at most {most:,}")
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: unreadable ({error.strerror}), expected a whole picture") from error


class Files(Source):
    """Picture files at given paths."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(Path(paths[0]).parent if paths else Path())
        self.names = list(map(str, paths))

    def name(self, number: int) -> str:
        """Return a picture's path."""
        return self.names[number]

    def contents(self, number: int) -> bytes:
        """Read a picture's file."""
        return read_bytes(self.names[number])

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return size, times and inode of a picture's file."""
        return stamp_of(self.names[number])


class Folder(Source):
    """A folder, searched in depth.

    A linked folder is followed at the first level, as a class folder, unless it leads back. Deeper links to folders
    are skipped.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        entries = self._entries(root)
        beside = OVERVIEWS | _moving(entries)
        above = {root.resolve(), *root.resolve().parents}
        found: list[str] = []
        tops: list[str] = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                self.skip(HIDDEN, entry.name)
            elif (kind := _kind(entry)) == "folder":
                if entry.is_symlink() and Path(entry.path).resolve() in above:
                    self.skip(LINKS, entry.name)
                    continue
                tops.append(entry.name)
                found += sorted(self._below(entry.name))
            elif self._takes(kind, entry.name, overview=entry.name in beside):
                found.append(entry.name)
        self.folders = tuple(tops)
        self.names = sorted(name for name in found if "/" not in name) + [name for name in found if "/" in name]

    def path(self, number: int) -> str:
        """Return a picture's path."""
        return os.path.join(self.root, self.names[number])  # noqa: PTH118

    def name(self, number: int) -> str:
        """Return a picture's path."""
        return self.path(number)

    def contents(self, number: int) -> bytes:
        """Read a picture's file."""
        return read_bytes(self.path(number))

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return size, times and inode of a picture's file."""
        return stamp_of(self.path(number))

    def _entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed ({error.strerror}), expected a folder of pictures") from error

    def _below(self, top: str) -> Iterator[str]:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            entries = self._entries(self.root / folder)
            described = any(entry.name == "manifest.json" for entry in entries)
            beside = OVERVIEWS | _moving(entries)
            for entry in entries:
                name = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    self.skip(HIDDEN, name)
                elif (kind := _kind(entry)) == "folder":
                    if entry.is_symlink():
                        self.skip(LINKS, name)
                    else:
                        waiting.append(name)
                elif self._takes(kind, name, overview=described and entry.name in beside):
                    yield name

    def _takes(self, kind: str, name: str, *, overview: bool) -> bool:
        """Tell if an entry is a picture to read. Note it if not. Raises InputError for a FIFO, a socket, a device."""
        if overview or name.rpartition("/")[2] in BESIDES:
            self.skip(OVERVIEW, name)
        elif not is_picture(name):
            self.skip(FOREIGN, name)
        elif kind == "nothing":
            self.skip(BROKEN, name)
        elif kind != "file":
            raise InputError(f"{self.root / name}: no regular file, expected a picture (reading it might never end)")
        else:
            return True
        return False


def _moving(entries: Sequence[os.DirEntry[str]]) -> set[str]:
    """Name the GIF and MP4 files that `dyndit sample` writes beside the PNG files of clips."""
    names = {entry.name for entry in entries}
    if "manifest.json" not in names:
        return set()
    return {name for name in names if name.endswith((".gif", ".mp4")) and f"{name[:-4]}.png" in names}


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder", "file", "other" (a FIFO, a device), or "nothing" for a link to nothing or in a loop."""
    try:
        mode = entry.stat().st_mode if entry.is_symlink() else 0
    except OSError:
        return "nothing"
    if stat.S_ISDIR(mode) or (not mode and entry.is_dir()):
        return "folder"
    return "file" if stat.S_ISREG(mode) or (not mode and entry.is_file()) else "other"


def at_least_one(source: Source) -> Source:
    """Return a source that holds pictures. Raises InputError: there is none."""
    if not len(source.names):
        there = ", ".join(f"{len(names)} {reason}" for reason, names in source.skipped.items())
        known = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise InputError(f"{source.root}: no picture found{f' ({there})' * bool(there)}, expected {known} files")
    return source
