"""The model of one's own that docs/how-to/my-own-model.md wraps."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyndit.models import registry
from support.fences import written

OWN_MODEL = "docs/how-to/my-own-model.md"
MODULE = "my_dit"


@contextmanager
def forgotten() -> Iterator[None]:
    """Register nothing, trust nothing and import no `my_dit` at first; forget all of it at the end."""
    registered, trusted, path = dict(registry._REGISTERED), set(registry._TRUSTED), list(sys.path)
    forget()
    try:
        yield
    finally:
        forget()
        registry._REGISTERED.update(registered)
        registry._TRUSTED.update(trusted)
        sys.path[:] = path


def forget() -> None:
    """Be as a new process, which knows no model of anybody's own."""
    registry._REGISTERED.clear()
    registry._TRUSTED.clear()
    sys.modules.pop(MODULE, None)


def write_own(folder: Path) -> Path:
    """Write the page's `my_dit.py` into a folder -> the file."""
    written(OWN_MODEL, folder)
    return folder / f"{MODULE}.py"
