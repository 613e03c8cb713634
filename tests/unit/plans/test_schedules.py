"""Fixed schedules: only depths that exist, in the order they promise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import constant, guidance_interval, ramp, reversed_plan, skips, switch
from dyndit.plans.step import Held, NoGuide
from dyndit.process import DDPM

NUM_BLOCKS = 12

depth_sets = st.sets(st.integers(1, NUM_BLOCKS - 1)).map(lambda exits: (*sorted(exits), NUM_BLOCKS))
starts = st.floats(0, NUM_BLOCKS)


def full(num_steps: int, guided: bool) -> DepthPlan:
    timesteps = tuple(999 - 7 * step for step in range(num_steps))
    return DepthPlan.full(timesteps, NUM_BLOCKS, "ddim", 1.5 if guided else 1.0)


plans = st.builds(full, st.integers(1, 30), st.booleans())


@given(base=plans, depths=depth_sets, start=starts, end=st.none() | starts, power=st.floats(0.25, 4))
def test_ramps_are_monotone(
    base: DepthPlan, depths: tuple[int, ...], start: float, end: float | None, power: float
) -> None:
    plan = ramp(base, depths, start, end, power)
    last = NUM_BLOCKS if end is None else end
    assert list(plan.depths) == sorted(plan.depths, reverse=last < start)
    assert set(plan.depths) <= set(depths)
    assert plan.uncond_depths == (plan.depths if base.guided else base.uncond_depths)
    assert (plan.timesteps, plan.solver, plan.cfg_scale) == (base.timesteps, base.solver, base.cfg_scale)
    if end is None and plan.num_steps > 1:
        assert plan.depths[-1] == NUM_BLOCKS
    assert abs(plan.depths[0] - start) == min(abs(depth - start) for depth in depths)


@given(base=plans, depths=depth_sets, depth=starts)
def test_constants_are_constant(base: DepthPlan, depths: tuple[int, ...], depth: float) -> None:
    plan = constant(base, depths, depth)
    assert len(set(plan.steps)) == 1
    assert abs(plan.depths[0] - depth) == min(abs(d - depth) for d in depths)
    assert constant(base, depths, NUM_BLOCKS).steps == base.steps


@given(base=plans, depths=depth_sets, depth=starts, share=st.floats(0, 1))
def test_switch_is_shallow_then_full(base: DepthPlan, depths: tuple[int, ...], depth: float, share: float) -> None:
    plan = switch(base, depths, depth, share)
    shallow = round(share * base.num_steps)
    assert plan.steps[shallow:] == base.steps[shallow:]
    assert plan.steps[:shallow] == constant(base, depths, depth).steps[:shallow]


@given(base=plans, depths=depth_sets, start=starts, end=starts, every=st.integers(2, 5))
def test_skips_are_shallow_forecasts_between_full_steps(
    base: DepthPlan, depths: tuple[int, ...], start: float, end: float, every: int
) -> None:
    plan, last = skips(base, depths, start, end, every), base.num_steps - 1
    whole = [k for k, step in enumerate(plan.steps) if not step.forecast]
    assert [plan.steps[k] for k in whole] == [base.steps[k] for k in whole]
    assert {0, min(1, last), last} <= set(whole)
    if len(depths) == 1:
        assert plan.steps == base.steps
        return
    since_the_second = [k for k in whole if 0 < k < last]
    assert since_the_second == list(range(1, last, every))
    for k in set(range(base.num_steps)) - set(whole):
        wanted = start + (end - start) * k / last
        assert abs(plan.depths[k] - wanted) == min(abs(depth - wanted) for depth in depths[:-1])
        assert plan.steps[k].guide == (Held() if base.guided else NoGuide())


def test_shapes_by_hand() -> None:
    base, depths = full(5, guided=False), tuple(range(1, 13))
    assert ramp(base, depths, 4).depths == (4, 6, 8, 10, 12)
    assert ramp(base, depths, 4, 8).depths == (4, 5, 6, 7, 8)
    assert ramp(base, depths, 4, power=2).depths == (4, 4, 6, 8, 12)  # 4.5 and 8.5: ties go to the cheaper depth
    assert switch(base, depths, 3, 0.4).depths == (3, 3, 12, 12, 12)
    assert ramp(base, (4, 8, 12), 4).depths == (4, 4, 8, 8, 12)
    assert ramp(full(1, guided=False), depths, 4).depths == (4,)
    assert skips(full(8, guided=False), depths).depths == (12, 12, 2, 12, 4, 12, 5, 12)
    with pytest.raises(InputError, match=r"every 1\.9; expected at least 2"):
        skips(base, depths, every=1.9)


@given(base=plans, depths=depth_sets, start=starts)
def test_reversed_costs_the_same_and_is_its_own_inverse(base: DepthPlan, depths: tuple[int, ...], start: float) -> None:
    plan = ramp(base, depths, start)
    control = reversed_plan(plan)
    assert sorted(control.steps, key=str) == sorted(plan.steps, key=str)
    assert control.share_of_blocks == plan.share_of_blocks
    assert control.timesteps == plan.timesteps
    assert control.steps == plan.steps[::-1]
    assert reversed_plan(control).steps == plan.steps


@pytest.mark.parametrize("guided", [False, True])
def test_a_plan_says_who_wrote_it(guided: bool) -> None:
    base, depths = full(5, guided), tuple(range(1, 13))
    made = [
        constant(base, depths, 6),
        ramp(base, depths, 4),
        ramp(base, depths, 4, power=2),
        switch(base, depths, 3, 0.4),
    ]
    names = [f"{plan.router}:{plan.settings_text}" for plan in (*made, reversed_plan(made[1]))]
    assert names == ["constant:6", "ramp:4-12-1", "ramp:4-12-2", "switch:3-0.4", "reversed:4-12-1"]


@given(base=plans, low=st.floats(0, 20), width=st.floats(0.1, 200))
def test_guidance_is_kept_at_noise_levels_inside_the_interval(base: DepthPlan, low: float, width: float) -> None:
    plan = guidance_interval(base, low, low + width)
    alphas_bar = DDPM().alphas_bar[list(base.timesteps)]
    levels = ((1 - alphas_bar) / alphas_bar).sqrt().tolist()
    assert plan.uncond_depths == tuple(
        u if low < s <= low + width else 0 for u, s in zip(base.uncond_depths, levels, strict=True)
    )
    assert (plan.depths, plan.cfg_scale, plan.timesteps) == (base.depths, base.cfg_scale, base.timesteps)


def test_a_guidance_interval_takes_both_ends_off() -> None:
    base = DepthPlan.full((999, 750, 500, 250, 0), NUM_BLOCKS, "ddim", 1.5)
    assert guidance_interval(base, 0.5, 10.0).uncond_depths == (0, 0, NUM_BLOCKS, NUM_BLOCKS, 0)
    assert guidance_interval(base, 0.0, 200.0) is base
    between = DepthPlan.full((500.5, 500), NUM_BLOCKS, "EulerDiscreteScheduler", 1.5)
    edge = (DDPM().noise_level(500) + DDPM().noise_level(501)) / 2
    assert guidance_interval(between, 0.0, edge).uncond_depths == (NUM_BLOCKS, NUM_BLOCKS)
    assert guidance_interval(between, 0.0, edge * (1 - 1e-6)).uncond_depths == (0, NUM_BLOCKS)


@pytest.mark.parametrize(("low", "high"), [(3.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_an_empty_guidance_interval_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="guidance interval"):
        guidance_interval(full(3, guided=True), low, high)
