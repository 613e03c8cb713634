"""Calibration: the measured table against brute force, and its economy."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.calibration import measure as measuring
from dyndit.calibration.calibrate import calibrate, calibrate_steps, measure_around, measure_bases, measure_moments
from dyndit.calibration.measure import CalibrationSettings, default_choices, measure_shifts, part_of
from dyndit.calibration.samplers import OwnSampler
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures import as_rgb
from dyndit.plans.predictor import Predictor
from dyndit.plans.step import Held, NoGuide, OwnExit, Step, Unconditional
from dyndit.plans.step_counts import LatencyBudget
from dyndit.plans.table import ShiftTable
from dyndit.process import RectifiedFlow
from dyndit.sampling.budget import plan_on_table
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import advance, batch_in_turn, full_plan, start
from dyndit.sampling.sample import sample
from dyndit.sampling.timing import measure_cost
from dyndit.stats import frechet_distance, moments
from dyndit.training.data import load_digits
from support.models import balanced_labels

SETTINGS = CalibrationSettings(num_pictures=80, num_bands=2, batch_size=32, choices=("2|2", "4|2", "6"))


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def reference(extractor):
    return moments(extractor.features(as_rgb(load_digits().uint8()[:400])))


@pytest.fixture(scope="module")
def table(model, extractor, reference):
    return measure_shifts(model, extractor, reference, num_steps=2, settings=SETTINGS)


@pytest.mark.parametrize("choice", SETTINGS.choices, ids=str)
@pytest.mark.parametrize("step", [0, 1])
def test_a_single_replaced_step_is_predicted_as_it_is_measured(
    model, extractor, reference, table, step: int, choice: Step
) -> None:
    """Two steps: brute force over the very same seeds gives the table's prediction."""
    full = full_plan(model, "ddim", 2, 1.5)
    plan = full.with_steps([choice if k == step else kept for k, kept in enumerate(full.steps)])
    drawn = sample(
        model, balanced_labels(80, 10), plan=plan, num_steps=2, cfg_scale=1.5, seed=SETTINGS.seed, batch_size=32
    )
    measured = frechet_distance(moments(extractor.features(as_rgb(drawn.pictures))), reference)
    predicted = Predictor(table, full.timesteps).predict(plan)
    assert predicted == pytest.approx(measured, rel=1e-5)
    assert abs(measured - Predictor(table, full.timesteps).predict(full)) > 1e-3 * measured


def test_bands_are_drawn_in_any_order(model) -> None:
    sampler, choice = OwnSampler(model, num_steps=4), Step.parse("2|2")
    full, *there = sampler.replaced((0, 1), [[0, 1], [2, 3], [1, 2], [3]], [choice])
    again, *back = sampler.replaced((0, 1), [[3], [1, 2], [2, 3], [0, 1]], [choice])
    assert torch.equal(full, again)
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert len({tuple(part.flatten().tolist()) for part in (full, *there)}) == 5


STEPS = tuple(map(Step.parse, ("6|6", "6", "4|2", "4|e2", "2", "2+", "4+|held", "2|held")))


def with_ground(steps: list[Step]) -> list[Step]:
    """Take the forecasts away that no full-depth step comes before."""
    first = next((k for k, step in enumerate(steps) if step.depth == 6), len(steps))
    return [replace(step, forecast=step.forecast and k > first) for k, step in enumerate(steps)]


@settings(max_examples=25)
@given(data=st.data(), solver=st.sampled_from(("ddim", "unipc", "ddpm")))
def test_variations_are_what_each_plan_draws_alone(model, data: st.DataObject, solver: str) -> None:
    """They share the steps before the first changed one: the solver's memory, held guidance and gaps of forecasts."""
    chosen = st.lists(st.sampled_from(STEPS), min_size=4, max_size=4)
    full = full_plan(model, solver, 4, 1.5)
    plan, *others = (full.with_steps(with_ground(data.draw(chosen))) for _ in range(4))
    sampler, indices = OwnSampler(model, solver, 4, 1.5), (0, 3, 4)
    varied = list(sampler.variations(indices, plan, others))
    for one, found in zip((plan, *others), varied, strict=True):
        alone, guidance = start(model, batch := batch_in_turn(model, indices, sampler.seed), solver, 4), Guidance(1.5)
        expected = sampler.to_pictures(advance(model, batch, alone, one, guidance).x)
        assert torch.equal(found, expected)


def test_moments_around_a_plan_are_those_of_each_plan(model, extractor) -> None:
    full = full_plan(model, "unipc", 3, 1.5)
    others = [full.with_steps([*full.steps[:2], step]) for step in STEPS[2:5]]
    options = {"num_pictures": 70, "seed": 5, "batch_size": 32}
    around = measure_around(model, extractor, full, others, **options)
    for plan, found in zip((full, *others), around, strict=True):
        alone = measure_moments(model, extractor, plan, **options)
        torch.testing.assert_close((found.mean, found.second), (alone.mean, alone.second))
    assert len(around) == 4


def test_an_interrupted_measurement_goes_on(model, extractor, reference, table, tmp_path, monkeypatch) -> None:
    ticks = itertools.count()  # the clock is looked at when a call begins, after each batch, and at the end
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    partial = tmp_path / "table.partial"
    cost = table.cost

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    measure = {"num_steps": 2, "settings": SETTINGS, "partial": partial, "cost": cost}
    with pytest.raises(Stop):
        measure_shifts(model, extractor, reference, on_progress=stop, **measure)
    seen, told = [], []
    follow = {"on_progress": lambda d, t: seen.append((d, t)), "on_measured": told.append}
    again = measure_shifts(model, extractor, reference, **follow, **measure)
    assert told == [1 + 3]  # one batch before the stop; then two, and the end
    assert 0 < len(seen) < seen[-1][1]  # some batches were not run a second time
    assert torch.allclose(again.mean, table.mean)
    assert torch.allclose(again.second, table.second)


FORECASTS = replace(SETTINGS, choices=(*SETTINGS.choices, "2+", "4+"), forecast_ages=2)


@pytest.mark.parametrize(
    "part",
    [
        replace(SETTINGS, choices=SETTINGS.choices[2:0:-1]),
        replace(SETTINGS, choices=(SETTINGS.choices[1], "4+"), forecast_ages=1),
        FORECASTS,
    ],
)
def test_a_part_of_a_table_is_what_would_be_measured(model, extractor, reference, part: CalibrationSettings) -> None:
    whole = measure_shifts(model, extractor, reference, num_steps=2, settings=FORECASTS)
    measured = measure_shifts(model, extractor, reference, num_steps=2, settings=part, cost=whole.cost)
    taken = part_of(whole, OwnSampler(model, "ddim", 2, 1.5, seed=part.seed), part)
    assert (taken.choices, taken.ages, taken.edges) == (measured.choices, measured.ages, measured.edges)
    assert torch.equal(taken.mean, measured.mean)
    assert torch.equal(taken.second, measured.second)


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({"choices": ("2",)}, {}),
        ({"num_pictures": 90}, {}),
        ({"num_bands": 1}, {}),
        ({"choices": ("2+",), "forecast_ages": 1}, {}),
        ({}, {"seed": 7}),
        ({}, {"num_steps": 3}),
        ({}, {"solver": "unipc"}),
        ({}, {"cfg_scale": 3.0}),
    ],
)
def test_no_part_of_a_table_is_another_measurement(model, table, changes: dict, drawn: dict) -> None:
    sampler = replace(OwnSampler(model, "ddim", 2, 1.5), **drawn)
    assert part_of(table, OwnSampler(model, "ddim", 2, 1.5), SETTINGS) is not None
    assert part_of(table, sampler, replace(SETTINGS, **changes)) is None


def test_sums_of_another_measurement_are_not_used(model, extractor, reference, table, tmp_path) -> None:
    partial = tmp_path / "table.partial"
    other = replace(SETTINGS, seed=7)
    measure_shifts(model, extractor, reference, num_steps=2, settings=other, partial=partial, cost=table.cost)
    again = measure_shifts(
        model, extractor, reference, num_steps=2, settings=SETTINGS, partial=partial, cost=table.cost
    )
    assert torch.allclose(again.mean, table.mean)


def test_calibrate_reports_predicted_and_measured(model, extractor, table) -> None:
    plan = calibrate(model, budget=0.8, num_steps=3, table=table, extractor=extractor)
    assert plan.figures["predicted_share_of_time"] <= 0.8
    fresh = measure_moments(model, extractor, plan, num_pictures=80, seed=SETTINGS.seed + 1)
    assert plan.figures["measured_fd"] == pytest.approx(frechet_distance(fresh, table.reference), rel=1e-3)
    assert (plan.backbone, plan.exits) == (model.identity.backbone, model.identity.exits)


def test_a_flow_is_calibrated_by_its_usual_solver(make_model, extractor, reference) -> None:
    """Where no solver is named, the process says which, from the table to the plan and its measurement."""
    few = replace(SETTINGS, num_pictures=66, choices=("2|2", "6"))
    made = make_model(learn_variance=False)
    flow = DynamicDepth(made.backbone, made.exits, process=RectifiedFlow())
    plan = calibrate(flow, budget=0.7, num_steps=2, extractor=extractor, reference=reference, settings=few)
    assert plan.solver == "flow-euler"
    assert plan.figures["measured_fd"] > 0
    drawn = sample(flow, [3, 7], plan=plan)
    assert torch.equal(drawn.pictures, sample(flow, [3, 7], plan=plan, solver="flow-euler").pictures)
    table = measure_bases(flow, measure_shifts(flow, extractor, reference, num_steps=2, settings=few), extractor)
    chosen = calibrate_steps(flow, LatencyBudget(0.5, 10), table=table)
    assert chosen.solver == table.solver == "flow-euler"


def test_full_depth_is_measured_once_at_every_step_count(model, extractor, table, tmp_path) -> None:
    path, seen = tmp_path / "table.safetensors", []
    bases = {"into": path, "on_progress": lambda done, total: seen.append((done, total))}
    more = measure_bases(model, table, extractor, solver="unipc", step_grid=(3, 1, 3), **bases)
    assert (more.step_counts("unipc"), more.step_counts("ddim")) == ((1, 3), (2,))
    full = full_plan(model, "unipc", 3, 1.5)
    alone = measure_moments(model, extractor, full, num_pictures=80, seed=SETTINGS.seed)
    assert torch.equal(more.bases["unipc", 3].second, alone.second)
    assert seen == [(3, 4), (4, 4)]
    stored = ShiftTable.load(path)
    again = measure_bases(model, stored, extractor, solver="unipc", step_grid=(1, 2), **bases)
    assert seen[2:] == [(2, 2)]
    assert again.step_counts("unipc") == (1, 2, 3)
    assert measure_bases(model, table, extractor, step_grid=(2,)) is table  # its own steps
    for bad in ((0,), (2, 1001)):
        with pytest.raises(InputError, match="--step-grid"):
            measure_bases(model, table, extractor, step_grid=bad)


def test_a_plan_is_searched_from_moments_that_the_table_holds(model, extractor, table) -> None:
    held = measure_bases(model, table, extractor, step_grid=(3,))
    plans = [calibrate(model, budget=0.8, num_steps=3, table=t, extractor=extractor) for t in (table, held)]
    assert plans[0].steps == plans[1].steps
    assert plans[0].figures == plans[1].figures


def test_steps_are_chosen_and_confirmed_by_measurement(model, extractor, table) -> None:
    held = measure_bases(model, table, extractor, step_grid=(1, 3))
    goal = LatencyBudget(0.6, reference_steps=3)
    chosen = calibrate_steps(model, goal, table=held)
    plan = calibrate_steps(model, goal, table=held, extractor=extractor, rounds=6)
    assert plan.steps == chosen.steps
    assert plan.num_steps in (1, 2, 3)
    f = plan.figures
    fresh = measure_moments(model, extractor, plan, num_pictures=80, seed=SETTINGS.seed + 1)
    assert f["measured_fd"] == pytest.approx(frechet_distance(fresh, table.reference), rel=1e-3)
    full = full_plan(model, "ddim", 3, 1.5)
    fresh = measure_moments(model, extractor, full, num_pictures=80, seed=SETTINGS.seed + 1)
    assert f["measured_fd_reference"] == pytest.approx(frechet_distance(fresh, table.reference), rel=1e-3)
    assert f["predicted_share_of_reference"] <= 0.6
    assert 0 < f["measured_share_of_reference_low"] <= f["measured_share_of_reference_high"]


def test_a_table_of_another_model_is_refused(make_model, table) -> None:
    with pytest.raises(InputError, match="backbone"):
        plan_on_table(make_model(seed=5), table, budget=0.8, solver="ddim", num_steps=2)
    with pytest.raises(InputError, match="backbone"):
        calibrate_steps(make_model(seed=5), LatencyBudget(0.5), table=table)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("depths", [(1, 2, 3, 4), tuple(range(1, 13)), (4, 8, 12, 16, 20, 24, 28)])
def test_default_choices_can_be_run_and_leave_the_full_step_out(depths: tuple[int, ...], guided: bool) -> None:
    choices = default_choices(depths, guided)
    assert Step.equal(depths[-1], guided) not in choices
    assert len(set(choices)) == len(choices)
    assert all(set(choice.exits) <= set(depths) for choice in choices)
    assert {type(choice.guide) for choice in choices} == ({NoGuide, Unconditional} if guided else {NoGuide})
    assert any(choice.guide not in (NoGuide(), Unconditional(choice.depth)) for choice in choices) == guided
    more = default_choices(depths, guided, held=True)
    assert set(more) - set(choices) == ({Step(choice.depth, Held()) for choice in more} if guided else set())
    own = set(default_choices(depths, guided, own_guides=True)) - set(choices)
    assert all(isinstance(choice.guide, OwnExit) and set(choice.exits) <= set(depths) for choice in own)
    assert bool(own) == guided


def test_cost_parts_are_positive_and_deeper_costs_more(model) -> None:
    cost = measure_cost(model, batch_size=4, rounds=3)
    full = full_plan(model, "ddim", 3, 1.5)
    assert cost.share_of_time(full) == pytest.approx(1)
    seconds = [cost.step_seconds(Step.equal(d, guided=True)) for d in model.depths]
    assert seconds[:-1] == sorted(seconds[:-1])
    assert all(s > 0 for s in seconds)


def test_many_features_are_reduced_to_leading_components(model, extractor, monkeypatch) -> None:
    """As for Inception's 2,048: the table holds the directions, and says what it was measured with."""
    from dyndit.calibration import measure as measuring

    monkeypatch.setattr(measuring, "MAX_FEATURES", 32)
    monkeypatch.setattr(measuring, "NUM_COMPONENTS", 8)
    real = load_digits().uint8()[:300]
    settings = replace(SETTINGS, num_pictures=20, batch_size=20)
    plan = calibrate(model, budget=0.8, num_steps=2, extractor=extractor, reference=real, settings=settings)
    assert plan.figures["measured_fd"] > 0
    reducing, reference = measuring.reduced(extractor, real)
    assert reference.mean.shape == (8,)
    assert reducing.fingerprint != extractor.fingerprint
    full = moments(extractor.features(as_rgb(real))).covariance
    assert reference.covariance.trace() <= full.trace()
    assert reference.covariance.trace() > 8 / 64 * full.trace()  # leading ones, not any
    with pytest.raises(InputError, match="features"):
        measure_shifts(model, extractor, moments(extractor.features(as_rgb(real))), num_steps=2, settings=settings)
