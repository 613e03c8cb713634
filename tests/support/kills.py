"""Processes that die without any cleaning up, at a moment of one's choice; disks that fill."""

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dyndit import files

Work = Callable[[], object]


def dies_at(moment: int, work: Work) -> bool:
    """Do the work in a child that dies at its so-and-so-many-th call of a function; whether it did."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal left
            if event in ("call", "c_call"):
                left -= 1
                if left < 0:
                    os._exit(9)

        try:
            sys.setprofile(count)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def moments(work: Work, num: int = 30) -> range:
    """About `num` moments, evenly spread over the calls that a piece of work makes; it is done once to count them."""
    total = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal total
        total += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return range(0, total, max(1, total // num))


class Crash(BaseException):
    """The process is dead: nothing that it does reaches the disk any more."""


@contextmanager
def changes(react: Callable[[int, str, Path], None]) -> Iterator[None]:
    """Call `react(number, act, path)` before each change that the block makes on the disk: see `files.reached`."""
    numbers = iter(range(1 << 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "reached", lambda act, path: react(next(numbers), act, path))
        yield


def changes_of(name: str, work: Work) -> list[int]:
    """Return at which of its changes of the disk a piece of work touches a file of this name."""
    found: list[int] = []
    with changes(lambda number, act, path: found.append(number) if path.name.startswith(name) else None):
        work()
    return found


def num_changes(work: Work, acts: list[str] | None = None) -> int:
    """Count the changes that a piece of work makes on the disk, and note them in `acts`."""
    acts = [] if acts is None else acts
    with changes(lambda number, act, path: acts.append(act)):
        work()
    assert {"make", "write", "flush", "rename"} <= set(acts)
    return len(acts)


def crashes_at(moment: int, work: Work) -> bool:
    """Do the work until its so-and-so-many-th change of the disk, and crash there; whether it did.

    A file that was written and not yet flushed is torn, as after a power cut.
    """

    def react(number: int, act: str, path: Path) -> None:
        if number == moment and act == "flush" and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        if number >= moment:
            raise Crash

    try:
        with changes(react):
            work()
    except Crash:
        return True
    return False


def fills_at(moment: int, work: Work, number: int = errno.ENOSPC) -> Exception | None:
    """Do the work on a disk that is full from its so-and-so-many-th change on; the error it ends with, if any.

    number: of the error that every change then meets.
    """

    def react(change: int, act: str, path: Path) -> None:
        if change >= moment and act != "remove":
            raise OSError(number, os.strerror(number), str(path))

    try:
        with changes(react):
            work()
    except Exception as error:
        return error
    return None


def killed_at_random(work: Work, within: float, chance: random.Random) -> bool:
    """Do the work in a process that SIGKILL ends within so many seconds; whether it was killed before its end."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
        finally:
            os._exit(0)
    time.sleep(chance.uniform(0, within))
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
