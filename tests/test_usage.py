"""Where plans use exits, and what that makes their errors weigh."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndit.errors import InputError
from dyndit.plan import REUSED, DepthPlan, own_exit
from dyndit.routers.searched import ShiftTable
from dyndit.usage import Usage

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
def test_the_usage_of_a_plan_is_what_it_runs(plan: DepthPlan, t: int) -> None:
    shares, run = Usage.of([plan]).shares(EXITS), exits_run_at(plan, t)
    assert shares[:, t].tolist() == [run.count(depth) for depth in EXITS]


@given(plans(), st.integers(0, 999))
def test_at_its_own_timestep_a_step_is_the_one_that_covers_it(plan: DepthPlan, t: int) -> None:
    """The edges, which timesteps drawn at random seldom meet."""
    shares = Usage.of([plan]).shares(EXITS)
    for top in plan.timesteps:
        for near in {int(top), min(int(top) + 1, 999)}:
            assert shares[:, near].tolist() == [exits_run_at(plan, near).count(depth) for depth in EXITS]


@given(plans(whole=True))
def test_steps_cover_what_they_cover_in_a_shift_table(plan: DepthPlan) -> None:
    unit_bands = SimpleNamespace(edges=tuple(range(999, -1, -1)))  # band t is (t - 1, t], from 999 down to 1
    covered = ShiftTable.weights(unit_bands, plan.timesteps).flip(1)
    wanted = torch.stack([sum(covered[k] for k in range(plan.num_steps) if plan.cond[k] == depth) + torch.zeros(999)
                          for depth in EXITS])  # fmt: skip
    usage = Usage.of([replace(plan, uncond=(0,) * plan.num_steps)])
    top = plan.timesteps[0]  # what lies above is the first step's too: a table has nothing there
    assert torch.equal(usage.shares(EXITS)[:, 1 : top + 1], wanted[:, :top])


@given(st.lists(plans(), min_size=1, max_size=3))
def test_shares_are_the_mean_over_plans(several: list[DepthPlan]) -> None:
    mean = torch.stack([Usage.of([plan]).shares(EXITS) for plan in several]).mean(0)
    torch.testing.assert_close(Usage.of(several).shares(EXITS), mean)
    assert repr(Usage.of(several)) == repr(Usage.of(several[::-1]))  # a set of plans, in whatever order


@given(st.lists(plans(), min_size=1, max_size=3), st.floats(0.01, 10))
def test_weights_average_to_one_and_leave_no_exit_out(several: list[DepthPlan], rest: float) -> None:
    usage = Usage.of(several, rest=rest)
    weights, shares = usage.weights(EXITS), usage.shares(EXITS)
    assert weights.shape == (4, 1000)
    assert weights.mean().item() == pytest.approx(1)
    assert weights.min() > 0
    torch.testing.assert_close(weights * (rest + shares[0, 0]), weights[0, 0] * (rest + shares))


def test_a_plan_at_full_depth_weighs_all_exits_alike() -> None:
    usage = Usage.of([DepthPlan.full((999, 500), L, "ddim", 1.5)])
    assert (usage.stretches, usage.depths) == ((), ())
    torch.testing.assert_close(usage.weights(EXITS), torch.ones(4, 1000, dtype=torch.float64))


def test_a_usage_is_told_from_any_other_in_few_words() -> None:
    usage = Usage(((1, 0, 10, 1.0), (3, 5, 999, 0.5)))
    others = [
        replace(usage, rest=0.2),
        replace(usage, num_timesteps=1001),
        replace(usage, stretches=((1, 0, 10, 1.0), (3, 5, 998, 0.5))),
        replace(usage, stretches=((1, 0, 10, 1.0), (3, 5, 999, 0.25))),
    ]
    assert len({repr(each) for each in (usage, *others)}) == 5
    assert repr(usage).startswith("Usage(exits [1, 3], rest 0.1, ")
    assert len(repr(usage)) < 60


@pytest.mark.parametrize("rest", [0.0, -1.0, float("inf"), float("nan")])
def test_usage_refuses_to_leave_exits_out(rest: float) -> None:
    with pytest.raises(InputError, match=f"rest {rest:g}: expected above 0"):
        Usage((), rest=rest)


def test_usage_refuses_what_lies_outside_the_schedule() -> None:
    plan = DepthPlan((999, 500), (2, 5), (0, 0), L, "ddim")
    assert Usage.of([plan], num_timesteps=1000).depths == (2,)
    with pytest.raises(InputError, match=r"a plan of timesteps 999\.\.500, expected within 499\.\.0"):
        Usage.of([plan], num_timesteps=500)
    with pytest.raises(InputError, match=r"exit 2 at timesteps 5\.\.1000, expected within 0\.\.999"):
        Usage(((2, 5, 1000, 1.0),))
    with pytest.raises(InputError, match="no plans"):
        Usage.of([])
