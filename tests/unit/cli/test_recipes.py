"""Recipes by name: those that people run and the studies, each readable with one other recipe open at most."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from dyndit.analysis.compare.experiment import Experiment
from dyndit.cli.recipes import find, modules, packaged
from dyndit.errors import InputError
from dyndit.training.distill import Distill
from dyndit.training.train import Train

ROOT = Path(__file__).parents[3] / "recipes"
RUN = [
    *("cifar10", "cifar10_frontier", "cifar10_on", "digits", "digits_flow", "digits_frontier", "digits_peers"),
    *("finetune_exits", "mmdit", "my_checkpoint", "plain_accelerate_loop", "published", "video"),
]
KINDS = {"train": Train, "distill": Distill, "experiment": Experiment, "quickstart": Experiment}
SCRIPTS = {
    *("cifar10_backbones", "cifar10_classifier", "claim", "claim_classes", "claim_fitted", "claim_heads"),
    "conditioning",
    *("digits_classifier", "kid_coverage", "ladder", "moving_digits_classifier", "plain_accelerate_loop"),
}
"""Recipes that are run with `python -m`; the others define what the command line takes."""


def path(name: str) -> Path:
    return ROOT / f"{name}.py" if name in RUN else ROOT / "studies" / f"{name}.py"


def parents(name: str) -> set[str]:
    """Name the recipes that a recipe imports, anywhere in its text: "digits_peers" -> {"digits"}."""
    found = set()
    for node in ast.walk(ast.parse(path(name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {file.stem for file in ROOT.glob("**/*.py")} - {"__init__"}
    recipes = [full.removeprefix("dyndit.recipes.").split(".") for full in found if full.startswith("dyndit.recipes.")]
    return {next(part for part in parts if part in names) for parts in recipes}


def test_those_that_people_run_come_first() -> None:
    assert packaged() == RUN
    assert list(modules())[: len(RUN)] == RUN
    assert list(modules())[len(RUN) :] == sorted(
        file.stem for file in (ROOT / "studies").glob("*.py") if file.stem != "__init__"
    )


@pytest.mark.parametrize("name", modules())
def test_it_loads_and_is_found(name: str) -> None:
    module = importlib.import_module(f"dyndit.recipes.{'' if name in RUN else 'studies.'}{name}")
    defined = {attribute: kind for attribute, kind in KINDS.items() if isinstance(vars(module).get(attribute), kind)}
    assert bool(defined) != (name in SCRIPTS)
    for attribute, kind in defined.items():
        assert find(name, attribute, kind) is getattr(module, attribute)


@pytest.mark.parametrize("name", modules())
def test_it_is_readable_by_itself(name: str) -> None:
    """It imports at most one other recipe, one that people run, which has no parent itself."""
    assert len(parents(name)) <= 1
    assert parents(name) <= set(RUN)
    if name in RUN:
        assert not any(parents(parent) for parent in parents(name))


def test_parents_are_seen() -> None:
    assert parents("digits_peers") == {"digits"}
    assert parents("cifar10_frontier") == {"cifar10"}
    assert parents("cifar10_levers") == {"cifar10_frontier"}
    assert parents("kid_coverage") == set()


@pytest.mark.parametrize("name", modules())
def test_its_docstring_has_its_command(name: str) -> None:
    """An indented line of its own, so that it can be copied; a study also states its result and its cost."""
    command = (
        rf"python -m dyndit\.recipes\.(studies\.)?{name}"
        if name in SCRIPTS
        else rf"dyndit (?:train|distill|compare) {name}"
    )
    text = ast.get_docstring(ast.parse(path(name).read_text()))
    assert re.search(rf"^    {command}\b", text, re.M)
    if name not in RUN:
        assert re.search(r"\b(Measured|not yet measured)\b", text)
        assert re.search(r"\b(minutes|seconds|s of|days|not timed)\b", text)


def test_an_unknown_name_is_told_the_recipes_and_where_the_studies_are() -> None:
    with pytest.raises(InputError) as error:
        find("digits_leavers", "experiment", Experiment)
    assert all(name in str(error.value) for name in RUN)
    assert "dyndit.recipes.studies" in str(error.value)
    with pytest.raises(InputError, match="digits_levers: defines no `train`; expected a Train"):
        find("digits_levers", "train", Train)
