"""Read pictures from .npz and .npy files, a batch at a time: uint8 (N, H, W, C), (N, C, H, W) or (N, H, W).

Clips are (N, T, H, W, C).

Sizes are checked before anything is allocated. An array that is stored as it is, is mapped; a deflated array is read
in order, and kept in memory only if it is asked for out of order.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dyndit.errors import InputError, first_line
from dyndit.files import opened
from dyndit.pictures.sources import Source, stamp_of
from dyndit.untrusted import check_size

PICTURES = ("arr_0", "images", "samples", "pictures")
"""Names of arrays of pictures, the usual ones first. A lone array of another name is taken too."""
LABELS = ("arr_1", "labels", "label", "y")
MOST_IN_MEMORY = 16 << 30
"""Most bytes of a deflated array that is kept in memory."""
MOST_SMALL = 1 << 30
"""Most bytes of any other array, such as statistics."""
Header = tuple[tuple[int, ...], bool, np.dtype]


class Arrays(Source):
    """Pictures of an .npz file. Classes come from `arr_1`, `labels`, `label` or `y` if there is one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        headers = headers_of(path)
        self._stamp = stamp_of(path)
        four = [k for k, (shape, _, kind) in headers.items() if kind == np.uint8 and len(shape) in (3, 4, 5)]
        known = [k for k in PICTURES if k in headers] or (four if len(four) == 1 else [])
        if not known:
            found = ", ".join(headers) or "nothing"
            raise InputError(
                f"{path}: holds {found}, expected an array 'arr_0' or 'images', or statistics 'mu', 'sigma'"
            )
        self.key = known[0]
        shape, fortran, kind = headers[self.key]
        self._layout = _layout(shape)
        if kind != np.uint8 or not self._layout or fortran:
            rest = " in Fortran's order" * fortran
            raise InputError(
                f"{path}: {self.key} is {kind} {shape}{rest}, expected uint8 (N, H, W, 1 or 3) or (N, 1 or 3, H, W)"
            )
        self._shape = shape
        self._array: np.ndarray | None = None
        self.names = range(shape[0])
        self._label(headers)

    def name(self, number: int) -> str:
        """Return file, array and number."""
        return f"{self.root}: {self.key}[{number}]"

    def contents(self, number: int) -> np.ndarray:
        """Return a picture, uint8 (H, W, C), or a clip, (T, H, W, C)."""
        if self._array is None:
            self._array = self._whole()
        return self._seen(np.asarray(self._array[number]))

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return the file's size and times, and the picture's number."""
        return *self._stamp, number

    def in_order(self) -> Iterator[np.ndarray]:
        """Read the pictures one after the other, without keeping any."""
        if self._array is not None:
            yield from map(self.contents, range(len(self.names)))
            return
        size = math.prod(self._shape[1:])
        with _member(self.root, self.key) as file:
            _header(file)
            for number in range(len(self.names)):
                if len(data := file.read(size)) != size:
                    raise InputError(f"{self.name(number)}: cut short, expected a whole .npz file")
                yield self._seen(np.frombuffer(data, np.uint8).reshape(self._shape[1:]))

    def _seen(self, picture: np.ndarray) -> np.ndarray:
        if self._layout == "NTHWC":
            return picture
        return picture.transpose(1, 2, 0) if self._layout == "NCHW" else picture.reshape(*picture.shape[:2], -1)

    def _whole(self) -> np.ndarray:
        offset = _offset(self.root, self.key)
        if offset is not None:
            return np.memmap(self.root, np.uint8, "r", offset, self._shape)
        return read_array(self.root, self.key, MOST_IN_MEMORY)

    def _label(self, headers: dict[str, Header]) -> None:
        for key in LABELS:
            if key in headers and headers[key][0] == (len(self.names),) and headers[key][2].kind in "iu":
                labels = read_array(self.root, key)
                if labels.min() < 0 or labels.max() >= 1 << 20:
                    raise InputError(f"{self.root}: {key} holds {labels.min()} to {labels.max()}, expected classes")
                self.labels = labels.tolist()
                self.class_names = tuple(map(str, range(int(labels.max()) + 1)))
                return

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}


def headers_of(path: Path) -> dict[str, Header]:
    """Return shape, order and dtype of each array of an .npz or .npy file, without reading any.

    Raises InputError: unreadable, or an array declares other bytes than its file holds, or deflates beyond the limit.
    """
    with _reading(path), opened(path) as file:
        if path.suffix == ".npy":
            return {"arr_0": _checked(path, "arr_0", _header(file), path.stat().st_size - file.tell())}
        found = {}
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    archive.open(member).close()  # compares its name with that at its bytes
                else:
                    check_size(path, member.file_size, path.stat().st_size, streamed=True)
                    key = member.filename.removesuffix(".npy")
                    with archive.open(member) as inner:
                        header = _header(inner)
                        held = member.file_size - inner.tell()
                    found[key] = _checked(path, key, header, held)
        return found


def read_array(path: Path, key: str, most: int = MOST_SMALL) -> np.ndarray:
    """Read one array of an .npz or .npy file. Raises InputError: unreadable, over `most` bytes, or of objects."""
    with _reading(path), _member(path, key) as file:
        shape, fortran, kind = _header(file)
        if (size := math.prod(shape) * kind.itemsize) > most:
            raise InputError(f"{path}: {key} declares {size:,} bytes, expected at most {most:,}")
        check_size(path, size, path.stat().st_size)
        data = bytearray(size)
        view, read = memoryview(data), 0
        while (
            read < size
            and (
                part := file.readinto(  # pyright: ignore[reportAttributeAccessIssue]  files and members of archives have it
                    view[read : read + (1 << 24)]
                )
            )
        ):
            read += part
        if read != size or file.read(1):  # at an entry's end its checksum is compared
            raise InputError(f"{path}: {key} is cut short, expected a whole .npz file")
        return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # OSError, ValueError, BadZipFile, zlib.error, SyntaxError of a header, ...
        raise InputError(f"{path}: unreadable ({first_line(error)}), expected an .npz file of pictures") from error


@contextmanager
def _member(path: Path, key: str) -> Iterator[IO[bytes]]:
    with _reading(path), opened(path) as file:
        if path.suffix == ".npy":
            yield file
            return
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as inner:
            yield inner


def _header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _checked(path: Path, key: str, header: Header, held: int) -> Header:
    shape, _, kind = header
    if kind.hasobject:
        raise InputError(f"{path}: unreadable ({key} holds pickled objects), expected numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != held:
        raise InputError(f"{path}: {key} declares {shape} of {kind}, its file holds {held:,} bytes; expected it whole")
    return header


def _layout(shape: tuple[int, ...]) -> str:
    """Return "NHWC", "NCHW" or "NTHWC"; "" for a shape of no pictures. 1 or 3 channels last are seen first."""
    if len(shape) not in (3, 4, 5) or min(shape) < 1:
        return ""
    if len(shape) == 5:
        return "NTHWC" if shape[4] in (1, 3) else ""
    if len(shape) == 3 or shape[3] in (1, 3):
        return "NHWC"
    return "NCHW" if shape[1] in (1, 3) else ""


def _offset(path: Path, key: str) -> int | None:
    """Return where an array's levels begin in the file, if they lie there as they are."""
    if path.suffix == ".npy":
        with opened(path) as file:
            _header(file)
            return file.tell()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(member) as inner:
            _header(inner)
            header = inner.tell()
    with opened(path) as file:  # the local header repeats the name, and may hold other extra bytes
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra + header
