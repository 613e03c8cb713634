"""Errors a user can act on: one line that names the file or flag, what was found and what was expected."""


class InputError(ValueError):
    """Bad input: a file, flag or argument, what was found, and what was expected, in one line.

    The command line prints the message alone and exits with status 2. In Python: `except dyndit.InputError as error`.
    """


class CheckpointError(InputError):
    """A checkpoint, exit file or table that is missing, damaged, or belongs to another model."""


class PlanError(InputError):
    """A depth plan that is malformed, or does not fit the model, the solver or the step count."""


def first_line(error: Exception) -> str:
    """Cut another library's message to its first line, at most 120 printable characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0][:120] if c.isprintable())
