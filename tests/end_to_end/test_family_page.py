"""docs/family.md is what its script makes of the published rows; and what it makes of the rows of tiny runs."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from dyndit.analysis import read_runs
from dyndit.analysis.compare import run as comparison
from dyndit.analysis.compare.experiment import GuidanceSweep, Inputs
from dyndit.analysis.compare.trainings import Trainings
from dyndit.analysis.compare.trainings import run as train_alike
from dyndit.analysis.report.verify import verify
from dyndit.calibration import samplers
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.dit import DiTConfig
from dyndit.recipes import digits
from dyndit.training.train import Train
from support.fences import ROOT
from support.tiny_verbs import fixed_cost

QUIET = Console(quiet=True)
TINY = DiTConfig(8, 4, 1, width=24, num_blocks=2, num_heads=2, num_classes=10)
FIT = replace(digits.train.fit, steps=2, batch_size=8)
TRAIN = Train(TINY, FIT, "digits")
ALIKE = Trainings(
    {name: replace(TRAIN, backbone=replace(TINY, conditioning=name)) for name in ("adaln-zero", "in-context")},
    *("digits", "digits"),
    seeds=(0, 1),
    steps=2,
    num_images=70,
    batch_size=70,
)
TINY_RUN = replace(
    digits.quickstart,
    train=TRAIN,
    distill=replace(digits.distill, fit=FIT),
    calibration=CalibrationSettings(num_pictures=70, num_bands=1, batch_size=70, num_depths=1),
    calibration_steps=2,
    guidance=GuidanceSweep(scales=(1.0, 1.5, 3.0), steps=2, exits=(1,)),
    full_steps=(1, 2),
    dynamic_steps=(2,),
    budgets=(0.9,),
    solvers=("ddim",),
    num_blocks=2,
    num_images=70,
    batch_size=70,
)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_page", ROOT / "docs/scripts/family.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def family() -> Iterator[ModuleType]:
    """The script. What it draws is not looked at here, and drawing takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _self, to, **_: getattr(to, "write_bytes", bytes)(b"drawn"))
        yield script()


@pytest.fixture(scope="module")
def runs(family: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny runs by the names that the script knows; some are missing. `family` is here because it draws nothing."""
    root = tmp_path_factory.mktemp("runs")
    train_alike(ALIKE, root / "conditioning-digits", console=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "measure_cost", fixed_cost)
        comparison.run(TINY_RUN, root / "flow", Inputs(from_scratch=True), QUIET)
    for name in ("ddpm", "guidance", "exits-adaln"):
        shutil.copytree(root / "flow", root / name)
    return root


@pytest.fixture(scope="module")
def published(family: ModuleType, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "results"
    family.publish(runs, folder)
    return folder


def test_the_page_is_what_the_script_makes_of_the_published_rows(family: ModuleType) -> None:
    text = (ROOT / "docs/family.md").read_text()
    assert text == family.Family().page(), "run `python docs/scripts/family.py`"
    assert [name for name in re.findall(r"\]\(([^)]+)\)", text) if not (ROOT / "docs" / name).is_file()] == []


def test_every_mark_and_every_run_is_known(family: ModuleType) -> None:
    marks = family.MARK.findall(family.TEXT.read_text())
    assert {name for _, name in marks if name} == family.COMMANDS.keys()
    assert all(hasattr(family.Family, part) for part, _ in marks)


def test_every_published_report_follows_from_its_rows() -> None:
    reports = ROOT.glob("docs/results/family/*/report.json")
    assert [line for report in sorted(reports) for line in verify(report)] == []


def test_what_is_published_verifies_and_is_small(published: Path) -> None:
    folders = {path.name for path in published.iterdir()}
    assert folders == {"conditioning-digits", "flow", "ddpm", "guidance", "exits-adaln", "processes"}
    assert [line for name in folders for line in verify(published / name)] == []
    kept = {path.suffix for path in published.rglob("*") if path.is_file()}
    assert kept == {".csv", ".json", ".md", ".png"}


def test_publishing_again_replaces_a_run_and_leaves_the_others(family: ModuleType, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "conditioning-digits", tmp_path / "runs" / "conditioning-digits")
    kept, there = tmp_path / "results" / "flow", tmp_path / "results" / "conditioning-digits"
    for folder in (kept, there):
        folder.mkdir(parents=True)
        (folder / "old.csv").write_text("old")
    family.publish(tmp_path / "runs", tmp_path / "results")
    assert (kept / "old.csv").exists()
    assert not (there / "old.csv").exists()
    assert (there / "runs.csv").read_bytes() == (runs / "conditioning-digits" / "runs.csv").read_bytes()


def test_partial_results_make_a_whole_page(family: ModuleType, published: Path, monkeypatch) -> None:
    monkeypatch.setattr(family, "MAIN_STEPS", 2)
    page = family.Family(published).page()
    lines = page.splitlines()
    assert not family.MARK.search(page)
    for name, command in family.COMMANDS.items():
        assert f"    {command}" in lines, name
    rows = read_runs(published / "flow")
    plan = rows[(rows["family"] == "searched")]
    (flow,) = [line for line in lines if line.startswith("| DiT, rectified flow |")]
    assert f"{plan['fd'].mean():.2f}" in flow
    assert "not yet measured" in next(line for line in lines if line.startswith("| video DiT |"))
    (context,) = [line for line in lines if line.startswith("| in-context |")]
    alike = read_runs(published / "conditioning-digits").pivot(index="block", columns="settings", values="fd")
    assert f"{alike['in-context'].mean():.2f}" in context
    assert f"{(alike['in-context'] - alike['adaln-zero']).mean():+.2f}" in context
    assert "not yet measured" in next(line for line in lines if line.startswith("| cross-attention |"))
    assert "a conditioning is missing" in page
    assert "under the flow, less DDPM's over the same seed blocks: +0.00" in page
    assert any(line.startswith("| own exit e1 |") for line in lines)
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert min(widths) > 3


def test_without_runs_nothing_is_claimed(family: ModuleType, tmp_path: Path) -> None:
    page = family.Family(tmp_path).page()
    assert page.count("Not yet measured.") == len(family.COMMANDS)
    assert not re.search(r"\d ± \d", page)
