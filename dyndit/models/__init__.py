"""Backbones, exits and the model that runs them. A new family is one file here, found by itself."""

import importlib
import pkgutil
from functools import cache

from dyndit.models.base import Backbone


@cache
def families() -> dict[str, type[Backbone]]:
    """Every backbone of this package, by the name that `config.json` records."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = Backbone.__subclasses__()
    return {kind.family: kind for kind in found if kind.__module__.startswith(f"{__name__}.")}
