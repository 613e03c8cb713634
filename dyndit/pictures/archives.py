"""Read pictures from archives: .zip, and .tar as WebDataset makes them. Nothing is ever extracted."""

import json
import os
import tarfile
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dyndit.errors import InputError, first_line
from dyndit.files import MOST_JSON
from dyndit.pictures.decode import MOST_BYTES, is_picture
from dyndit.pictures.sources import BROKEN, FOREIGN, HIDDEN, OVERVIEW, OVERVIEWS, Source, stamp_of

BLOCK, MOST_PADDING = 512, 1 << 20
LABELS = "dataset.json"
"""File in the zips of StyleGAN and EDM: {"labels": [["00000/img00000000.png", 6], ...]}."""


class Zip(Source):
    """A .zip of pictures: class folders, one flat folder, or names and labels in a `dataset.json`.

    A folder that holds all others is passed: cifar10/cat/1.png is of class cat.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive: zipfile.ZipFile | None = None
        self._pid = -1
        self._stamp = stamp_of(path)
        members: dict[str, zipfile.ZipInfo] = {}
        given: dict[str, int] = {}
        for member in self._open().infolist():
            if member.is_dir():
                continue
            if member.filename in members:
                raise InputError(f"{path}: {member.filename} stands twice, expected every name once")
            if PurePosixPath(member.filename).name == LABELS:
                given = self._labels(member)
            elif _passes(self, member.filename):
                members[member.filename] = self._checked(member)
        base = _common_folder(members)
        self.names = _in_class_order([name.removeprefix(base) for name in members])
        self._members = [members[base + name] for name in self.names]
        if given:
            self._set_labels(given, base)

    def contents(self, number: int) -> bytes:
        """Read a picture's file."""
        return self._read(self._members[number])

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return the archive's size and times, and the picture's checksum in it."""
        return *self._stamp, self._members[number].CRC

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._pid != os.getpid():  # a fork shares the place in the file
            try:
                self._archive, self._pid = zipfile.ZipFile(self.root), os.getpid()
            except (OSError, zipfile.BadZipFile, ValueError) as error:
                raise InputError(f"{self.root}: unreadable ({first_line(error)}), expected a whole .zip") from error
        return self._archive

    def _checked(self, member: zipfile.ZipInfo) -> zipfile.ZipInfo:
        if member.flag_bits & 1:
            raise InputError(f"{self.root}: {member.filename} is encrypted, expected a .zip without a password")
        if member.file_size > MOST_BYTES:
            raise InputError(
                f"{self.root}: {member.filename} declares {member.file_size:,} bytes, at most {MOST_BYTES:,}"
            )
        return member

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        try:
            with self._open().open(member) as file:
                return file.read(member.file_size)
        except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self.root}: {member.filename}: unreadable ({first_line(error)}), expected a whole picture"
            ) from error
        except Exception as error:  # zlib.error, lzma.LZMAError
            raise InputError(f"{self.root}: {member.filename}: unreadable ({first_line(error)})") from error

    def _labels(self, member: zipfile.ZipInfo) -> dict[str, int]:
        where = f"{self.root}: {member.filename}"
        if member.file_size > MOST_JSON * 4:
            raise InputError(f"{where} declares {member.file_size:,} bytes, expected a list of labels")
        try:
            found = json.loads(self._read(member)).get("labels")
            return {} if found is None else {str(name): int(label) for name, label in found}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: no labels ({first_line(error)}), expected [name, label] pairs") from error

    def _set_labels(self, given: dict[str, int], base: str) -> None:
        for name in self.names:
            if name not in given and base + name not in given:
                raise InputError(f"{self.root}: {LABELS} has no label of {name}, expected one of every picture")
        labels = [given[name] if name in given else given[base + name] for name in self.names]
        self.labels, self.class_names = labels, _numbered(labels, f"{self.root}: {LABELS}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}  # a worker process opens the file itself


class Tars(Source):
    """Shards of WebDataset: plain .tar files. A picture's class is the number in its `.cls`, else its folder."""

    def __init__(self, shards: Sequence[Path]) -> None:
        super().__init__(shards[0] if len(shards) == 1 else shards[0].parent)
        self._shards = [(str(path), stamp_of(path)) for path in shards]
        found: dict[str, tuple[int, int, int]] = {}
        classes: dict[str, int] = {}
        for number, path in enumerate(shards):
            for member in self._members(path):
                name = f"{path.name}/{member.name}" if len(shards) > 1 else member.name
                place = (number, member.offset_data, member.size)
                if member.name.endswith(".cls"):
                    classes[_key(name)] = self._class(name, place)
                elif _passes(self, name):
                    if name in found:
                        raise InputError(f"{path}: {member.name} stands twice, expected every name once")
                    found[name] = place
        base, order = "", list(found)
        if not classes and len(shards) == 1:
            base = _common_folder(found)
            order = [base + name for name in _in_class_order([name.removeprefix(base) for name in found])]
        self.names, self._places = [name.removeprefix(base) for name in order], [found[name] for name in order]
        if classes:
            for name in self.names:
                if _key(name) not in classes:
                    raise InputError(f"{self.root}: {name} has no .cls beside it, expected one of every picture")
            self.labels = [classes[_key(name)] for name in self.names]
            self.class_names = _numbered(self.labels, f"{self.root}: .cls")
        elif len(shards) > 1:
            self._label_by_folders()

    def contents(self, number: int) -> bytes:
        """Read a picture's file."""
        return self._read(self._places[number], self.names[number])

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return the shard's size and times, and the picture's place in it."""
        shard, *place = self._places[number]
        return *self._shards[shard][1], *place

    def _label_by_folders(self) -> None:
        """Take the folders within the shards as classes: a name begins with its shard."""
        folders = [name.split("/", 1)[1].rpartition("/")[0].split("/")[0] for name in self.names]
        self.class_names = tuple(sorted(set(folders)))
        self.labels = [self.class_names.index(folder) for folder in folders]
        if self.class_names == ("",):
            self.class_names = (self.root.name,)

    def _members(self, path: Path) -> list[tarfile.TarInfo]:
        try:
            with tarfile.open(path, "r:") as archive:
                members = archive.getmembers()
        except (OSError, tarfile.TarError, EOFError) as error:
            raise InputError(
                f"{path}: unreadable ({first_line(error)}), expected a whole .tar without compression"
            ) from error
        self._check_end(path, members)
        for member in members:
            if not (member.isreg() or member.isdir()) or member.issparse():
                self.skip(BROKEN if member.issym() or member.islnk() else FOREIGN, member.name)
        return [member for member in members if member.isreg() and not member.issparse()]

    def _check_end(self, path: Path, members: Sequence[tarfile.TarInfo]) -> None:
        """Refuse an archive without its end, or with others behind it: tarfile would lose pictures without a word."""
        end = max((m.offset_data + (-(-m.size // BLOCK) * BLOCK if m.isreg() else 0) for m in members), default=0)
        with path.open("rb") as file:
            file.seek(end)
            first, rest = file.read(BLOCK), file.read(MOST_PADDING + 1)
        if first != bytes(BLOCK):
            raise InputError(f"{path}: cut short, expected a whole .tar")
        if rest.strip(b"\0") or len(rest) > MOST_PADDING:
            raise InputError(f"{path}: holds more behind its end, expected one .tar and not several joined")

    def _read(self, place: tuple[int, int, int], name: str) -> bytes:
        shard, offset, size = place
        path = self._shards[shard][0]
        if size > MOST_BYTES:
            raise InputError(f"{path}: {name} declares {size:,} bytes, expected at most {MOST_BYTES:,}")
        try:
            with open(path, "rb") as file:  # noqa: PTH123  strings: a million files
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InputError(f"{path}: unreadable ({error.strerror}), expected a whole .tar") from error
        if len(data) != size:
            raise InputError(f"{path}: {name}: {len(data):,} of {size:,} bytes, expected a whole .tar")
        return data

    def _class(self, name: str, place: tuple[int, int, int]) -> int:
        if place[2] > 64 or not (text := self._read(place, name).decode("ascii", "replace").strip()).isdecimal():
            raise InputError(f"{self.root}: {name} holds no class, expected a number")
        return int(text)


def _passes(source: Source, name: str) -> bool:
    """Tell if a member is a picture. Note it if not."""
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        source.skip(HIDDEN, name)
    elif not is_picture(name):
        source.skip(FOREIGN, name)
    elif len(parts) == 1 and name in OVERVIEWS:
        source.skip(OVERVIEW, name)
    else:
        return True
    return False


def _common_folder(names: Collection[str]) -> str:
    """Return the leading folders that hold nothing but one other level of folders: "cifar10/"."""
    base = ""
    while True:
        rest = [name[len(base) :].split("/") for name in names]
        if not rest or len({parts[0] for parts in rest}) > 1 or min(map(len, rest)) < 3:
            return base
        base += rest[0][0] + "/"


def _in_class_order(names: Sequence[str]) -> list[str]:
    """Sort names as those of a folder are: loose pictures first, then folder by folder."""
    return sorted(names, key=lambda name: ("/" in name, name.split("/", 1)[0] if "/" in name else "", name))


def _key(name: str) -> str:
    """Return a member's key as WebDataset does: up to the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.', 1)[0]}"


def _numbered(labels: Sequence[int], where: str) -> tuple[str, ...]:
    """Name classes by their numbers, 0 to the largest. Raises InputError for numbers that no class can have."""
    if min(labels) < 0 or max(labels) >= 1 << 20:
        raise InputError(f"{where}: classes {min(labels)} to {max(labels)}, expected 0 or more")
    return tuple(map(str, range(max(labels) + 1)))
