"""Steps and depth together: what is chosen is the best of every step count and every plan."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import search
from dyndit.plans.step_counts import LatencyBudget, TargetFD, frontier
from dyndit.plans.table import ShiftTable
from dyndit.sampling.solvers import timesteps_of
from dyndit.stats import Moments, moments
from support.tables import NUM_BLOCKS, random_table

COUNTS, REFERENCE = (2, 3, 4), 4
AT = {solver: partial(timesteps_of, solver) for solver in ("ddim", "unipc")}
"""By solver, its timesteps at a number of steps."""


def table_of_steps(seed: int) -> ShiftTable:
    """A table of four steps that holds full depth's moments at two and three too, the worse the fewer they are."""
    table = random_table(num_steps=4, num_depths=3, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)

    def base(steps: int) -> Moments:
        features = torch.randn(64, 3, generator=g, dtype=torch.float64)
        return moments(features * (1 + 0.3 / steps) + torch.randn(3, generator=g, dtype=torch.float64) / steps)

    edges = (*map(float, timesteps_of("ddim", 4)), 0.0)
    return replace(table, edges=edges, bases={("ddim", steps): base(steps) for steps in COUNTS[:-1]})


def full_of(table: ShiftTable, steps: int) -> DepthPlan:
    return DepthPlan.full(timesteps_of("ddim", steps), NUM_BLOCKS, "ddim", table.cfg_scale)


def every_plan(table: ShiftTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Seconds and predicted distance of every plan at every step count."""
    seconds, values = [], []
    for steps in COUNTS:
        base = table.bases.get(("ddim", steps), table.base)
        predictor = Predictor(table, timesteps_of("ddim", steps), base)
        choices = torch.tensor(list(product(range(len(predictor.choices)), repeat=steps)))
        seconds.append(predictor.seconds[choices].sum(1))
        values.append(predictor.distances(choices))
    return torch.cat(seconds), torch.cat(values)


def reference_seconds(table: ShiftTable) -> float:
    return table.cost.plan_seconds(full_of(table, REFERENCE))


@settings(max_examples=6, derandomize=True)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.25, 0.4, 0.5, 0.75, 1.0]))
def test_the_choice_is_the_best_of_every_step_count_and_plan(seed: int, share: float) -> None:
    table = table_of_steps(seed)
    plan = LatencyBudget(share, REFERENCE).choose(table, "ddim", AT["ddim"])
    seconds, values = every_plan(table)
    limit = share * reference_seconds(table) * (1 + 1e-9)
    assert plan.figures["predicted_fd"] == pytest.approx(values[seconds <= limit].min().item(), abs=1e-9)
    assert table.cost.plan_seconds(plan) <= limit
    assert plan.figures["predicted_share_of_reference"] <= share * (1 + 1e-9)
    base = table.base_at("ddim", plan.num_steps)
    assert Predictor(table, plan.timesteps, base).predict(plan) == pytest.approx(plan.figures["predicted_fd"])


def test_the_small_tables_are_worth_choosing_on() -> None:
    """Guard of the test above: every step count is chosen somewhere, and so are plans of unequal steps."""
    plans = [
        LatencyBudget(share).choose(table_of_steps(seed), "ddim", AT["ddim"])
        for seed in range(3)
        for share in (0.4, 0.75)
    ]
    assert {plan.num_steps for plan in plans} == set(COUNTS)
    assert any(len(set(plan.depths)) > 1 for plan in plans)


def test_more_time_is_never_predicted_worse() -> None:
    table = table_of_steps(8)
    values = [LatencyBudget(s).choose(table, "ddim", AT["ddim"]).figures["predicted_fd"] for s in (0.25, 0.4, 0.6, 1.0)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("share", "steps"), [(1.0, 4), (0.8, 3), (0.55, 2)])
def test_full_depth_is_a_candidate(share: float, steps: int) -> None:
    """Exits that ruin the pictures, and full depth that is perfect: the most steps of full depth that fit."""
    table = table_of_steps(0)
    ruined = table.second + 100 * torch.eye(3, dtype=torch.float64)
    perfect = {("ddim", k): table.reference for k in COUNTS[:-1] if k == steps}
    table = replace(table, second=ruined, base=table.reference, bases=table.bases | perfect)
    plan = LatencyBudget(share).choose(table, "ddim", AT["ddim"])
    assert (plan.num_steps, set(plan.depths)) == (steps, {NUM_BLOCKS})
    assert plan.figures["share_of_blocks"] == plan.share_of_blocks == 1
    assert plan.router == "chosen"


@settings(max_examples=6, derandomize=True)
@given(seed=st.integers(0, 10_000), rank=st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_the_target_is_met_by_the_cheapest_plan_that_meets_it(seed: int, rank: float) -> None:
    table = table_of_steps(seed)
    seconds, values = every_plan(table)
    target = values.quantile(rank, interpolation="higher").item() * (1 + 1e-9)
    plan = TargetFD(target, tolerance=0.02).choose(
        table, "ddim", AT["ddim"]
    )  # less than a block: nothing is given away
    assert plan.figures["predicted_fd"] <= target
    assert table.cost.plan_seconds(plan) == pytest.approx(seconds[values <= target].min().item(), rel=1e-6)


def test_the_frontier_has_what_the_choice_is_made_among() -> None:
    table = table_of_steps(5)
    rows = frontier(table, "ddim", AT["ddim"], (0.15, 0.5, 1.0), REFERENCE)
    assert list(rows[rows["latency_budget"] == 0.5]["steps"]) == list(COUNTS)
    assert len(rows[rows["latency_budget"] == 0.15]) < len(COUNTS)  # at the most steps no plan is that quick
    plan = LatencyBudget(0.5, REFERENCE).choose(table, "ddim", AT["ddim"])
    best = rows[rows["latency_budget"] == 0.5].sort_values("predicted_fd").iloc[0]
    assert (best["steps"], best["predicted_fd"]) == (plan.num_steps, plan.figures["predicted_fd"])
    assert best["predicted_ms"] == pytest.approx(1e3 * table.cost.plan_seconds(plan) / table.cost.batch_size)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (
            lambda table: LatencyBudget(0.05, REFERENCE).choose(table, "ddim", AT["ddim"]),
            "--latency-budget 0.05: .* 2 steps",
        ),
        (lambda _: LatencyBudget(1.5), "--latency-budget 1.5"),
        (lambda _: LatencyBudget(float("nan")), "--latency-budget nan"),
        (lambda _: LatencyBudget(0.5, 0), "--reference-steps 0"),
        (lambda _: TargetFD(-1.0), "--target-fd -1"),
        (lambda table: TargetFD(1e-9).choose(table, "ddim", AT["ddim"]), "--target-fd 1e-09: the least predicted is"),
        (lambda table: LatencyBudget(0.5).choose(table, "unipc", AT["unipc"]), "--solver unipc"),
    ],
)
def test_what_cannot_be_chosen_is_refused(choose, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(table_of_steps(1))


def test_a_table_keeps_the_moments_it_holds_to_the_last_bit(tmp_path) -> None:
    table = table_of_steps(2)
    table.save(tmp_path / "table.safetensors")
    again = ShiftTable.load(tmp_path / "table.safetensors")
    assert again.step_counts("ddim") == COUNTS
    for key, base in table.bases.items():
        assert torch.equal(again.bases[key].mean, base.mean)
        assert torch.equal(again.bases[key].second, base.second)
        assert again.bases[key].num == base.num


def test_a_table_without_them_is_written_as_it_was(tmp_path) -> None:
    """And so a file from before there were any is read: it is such a file."""
    path = tmp_path / "table.safetensors"
    replace(table_of_steps(2), bases={}).save(path)
    with safe_open(path, "pt") as file:
        parts = {f"{name}.{part}" for name in ("base", "reference") for part in ("mean", "second")}
        assert set(file.keys()) == parts | {"mean", "second"}
        assert set(file.metadata()) == {"format", "version", "table", "checksum"}
        assert "bases" not in file.metadata()["table"]
    again = ShiftTable.load(path)
    assert again.bases == {}
    assert again.step_counts("ddim") == (4,)


def test_the_search_starts_from_the_moments_that_the_table_holds() -> None:
    table = table_of_steps(4)
    full = full_of(table, 2)
    held = search(table, full, 0.6)
    given_them = search(replace(table, bases={}), full, 0.6, base=table.bases["ddim", 2])
    without = search(replace(table, bases={}), full, 0.6)
    assert held.figures == given_them.figures != without.figures
