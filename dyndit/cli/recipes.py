"""Recipes: Python files that define `train`, `distill`, `experiment` or `quickstart`."""

import importlib
import pkgutil
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import dyndit.recipes as recipes
from dyndit.errors import InputError, did_you_mean, first_line, misspelt
from dyndit.recipes import studies

T = TypeVar("T")


def packaged() -> list[str]:
    """List the recipes that people run. Studies are found by their names too."""
    return list(_modules(recipes))


def modules() -> dict[str, str]:
    """Name every packaged recipe, studies included: "digits" -> "dyndit.recipes.digits"."""
    return _modules(recipes) | _modules(studies)


def quickstarts() -> dict[str, str]:
    """Name the recipes that define a `quickstart`, by family: "flow" -> "digits_flow"."""
    found = (name for name in packaged() if hasattr(importlib.import_module(modules()[name]), "quickstart"))
    return {name.removeprefix("digits_"): name for name in found}


def _modules(package: ModuleType) -> dict[str, str]:
    """Name the recipes of a package: "digits" -> "dyndit.recipes.digits"."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)
    return {name: f"{package.__name__}.{name}" for name in sorted(found)}


def check_name(recipe: str) -> None:
    """Refuse a recipe that is no name and no file. Raises InputError."""
    if recipe not in modules() and not Path(recipe).is_file():
        expected = f"a path, one of {', '.join(packaged())}, or a study of {studies.__name__}"
        raise InputError(f"recipe {recipe}: no such file; expected {expected}{did_you_mean(recipe, modules())}")


def find(recipe: str, attribute: str, kind: type[T]) -> T:
    """Return a recipe's `attribute`.  recipe: the name of a packaged recipe, or a path.

    Raises InputError: no such recipe, or its attribute is missing or of another kind.
    """
    check_name(recipe)
    if (module := modules().get(recipe)) is not None:
        found = getattr(importlib.import_module(module), attribute, None)
    else:
        # Run a path, do not import it: the file may lie anywhere. Its user trusts it as much as with `python FILE`, and
        # it may import what lies beside it.
        sys.path.insert(0, str(Path(recipe).resolve().parent))
        try:
            found = runpy.run_path(recipe, run_name="dyndit_recipe").get(attribute)
        except TypeError as error:
            if not (meant := misspelt(error)):
                raise
            raise InputError(f"recipe {recipe}: {first_line(error)}{meant}") from error
    if not isinstance(found, kind):
        raise InputError(f"recipe {recipe}: defines no `{attribute}`; expected a {kind.__name__}")
    return found
