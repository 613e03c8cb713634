"""The searched router: the additive prediction, and the search on it."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dyndit.errors import CheckpointError, InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import SearchSettings, _kicked, search
from dyndit.plans.step import Step, steps
from dyndit.plans.table import ShiftTable
from dyndit.stats import frechet_distance, moments
from support.tables import COST, NUM_BLOCKS, full_plan, random_table, table_from


def best_by_enumeration(table: ShiftTable, budget: float) -> tuple[float, tuple]:
    predictor = Predictor(table, full_plan(table).timesteps)
    choices = torch.tensor(list(product(range(len(predictor.choices)), repeat=table.num_bands)))
    limit = budget * predictor.seconds[-1] * table.num_bands
    choices = choices[predictor.seconds[choices].sum(1) <= limit * (1 + 1e-9)]
    values = predictor.distances(choices)
    best = int(values.argmin())
    return values[best].item(), tuple(predictor.choices[i] for i in choices[best].tolist())


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
    assert any(len(set(plan)) > 1 for plan in plans.values())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), budget=st.sampled_from([0.45, 0.6, 0.8]))
def test_no_change_of_one_step_is_better_in_a_table_too_large_to_enumerate(seed: int, budget: float) -> None:
    table = random_table(num_steps=20, num_depths=4, seed=seed, num_features=4)
    plan = search(table, full_plan(table), budget)
    predictor = Predictor(table, plan.timesteps)
    choices = predictor.choice(plan).repeat(20 * 4, 1)
    choices[range(20 * 4), torch.arange(20).repeat_interleave(4)] = torch.arange(4).repeat(20)
    within = predictor.seconds[choices].sum(1) <= budget * predictor.seconds[-1] * 20
    assert predictor.distances(choices[within]).min() >= plan.figures["predicted_fd"] - 1e-9


LARGE = (
    (0, 0.45, 16.053928335, "22222123121231112121"),
    (0, 0.6, 7.404358515, "23223133322233312123"),
    (1, 0.45, 15.929984327, "21121213221221123221"),
    (1, 0.6, 7.132082705, "21123333221223333331"),
    (2, 0.45, 12.516784233, "22211221221212221222"),
    (2, 0.6, 4.657862832, "23312223222232323223"),
    (3, 0.45, 15.144106695, "21212121122122222321"),
    (3, 0.6, 6.664894948, "22233321322323222322"),
    (4, 0.45, 14.225049785, "22213111321132211212"),
    (4, 0.6, 6.588071379, "22223131323132333232"),
    (5, 0.45, 14.088898202, "11123222222212121122"),
    (5, 0.6, 5.828524535, "13133222223312323332"),
)
"""Seed of the table, budget, predicted distance and depths: what the search found on 2026-11-29."""


@pytest.mark.parametrize(("seed", "budget", "distance", "depths"), LARGE)
def test_the_search_finds_what_it_found(seed: int, budget: float, distance: float, depths: str) -> None:
    """A change of its effort, or of the order of its moves, is seen here: better is welcome, and recorded anew."""
    table = random_table(num_steps=20, num_depths=4, seed=seed, num_features=4)
    plan = search(table, full_plan(table), budget)
    assert plan.figures["predicted_fd"] == pytest.approx(distance, rel=1e-7)
    assert "".join(str(step.depth) for step in plan.steps) == depths


def test_prediction_is_exact_where_each_step_moves_pictures_of_its_own() -> None:
    """Two steps; the first exit changes the first half of the pictures, the second the rest: shifts add exactly."""
    g = torch.Generator().manual_seed(0)
    base, reference = (torch.randn(80, 5, generator=g, dtype=torch.float64) for _ in range(2))
    change = torch.randn(80, 5, generator=g, dtype=torch.float64)
    first, second = base.clone(), base.clone()
    first[:40] += change[:40]
    second[40:] += change[40:]
    step = Step.parse("2|2")
    table = table_from({(0, step): first, (1, step): second}, base, reference, (900.0, 400.0, 0.0), (step,))
    full = full_plan(table)
    both = full.with_steps([step, step])
    measured = frechet_distance(moments(base + change), moments(reference))
    assert Predictor(table, full.timesteps).predict(both) == pytest.approx(measured, rel=1e-9)
    assert measured != pytest.approx(frechet_distance(moments(base), moments(reference)), rel=1e-3)


@pytest.mark.parametrize("step", [0, 1])
def test_prediction_is_exact_for_a_single_replaced_step(step: int) -> None:
    table = random_table(2, 3, seed=3)
    g = torch.Generator().manual_seed(3)
    base = torch.randn(64, 3, generator=g, dtype=torch.float64)
    full = full_plan(table)
    changed = list(full.steps)
    changed[step] = Step.equal(2, guided=True)
    index = table.choices.index(changed[step])
    mean = base.mean(0) + table.mean[step, index]
    second = base.T @ base / 64 + table.second[step, index]
    covariance = (second - torch.outer(mean, mean)) * 64 / 63
    predictor = Predictor(table, full.timesteps)
    assert predictor.predict(full.with_steps(changed)) == pytest.approx(predictor.frechet(mean, covariance).item())


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
    """Moving a small part of a step from one choice to another changes the distance by the difference of slopes."""
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
    assert search(table, full, 0.6, settings=settings, starts=[good]).steps == good.steps != quick.steps
    assert search(table, full, 0.4, settings=settings, starts=[good]).figures["predicted_share_of_time"] <= 0.4


def test_table_round_trip(tmp_path) -> None:
    table = random_table(3, 3, seed=2)
    table.save(tmp_path / "table.safetensors")
    again = ShiftTable.load(tmp_path / "table.safetensors")
    full = full_plan(table)
    assert again.choices == table.choices
    assert again.cost == table.cost
    plan = full.with_steps(steps("1|1", "2|2", "4|4"))
    assert Predictor(again, full.timesteps).predict(plan) == pytest.approx(
        Predictor(table, full.timesteps).predict(plan), rel=1e-5
    )


def test_a_table_holds_its_choices_as_they_are_printed(tmp_path) -> None:
    path, choices = tmp_path / "table.safetensors", steps("2|held", "3|e1", "1+")
    table = replace(random_table(3, 3, seed=2), backbone="aa", exits="bb", ages=(0, 0, 1))
    table = replace(table, choices=choices, mean=table.mean[:, :3], second=table.second[:, :3])
    table.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored = json.loads(metadata["table"])
    assert (metadata["version"], stored["choices"]) == ("2", ["2|held", "3|e1", "1+"])
    again = ShiftTable.load(path)
    assert (again.choices, again.ages, again.backbone, again.exits) == (choices, (0, 0, 1), "aa", "bb")


@pytest.mark.parametrize("changes", [{"version": "1"}, {"format": "dyndit-plan"}])
def test_tables_of_another_version_are_refused(changes: dict[str, str], tmp_path) -> None:
    path = tmp_path / "table.safetensors"
    random_table(3, 3, seed=2).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | changes)
    with pytest.raises(CheckpointError, match=r"table.safetensors: expected a dyndit-shift-table file of version 2"):
        ShiftTable.load(path)


def test_a_table_whose_choices_are_no_steps_is_refused(tmp_path) -> None:
    path = tmp_path / "table.safetensors"
    random_table(3, 3, seed=2).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    table = json.loads(metadata["table"]) | {"choices": [[1, 1], [2, 2], [3, 3]]}
    save_file(load_file(path), path, metadata=metadata | {"table": json.dumps(table)})
    with pytest.raises(CheckpointError, match=r"table.safetensors: no readable shift table \(step"):
        ShiftTable.load(path)


@pytest.mark.parametrize(
    ("step", "nearest"),
    [
        ("3|2", "3|1"),  # an unconditional pass for another one, then by depth
        ("1|2", "2|2"),
        ("3|held", "2|held"),  # of two as near the one that is listed first
        ("1|held", "2|held"),
        ("4|e3", "3|e2"),
        ("3|e1", "3|e2"),
        ("3", "2"),
        ("2+|held", "1+|held"),
        ("4", "2"),
        ("4|4", "4|4"),
    ],
)
def test_a_step_that_a_table_lacks_takes_the_nearest_of_its_kind(step: str, nearest: str) -> None:
    choices = steps("3|1", "2|2", "2|held", "4|held", "3|e2", "2", "1+|held")
    table = random_table(2, 3, seed=0)
    shifts = {name: getattr(table, name)[:, :1].repeat_interleave(7, 1) for name in ("mean", "second")}
    predictor = Predictor(replace(table, choices=choices, **shifts), full_plan(table).timesteps)
    assert str(predictor.choices[predictor.nearest(Step.parse(step))]) == nearest


def test_of_guides_the_kind_counts_before_the_depth() -> None:
    table = random_table(2, 3, seed=0)
    shifts = {name: getattr(table, name)[:, :1].repeat_interleave(3, 1) for name in ("mean", "second")}
    predictor = Predictor(replace(table, choices=steps("1|held", "3|e1", "3"), **shifts), full_plan(table).timesteps)
    assert str(predictor.choices[predictor.nearest(Step.parse("3|held"))]) == "1|held"
    assert str(predictor.choices[predictor.nearest(Step.parse("2|e1"))]) == "3|e1"


@pytest.mark.parametrize("seed", range(3))
def test_without_whole_steps_no_step_runs_at_full_depth(seed: int) -> None:
    table = random_table(4, 4, seed)
    assert any(step.depth == NUM_BLOCKS for step in search(table, full_plan(table), 1.0).steps)
    plan = search(table, full_plan(table), 1.0, settings=SearchSettings(whole=False))
    assert all(step.depth < NUM_BLOCKS for step in plan.steps)


@pytest.mark.parametrize("content", [b"", b"not a table", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_tables_are_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"table\.safetensors"):
        ShiftTable.load(path)


@pytest.mark.parametrize(
    ("budget", "why"), [(0.0, "above 0"), (-1.0, "above 0"), (1.1, "at most 1"), (0.05, "cheapest")]
)
def test_impossible_budgets_are_refused(budget: float, why: str) -> None:
    table = random_table(3, 3, seed=2)
    with pytest.raises(InputError, match=f"--budget.*{why}"):
        search(table, full_plan(table), budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_no_worse_than_any_choice_at_every_step(seed: int) -> None:
    """Also where a table has none of the choices that ramps are made of: no guide, or an own exit."""
    table = random_table(num_steps=8, num_depths=4, seed=seed)
    table = replace(table, choices=steps("1", "2", "3|e1"))
    full, predictor = full_plan(table), Predictor(table, full_plan(table).timesteps)
    plan = search(table, full, 0.5, settings=SearchSettings(num_kicks=0))
    constants = torch.arange(len(predictor.choices))[:, None].repeat(1, full.num_steps)
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

    def seconds(text: str) -> float:
        return COST.step_seconds(Step.parse(text))

    assert seconds("4|2") == pytest.approx(0.05 + 0.1 + 2 * 1.9 + 0.1 + 2 * 1.0 + 0.1)
    assert seconds("2|4") == seconds("4|2")
    assert seconds("3") == pytest.approx(0.05 + 0.1 + 3 * 1.0 + 0.1)
    assert seconds("3|held") == seconds("3")
    assert seconds("3|e1") == pytest.approx(seconds("3") + 0.1)
    assert COST.share_of_time(DepthPlan.full((9, 5), NUM_BLOCKS, "ddim", 1.5)) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(6))
def test_a_kick_moves_a_third_of_the_steps_and_keeps_what_just_fits(seed: int) -> None:
    """Four steps have a third of one step. A budget that the kicked plan meets to the bit changes nothing of it."""
    for num_steps, most in ((2, 1), (4, 1), (9, 3)):
        predictor = Predictor(random_table(num_steps, 4, seed), range(100 * num_steps, 0, -100))
        choice = torch.zeros(num_steps, dtype=torch.long)
        free = _kicked(predictor, choice, float("inf"), torch.Generator().manual_seed(seed))
        assert int((free != choice).sum()) <= most
        just = predictor.spent(free).item()
        assert torch.equal(_kicked(predictor, choice, just, torch.Generator().manual_seed(seed)), free)
        tight = _kicked(predictor, choice, predictor.spent(choice).item(), torch.Generator().manual_seed(seed))
        assert predictor.spent(tight) <= predictor.spent(choice)
