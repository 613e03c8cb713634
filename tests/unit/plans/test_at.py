"""Plans over log-SNR: a plan at other timesteps of its process."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.errors import PlanError
from dyndit.plans.plan import REACH, DepthPlan
from dyndit.plans.step import Held, Step, Unconditional, steps
from dyndit.process import DDPM, Process, RectifiedFlow
from dyndit.sampling.solvers import timesteps_of

FULL = 8
PROCESSES = [DDPM(), RectifiedFlow()]
TEXTS = ("8|8", "8", "4", "2", "6|3", "4|e2", "3|held", "2+", "4+|held", "3+|e1", "8|held", "8|e2")


def shifted(num_steps: int, shift: float) -> tuple[float, ...]:
    """Timesteps of flow matching under a shift, as schedulers of diffusers have them."""
    shares = [1 - k / num_steps for k in range(num_steps)]
    return tuple(1000 * shift * s / (1 + (shift - 1) * s) for s in shares)


def a_plan(texts: tuple[str, ...], timesteps: tuple[float, ...], scale: float = 4.0) -> DepthPlan:
    return DepthPlan(timesteps, steps(*texts), FULL, "any", cfg_scale=scale, figures={"measured_fd": 1.0})


def test_its_own_timesteps_are_the_plan_itself() -> None:
    plan = a_plan(("8|8", "4", "2+", "8|8"), (999, 749, 500, 250))
    assert plan.at(plan.timesteps, DDPM()) is plan
    assert plan.at([float(t) for t in plan.timesteps], DDPM()) is plan


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_each_timestep_takes_the_step_nearest_in_log_snr(process: Process) -> None:
    plan = a_plan(("1", "2", "3", "4"), (950, 700, 450, 200), scale=1.0)
    found = plan.at((999, 800, 600, 500, 300, 100), process)
    mine = [process.log_snr_at(t) for t in plan.timesteps]
    for t, step in zip(found.timesteps, found.steps, strict=True):
        gaps = [abs(place - process.log_snr_at(t)) for place in mine]
        assert step == plan.steps[gaps.index(min(gaps))]
    assert len(set(found.steps)) == 4
    assert (found.solver, found.cfg_scale, found.num_blocks, found.figures) == ("any", 1.0, FULL, {})


def test_a_shift_moves_steps_with_their_noise() -> None:
    """A shift of 3 spends more steps at high noise: more of them take the plan's noisy steps."""
    plan = a_plan(tuple(map(str, range(1, 9))), shifted(8, 1.0), scale=1.0)
    found = plan.at(shifted(8, 3.0), RectifiedFlow())
    assert sum(found.depths) < sum(plan.depths)
    assert list(found.depths) == sorted(found.depths)
    assert plan.at(shifted(16, 1.0), RectifiedFlow()).depths[::2] == plan.depths


def test_a_lost_full_step_is_run_where_it_is_first_needed() -> None:
    timesteps = (900, 800, 700, 600, 500, 400)
    plan = a_plan(("8|8", "2+", "2+|held", "8|8", "2+", "2+|held"), timesteps)
    found = plan.at((900, 700, 500), RectifiedFlow())
    assert list(map(str, found.steps)) == ["8|8", "2+|held", "8|8"]
    found = plan.at((700, 500, 400), RectifiedFlow())
    assert list(map(str, found.steps)) == ["8|8", "8|8", "2+|held"]


def test_a_lost_unconditional_pass_is_run_where_it_is_first_needed() -> None:
    plan = a_plan(("6|3", "4|held", "8", "6|3", "4|held"), (900, 700, 500, 300, 100))
    assert list(map(str, plan.at((900, 500, 100), RectifiedFlow()).steps)) == ["6|3", "8", "8|8"]
    early = a_plan(("4|held", "6|3", "4|held"), (900, 500, 100))  # without an earlier pass nothing guides, as planned
    assert list(map(str, early.at((900, 100), RectifiedFlow()).steps)) == ["4|held", "8|8"]


def test_no_forecast_reaches_further_than_the_plan_s() -> None:
    plan = a_plan(("8", "8", "2+", "2+"), (900, 700, 500, 300), scale=1.0)
    found = plan.at(tuple(range(900, 250, -20)), RectifiedFlow())
    assert reaches(found, RectifiedFlow())[-1] > 0
    assert max(reaches(found, RectifiedFlow())) <= REACH * (1 + 1e-6)
    assert found.depths.count(2) > len(found.depths) / 4


def test_timesteps_that_do_not_fall_are_refused() -> None:
    with pytest.raises(PlanError, match="must fall"):
        a_plan(("8|8",), (500,)).at((100, 200), DDPM())


def reaches(plan: DepthPlan, process: Process) -> list[float]:
    """How far each forecast extrapolates, in distances of its last two full steps."""
    found, full = [], []
    for t, step in zip(plan.timesteps, plan.steps, strict=True):
        place = process.log_snr_at(t)
        if step.forecast and len(full) > 1:
            found.append((place - full[-1]) / max(full[-1] - full[-2], 1e-9))
        if step.depth == FULL:
            full.append(place)
    return [0.0, *found]


@st.composite
def plans(draw: st.DrawFn) -> DepthPlan:
    num = draw(st.integers(1, 12))
    texts = draw(st.lists(st.sampled_from(TEXTS), min_size=num, max_size=num))
    full, kept = False, []
    for step in steps(*texts):  # a forecast needs an earlier step at full depth
        kept.append(Step(step.depth, step.guide) if step.forecast and not full else step)
        full = full or step.depth == FULL
    times = draw(st.lists(st.integers(1, 999), min_size=num, max_size=num, unique=True))
    return DepthPlan(tuple(sorted(times, reverse=True)), tuple(kept), FULL, "any", cfg_scale=4.0)


@settings(deadline=None, max_examples=150)
@given(plans(), st.lists(st.integers(1, 999), min_size=1, max_size=20, unique=True), st.sampled_from(PROCESSES))
def test_what_a_step_builds_on_is_there(plan: DepthPlan, times: list[int], process: Process) -> None:
    found = plan.at(sorted(times, reverse=True), process)
    assert set(found.steps) <= {*plan.steps, plan.whole}
    limit = max(REACH, *reaches(plan, process), 0.0)
    assert max(reaches(found, process)) <= limit * (1 + 1e-5)
    first = next((k for k, step in enumerate(plan.steps) if isinstance(step.guide, Unconditional)), None)
    for k, step in enumerate(found.steps):
        if step.forecast:
            assert FULL in found.depths[:k]
        if isinstance(step.guide, Held) and first is not None:
            origin = [index for index, other in enumerate(plan.steps) if other == step]
            if min(origin) > first:
                assert any(isinstance(other.guide, Unconditional) for other in found.steps[:k])
    assert found.at(found.timesteps, process) is found


@pytest.mark.parametrize("solver", ["ddim", "flow-euler"])
def test_a_plan_of_a_solver_serves_its_other_step_counts(solver: str) -> None:
    process = RectifiedFlow() if solver == "flow-euler" else DDPM()
    plan = DepthPlan.full(timesteps_of(solver, 10, process), FULL, solver)
    plan = plan.with_steps([Step(1 + round(7 * k / 9)) for k in range(10)])
    for count in (4, 7, 20, 50):
        found = plan.at(timesteps_of(solver, count, process), process)
        assert (found.num_steps, found.depths[0]) == (count, 1)
        assert found.depths[-1] == FULL or count < 10, "fewer steps end at more noise, and so at a lower depth"
        assert all(a <= b for a, b in pairwise(found.depths))
