"""A rehearsal of the tries: every variant, on a tiny model, from the exits to the rows."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from dyndit import sealed_csv
from dyndit.analysis.compare.experiment import Inputs, Variant
from dyndit.analysis.compare.run import run
from dyndit.analysis.report.runs import read_runs
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import Exits
from dyndit.plans.plan import DepthPlan
from dyndit.recipes.studies import claim, claim_classes, claim_heads, claim_tries
from dyndit.storage import load as checkpoints
from dyndit.training.distill import Distill

pytestmark = pytest.mark.usefixtures("quick_search")

NUM_IMAGES = 66


def shorter(distill: Distill | None) -> Distill | None:
    if distill is None:
        return None
    few = {"steps": 2, "batch_size": 8, "checkpoint_every": 1, "precision": "fp32"}
    fits = {name: replace(getattr(distill, name), **few) for name in ("fit", "recall_fit")}
    return replace(distill, **fits, num_steps=4, num_trajectories=8)


def small(variant: Variant) -> Variant:
    few = {"num_pictures": NUM_IMAGES, "num_bands": 3, "batch_size": NUM_IMAGES, "forecast_ages": 1}
    calibration = variant.calibration and replace(variant.calibration, **few)
    descent = variant.descent
    if descent is not None:
        descent = replace(descent, rounds=min(1, descent.rounds), width=2, num_pictures=NUM_IMAGES)
    return replace(variant, distill=shorter(variant.distill), calibration=calibration, descent=descent)


def test_every_try_makes_a_plan(inputs: Inputs, tmp_path: Path) -> None:
    whole = claim_tries.experiment
    own = small(Variant("", calibration=whole.calibration)).calibration
    assert own is not None
    few = {"num_blocks": 1, "num_images": NUM_IMAGES, "batch_size": 33, "metrics": ("fd",), "precision": "fp32"}
    points = dict.fromkeys(("points", "full_points"), (("unipc", 4),))
    experiment = replace(
        whole,
        distill=shorter(whole.distill),
        calibration=own,
        calibration_steps=3,
        budgets=(0.7,),
        variants=tuple(map(small, whole.variants)),
        **few,
        **points,
    )
    run(experiment, tmp_path, inputs, Console(quiet=True))
    rows = read_runs(tmp_path)
    names = [variant.name for variant in whole.variants]
    assert set(rows["family"]) == {"full", "searched", *(f"searched-{name}" for name in names)}
    assert set(rows["extractor"]) == {"resnet20-cifar10", "vgg-cifar10"}
    folders = [tmp_path / "variants" / name for name in names]
    plans = {folder.name: DepthPlan.load(next(folder.glob("plan-*.json"))) for folder in folders}
    descended = {name for name, plan in plans.items() if plan.router == "descended"}
    assert descended == {"descent", "searches"} & set(names)


def test_a_plan_per_class_is_chosen_on_one_half_and_measured_on_the_other() -> None:
    rows = [("a", 0, "chooses", 1.0, 9.0), ("a", 0, "measures", 9.0, 3.0), ("a", 1, "chooses", 2.0, 9.0)]
    rows += [("a", 1, "measures", 9.0, 4.0), ("b", 0, "chooses", 2.0, 0.0), ("b", 0, "measures", 9.0, 1.0)]
    rows += [("b", 1, "chooses", 1.5, 0.0), ("b", 1, "measures", 9.0, 3.5)]
    table = pd.DataFrame(rows, columns=["plan", "class", "half", "mine", "another"])
    one, own, found = claim_classes.compared(table, "mine", "another")
    assert (one, own) == ("a", {0: "a", 1: "b"})
    assert found["one plan"].tolist() == [3.0, 4.0]
    assert found["own plan"].tolist() == [3.0, 3.5]


def test_plans_per_class_go_on_where_they_stopped(
    inputs: Inputs, plans: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.load(inputs.model)
    folder = tmp_path / "model"
    checkpoints.save(DynamicDepth(model.backbone, Exits(model.backbone, claim_heads.SETS["wide"])), folder)
    out, options = tmp_path / "run", {"num_images": 8, "precision": "fp32"}
    given = str(folder), inputs.data, inputs.extractor_weights, plans, out
    claim_classes.main(*given, **options)
    path = out / claim_classes.ROWS
    whole, said = path.read_bytes(), capsys.readouterr().out
    assert said.count("a plan per class have") == 2
    assert "class 0: plan" in said
    rows = sealed_csv.read(path, claim_classes.KEY)
    assert len(rows) == 2 * model.backbone.condition.num_classes * 2
    sealed_csv.write(path, rows[rows["plan"] == "plan0"])
    claim_classes.main(*given, **options)
    assert path.read_bytes() == whole


def test_the_claims_seeds_are_not_used() -> None:
    own = [claim.PROTOCOLS["main"].calibrated(number) for number in range(5)]
    tried = claim_tries.experiment
    scoring = range(tried.first_seed, tried.first_seed + tried.num_blocks)
    assert not {one.first_seed for one in own} & set(scoring)
    assert tried.calibration.seed not in {one.calibration.seed + k for one in own for k in range(3)}
    assert tried.distill.fit.seed not in {one.distill.fit.seed for one in own}
    assert "efficientnet-lite0" not in (tried.extractor, *tried.more_extractors)


def test_plans_are_made_as_the_claims() -> None:
    """From exits that are trained for longer."""
    of_claim, tried = claim.PROTOCOLS["main"].calibrated(claim_tries.NUMBER), claim_tries.experiment
    for name in ("points", "budgets", "refinements", "search_seed", "precision", "batch_size"):
        assert getattr(tried, name) == getattr(of_claim, name), name
    assert tried.distill.fit.seed == of_claim.distill.fit.seed
    assert set(claim.CHOICES) < {*claim_tries.CHOICES, *claim_tries.STRENGTHS}


def test_lighter_heads_draw_the_given_plans_of_other_exits(
    inputs: Inputs,
    plans: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claim_heads, "exits", shorter(claim_heads.exits))
    monkeypatch.setattr(claim_heads, "BATCH", 33)
    out = tmp_path / "run"
    options = {"num_images": NUM_IMAGES, "precision": "fp32"}
    given = inputs.model, inputs.data, inputs.extractor_weights, plans, out
    claim_heads.main(*given, num_blocks=1, **options)
    first = pd.read_csv(out / claim_heads.ROWS).drop(columns="checksum")
    claim_heads.main(*given, num_blocks=2, **options)
    rows = pd.read_csv(out / claim_heads.ROWS).drop(columns="checksum")
    assert rows[: len(first)].equals(first)
    assert len(rows) == 3 * 2 * 2
    assert "light: " in capsys.readouterr().out
    found = claim_heads.compared(rows, "slim")
    means = rows.groupby(["heads", "plan"]).mean(numeric_only=True)
    for name in ("resnet20-cifar10", "vgg-cifar10"):
        assert found[name][0] == pytest.approx((means.loc["slim"][name] - means.loc["wide"][name]).mean())


def test_heads_are_the_claims_and_the_light_ones_a_tenth_of_the_backbone() -> None:
    assert replace(claim_heads.exits, fit=claim.exits.fit) == claim.exits
    assert replace(claim_heads.exits.fit, seed=claim.exits.fit.seed) == claim.exits.fit
