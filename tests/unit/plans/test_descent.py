"""Plans improved by measuring their neighbours: never worse where they are measured, and within the budget."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.errors import InputError
from dyndit.plans.descent import Descent, descended
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import SearchSettings, search
from dyndit.plans.table import ShiftTable
from dyndit.stats import Moments, frechet_distance
from support.tables import full_plan, random_table

Measured = dict[tuple, float]


def world(
    table: ShiftTable, full: DepthPlan, moved: Callable[[DepthPlan], float]
) -> tuple[Callable[[DepthPlan, Sequence[DepthPlan]], list[Moments]], Measured]:
    """A world in which the prediction's means are off by `moved(plan)`, and what was measured in it."""
    predictor, distances = Predictor(table, full.timesteps), {}

    def one(plan: DepthPlan) -> Moments:
        mean, covariance = (m[0] for m in predictor.moments(predictor.choice(plan)[None]))
        found = Moments.of_covariance(mean + moved(plan), covariance, table.base.num)
        distances[plan.steps] = frechet_distance(found, table.reference)
        return found

    return lambda plan, others: [one(each) for each in (plan, *others)], distances


def shallow_pairs(plan: DepthPlan) -> float:
    """Errors of neighbouring steps that make each other worse."""
    return 0.3 * sum(a < 4 and b < 4 for a, b in zip(plan.depths, plan.depths[1:], strict=False))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1_000), rounds=st.integers(1, 3), width=st.integers(1, 6))
def test_it_is_the_best_of_what_was_measured(seed: int, rounds: int, width: int) -> None:
    table = random_table(num_steps=5, num_depths=4, seed=seed)
    full = full_plan(table)
    measure, distances = world(table, full, shallow_pairs)
    first = search(table, full, 0.6)
    plan = descended(table, full, first, measure, descent=Descent(rounds, width))
    assert len(distances) <= 1 + rounds * width
    assert plan.figures["descended_fd"] == min(distances.values()) == distances[plan.steps]
    assert plan.figures["descended_fd_from"] == distances[first.steps]
    assert table.cost.share_of_time(plan) <= 0.6 * (1 + 1e-9)
    assert plan.figures["predicted_share_of_time"] == table.cost.share_of_time(plan)
    assert (plan.router, plan.budget) == ("descended", 0.6)


def test_where_shifts_add_up_the_searched_plan_stays() -> None:
    """A plan that no one or two moves improve in the prediction is not left where the prediction is true."""
    table = random_table(num_steps=4, num_depths=4, seed=3)
    full = full_plan(table)
    measure, _ = world(table, full, lambda plan: 0.0)
    first = search(table, full, 0.6)
    plan = descended(table, full, first, measure)
    assert plan.steps == first.steps
    assert plan.figures["descended_fd"] == pytest.approx(plan.figures["predicted_fd"])
    assert plan.figures["predicted_fd"] == pytest.approx(first.figures["predicted_fd"])


def test_it_wins_where_the_prediction_is_wrong_and_goes_further_in_more_rounds() -> None:
    gains = []
    for seed in range(6):
        table = random_table(num_steps=6, num_depths=4, seed=seed)
        full = full_plan(table)
        measure, _ = world(table, full, shallow_pairs)
        first = search(table, full, 0.6)
        plans = [descended(table, full, first, measure, descent=Descent(rounds, 4)) for rounds in (1, 4)]
        least = [plan.figures["descended_fd"] for plan in plans]
        assert least[0] >= least[1]
        gains.append((plans[0].figures["descended_fd_from"] - least[0], least[0] - least[1]))
    assert max(gain for gain, _ in gains) > 0.1
    assert max(more for _, more in gains) > 0.01


def test_what_the_search_may_not_take_is_not_drawn() -> None:
    table = random_table(num_steps=4, num_depths=4, seed=5)
    full = full_plan(table)
    measure, distances = world(table, full, shallow_pairs)
    effort = SearchSettings(whole=False)
    descended(table, full, search(table, full, 0.7, settings=effort), measure, settings=effort)
    assert not any(table.full_step in steps for steps in distances)
    assert len(distances) > 1


def test_the_best_plan_of_a_smaller_budget_is_a_start_too() -> None:
    """Where what more time buys was measured worse, the plan of less time stays."""
    table = random_table(num_steps=5, num_depths=4, seed=2)
    full = full_plan(table)
    measure, distances = world(table, full, lambda plan: 0.2 * sum(step.work().blocks for step in plan.steps))
    plans: list[DepthPlan] = []
    for budget in (0.4, 0.5, 0.6, 0.8):
        first = search(table, full, budget, starts=plans)
        plans.append(descended(table, full, first, measure, starts=plans, descent=Descent(1, 2)))
    least = [plan.figures["descended_fd"] for plan in plans]
    assert least == sorted(least, reverse=True)
    assert [plan.budget for plan in plans] == [0.4, 0.5, 0.6, 0.8]
    assert all(plan.figures["descended_fd"] == distances[plan.steps] for plan in plans)


def test_the_scale_that_measures_best_stays() -> None:
    """The last plan is drawn at every scale; its own stays if none is better, and prefixes are not shared."""
    table = random_table(num_steps=3, num_depths=4, seed=7)
    full = full_plan(table)
    measure, _ = world(table, full, lambda plan: abs(plan.cfg_scale - 2.5))
    drawn = []

    def noted(plan: DepthPlan, others: Sequence[DepthPlan]) -> list[Moments]:
        drawn.append((plan.cfg_scale, len(others)))
        return measure(plan, others)

    first = search(table, full, 0.7)
    plan = descended(table, full, first, noted, descent=Descent(rounds=0, scales=(2.0, 2.5, 3.0)))
    assert (plan.steps, plan.cfg_scale) == (first.steps, 2.5)
    assert drawn == [(first.cfg_scale, 0), (2.0, 0), (2.5, 0), (3.0, 0)]
    assert plan.figures["descended_fd"] < plan.figures["descended_fd_from"]
    again = descended(table, full, plan, measure, starts=[first], descent=Descent(rounds=0, scales=(2.0, 3.0)))
    assert again.cfg_scale == 2.5


def test_impossible_descents_are_refused() -> None:
    table = random_table(num_steps=2, num_depths=4, seed=0)
    full = full_plan(table)
    with pytest.raises(InputError, match="no budget"):
        descended(table, full, full, lambda plan, others: pytest.fail("was drawn"))
    few = Moments(table.reference.mean, table.reference.second, len(table.reference.mean))
    with pytest.raises(InputError, match=r"descent: (\d+) pictures for \1 features"):
        descended(table, full, search(table, full, 0.8), lambda plan, others: [few] * (1 + len(others)))
    for changes, said in (({"width": 0}, "width 0"), ({"rounds": -1}, "rounds -1"), ({"scales": (1.0,)}, "scale 1,")):
        with pytest.raises(InputError, match=said):
            Descent(**changes)
