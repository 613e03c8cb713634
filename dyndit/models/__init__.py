"""Backbones, exits and the model that runs them. To add a family, add one file here; `families()` finds it."""

import importlib
import pkgutil
from functools import cache

from dyndit.models.base import Backbone


@cache
def families() -> dict[str, type[Backbone]]:
    """Return every backbone class of this package, keyed by its name in `config.json`."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = Backbone.__subclasses__()
    return {kind.family: kind for kind in found if kind.__module__.startswith(f"{__name__}.")}
