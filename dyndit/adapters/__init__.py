"""Adapters over diffusers transformers. A new family: one file here, found by itself.

Each cuts a transformer of diffusers into embed, blocks and head without changing it, so that exits, plans and
everything built on them work on it in place.
"""

import importlib
import pkgutil
from functools import cache

from torch import nn

from dyndit.adapters.base import Adapter
from dyndit.errors import InputError

__all__ = ["Adapter", "adapt", "adapters"]


@cache
def adapters() -> dict[str, type[Adapter]]:
    """Every adapter of this package, by the name of the diffusers class it serves."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {adapter.serves: adapter for adapter in Adapter.__subclasses__()}


def adapt(transformer: nn.Module) -> Adapter:
    """The adapter over this very transformer: same modules, nothing copied.

    Raises:
        InputError: no adapter serves its class.
    """
    known = adapters()
    for base in type(transformer).__mro__:
        if base.__name__ in known:
            return known[base.__name__](transformer)
    raise InputError(f"transformer {type(transformer).__name__}: expected one of {', '.join(sorted(known))}")
