"""Backbones, exits and the model that runs them. To add a family, add one file here; `families()` finds it."""

from functools import cache

from dyndit.discovery import subclasses_in
from dyndit.models.base import Backbone


@cache
def families() -> dict[str, type[Backbone]]:
    """Return every backbone class of this package, keyed by its name in `config.json`."""
    return {kind.family: kind for kind in subclasses_in(__name__, __path__, Backbone)}
