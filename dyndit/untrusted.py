"""Read files of strangers within bounds: sizes are checked before memory is taken, and pickles in a child process.

`--max-gib` (in Python `limits.LIMITS.gib`) says how much memory one file may take. Without it, a file may take three
quarters of the machine's memory, and an archive of more than 256 MiB may not hold more than 100 times its own size.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dyndit.errors import CheckpointError
from dyndit.files import opened
from dyndit.limits import LIMITS

_GIB = 1 << 30
_FREE, _RATIO = 256 << 20, 100


def check_size(path: Path, num_bytes: int, stored: int, *, streamed: bool = False) -> None:
    """Refuse content that would take more memory than the limit.  stored: bytes of it in the file.

    streamed: it never lies in memory whole, so its size alone is no reason.

    Raises:
        CheckpointError: too large.
    """
    most = math.inf if streamed else LIMITS.memory
    if LIMITS.gib is None and num_bytes > _FREE:
        most = min(most, _RATIO * stored)
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


@contextmanager
def _child_limits(num_bytes: int) -> Iterator[None]:
    import resource  # Unix alone

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))
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
