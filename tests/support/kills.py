"""Processes that die without any cleaning up, at a moment of one's choice."""

import os
import sys
from collections.abc import Callable


def dies_at(moment: int, work: Callable[[], object]) -> bool:
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


def moments(work: Callable[[], object], num: int = 30) -> range:
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
