"""Plans corrected by measuring a few: exact where the truth is additive, better than the search where it is not."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.refined import refined
from dyndit.plans.search import search
from dyndit.plans.table import ShiftTable
from dyndit.stats import Moments, frechet_distance
from support.tables import full_plan, random_table


def additive(table: ShiftTable, full: DepthPlan) -> Callable[[DepthPlan], Moments]:
    """A world in which the prediction is true."""
    predictor = Predictor(table, full.timesteps)

    def measure(plan: DepthPlan) -> Moments:
        mean, covariance = (m[0] for m in predictor.moments(predictor.choice(plan)[None]))
        return Moments.of_covariance(mean, covariance, table.base.num)

    return measure


def test_where_shifts_add_up_the_first_plan_stays() -> None:
    table = random_table(num_steps=4, num_depths=4, seed=3)
    full, measured = full_plan(table), []
    true = additive(table, full)

    def measure(plan: DepthPlan) -> Moments:
        measured.append(plan)
        return true(plan)

    plan = refined(table, full, 0.6, measure, rounds=5)
    assert plan.steps == search(table, full, 0.6).steps
    assert len(measured) == 1  # found again, so there is nothing more to correct
    assert plan.figures["calibrated_fd"] == pytest.approx(plan.figures["predicted_fd"])
    assert plan.router == "refined"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1_000), rounds=st.integers(1, 4))
def test_it_is_the_best_of_what_was_measured(seed: int, rounds: int) -> None:
    """In a world where errors of neighbouring steps make each other worse."""
    table = random_table(num_steps=5, num_depths=4, seed=seed)
    full = full_plan(table)
    true, distances = additive(table, full), {}

    def measure(plan: DepthPlan) -> Moments:
        found = true(plan)
        shallow = sum(a < 4 and b < 4 for a, b in zip(plan.depths, plan.depths[1:], strict=False))
        moved = Moments.of_covariance(found.mean + 0.3 * shallow, found.covariance, found.num)
        distances[plan.steps] = frechet_distance(moved, table.reference)
        return moved

    plan = refined(table, full, 0.6, measure, rounds=rounds)
    assert len(distances) <= rounds + 1
    assert plan.figures["calibrated_fd"] == min(distances.values()) == distances[plan.steps]
    assert distances[search(table, full, 0.6).steps] >= plan.figures["calibrated_fd"]
    assert table.cost.share_of_time(plan) <= 0.6 * (1 + 1e-9)
    assert plan.figures["predicted_fd_full"] == pytest.approx(Predictor(table, full.timesteps).predict(full))


def test_a_correction_can_win() -> None:
    """Else the test above holds for a search that measures once and stops."""
    gains = []
    for seed in range(8):
        table = random_table(num_steps=5, num_depths=4, seed=seed)
        full = full_plan(table)
        true, first = additive(table, full), search(table, full, 0.6)

        def measure(plan: DepthPlan, true=true, first=first) -> Moments:
            found = true(plan)
            return Moments.of_covariance(found.mean + 2.0 * (plan.steps == first.steps), found.covariance, found.num)

        plan = refined(table, full, 0.6, measure, rounds=3)
        gains.append(frechet_distance(measure(first), table.reference) - plan.figures["calibrated_fd"])
    assert max(gains) > 1


def test_more_budget_is_never_measured_worse() -> None:
    """A smaller budget's plan stays where what a larger one buys was measured worse."""
    table = random_table(num_steps=5, num_depths=4, seed=2)
    full = full_plan(table)
    true = additive(table, full)

    def measure(plan: DepthPlan) -> Moments:
        found, deep = true(plan), sum(step.work().blocks for step in plan.steps)
        return Moments.of_covariance(found.mean + 0.2 * deep, found.covariance, found.num)

    alone, plans = [], []
    for budget in (0.4, 0.5, 0.6, 0.8):
        alone.append(refined(table, full, budget, measure, rounds=1))
        plans.append(refined(table, full, budget, measure, rounds=1, smaller=plans))
    distances = [plan.figures["calibrated_fd"] for plan in plans]
    assert distances == sorted(distances, reverse=True)
    assert any(a.figures["calibrated_fd"] > d for a, d in zip(alone, distances, strict=True))
    assert [plan.budget for plan in plans] == [0.4, 0.5, 0.6, 0.8]


def test_the_base_through_a_plan_predicts_what_was_measured() -> None:
    table = random_table(num_steps=4, num_depths=4, seed=1)
    full = full_plan(table)
    plan, predictor = search(table, full, 0.5), Predictor(table, full.timesteps)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 3, generator=generator, dtype=torch.float64) + 2
    measured = Moments(features.mean(0), features.T @ features / 64, 64)
    moved = Predictor(table, full.timesteps, predictor.base_through(plan, measured))
    assert moved.predict(plan) == pytest.approx(frechet_distance(measured, table.reference))
    assert moved.predict(full) != pytest.approx(predictor.predict(full))


def test_no_rounds_are_refused() -> None:
    table = random_table(num_steps=2, num_depths=4, seed=0)
    with pytest.raises(InputError, match="--refinements 0"):
        refined(table, full_plan(table), 0.6, lambda plan: pytest.fail("was drawn"), rounds=0)
