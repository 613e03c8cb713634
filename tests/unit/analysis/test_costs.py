"""What trainings cost: arithmetic by hand, times of resumed runs, rows in the place of earlier ones."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dyndit.analysis.compare.costs import backbone_cost, exits_cost, note
from dyndit.analysis.metrics.macs import model_macs
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import Exits
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.fit import FitResult

FIT = FitConfig(steps=10, batch_size=4)


def result(seconds: float, updates: int) -> FitResult:
    return FitResult({}, {}, pd.DataFrame(), seconds, updates)


def test_an_update_is_three_passes_of_the_backbone_and_of_the_heads(model: DynamicDepth) -> None:
    macs = model_macs(model)
    found = backbone_cost(model, FIT, result(5.0, 10))
    assert found["training_flops"] == 2 * 3 * macs.full * 40
    assert (found["updates"], found["pictures"], found["seconds"]) == (10, 40, 5.0)
    assert found["parameters"] == sum(p.numel() for p in model.backbone.parameters())
    heads = sum(macs.leave[depth] for depth in range(1, 6))
    frozen, whole = (
        exits_cost(model, Distill(fit=FIT, backbone=kind), result(5.0, 10)) for kind in ("frozen", "whole")
    )
    assert frozen["training_flops"] == 2 * (macs.full + 3 * heads) * 40
    assert whole["training_flops"] == 2 * (4 * macs.full + 3 * heads) * 40
    assert frozen["parameters"] == sum(p.numel() for p in model.exits.parameters())


def test_learned_forecasts_are_charged_for_what_they_see_and_for_their_heads(make_model) -> None:
    plain = make_model()
    exits = Exits(plain.backbone, replace(plain.exits.config, recall=(2,)))
    model = DynamicDepth(plain.backbone, exits)
    distill = Distill(fit=FIT, exits=exits.config, num_steps=5, num_trajectories=3, recall_fit=replace(FIT, steps=2))
    found, alone = (exits_cost(one, distill, replace(result(5.0, 10), beside=2.0)) for one in (model, plain))
    macs = model_macs(model)
    assert macs.recall[2] > macs.leave[2]
    more = 2 * (2 * macs.full * 5 * 3 + 3 * macs.recall[2] * 2 * 4)
    assert found["training_flops"] == alone["training_flops"] + more
    assert found["parameters"] == sum(p.numel() for p in exits.parameters()) > alone["parameters"]
    assert found["seconds"] == 7.0


def test_a_resumed_training_is_charged_for_all_its_updates(model: DynamicDepth) -> None:
    assert backbone_cost(model, FIT, result(2.0, 4))["seconds"] == pytest.approx(5.0)
    assert math.isnan(backbone_cost(model, FIT, result(0.0, 0))["seconds"])
    longer = replace(FIT, steps=20)
    assert backbone_cost(model, longer, result(2.0, 4))["seconds"] == pytest.approx(10.0)


def test_a_row_takes_the_place_of_an_earlier_one_and_keeps_its_time(tmp_path: Path) -> None:
    path = tmp_path / "trainings.csv"
    note(path, {"name": "exits", "seed": 0, "updates": 3, "seconds": 7.0})
    note(path, {"name": "exits", "seed": 1, "updates": 3, "seconds": 8.0})
    note(path, {"name": "exits", "seed": 0, "updates": 4, "seconds": math.nan})
    found = pd.read_csv(path).set_index("seed")
    assert found["updates"].to_dict() == {0: 4, 1: 3}
    assert found["seconds"].to_dict() == {0: 7.0, 1: 8.0}
