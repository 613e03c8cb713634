"""Errors a user can act on: one line that names the file or flag, what was found and what was expected."""

import re
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

LONGEST = 1_500
"""Most characters of a message."""


class InputError(ValueError):
    """Bad input: a file, flag or argument, what was found, and what was expected, in one line.

    The command line prints the message alone and exits with status 2. In Python: `except dyndit.InputError as error`.
    What a file says may be part of a message: characters that are not printable, such as line breaks and escape
    sequences, are escaped, and the message ends after `LONGEST` characters.
    """

    def __str__(self) -> str:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
        return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


class CheckpointError(InputError):
    """A checkpoint, exit file or table that is missing, damaged, or belongs to another model."""


class PlanError(InputError):
    """A depth plan that is malformed, or does not fit the model, the solver or the step count."""


def expected_one_of(given: object, names: Iterable[object]) -> str:
    """Name what was expected, and what was perhaps meant: "expected one of ddim, unipc; did you mean unipc?"."""
    known = [str(name) for name in names]
    return f"expected one of {', '.join(known)}{did_you_mean(given, known)}"


def did_you_mean(given: object, names: Iterable[object]) -> str:
    """Return "; did you mean NAME?" if a name is much like the given one, else nothing. Capitals do not count."""
    known = {str(name).lower(): str(name) for name in names}
    close = get_close_matches(str(given).lower()[:100], known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else ""


def misspelt(error: TypeError) -> str:
    """Return "; did you mean NAME?" if a dataclass of this package got a keyword much like one of its fields."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return ""
    places = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "dyndit"]
    kinds = [kind for module in places if is_dataclass(kind := getattr(module, found[1], None))]
    return did_you_mean(found[2], [field.name for field in fields(kinds[0])]) if kinds else ""


def first_line(error: Exception) -> str:
    """Cut another library's message to its first line, at most 120 printable characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0][:120] if c.isprintable())
