"""Several independent calibrations in one comparison: seeds, folders, arms and rows of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import dyndit
from dyndit.analysis import read_runs, verify
from dyndit.analysis.compare import run as comparison
from dyndit.analysis.compare.arms import Arm
from dyndit.analysis.compare.experiment import Experiment, Inputs
from dyndit.cli.recipes import find
from dyndit.plans.plan import DepthPlan
from dyndit.plans.table import ShiftTable
from dyndit.training.distill import Distill
from support.tiny_verbs import RECIPE, fixed_cost

PLAN = DepthPlan.full((999, 499), 2, "ddim", 1.5)


def test_each_calibration_has_seeds_of_its_own() -> None:
    first = Experiment("", "digits", "digits", Distill(), num_calibrations=3)
    seeds = [(e.distill.fit.seed, e.calibration.seed, e.search_seed) for e in map(first.calibrated, range(3))]
    assert all(len(set(column)) == 3 for column in zip(*seeds, strict=True))
    assert replace(first, controls=None) == first.calibrated(0)


def test_arms_of_further_calibrations_have_names_of_their_own() -> None:
    names = [Arm("searched", PLAN, 0.6, calibration=k).name for k in (None, 0, 1, 2)]
    assert names == ["searched-ddim-2-b0.6"] * 2 + ["searched-ddim-2-b0.6-c1", "searched-ddim-2-b0.6-c2"]


def test_a_comparison_of_two_calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyndit.calibration.samplers.measure_cost", fixed_cost)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    experiment = replace(find(str(recipe), "experiment", Experiment), num_calibrations=2)
    inputs, out, console = Inputs(from_scratch=True), tmp_path / "run", Console(quiet=True)
    comparison.run(experiment, out, inputs, console)
    runs = read_runs(out)
    plans = runs[runs["family"] == "searched"]
    assert set(zip(plans["arm"], plans["calibration"], strict=True)) == {
        ("searched-ddim-2-b0.9", "0"),
        ("searched-ddim-2-b0.9-c1", "1"),
    }
    assert set(runs[runs["family"] == "full"]["calibration"]) == {""}
    assert plans["macs_heads"].notna().all()
    assert plans[["kid", "precision", "recall"]].notna().all(axis=None)
    folders = [out, out / "calibrations" / "1"]
    models = [dyndit.load(folder / "model") for folder in folders]
    assert models[0].identity.backbone == models[1].identity.backbone
    assert models[0].identity.exits != models[1].identity.exits
    tables = [ShiftTable.load(folder / "model" / "shift-table.safetensors") for folder in folders]
    assert tables[0].seed != tables[1].seed
    for folder, model, name in zip(folders, models, dict.fromkeys(plans["plan"]), strict=True):
        plan = DepthPlan.load(out / name)
        assert plan.exits == model.identity.exits
        assert (folder / "plan-ddim-2-b0.9.json").samefile(out / name)
    text = (out / "report.md").read_text()
    assert "### Calibrations" in text
    assert "2 calibrations" in text
    assert verify(out) == []
    before = (out / "runs.csv").read_bytes()
    monkeypatch.setattr("dyndit.analysis.compare.context.measure_shifts", None)
    comparison.run(experiment, out, inputs, console)
    assert (out / "runs.csv").read_bytes() == before
