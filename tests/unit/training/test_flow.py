"""A rectified flow from training to a plan: the same recipes, another process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dyndit
import dyndit.storage.pretrained
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.calibration.calibrate import calibrate
from dyndit.calibration.measure import CalibrationSettings, measure_shifts, reduced
from dyndit.cli.models import _preview
from dyndit.errors import InputError
from dyndit.models.dit import DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig
from dyndit.plans.search import search
from dyndit.plans.step import OwnExit, Step
from dyndit.plans.table import ShiftTable
from dyndit.process import DDPM, RectifiedFlow
from dyndit.recipes import digits, digits_flow
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill
from dyndit.training.exit_errors import exit_error_table
from dyndit.training.match import Match
from dyndit.training.recorded import RecordedCalls
from dyndit.training.train import Train
from support.files import same
from support.models import balanced_labels
from support.tables import COST

DIGITS = load_digits()
TINY = DiTConfig(8, 4, 1, width=32, num_blocks=4, num_heads=2, num_classes=10, learn_variance=False)
FIT = FitConfig(steps=60, batch_size=32, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, flip=False)
TRAIN = Train(TINY, FIT, process=RectifiedFlow())
DISTILL = Distill(
    fit=replace(FIT, steps=20), forecasts=True, weighting="path-kl", solver="flow-euler", num_steps=4, cfg_scale=1.5
)
DRAW = {"solver": "flow-euler", "num_steps": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DynamicDepth:
    model, result = TRAIN.run(DIGITS, tmp_path_factory.mktemp("train"))
    assert model.process == RectifiedFlow()
    losses = result.losses["mse"]
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()
    return model


@pytest.fixture(scope="module")
def distilled(trained: DynamicDepth, tmp_path_factory: pytest.TempPathFactory) -> DynamicDepth:
    model, result = DISTILL.run(trained, DIGITS, tmp_path_factory.mktemp("distill"))
    assert result.losses["noise"][-5:].mean() < result.losses["noise"][:5].mean()
    return model


def test_a_flow_is_trained_distilled_calibrated_and_sampled(distilled: DynamicDepth, tmp_path: Path) -> None:
    assert distilled.process == RectifiedFlow()
    assert distilled.exits.gains is not None
    assert exit_error_table(distilled, DIGITS, num_pictures=16, num_bands=2).notna().all().all()
    extractor, reference = reduced(load_extractor("digits"), DIGITS.uint8())
    settings = CalibrationSettings(80, 3, 40, num_depths=2, forecast_ages=1)
    table = measure_shifts(distilled, extractor, reference, num_steps=3, settings=settings, cost=COST)
    assert table.solver == "flow-euler"
    plan = calibrate(distilled, budget=0.6, table=table, extractor=extractor, **DRAW)
    assert plan.timesteps == (1000, 666.6666870117188, 333.3333435058594)
    assert plan.backbone == distilled.identity.backbone
    labels = balanced_labels(20, 10)
    pictures = sample(distilled, labels, plan=plan, **DRAW).pictures
    assert not torch.equal(pictures, sample(distilled, labels, **DRAW).pictures)
    distilled.save_pretrained(tmp_path)
    plan.save(tmp_path / "plan-a.json")
    again = dyndit.load(tmp_path)
    assert torch.equal(
        pictures, sample(again, labels, plan=dyndit.DepthPlan.load(tmp_path / "plan-a.json"), **DRAW).pictures
    )
    pipe = dyndit.DynDiTPipeline.from_model(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(labels, plan=plan, seed=0, output_type="pt").images
    assert torch.equal((255 * images).round().to(torch.uint8).float().mean().round(), pictures.float().mean().round())
    assert "| process | flow |" in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def table(distilled: DynamicDepth) -> ShiftTable:
    """With own guides and forecasts, measured at eight steps."""
    extractor, reference = reduced(load_extractor("digits"), DIGITS.uint8())
    settings = CalibrationSettings(80, 8, 40, num_depths=2, own_guides=True, forecast_ages=1)
    return measure_shifts(distilled, extractor, reference, num_steps=8, settings=settings, cost=COST)


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("solver", ["flow-euler", "flow-heun", "flow-sde"])
@pytest.mark.parametrize("num_steps", [4, 8, 10, 20])
def test_plans_of_a_flow_are_searched_at_any_number_of_steps(
    distilled: DynamicDepth, table: ShiftTable, num_steps: int, solver: str
) -> None:
    kinds = {type(choice.guide) for choice in table.choices}
    assert OwnExit in kinds
    assert any(choice.forecast for choice in table.choices)
    full = full_plan(distilled, solver, num_steps, 1.5)
    plan = search(table, full, 0.5)
    assert plan.timesteps == full.timesteps
    assert COST.share_of_time(plan) <= 0.5 * (1 + 1e-6)
    options = {"solver": solver, "num_steps": num_steps, "cfg_scale": 1.5}
    pictures = sample(distilled, [1, 2], plan=plan, **options).pictures
    assert not torch.equal(pictures, sample(distilled, [1, 2], **options).pictures)


@pytest.mark.parametrize("step", ["2|e1", "2+", "3|held"])
def test_every_kind_of_step_runs_under_a_flow(distilled: DynamicDepth, step: str) -> None:
    full = full_plan(distilled, "flow-euler", 4, 1.5)
    plan = full.with_steps([*full.steps[:2], Step.parse(step), Step.parse(step)])
    options = {"solver": "flow-euler", "num_steps": 4}
    pictures = sample(distilled, [1, 2], plan=plan, **options).pictures
    assert not torch.equal(pictures, sample(distilled, [1, 2], **options).pictures)


def test_a_recipe_trains_under_another_process() -> None:
    ddpm = replace(TRAIN, process=DDPM(), backbone=replace(TINY, learn_variance=True))
    assert ddpm.under(RectifiedFlow()) == TRAIN
    assert ddpm.under(DDPM(beta_end=0.01)).backbone.learn_variance
    assert digits_flow.train.process == RectifiedFlow()
    assert replace(digits_flow.train.backbone, learn_variance=True) == digits.train.backbone


def test_a_run_goes_on_under_its_own_process_alone(tmp_path: Path) -> None:
    short = replace(TRAIN, fit=replace(FIT, steps=2))
    first, _ = short.run(DIGITS, tmp_path)
    again, _ = short.run(DIGITS, tmp_path)
    assert same(first.state_dict(), again.state_dict())
    with pytest.raises(InputError, match="identity"):
        replace(short, process=DDPM()).run(DIGITS, tmp_path)


def test_exits_are_distilled_and_states_recorded_under_their_own_process_alone(
    trained: DynamicDepth, tmp_path: Path
) -> None:
    recipe = Distill(fit=replace(FIT, steps=2), states="sampler", num_trajectories=4, **DRAW)
    recipe.run(trained, DIGITS, tmp_path)
    replace(recipe, solver=None, num_steps=2).run(trained, DIGITS, tmp_path / "usual")  # its process' usual solver
    assert next(path.name for path in (tmp_path / "usual").glob("states-*")).startswith("states-flow-euler-2-")
    other = DynamicDepth(trained.backbone, process=DDPM())
    with pytest.raises(InputError, match="steps the process flow, but this model's is ddpm"):
        recipe.run(other, DIGITS, tmp_path)
    with pytest.raises(InputError, match="calls of"):
        RecordedCalls(next(tmp_path.glob("states-*"))).check(other)
    noised = Distill(fit=replace(FIT, steps=2))
    noised.run(trained, DIGITS, tmp_path / "noised")
    with pytest.raises(InputError, match="identity"):
        noised.run(other, DIGITS, tmp_path / "noised")


def test_a_flow_has_no_variance_to_learn() -> None:
    with pytest.raises(InputError, match="learn_variance True: the process flow has no variance; expected False"):
        replace(TRAIN, backbone=replace(TINY, learn_variance=True))


def test_a_variance_half_that_a_flow_came_with_is_ignored(make_model, tmp_path: Path) -> None:
    """Half of the output means nothing (SiT's weights have one): neither losses nor exits are judged on it."""
    model = make_model(width=32, num_blocks=4)
    flow = DynamicDepth(model.backbone, process=RectifiedFlow())
    assert flow.backbone.out_channels == 2
    recipe = Distill(ExitConfig((2,)), replace(FIT, steps=2), variance_weight=5.0)
    _, result = recipe.run(flow, DIGITS, tmp_path / "exits")
    assert result.losses["variance"].min() > 0
    torch.testing.assert_close(result.losses["loss"].tolist(), result.losses["noise"].tolist())
    _, result = Match(replace(FIT, steps=2), variance_weight=5.0).run(
        flow, make_model(seed=3).backbone, DIGITS, tmp_path
    )
    torch.testing.assert_close(result.losses["loss"].tolist(), result.losses["noise"].tolist())


def test_training_goes_on_from_the_same_process_alone(trained: DynamicDepth, tmp_path: Path) -> None:
    recipe = replace(TRAIN, fit=replace(FIT, steps=1))
    recipe.run(DIGITS, tmp_path / "on", start=trained)
    with pytest.raises(InputError, match="--model: of the process flow; expected the recipe's, ddpm"):
        replace(recipe, process=DDPM()).run(DIGITS, tmp_path / "off", start=trained)


def test_previews_are_drawn_with_the_process_own_solver(trained: DynamicDepth, tmp_path: Path) -> None:
    _preview(trained, tmp_path, 1)
    assert (tmp_path / "previews" / "step-000001.png").stat().st_size > 0


def test_exits_train_with_a_flow_from_the_first_step(tmp_path: Path) -> None:
    model, result = replace(TRAIN, fit=replace(FIT, steps=2), exits=ExitConfig((2,))).run(DIGITS, tmp_path)
    assert model.process == RectifiedFlow()
    assert {"mse", "exits"} <= set(result.losses.columns)
    assert "vb" not in result.losses.columns
