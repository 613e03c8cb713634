"""Errors a user can act on: one line that names the file or flag, what was found and what was expected."""


class InputError(ValueError):
    """Bad input. The command line prints the message alone and exits with status 2."""


class CheckpointError(InputError):
    """A checkpoint, exit file or table that is missing, damaged, or belongs to another model."""


class PlanError(InputError):
    """A depth plan that is malformed, or does not fit the model, the solver or the step count."""
