"""Keep a second writer out of a run's folder.

A writer holds a lock of the operating system on the file `.lock` in the folder, and removes the file at its end. The
lock of a killed process is gone at once; its file may stay and does no harm. The file names the holder.
"""

# pyright: reportOptionalMemberAccess=false
# Without fcntl there are no handles, and nothing of it is used.

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dyndit.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: no lock is taken
    fcntl = None

LOCK = ".lock"
"""Name of the file that a run's writer holds."""

_held: dict[Path, "Lock"] = {}
"""Locks of this process, by folder."""

CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems without locks."""


class Lock:
    """A held lock.  handle: the open file; None if the file system has no locks, or lets nobody write there."""

    def __init__(self, path: Path, handle: int | None):
        self.path, self.handle = path, handle

    def share(self) -> None:
        """Let other processes of the same run hold the folder too."""
        if self.handle is not None:
            fcntl.flock(self.handle, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the folder back, and remove the file unless another process shares it."""
        if self.handle is None:
            return
        with suppress(OSError):
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        os.close(self.handle)


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: float = 0.0) -> Iterator[Lock]:
    """Hold a folder, which is made if missing. A folder that was made and stays empty is removed at the end.

    The block of a process that holds the folder already runs at once.
    shared: hold it beside processes that called `Lock.share`; alone, if there are none. wait: seconds to try for.

    Raises:
        InputError: another process holds the folder. The message names this process.
    """
    folder = Path(folder)
    if (key := folder.resolve()) in _held:
        yield _held[key]
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / LOCK, None if fcntl is None else _taken(folder, shared, time.monotonic() + wait))
    except OSError:  # nobody can write here: what the block writes is refused with its own message
        lock = Lock(folder / LOCK, None)
    _held[key] = lock
    try:
        yield lock
    finally:
        if _held.pop(key, None) is not None:  # else this is a child that another process forked off meanwhile
            lock.release()
            with suppress(OSError):
                for path in made:
                    path.rmdir()


def _taken(folder: Path, shared: bool, deadline: float) -> int | None:
    """Return the open, locked file of a folder. None if the file system has no locks."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _locks(handle, shared):
                if _is_at(handle, path):  # else its last holder has just removed it
                    os.ftruncate(handle, 0)
                    with suppress(OSError):  # a full disk
                        os.pwrite(handle, _me().encode(), 0)
                    return handle
            elif time.monotonic() > deadline:
                holder = os.pread(handle, 400, 0).decode(errors="replace") or "another process"
                raise InputError(f"{folder}: in use by {holder}; expected a folder that nobody else writes to")
        except OSError as error:
            os.close(handle)
            if error.errno in CANNOT_LOCK:
                return None
            raise
        except InputError:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(0.02)


def _locks(handle: int, shared: bool) -> bool:
    """Take the lock: alone if possible, else, if `shared`, beside others. Return whether it was taken."""
    for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH) if shared else (fcntl.LOCK_EX,):
        with suppress(BlockingIOError):
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
    return False


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _me() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    text = f"process {os.getpid()} on {socket.gethostname()} ({command[:200]})"
    return "".join(c for c in text if c.isprintable())


def _forget() -> None:
    """Close the locks in a forked child: they are its parent's, and end with the parent."""
    for lock in _held.values():
        if lock.handle is not None:
            os.close(lock.handle)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
