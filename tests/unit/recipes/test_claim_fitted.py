"""Exits that are fitted to a plan: what they are fitted on is what the plan meets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dyndit import sealed_csv
from dyndit.analysis.compare.experiment import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.models.exits import Exits
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.step import steps
from dyndit.recipes.studies import claim_fitted, claim_heads
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.storage import load as checkpoints
from support.models import randomise

NUM = 60  # more than a batch
TEXTS = ("12|12", "2+|held*1.4", "8|4", "4+|held", "6|e2*2", "12|e4", "8", "12")


@pytest.fixture
def model(inputs: Inputs) -> DynamicDepth:
    backbone = checkpoints.load(inputs.model).backbone
    exits = Exits(backbone, claim_heads.SETS["wide"])
    randomise(exits, seed=1)
    return DynamicDepth(backbone, exits).eval()


@pytest.fixture
def plan(model: DynamicDepth) -> DepthPlan:
    return full_plan(model, "unipc", len(TEXTS), 2.0).with_steps(steps(*TEXTS))


class Asked(DynamicDepth):
    """Note what each step gives the solver, and what full depth would give."""

    asked: list[tuple[int, list[Tensor]]]

    def predict(self, step: StepInputs, memory: Any) -> tuple[list[Tensor], Any]:
        found = super().predict(step, memory)
        self.asked.append((step.k, found[0]))
        return found


def test_states_and_memories_are_those_of_the_plan(model: DynamicDepth, plan: DepthPlan) -> None:
    """Each step's predictions, again from what was kept of it, are those of the sampling."""
    states = claim_fitted.visits(model, plan, NUM, seed=5)
    watched = Asked(model.backbone, model.exits, process=model.process).eval()
    watched.asked = []
    sample(watched, model.backbone.condition.in_turn(NUM), plan=plan, seed=5, batch_size=claim_fitted.BATCH)
    assert list(states.by_step) == [1, 2, 3, 4, 5, 6]  # an exit or a forecast predicts at these
    for k, (step, memory, _) in states.by_step.items():
        there = [torch.cat(parts) for parts in zip(*(found for at, found in watched.asked if at == k), strict=True)]
        again, _ = model.predict(step, memory)
        for one, other in zip(again, there, strict=True):
            torch.testing.assert_close(one, other)


def test_what_full_depth_predicts_has_no_error(model: DynamicDepth, plan: DepthPlan) -> None:
    """Targets are full depth's predictions as the solver gets them, in the states that the plan meets."""
    states = claim_fitted.visits(model, plan, NUM, seed=5)
    for k, (step, memory, targets) in states.by_step.items():
        asked = step.branches[0]
        both = asked, replace(asked, y=model.backbone.condition.null(asked.y))
        full = replace(step, branches=both, work=plan.steps[0].work())
        assert plan.steps[0] == steps("12|12")[0]
        torch.testing.assert_close(claim_fitted.predicted(model, plan, full, memory), targets, msg=str(k))


def test_a_step_is_trained_whatever_it_is_made_of(model: DynamicDepth, plan: DepthPlan) -> None:
    """Both heads of a pair get a gradient, and the backbone none."""
    states = claim_fitted.visits(model, plan, 4, seed=5)
    model.requires_grad_(False)
    assert model.exits is not None
    module = claim_fitted.Steps(model, plan, states)
    module.exits.requires_grad_(True)
    expected = {1: {"recalls.2"}, 2: {"heads.8", "heads.4"}, 3: {"heads.4"}, 4: {"heads.6", "heads.2"}}
    expected |= {5: {"heads.4"}, 6: {"heads.8"}}
    for k, heads in expected.items():
        module.zero_grad()
        module(k, torch.arange(4)).mean().backward()
        moved = {name for name, one in module.exits.named_parameters() if one.grad is not None and one.grad.any()}
        assert {".".join(name.split(".")[:2]) for name in moved} == heads, TEXTS[k]


def test_an_update_draws_steps_of_the_plan_for_all_pictures(model: DynamicDepth, plan: DepthPlan) -> None:
    states = claim_fitted.visits(model, plan, 4, seed=5)
    task = claim_fitted.Fitting(claim_fitted.Steps(model, plan, states))
    for size in (1, 3, 10, 128):
        x, drawn = task.draw(torch.arange(size), 0, torch.Generator().manual_seed(size))
        assert len(x) == len(drawn) == size
        assert set(drawn.tolist()) <= set(states.by_step)


def test_fitting_lowers_the_error_and_goes_on_where_it_stopped(
    inputs: Inputs,
    plans: tuple[Path, Path],
    model: DynamicDepth,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    checkpoints.save(model, folder)
    few = replace(claim_fitted.fitting, batch_size=16, learning_rate=1e-2, warmup_steps=1, checkpoint_every=5)
    monkeypatch.setattr(claim_fitted, "fitting", few)
    options = {"num_images": 100, "num_states": NUM, "updates": 40, "precision": "fp32"}
    given = str(folder), inputs.data, inputs.extractor_weights, plans, out
    claim_fitted.main(*given, **options, num_blocks=1)
    said = capsys.readouterr().out
    shares = [float(line.split("error ")[1].split()[0]) for line in said.splitlines() if " error " in line]
    assert len(shares) == 2 * 2
    assert max(shares) < 0.9
    first = sealed_csv.read(out / claim_fitted.ROWS, ("exits", "plan", "block"))
    assert len(first) == 2 * 2
    claim_fitted.main(*given, **options, num_blocks=2)
    rows = sealed_csv.read(out / claim_fitted.ROWS, ("exits", "plan", "block"))
    assert rows[: len(first)].equals(first)
    assert "error " not in capsys.readouterr().out  # nothing was fitted again
    own = checkpoints.load(out / "plan0" / "model")
    assert own.identity.backbone == model.identity.backbone
    assert own.identity.exits != model.identity.exits
    bind(replace(DepthPlan.load(plans[0]), exits=""), own)
