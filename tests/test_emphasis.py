"""Where exits matter, and what that makes their errors weigh."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_searched import random_table

from dyndit.analysis.fidelity import Moments, frechet_distance
from dyndit.emphasis import Emphasis
from dyndit.errors import InputError
from dyndit.plan import REUSED, DepthPlan, own_exit
from dyndit.routers.searched import ShiftTable

L = 5
EXITS = (1, 2, 3, 4)


@st.composite
def plans(draw: st.DrawFn, whole: bool = False) -> DepthPlan:
    """Any plan of 5 blocks; with fractional timesteps too, as some solvers have."""
    times = st.integers(0, 999) if whole else st.integers(0, 999) | st.floats(0, 999)
    timesteps = sorted(draw(st.sets(times, min_size=1, max_size=6)), reverse=True)
    pairs = []
    for _ in timesteps:
        cond = draw(st.integers(1, L))
        guides = [own_exit(depth) for depth in range(1, cond)]
        pairs.append((cond, draw(st.sampled_from([0, REUSED, *range(1, L + 1), *guides]))))
    return DepthPlan(tuple(timesteps), *zip(*pairs, strict=True), L, "ddim", cfg_scale=1.5)


def exits_run_at(plan: DepthPlan, t: int) -> list[int]:
    """Depths of the exits that predict for a timestep, read off the plan step by step."""
    step = max((k for k, top in enumerate(plan.timesteps) if top >= t), default=0)
    cond, uncond, guide = plan.cond[step], plan.uncond[step], plan.guides[step]
    return [depth for depth in (cond, max(uncond, 0), guide) if 0 < depth < L]


@given(plans(), st.integers(0, 999))
def test_the_emphasis_of_a_plan_is_what_it_runs(plan: DepthPlan, t: int) -> None:
    shares, run = Emphasis.of_plans([plan]).shares(EXITS), exits_run_at(plan, t)
    assert shares[:, t].tolist() == [run.count(depth) for depth in EXITS]


@given(plans(), st.integers(0, 999))
def test_at_its_own_timestep_a_step_is_the_one_that_covers_it(plan: DepthPlan, t: int) -> None:
    """The edges, which timesteps drawn at random seldom meet."""
    shares = Emphasis.of_plans([plan]).shares(EXITS)
    for top in plan.timesteps:
        for near in {int(top), min(int(top) + 1, 999)}:
            assert shares[:, near].tolist() == [exits_run_at(plan, near).count(depth) for depth in EXITS]


@given(plans(whole=True))
def test_steps_cover_what_they_cover_in_a_shift_table(plan: DepthPlan) -> None:
    unit_bands = SimpleNamespace(edges=tuple(range(999, -1, -1)))  # band t is (t - 1, t], from 999 down to 1
    covered = ShiftTable.weights(unit_bands, plan.timesteps).flip(1)
    wanted = torch.stack([sum(covered[k] for k in range(plan.num_steps) if plan.cond[k] == depth) + torch.zeros(999)
                          for depth in EXITS])  # fmt: skip
    emphasis = Emphasis.of_plans([replace(plan, uncond=(0,) * plan.num_steps)])
    top = plan.timesteps[0]  # what lies above is the first step's too: a table has nothing there
    assert torch.equal(emphasis.shares(EXITS)[:, 1 : top + 1], wanted[:, :top])


@given(st.lists(plans(), min_size=1, max_size=3))
def test_shares_are_the_mean_over_plans(several: list[DepthPlan]) -> None:
    mean = torch.stack([Emphasis.of_plans([plan]).shares(EXITS) for plan in several]).mean(0)
    torch.testing.assert_close(Emphasis.of_plans(several).shares(EXITS), mean)
    assert repr(Emphasis.of_plans(several)) == repr(
        Emphasis.of_plans(several[::-1])
    )  # a set of plans, in whatever order


@given(st.lists(plans(), min_size=1, max_size=3), st.floats(0.01, 10))
def test_weights_average_to_one_and_leave_no_exit_out(several: list[DepthPlan], rest: float) -> None:
    emphasis = Emphasis.of_plans(several, rest=rest)
    weights, shares = emphasis.weights(EXITS), emphasis.shares(EXITS)
    assert weights.shape == (4, 1000)
    assert weights.mean().item() == pytest.approx(1)
    assert weights.min() > 0
    torch.testing.assert_close(weights * (rest + shares[0, 0]), weights[0, 0] * (rest + shares))


def test_a_plan_at_full_depth_weighs_all_exits_alike() -> None:
    emphasis = Emphasis.of_plans([DepthPlan.full((999, 500), L, "ddim", 1.5)])
    assert (emphasis.stretches, emphasis.depths) == ((), ())
    torch.testing.assert_close(emphasis.weights(EXITS), torch.ones(4, 1000, dtype=torch.float64))


def test_an_emphasis_is_told_from_any_other_in_few_words() -> None:
    emphasis = Emphasis(((1, 0, 10, 1.0), (3, 5, 999, 0.5)))
    others = [
        replace(emphasis, rest=0.2),
        replace(emphasis, num_timesteps=1001),
        replace(emphasis, stretches=((1, 0, 10, 1.0), (3, 5, 998, 0.5))),
        replace(emphasis, stretches=((1, 0, 10, 1.0), (3, 5, 999, 0.25))),
    ]
    assert len({repr(each) for each in (emphasis, *others)}) == 5
    assert repr(emphasis).startswith("Emphasis(exits [1, 3], rest 0.1, ")
    assert len(repr(emphasis)) < 60


@pytest.mark.parametrize("rest", [0.0, -1.0, float("inf"), float("nan")])
def test_emphasis_refuses_to_leave_exits_out(rest: float) -> None:
    with pytest.raises(InputError, match=f"emphasis: rest {rest:g}, expected above 0"):
        Emphasis((), rest=rest)


def test_emphasis_refuses_what_lies_outside_the_schedule() -> None:
    plan = DepthPlan((999, 500), (2, 5), (0, 0), L, "ddim")
    assert Emphasis.of_plans([plan], num_timesteps=1000).depths == (2,)
    with pytest.raises(InputError, match=r"a plan of timesteps 999\.\.500, expected within 499\.\.0"):
        Emphasis.of_plans([plan], num_timesteps=500)
    with pytest.raises(InputError, match=r"exit 2 at timesteps 5\.\.1000, expected within 0\.\.999"):
        Emphasis(((2, 5, 1000, 1.0),))
    with pytest.raises(InputError, match="emphasis: no plans"):
        Emphasis.of_plans([])


def errors_of(depths: tuple[int, ...], num_bands: int, seed: int) -> pd.DataFrame:
    """Errors as `exit_error_table` gives them, at random."""
    sizes = torch.rand(len(depths), num_bands, generator=torch.Generator().manual_seed(seed)) + 0.1
    return pd.DataFrame(
        [
            {"depth": depth, "band": band, "noise_error": sizes[i, band].item(), "variance_error": 0.0}
            for band in range(num_bands)
            for i, depth in enumerate(depths)
        ]
    )


@settings(deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 5, 20, 100]), st.integers(0, 50))
def test_weighed_by_shifts_the_loss_is_the_sum_of_the_measured_distances(bands: int, of_errors: int, seed: int) -> None:
    """But for a factor: share times squared error, over a band's timesteps, is the distance that the band was moved."""
    table, errors = random_table(bands, 3, seed), errors_of((1, 2, 3), of_errors, seed)
    shares = Emphasis.of_shifts(table, errors).shares((1, 2, 3))
    squared = torch.tensor(errors.pivot(index="depth", columns="band", values="noise_error").values)
    squared = squared.repeat_interleave(1000 // of_errors, dim=1)
    factors = []
    for band, (low, high) in enumerate(zip(table.edges[1:], table.edges[:-1], strict=True)):
        covered = slice(int(low) + 1 if band < bands - 1 else 0, int(high) + 1 if band else 1000)
        for i in range(3):
            moved = Moments(table.base.mean + table.mean[band, i], table.base.second + table.second[band, i], 64)
            factors.append((shares[i] * squared[i])[covered].sum().item() / frechet_distance(table.base, moved))
    # Errors differ within a table's band, its distance does not: a share is even over the band, so the sum is exact.
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-6)
    assert shares.mean().item() == pytest.approx(1)


def test_exits_that_the_table_lacks_lie_between_their_neighbours() -> None:
    table, errors = random_table(4, 3, 0), errors_of((1, 2, 3), 10, 0).assign(noise_error=1.0)
    whole = Emphasis.of_shifts(table, errors).shares((1, 2, 3))
    part = Emphasis.of_shifts(table.part(((1, 1), (3, 3))), errors).shares((1, 2, 3))
    torch.testing.assert_close(part[1], (part[0] * part[2]).sqrt())
    torch.testing.assert_close(part[0] * whole[2], part[2] * whole[0])


def test_shifts_are_taken_beside_the_deepest_unconditional_pass() -> None:
    """Not where guidance is left out or bent, which moves pictures too."""
    table, errors = random_table(3, 3, 0), errors_of((1, 2, 3), 10, 0)
    wanted = Emphasis.of_shifts(table, errors)
    for uncond in (0, REUSED, own_exit(1)):
        more = replace(
            table,
            pairs=((2, uncond), *table.pairs),
            mean=torch.cat([100 + table.mean[:, :1], table.mean], 1),
            second=torch.cat([1e5 + table.second[:, :1], table.second], 1),
        )
        assert Emphasis.of_shifts(more, errors) == wanted
    with pytest.raises(InputError, match="emphasis: the shift table measured no exit beside an unconditional pass"):
        Emphasis.of_shifts(more.part(((2, own_exit(1)),)), errors)
