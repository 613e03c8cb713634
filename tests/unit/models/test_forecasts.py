"""Forecasts of what full depth adds to an exit: exact where it changes linearly, learned corrections, plans, tables."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.analysis.metrics.macs import plan_macs, sampling_macs
from dyndit.calibration.measure import CalibrationSettings, forecast_choices, measure_shifts
from dyndit.calibration.samplers import OwnSampler
from dyndit.errors import InputError, PlanError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.forecasts import NUM_TERMS, GapRegression, Gaps, basis, forecast_gap, remembered
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import _programmed, search
from dyndit.plans.step import Step, steps
from dyndit.plans.table import ShiftTable
from dyndit.process import DDPM
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start
from dyndit.sampling.sample import sample
from dyndit.stats import Moments, moments
from dyndit.storage import load as checkpoints
from dyndit.training.distill import Distill
from support.tables import COST, NUM_BLOCKS, random_table
from support.tables import full_plan as table_plan

PROCESS = DDPM()
LOG_SNR = PROCESS.log_snr_at


def gap_at(timestep: float, memory, gains: torch.Tensor | None = None, depth: int = 2) -> torch.Tensor:
    return forecast_gap(memory, depth, timestep, PROCESS, gains)


def gaps_along(values, timesteps) -> tuple[Gaps, ...]:
    return tuple(Gaps(t, {2: values(t)}) for t in timesteps)


@given(times=st.lists(st.integers(0, 999), min_size=3, max_size=3, unique=True), seed=st.integers(0, 99))
def test_gaps_linear_in_log_snr_are_forecast_exactly(times: list[int], seed: int) -> None:
    earlier, later, now = sorted(times, reverse=True)
    level, slope = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    memory = gaps_along(lambda t: level + LOG_SNR(t) * slope, (earlier, later))
    torch.testing.assert_close(gap_at(now, memory), level + LOG_SNR(now) * slope, rtol=1e-6, atol=1e-5)


def test_of_one_remembered_step_the_gap_is_taken_as_it_was() -> None:
    gap = torch.randn(2, 1, 2, 2)
    assert torch.equal(forecast_gap(remembered((), 900, {2: gap}), 2, 500, PROCESS), gap)


def test_two_steps_are_remembered() -> None:
    memory = ()
    for timestep in (900, 700, 500):
        memory = remembered(memory, timestep, {2: torch.full((1,), float(timestep))})
    assert [gaps.timestep for gaps in memory] == [700, 500]


def test_a_correction_of_zero_changes_no_bit() -> None:
    memory = gaps_along(lambda t: torch.full((1, 1, 2, 2), t / 7), (900, 700))
    assert torch.equal(gap_at(500, memory, torch.zeros(2, NUM_TERMS)), gap_at(500, memory))


def test_the_regression_finds_the_correction_that_made_the_gaps() -> None:
    """Each gap is the corrected forecast from the two before it: the regression has nothing else to find."""
    true = torch.tensor([[-0.2, 0.1, -0.1, 0.0], [-0.5, 0.0, 0.2, 0.1]])
    regression = GapRegression((2,), PROCESS, oldest=1, ridge=1e-9)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        timesteps = torch.randperm(1000, generator=generator)[:8].sort(descending=True).values.tolist()
        made = [Gaps(t, {2: torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)}) for t in timesteps[:2]]
        for t in timesteps[2:]:
            made.append(Gaps(t, {2: gap_at(t, tuple(made[-2:]), true)}))
        regression.add(made[1:])
        # The second of `made` has one step before it in the regression's eyes; only what follows is the correction's.
        first = GapRegression((2,), PROCESS, oldest=1)
        first.add(made[1:3])
        regression.gram -= first.gram
        regression.missed -= first.missed
    torch.testing.assert_close(regression.gains()[0], true, rtol=0, atol=2e-3)


def test_where_nothing_was_seen_the_correction_is_zero() -> None:
    assert torch.equal(GapRegression((1, 2), PROCESS).gains(), torch.zeros(2, 2, NUM_TERMS))


def plan_of(model: DynamicDepth, *texts: str, cfg_scale: float = 1.5) -> DepthPlan:
    return full_plan(model, "ddim", len(texts), cfg_scale).with_steps(steps(*texts))


@torch.no_grad()
def test_a_step_that_forecasts_is_its_exit_and_the_forecast(model: DynamicDepth) -> None:
    """Against the sum written out: two steps at full depth, one that leaves at 2."""
    plan = plan_of(model, "6", "6", "2+", cfg_scale=1.0)
    seen: list[tuple] = []

    class Watched(DynamicDepth):
        def predict(self, step, memory):
            predictions, memory = super().predict(step, memory)
            kept = tuple(replace(branch, x=branch.x.clone(), t=branch.t.clone()) for branch in step.branches)
            seen.append((replace(step, branches=kept), predictions[0]))
            return predictions, memory

    sample(Watched(model.backbone, model.exits), [3, 4], plan=plan, num_steps=3, cfg_scale=1.0)
    gaps = []
    for step, prediction in seen[:2]:
        exit_at_2 = model(step.x_t, step.times, step.labels[0], depth=2)
        gaps.append(Gaps(step.timesteps[step.k], {2: prediction - exit_at_2}))
    step, prediction = seen[2]
    expected = model(step.x_t, step.times, step.labels[0], depth=2) + forecast_gap(
        tuple(gaps), 2, step.timesteps[2], PROCESS
    )
    torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)


def test_remembering_changes_no_bit_of_full_depth(model: DynamicDepth) -> None:
    """The steps before the forecast are the full plan's, guided or not, whatever exits they also ran."""
    full = full_plan(model, "ddim", 4, 1.5)
    plan = full.with_steps([*full.steps[:3], Step.parse("2+|held")])
    states: dict[str, list] = {"full": [], "forecast": []}

    class Watched(DynamicDepth):
        def predict(self, step, memory):
            states[self.name].append(step.x_t)
            return super().predict(step, memory)

    for name, each in (("full", full), ("forecast", plan)):
        watched = Watched(model.backbone, model.exits)
        watched.name = name
        sample(watched, [1, 2, 3], plan=each, num_steps=4)
    assert all(torch.equal(a, b) for a, b in zip(states["full"], states["forecast"], strict=True))


def test_pictures_that_forecast_do_not_depend_on_their_batch_mates(model: DynamicDepth) -> None:
    plan = plan_of(model, "6|6", "2+|held", "6|3", "3+", "2+|e1")
    together = sample(model, [1, 2, 3], plan=plan, num_steps=5).pictures.int()
    alone = torch.cat([sample(model, [i + 1], plan=plan, num_steps=5, first_index=i).pictures for i in range(3)]).int()
    assert (together - alone).abs().max() <= 1
    assert torch.equal(sample(model, [1, 2, 3], plan=plan, num_steps=5).pictures.int(), together)  # no state is kept


def test_a_plan_that_forecasts_costs_what_its_sampling_computes(model: DynamicDepth) -> None:
    plan = plan_of(model, "6|6", "2+|held", "6|3", "3+", "2+|e1")
    assert [work.kept for work in plan.works] == [(2, 3), (), (2, 3), (), ()]
    assert sampling_macs(model, plan) == plan_macs(model, plan)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (("2+", "6", "6"), "step 0 forecasts, but no step before"),
        (("6", "2+|2", "6"), "beside an unconditional pass"),
        (("6", "2+|e2", "6"), "guided by its own exit at 2"),
        (("6", "6+", "6"), "forecasts at full depth"),
        (("6", "0+", "6"), r"step '0\+': expected a depth"),
    ],
)
def test_impossible_forecasts_are_refused(texts: tuple[str, ...], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        DepthPlan((900, 500, 100), texts, 6, "ddim", cfg_scale=1.5)


def test_a_plan_that_forecasts_survives_json_and_prints(make_model, tmp_path: Path) -> None:
    plan = DepthPlan((900, 500, 100), steps("6|6", "2+|held", "6"), 6, "ddim", cfg_scale=1.5)
    plan.save(tmp_path / "plan.json")
    assert DepthPlan.load(tmp_path / "plan.json") == plan
    assert " 2+|held " in str(plan)
    assert plan.share_of_blocks == (6 + 2 + 6 + 6) / 36
    with pytest.raises(PlanError, match="depth 2 has no exit"):
        bind(plan, make_model(layers=(3,)))


def test_exits_keep_their_correction(model: DynamicDepth, tmp_path: Path) -> None:
    plain = model.identity.exits
    model.exits.gains = torch.nn.Parameter(torch.randn(5, 2, NUM_TERMS))
    checkpoints.save(model, tmp_path)
    loaded = checkpoints.load(tmp_path)
    assert torch.equal(loaded.exits.gains, model.exits.gains)
    assert loaded.identity.exits == model.identity.exits != plain
    plan = plan_of(model, "6", "6", "2+")
    corrected = sample(model, [1], plan=plan, num_steps=3).pictures
    model.exits.gains = None
    assert not torch.equal(sample(model, [1], plan=plan, num_steps=3).pictures, corrected)


class Squares:
    """Features of tiny pictures: their pixels' means by quarter, and the squares."""

    name, fingerprint, projection = "squares", "squares", None

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        mean = torch.nn.functional.adaptive_avg_pool2d(pictures[:, :1].double() / 255, 2).flatten(1)
        return torch.cat([mean, mean.square()], dim=1)


def test_a_forecast_is_measured_at_its_age(model: DynamicDepth) -> None:
    """Of age 1 it is the plan with that step alone forecast; older ones are other pictures."""
    sampler = OwnSampler(model, "ddim", 4, 1.5)
    choice, plain = steps("2+|held", "2|held")
    bands = [[k] for k in range(4)]
    found = list(sampler.replaced(range(3), bands, [choice, choice], [1, 2]))[1:]
    for k in range(4):
        changed = [(choice if k else plain) if i == k else step for i, step in enumerate(sampler.full.steps)]
        expected = sample(
            model, [0, 1, 2], plan=sampler.full.with_steps(changed), num_steps=4, seed=sampler.seed
        ).pictures
        assert torch.equal(found[2 * k], expected)
    assert [torch.equal(found[2 * k], found[2 * k + 1]) for k in range(4)] == [True, True, False, False]


def test_a_table_with_forecasts_round_trips_and_plans(model: DynamicDepth, tmp_path: Path) -> None:
    table = measure_shifts(
        model,
        Squares(),
        random_moments(),
        num_steps=4,
        settings=CalibrationSettings(num_pictures=24, num_bands=4, batch_size=12, num_depths=3, forecast_ages=2),
        cost=replace(COST, num_blocks=6),
    )
    assert set(table.ages) == {0, 1, 2}
    assert len(table.ages) == len(table.choices) == table.mean.shape[1]
    table.save(tmp_path / "table.safetensors")
    loaded = ShiftTable.load(tmp_path / "table.safetensors")
    assert (loaded.ages, loaded.choices) == (table.ages, table.choices)
    for budget in (0.4, 0.7):
        for num_steps in (4, 7):
            plan = search(loaded, full_plan(model, "ddim", num_steps, 1.5), budget)
            bind(plan, model)
            assert loaded.cost.share_of_time(plan) <= budget * (1 + 1e-6)


def random_moments() -> Moments:
    return moments(torch.rand(64, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def test_forecasts_want_a_band_for_each_step(model: DynamicDepth) -> None:
    settings = CalibrationSettings(num_pictures=24, num_bands=2, batch_size=12, forecast_ages=1)
    with pytest.raises(InputError, match="--num-bands 2: forecasts are measured step by step"):
        measure_shifts(model, Squares(), random_moments(), num_steps=4, settings=settings, cost=COST)


def test_choices_that_forecast_run_no_second_pass() -> None:
    guided = steps("1+", "1+|held", "2+", "2+|held", "3+", "3+|held")
    assert forecast_choices((1, 2, 3, 6), guided=True) == guided
    assert forecast_choices((1, 2, 3, 6), guided=False) == steps("1+", "2+", "3+")


def forecasting_table(seed: int, num_steps: int = 4) -> ShiftTable:
    """A random table of the exits 1 to 3 without guidance, and the first one's forecasts at ages 1 and 2."""
    table = random_table(num_steps, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    shares = 0.05 + 0.2 * torch.rand(2, generator=generator, dtype=torch.float64)
    mean = torch.cat([table.mean, *(share * table.mean[:, :1] for share in shares)], dim=1)
    second = torch.cat([table.second, *(share * table.second[:, :1] for share in shares)], dim=1)
    choices = steps("1", "2", "3", "1+", "1+")
    return replace(table, choices=choices, ages=(0, 0, 0, 1, 2), mean=mean, second=second)


def ages_by_hand(depths: list[int]) -> list[int]:
    return [k - max((i for i in range(k) if depths[i] == NUM_BLOCKS), default=k) for k in range(len(depths))]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), picks=st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_a_choice_takes_the_entries_of_its_ages(seed: int, picks: list[int]) -> None:
    predictor = Predictor(forecasting_table(seed, 6), range(600, 0, -100))
    choices = torch.tensor([picks])
    settled, taken = predictor.entries.taken(choices)
    found = [predictor.choices[i] for i in settled[0].tolist()]
    ages = ages_by_hand([step.depth for step in found])
    for asked, step, entry, age in zip(
        (predictor.choices[i] for i in picks), found, taken[0].tolist(), ages, strict=True
    ):
        if step.forecast:
            assert age in (1, 2)
            assert entry == 2 + age  # after the three plain ones
        elif asked.forecast:
            assert step == Step(1)
            assert age == 0 or age > 2
    assert torch.equal(predictor.settled(settled), settled)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), budget=st.sampled_from([0.4, 0.55, 0.7]))
def test_search_finds_the_best_plan_that_may_forecast(seed: int, budget: float) -> None:
    table = forecasting_table(seed)
    full = table_plan(table)
    predictor = Predictor(table, full.timesteps)
    choices = torch.tensor(list(product(range(len(predictor.choices)), repeat=4)))
    choices = choices[(predictor.settled(choices) == choices).all(1)]
    choices = choices[predictor.seconds[choices].sum(1) <= budget * predictor.seconds[-1] * 4 * (1 + 1e-9)]
    best = predictor.distances(choices).min().item()
    plan = search(table, full, budget)
    assert plan.figures["predicted_fd"] == pytest.approx(best, abs=1e-9)
    assert table.cost.share_of_time(plan) <= budget * (1 + 1e-6)


def test_the_best_plans_of_these_tables_do_forecast() -> None:
    """Guard of the test above."""
    tables = [forecasting_table(seed) for seed in range(8)]
    assert (
        sum(
            any(step.forecast for step in search(t, table_plan(t), budget).steps)
            for t in tables
            for budget in (0.4, 0.55, 0.7)
        )
        >= 6
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), price=st.floats(0, 3))
def test_the_dynamic_program_finds_the_least_sum(seed: int, price: float) -> None:
    predictor = Predictor(forecasting_table(0, 5), range(500, 0, -100))
    values = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def total(choices: torch.Tensor) -> torch.Tensor:
        settled, taken = predictor.entries.taken(choices)
        sums = values.expand(len(choices), -1, -1).gather(2, taken[:, :, None])[:, :, 0].sum(1)
        wrong = (settled != choices).any(1)
        return (sums + price * predictor.seconds[choices].sum(1)).masked_fill(wrong, torch.inf)

    every = torch.tensor(list(product(range(len(predictor.choices)), repeat=5)))
    found = predictor.entries.programmed(values, predictor.seconds, price)
    assert total(found[None]).item() == pytest.approx(total(every).min().item(), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_programmed_plans_hold_the_budget_and_some_change_little(seed: int) -> None:
    """Reluctance keeps a plan near the one whose slopes it follows; the first plan knows none."""
    predictor = Predictor(forecasting_table(seed, 8), range(800, 0, -100))
    choice = torch.full((8,), 2)
    for limit in (float("inf"), predictor.spent(choice).item()):
        plans = torch.cat(_programmed(predictor, choice, limit))
        assert (predictor.spent(plans) <= limit).all()
        assert torch.equal(predictor.settled(plans), plans)
        changes = (plans != choice).sum(1)
        assert changes.min() < changes[0]
    values = predictor.entry_slopes(choice)
    greedy = predictor.entries.programmed(values, predictor.seconds, 0.0)
    sums = [values[range(8), predictor.entries.taken(plan[None])[1][0]].sum().item() for plan in (greedy, plans[0])]
    assert sums[0] <= sums[1] + 1e-12


PROGRAMMED = (
    "00000000 01010000 11210120 11211221 12211221 22211221 11210220 22212221 22210220 22212222 22222222",
    "00000000 00000100 02000100 02010100 02043100 02243100 02220100 02222100 02222120",
    "00000000 01000100 01110110 21120110 21121110 21121210 41321210 21421210 21221210 01120110 21120210 22222210",
)
"""Choices of the plans that the dynamic program found on 2026-11-29, around the third choice at all of 8 steps."""


@pytest.mark.parametrize(("seed", "found"), list(enumerate(PROGRAMMED)))
def test_the_dynamic_program_goes_by_these_prices_and_reluctances(seed: int, found: str) -> None:
    predictor = Predictor(forecasting_table(seed, 8), range(800, 0, -100))
    choice = torch.full((8,), 2)
    plans = torch.cat(_programmed(predictor, choice, predictor.spent(choice).item()))
    assert ["".join(map(str, plan)) for plan in plans.tolist()] == found.split()


def test_a_longer_sampling_ages_more_slowly() -> None:
    predictor = Predictor(forecasting_table(0, 4), range(396, -1, -50))  # 8 steps on a table of 4
    full, forecasting = len(predictor.choices) - 1, 3
    settled, taken = predictor.entries.taken(torch.tensor([[full] + [forecasting] * 7]))
    assert taken[0].tolist()[1:5] == [3, 3, 4, 4]
    assert tuple(predictor.choices[i] for i in settled[0].tolist()) == steps(
        "4|4", "1+", "1+", "1+", "1+", "1", "1", "1"
    )


def test_the_correction_is_learned_with_the_exits_and_forecasts_better(model: DynamicDepth) -> None:
    """Judged on pictures of another seed."""
    recipe = Distill(forecasts=True, num_steps=6)
    gains = recipe._gains(model)
    assert gains.shape == (5, 2, NUM_TERMS)
    assert gains.abs().sum() > 0
    errors = {}
    batch = Batch(torch.arange(8), tuple(range(8)), 7)
    trajectory, gaps, full = start(model, batch, "ddim", 6), [], full_plan(model, "ddim", 6, 1.5)
    for k in range(6):
        step = {"first": k, "stop": k + 1, "also_keep": model.exits.layers}
        gaps.append(advance(model, batch, trajectory, full, Guidance(1.5), **step).memory.gaps[-1])
    for name, correction in (("plain", None), ("learned", gains)):
        missed = [
            (gaps[k].by_depth[d] - gap_at(gaps[k].timestep, tuple(gaps[k - 2 : k]), of, d)).square().mean()
            for k in range(2, 6)
            for row, d in enumerate(model.exits.layers)
            for of in [None if correction is None else correction[row]]
        ]
        errors[name] = torch.stack(missed).mean().item()
    assert errors["learned"] < errors["plain"]
    assert basis(500, 500, PROCESS)[2:].abs().sum() == 0
