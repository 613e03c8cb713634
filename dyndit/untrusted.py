"""Read files of strangers within bounds: sizes are checked before memory is taken, and pickles in a child process.

`--max-gib` (in Python `limits.LIMITS.gib`) says how much memory one file may take. Without it, a file may take three
quarters of the machine's memory, and an archive of more than 256 MiB may not hold more than 100 times its own size.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.files import opened
from dyndit.limits import LIMITS

_GIB = 1 << 30
_FREE, _RATIO = 256 << 20, 100


def check_size(path: Path, num_bytes: int, stored: int) -> None:
    """Refuse content that would take more memory than the limit.  stored: bytes of it in the file.

    Raises:
        CheckpointError: too large.
    """
    most = LIMITS.memory if LIMITS.gib is not None or num_bytes <= _FREE else min(LIMITS.memory, _RATIO * stored)
    if num_bytes > most:
        raise CheckpointError(
            f"{path}: declares {num_bytes / _GIB:.3g} GiB in {stored / _GIB:.3g} GiB, expected at most "
            f"{most / _GIB:.3g} GiB; --max-gib allows more"
        )


def check_archive(path: Path) -> None:
    """Refuse a zip archive that would take more memory than the limit. Files that are no zip pass.

    Raises:
        CheckpointError: too large.
        OSError: it cannot be read.
    """
    with opened(path) as file:
        if not zipfile.is_zipfile(file):
            return
        try:
            with zipfile.ZipFile(file) as archive:
                declared = sum(entry.file_size for entry in archive.infolist())
        except Exception:  # a damaged directory is met, and named, by the reader
            return
        check_size(path, declared, os.fstat(file.fileno()).st_size)


def read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read the wanted arrays of an .npz file -> the arrays, and the names of all arrays in it. Nothing is unpickled.

    Raises:
        InputError: unreadable, damaged, larger than the limit, or an array of objects.
    """
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            check_size(path, sum(entries[n].file_size for n in wanted if n in entries), os.fstat(file.fileno()).st_size)
            arrays = {n: _array(path, archive, entries[n]) for n in wanted if n in entries}
            return arrays, tuple(entries)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path}: larger than the memory; expected a smaller file") from error
    except Exception as error:  # a damaged directory can name any compression, size or text
        found = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: unreadable ({found}), expected an .npz file of pictures") from error


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read(member)
        if dtype.hasobject:
            raise InputError(f"{path}: unreadable ({entry.filename} holds Python objects), expected numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != entry.file_size - member.tell():
            raise InputError(f"{path}: {entry.filename} declares {shape} of {dtype}, but holds {entry.file_size} bytes")
        array = np.empty(math.prod(shape), dtype)
        rest = memoryview(array).cast("B") if array.nbytes else memoryview(b"")
        while rest and (num := member.readinto(rest)):
            rest = rest[num:]
        if rest or member.read(1):  # at its end the checksum is compared
            raise InputError(f"{path}: {entry.filename} is cut off; expected it whole")
        return array.reshape(shape, order="F" if in_columns else "C")


@contextmanager
def _child_limits(num_bytes: int) -> Iterator[None]:
    import resource  # Unix alone

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    yield


def tried_in_child(path: Path, read: Callable[[], object], num_bytes: int) -> None:
    """Read a file in a child process first, with a limit on its memory, and forget what it read.

    A file that takes more than `num_bytes`, or that ends the process, ends the child alone. An error that `read` raises
    in the child is left to the caller's own reading. Only Linux can limit a child's memory; elsewhere nothing is tried.

    Raises:
        CheckpointError: the child ran out of memory or died.
    """
    if not Path("/proc/self/statm").exists():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of threads: the child only reads and leaves
        child = os.fork()
    if child == 0:
        status = 1
        try:
            with _child_limits(num_bytes):
                read()
            status = 0
        except (MemoryError, RuntimeError) as error:
            status = 2 if isinstance(error, MemoryError) or "memory" in str(error) else 0
        except Exception:  # the caller meets it, and names it
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if ended:
        code = os.waitstatus_to_exitcode(ended)
        found = f"takes more than {num_bytes / _GIB:.3g} GiB" if code == 2 else f"ends its reader ({code})"
        raise CheckpointError(f"{path}: {found}; expected a checkpoint, or --max-gib for a larger one")
