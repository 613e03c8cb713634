"""`dyndit train --conditioning NAME`: the four ways to condition on the command line, and what cannot hold them."""

from pathlib import Path

import pytest

import dyndit
from dyndit.cli import main
from dyndit.models.conditioning import CONDITIONINGS

RECIPE = """
from dyndit.models.dit import DiTConfig
from dyndit.training.config import FitConfig
from dyndit.training.train import Train

train = Train(DiTConfig(8, 4, 1, width=24, num_blocks=3, num_heads=2, num_classes=10), FitConfig(2, 4), data="digits")
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return str(tmp_path / "recipe.py")


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_each_is_trained_stored_and_sampled(name: str, recipe: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    main(["train", recipe, "--conditioning", name, "--out", str(out)])
    assert dyndit.load(out).backbone.config()["conditioning"] == name
    main(["sample", str(out), "--num-images", "2", "--steps", "2", "--out", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 2
    capsys.readouterr()
    for to in ("official", "diffusers"):
        target = tmp_path / to
        if name == "adaln-zero":
            main(["convert", str(out), str(target), "--to", to])
        else:
            assert name in refused(capsys, "convert", str(out), str(target), "--to", to)
            assert not target.exists()


def test_another_conditioning_is_another_run(recipe: str, tmp_path: Path, capsys) -> None:
    main(["train", recipe, "--conditioning", "adaln", "--out", str(tmp_path / "model")])
    capsys.readouterr()
    line = refused(capsys, "train", recipe, "--conditioning", "in-context", "--out", str(tmp_path / "model"))
    assert "holds another run (conditioning 'adaln', now 'in-context')" in line


def test_an_unknown_name_is_refused_in_one_line(recipe: str, tmp_path: Path, capsys) -> None:
    line = refused(capsys, "train", recipe, "--conditioning", "film", "--out", str(tmp_path / "model"))
    assert line == "dyndit: conditioning 'film': expected one of in-context, cross-attention, adaln, adaln-zero"
    assert not (tmp_path / "model").exists()
