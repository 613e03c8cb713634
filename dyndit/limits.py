"""Limits of this process on what strangers' files may take. `--max-gib` sets them on the command line."""

import os
from dataclasses import dataclass

from dyndit import bounds
from dyndit.errors import InputError

_GIB = 1 << 30


@dataclass
class Limits:
    """Limits of this process.  gib: GiB that one file may take; None: three quarters of the machine's memory."""

    gib: float | None = None

    @property
    def memory(self) -> int:
        """Return the bytes that one file may take."""
        if self.gib is not None:
            return int(self.gib * _GIB)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


LIMITS = Limits()


def take_limits(arguments: list[str]) -> None:
    """Take `--max-gib N` out of the command line, and set it. Raises InputError: N is no such number."""
    if "--max-gib" in arguments:
        at = arguments.index("--max-gib")
        text = arguments[at + 1] if at + 1 < len(arguments) else ""
        try:
            bounds.check(max_gib=float(text))
        except ValueError as error:
            raise InputError(f"--max-gib {text}: expected a number above 0") from error
        LIMITS.gib = float(text)
        del arguments[at : at + 2]
