"""The searched router: the additive prediction, and the search on it."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.errors import CheckpointError, InputError
from dyndit.plans.plan import REUSED, DepthPlan, own_exit
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import SearchSettings, search
from dyndit.plans.table import ShiftTable
from dyndit.stats import frechet_distance, moments
from support.tables import COST, NUM_BLOCKS, full_plan, random_table, table_from


def best_by_enumeration(table: ShiftTable, budget: float) -> tuple[float, tuple]:
    predictor = Predictor(table, full_plan(table).timesteps)
    choices = torch.tensor(list(product(range(len(predictor.pairs)), repeat=table.num_bands)))
    limit = budget * predictor.seconds[-1] * table.num_bands
    choices = choices[predictor.seconds[choices].sum(1) <= limit * (1 + 1e-9)]
    values = predictor.distances(choices)
    best = int(values.argmin())
    return values[best].item(), tuple(predictor.pairs[i] for i in choices[best].tolist())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), budget=st.sampled_from([0.45, 0.6, 0.8, 1.0]))
def test_search_finds_the_best_plan_of_a_small_table(seed: int, budget: float) -> None:
    table = random_table(num_steps=4, num_depths=4, seed=seed)
    plan = search(table, full_plan(table), budget)
    value, _ = best_by_enumeration(table, budget)
    assert plan.figures["predicted_fd"] == pytest.approx(value, abs=1e-9)
    assert table.cost.share_of_time(plan) <= budget * (1 + 1e-6)


def test_the_small_tables_are_worth_searching() -> None:
    """Guard of the test above: the best plans differ from step to step, and between budgets."""
    table = random_table(4, 4, seed=7)
    plans = {budget: best_by_enumeration(table, budget)[1] for budget in (0.45, 0.6, 0.8)}
    assert len(set(plans.values())) == 3
    assert any(len(set(pairs)) > 1 for pairs in plans.values())


def test_prediction_is_exact_where_each_step_moves_pictures_of_its_own() -> None:
    """Two steps; the first exit changes the first half of the pictures, the second the rest: shifts add exactly."""
    g = torch.Generator().manual_seed(0)
    base, reference = (torch.randn(80, 5, generator=g, dtype=torch.float64) for _ in range(2))
    change = torch.randn(80, 5, generator=g, dtype=torch.float64)
    first, second = base.clone(), base.clone()
    first[:40] += change[:40]
    second[40:] += change[40:]
    pair = (2, 2)
    table = table_from({(0, pair): first, (1, pair): second}, base, reference, (900.0, 400.0, 0.0), (pair,))
    full = full_plan(table)
    both = full.with_pairs([pair, pair])
    measured = frechet_distance(moments(base + change), moments(reference))
    assert Predictor(table, full.timesteps).predict(both) == pytest.approx(measured, rel=1e-9)
    assert measured != pytest.approx(frechet_distance(moments(base), moments(reference)), rel=1e-3)


@pytest.mark.parametrize("step", [0, 1])
def test_prediction_is_exact_for_a_single_replaced_step(step: int) -> None:
    table = random_table(2, 3, seed=3)
    g = torch.Generator().manual_seed(3)
    base = torch.randn(64, 3, generator=g, dtype=torch.float64)
    full = full_plan(table)
    pairs = list(full.pairs)
    pairs[step] = (2, 2)
    index = table.pairs.index((2, 2))
    mean = base.mean(0) + table.mean[step, index]
    second = base.T @ base / 64 + table.second[step, index]
    covariance = (second - torch.outer(mean, mean)) * 64 / 63
    predictor = Predictor(table, full.timesteps)
    assert predictor.predict(full.with_pairs(pairs)) == pytest.approx(predictor.frechet(mean, covariance).item())


def test_weights_of_the_tables_own_steps_are_the_identity() -> None:
    table = random_table(5, 2, seed=0)
    assert torch.equal(table.weights(full_plan(table).timesteps), torch.eye(5, dtype=torch.float64))


@given(steps=st.integers(1, 40), bands=st.integers(1, 6))
def test_steps_share_out_every_band_once(steps: int, bands: int) -> None:
    table = random_table(bands, 2, seed=0)
    top = table.edges[0]
    timesteps = [top * (steps - k) / steps for k in range(steps)]
    assert torch.allclose(table.weights(timesteps).sum(0), torch.ones(bands, dtype=torch.float64))


def test_slopes_are_the_derivative_of_the_distance() -> None:
    """Moving a small part of a step from one pair to another changes the distance by the difference of slopes."""
    table = random_table(3, 4, seed=5)
    predictor = Predictor(table, full_plan(table).timesteps)
    choice = torch.tensor([0, 2, 1])
    slopes = predictor.slopes(choice)
    a, h = predictor.coverage(choice[None]), 1e-6
    moved = a.clone()
    moved[0, 1] -= h * torch.nn.functional.one_hot(torch.tensor(2), 4)
    moved[0, 1] += h * torch.nn.functional.one_hot(torch.tensor(0), 4)
    values = []
    for coverage in (a, moved):
        predictor.coverage = lambda _, coverage=coverage: coverage
        values.append(predictor.distances(choice[None]).item())
    assert (values[1] - values[0]) / h == pytest.approx((slopes[1, 0] - slopes[1, 2]).item(), rel=1e-3, abs=1e-5)


def test_more_budget_is_never_predicted_worse() -> None:
    table = random_table(6, 4, seed=11)
    values = [search(table, full_plan(table), b).figures["predicted_fd"] for b in (0.4, 0.5, 0.6, 0.8, 1.0)]
    assert values == sorted(values, reverse=True)


def test_a_given_start_is_never_made_worse_and_never_breaks_the_budget() -> None:
    table = random_table(6, 4, seed=11)
    full, settings = full_plan(table), SearchSettings(num_starts=1, num_kicks=0, max_moves=0)
    good = search(table, full, 0.6)
    quick = search(table, full, 0.6, settings=settings)
    assert search(table, full, 0.6, settings=settings, starts=[good]).pairs == good.pairs != quick.pairs
    assert search(table, full, 0.4, settings=settings, starts=[good]).figures["predicted_share_of_time"] <= 0.4


def test_table_round_trip(tmp_path) -> None:
    table = random_table(3, 3, seed=2)
    table.save(tmp_path / "table.safetensors")
    again = ShiftTable.load(tmp_path / "table.safetensors")
    full = full_plan(table)
    assert again.pairs == table.pairs
    assert again.cost == table.cost
    plan = full.with_pairs([(1, 1), (2, 2), (4, 4)])
    assert Predictor(again, full.timesteps).predict(plan) == pytest.approx(
        Predictor(table, full.timesteps).predict(plan), rel=1e-5
    )


@pytest.mark.parametrize("content", [b"", b"not a table", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_tables_are_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"table\.safetensors"):
        ShiftTable.load(path)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.1, 0.05])
def test_impossible_budgets_are_refused(budget: float) -> None:
    table = random_table(3, 3, seed=2)
    with pytest.raises(InputError, match="--budget"):
        search(table, full_plan(table), budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_no_worse_than_any_pair_at_every_step(seed: int) -> None:
    """Also where a table has none of the pairs that ramps are made of: one branch alone, or guided by its own exit."""
    table = random_table(num_steps=8, num_depths=4, seed=seed)
    table = replace(table, pairs=((1, 0), (2, 0), (3, own_exit(1))))
    full, predictor = full_plan(table), Predictor(table, full_plan(table).timesteps)
    plan = search(table, full, 0.5, settings=SearchSettings(num_kicks=0))
    constants = torch.arange(len(predictor.pairs))[:, None].repeat(1, full.num_steps)
    within = predictor.seconds[constants].sum(1) <= 0.5 * predictor.seconds[-1] * full.num_steps
    assert within.any()
    assert plan.figures["predicted_fd"] <= predictor.distances(constants[within]).min().item() + 1e-9


def test_no_plan_is_cheaper_than_the_least_share() -> None:
    table = random_table(3, 3, seed=2)
    full = full_plan(table)
    cheapest = search(table, full, table.least_share)
    assert table.cost.share_of_time(cheapest) == pytest.approx(table.least_share)
    with pytest.raises(InputError, match="cheapest plan"):
        search(table, full, 0.99 * table.least_share)


def test_cost_of_unequal_branches() -> None:
    """Shared up to the shallower branch, alone from there on."""
    assert COST.step_seconds(4, 2) == pytest.approx(0.05 + 0.1 + 2 * 1.9 + 0.1 + 2 * 1.0 + 0.1)
    assert COST.step_seconds(2, 4) == COST.step_seconds(4, 2)
    assert COST.step_seconds(3, 0) == pytest.approx(0.05 + 0.1 + 3 * 1.0 + 0.1)
    assert COST.step_seconds(3, REUSED) == COST.step_seconds(3, 0)
    assert COST.step_seconds(3, own_exit(1)) == pytest.approx(COST.step_seconds(3, 0) + 0.1)
    assert COST.share_of_time(DepthPlan.full((9, 5), NUM_BLOCKS, "ddim", 1.5)) == pytest.approx(1)
