"""Learned forecasts: heads that see what the last full-depth step left."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.analysis.metrics.macs import Macs, model_macs, sampling_macs
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs, Work
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step, steps
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.storage import load as checkpoints
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import RECALL, Distill
from dyndit.training.recall import RECALLING
from dyndit.training.recorded import RecordedCalls, record_sampling

LABELS, STEPS, BLOCKS = [3, 1, 4, 1, 5], 6, 6
RECALLED = (1, 3)


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    """A model with learned forecasts after 1 and 3 blocks of 6, not trained but no longer zero."""
    plain = make_model(num_blocks=BLOCKS, head="wide")
    exits = Exits(plain.backbone, replace(plain.exits.config, recall=RECALLED)).requires_grad_(False)
    exits.load_state_dict(plain.exits.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in exits.recalls.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return DynamicDepth(plain.backbone, exits, pixel_space=plain.pixel_space).eval()


@pytest.fixture(scope="module")
def plain(model) -> DynamicDepth:
    """The same model without them."""
    exits = Exits(model.backbone, replace(model.exits.config, recall=())).requires_grad_(False)
    exits.load_state_dict({k: v for k, v in model.exits.state_dict().items() if not k.startswith("recalls.")})
    return DynamicDepth(model.backbone, exits, pixel_space=model.pixel_space).eval()


@pytest.fixture(scope="module")
def macs(model) -> Macs:
    return model_macs(model)


def draw(model: DynamicDepth, plan: DepthPlan, batch_size: int = 5) -> torch.Tensor:
    options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
    return sample(model, LABELS, plan=plan, batch_size=batch_size, **options).pictures


def plan_of(model: DynamicDepth, *texts: str) -> DepthPlan:
    return full_plan(model, "ddim", len(texts), 1.5).with_steps(steps(*texts))


forecasting = st.lists(
    st.sampled_from(["6|6", "6", "1+", "3+|held", "3+|e1", "5+", "4|2", "3", "6|e3", "2|5"]), min_size=4, max_size=4
)


def test_full_depth_is_the_model_bit_for_bit(model, plain) -> None:
    for solver in ("ddim", "unipc"):
        full = full_plan(model, solver, STEPS, 1.5)
        assert torch.equal(draw(model, full), draw(plain, full))


@settings(max_examples=20)
@given(middle=forecasting)
def test_plans_without_their_forecasts_are_untouched(model, plain, middle) -> None:
    """Forecasts at other depths extrapolate as before, bit for bit."""
    plan = plan_of(model, "6|6", *middle, "6|6")
    if not any(step.forecast and step.depth in RECALLED for step in plan.steps):
        assert torch.equal(draw(model, plan), draw(plain, plan))
    else:
        assert not torch.equal(draw(model, plan), draw(plain, plan))


@settings(max_examples=20)
@given(middle=forecasting)
def test_multiply_accumulates_are_those_that_run(model, macs, middle) -> None:
    """No exit head runs at a full step for a learned forecast, and none beside the head that forecasts."""
    plan = plan_of(model, "6|6", *middle, "6|6")
    assert macs.plan(plan) == sampling_macs(model, plan)
    whole = full_plan(model, "ddim", STEPS, 1.5)
    assert macs.heads(whole) == 0


@settings(max_examples=8)
@given(middle=forecasting)
def test_pictures_do_not_depend_on_batch_mates(model, middle) -> None:
    plan = plan_of(model, "6|6", *middle, "6|6")
    first = draw(model, plan)
    assert (draw(model, plan, batch_size=2).int() - first.int()).abs().max() <= 1
    assert torch.equal(draw(model, plan), first)


def test_an_untrained_head_is_the_final_layer_on_what_was_left(model) -> None:
    """It holds the last block's tokens under the present condition, bit for bit."""
    fresh = DynamicDepth(model.backbone, Exits(model.backbone, ExitConfig((1, 3), "wide", (3,)))).eval()
    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn((2, *model.backbone.sample_shape), generator=generator) for _ in range(2))
    y, times = torch.tensor([3, 1]), (500.0, 400.0)
    t, later = (torch.full((2,), time) for time in times)
    with torch.inference_mode():
        first = StepInputs(0, (Inputs(x, t, y),), Work((BLOCKS,), kept=(3,)), times)
        _, memory = fresh.predict(first, None)
        second = StepInputs(1, (Inputs(other, later, y),), Work((3,), forecast=True), times)
        (found,), after = fresh.predict(second, memory)
        state = model.backbone.embed(x, t, y)
        for index in range(BLOCKS):
            state = model.backbone.block(index, state)
        cond = model.backbone.embed(other, later, y).cond
        assert torch.equal(found, model.backbone.head(replace(state, cond=cond)))
    assert after.left is memory.left
    assert memory.left.timestep == 500.0
    assert set(memory.left.tokens) == {3, BLOCKS}


def test_it_builds_on_the_last_full_step_alone(model) -> None:
    """Another step before the last full one changes nothing but x: the tokens of the older full step are gone."""
    plan = plan_of(model, "6|6", "6|6", "3+")
    assert [work.kept for work in plan.works] == [(3,), (3,), ()]
    seen = []
    original = model.exits.recalled

    def spy(state, depth, left, when):
        seen.append(left.timestep)
        return original(state, depth, left, when)

    model.exits.recalled = spy
    draw(model, plan)
    del model.exits.recalled
    assert seen == [plan.timesteps[1]]


def test_files_keep_the_heads(model, tmp_path: Path) -> None:
    checkpoints.save(model, tmp_path)
    again = checkpoints.load(tmp_path)
    assert again.exits.config == model.exits.config
    assert again.identity == model.identity
    plan = plan_of(model, "6|6", "3+|held", "1+", "6")
    assert torch.equal(draw(again, plan), draw(model, plan))


def test_a_learned_forecast_costs_its_own_head_once() -> None:
    one = PartTimes(1.0, 10.0, 2.0, 3.0, recalls={3: 0.25})
    cost = CostModel(5, BLOCKS, one, one, 0.5)
    assert cost.step_seconds(Step.parse("3+")) == pytest.approx(0.5 + 1 + 30 + 0.25)
    assert cost.step_seconds(Step.parse("3+|e1")) == pytest.approx(0.5 + 1 + 30 + 0.25 + 2)
    assert cost.step_seconds(Step.parse("2+")) == pytest.approx(0.5 + 1 + 20 + 2 + 2)
    assert CostModel.from_description(cost.describe()) == cost


def test_depths_that_learn_are_depths_that_have_exits(model) -> None:
    with pytest.raises(InputError, match=r"exit recall \[2\]: expected some of the layers, \[1, 3\]"):
        ExitConfig((1, 3), recall=(2,)).resolved(BLOCKS)
    assert ExitConfig((1, 3), recall=(3, 1)).resolved(BLOCKS).recall == (1, 3)


@pytest.fixture(scope="module")
def recipe() -> Distill:
    fit = FitConfig(steps=4, batch_size=16, learning_rate=1e-3, flip=False)
    recall = replace(RECALLING, steps=30, batch_size=32, warmup_steps=2, checkpoint_every=15)
    return Distill(ExitConfig((1, 3), recall=(1,)), fit, num_trajectories=32, num_steps=5, recall_fit=recall)


@pytest.fixture(scope="module")
def distilled(recipe, model, tmp_path_factory) -> tuple[DynamicDepth, Path]:
    out = tmp_path_factory.mktemp("recall")
    return recipe.run(model, load_digits(), out)[0], out


def test_training_makes_forecasts_better_than_holding(distilled) -> None:
    found, out = distilled
    losses = pd.read_csv(out / RECALL / "losses.csv")["loss"]
    assert len(losses) == 30
    assert losses.tail(5).mean() < losses.head(5).mean()
    assert found.exits.config.recall == (1,)
    assert not torch.equal(found.exits.recalls["1"].fc2.weight, torch.zeros_like(found.exits.recalls["1"].fc2.weight))


def test_exits_are_the_same_with_and_without_learned_forecasts(distilled, recipe, model, tmp_path: Path) -> None:
    alone = replace(recipe, exits=replace(recipe.exits, recall=())).run(model, load_digits(), tmp_path)[0]
    found, _ = distilled
    state = found.exits.state_dict()
    for name, tensor in alone.exits.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_stopped_training_ends_with_the_same_bits(distilled, recipe, model, tmp_path: Path) -> None:
    found, _ = distilled
    short = replace(recipe, recall_fit=replace(recipe.recall_fit, schedule="constant"))
    first, record = short.run(model, load_digits(), tmp_path / "whole")
    half = replace(short, recall_fit=replace(short.recall_fit, steps=15))
    half.run(model, load_digits(), tmp_path / "halves")
    second = short.run(model, load_digits(), tmp_path / "halves")[0]
    assert first.identity == second.identity
    assert first.identity != found.identity
    assert record.beside > 0  # the time of the forecasts' training


def test_recorded_calls_are_refused(recipe, model, tmp_path: Path) -> None:
    record_sampling(model, [1, 2], tmp_path / "calls", num_steps=2)
    with pytest.raises(InputError, match=r"recall: recorded calls .* are states; expected pictures"):
        recipe.check(model, RecordedCalls(tmp_path / "calls"))


def test_a_narrower_head_has_its_width_in_its_file(model, tmp_path: Path) -> None:
    narrow = Exits(model.backbone, replace(model.exits.config, recall_ratio=1)).requires_grad_(False)
    whole, half = (exits.recalls["1"].fc1.out_features for exits in (model.exits, narrow))
    assert whole == 2 * half == 2 * model.backbone.width
    checkpoints.save(DynamicDepth(model.backbone, narrow, pixel_space=model.pixel_space), tmp_path / "model")
    read = checkpoints.load(tmp_path / "model").exits
    assert read.config == narrow.config
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), narrow.parameters(), strict=True))
    assert "recall_ratio" not in model.exits.describe()
    for ratio in (0, 10**9):
        with pytest.raises(InputError, match=f"recall_ratio {ratio}: expected 1 to 8"):
            Exits(model.backbone, replace(model.exits.config, recall_ratio=ratio))
