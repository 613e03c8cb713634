"""Recipes: Python files that define `train`, `distill`, `experiment` or `quickstart`."""

import importlib
import pkgutil
import runpy
from pathlib import Path
from typing import TypeVar

from dyndit import recipes
from dyndit.errors import InputError

T = TypeVar("T")


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def find(recipe: str, attribute: str, kind: type[T]) -> T:
    """What a recipe defines under `attribute`. `recipe`: the name of a packaged one, or a path.

    Raises:
        InputError: no such recipe, or it defines nothing of the kind.
    """
    if recipe in packaged():
        found = getattr(importlib.import_module(f"dyndit.recipes.{recipe}"), attribute, None)
    elif Path(recipe).is_file():
        # A path is run, not imported: the file may lie anywhere. `python FILE` is what its user trusts it with too.
        found = runpy.run_path(recipe, run_name="dyndit_recipe").get(attribute)
    else:
        raise InputError(f"recipe {recipe}: no such file; expected a path or one of {', '.join(packaged())}")
    if not isinstance(found, kind):
        raise InputError(f"recipe {recipe}: defines no `{attribute}`; expected a {kind.__name__}")
    return found
