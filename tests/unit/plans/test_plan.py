"""Plans: plain data that survives JSON, counts its blocks, and refuses what it does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyndit.errors import PlanError
from dyndit.plans.plan import REUSED, DepthPlan, guide_of, own_exit, written

DEPTHS = (2, 4, 6)
PLAN = DepthPlan((900, 500, 100), (2, 4, 6), (0, 2, 6), 6, "ddim", "hand", cfg_scale=1.5, trunk="aa", exits="bb")


@st.composite
def plans(draw: st.DrawFn, *, guided: bool | None = None) -> DepthPlan:
    """Any valid plan."""
    num_blocks, num_steps = draw(st.integers(1, 28)), draw(st.integers(1, 12))
    guided = draw(st.booleans()) if guided is None else guided

    def depths(least: int) -> list[int]:
        return draw(st.lists(st.integers(least, num_blocks), min_size=num_steps, max_size=num_steps))

    timesteps = sorted(draw(st.sets(st.integers(0, 999), min_size=num_steps, max_size=num_steps)), reverse=True)
    return DepthPlan(
        tuple(timesteps),
        tuple(cond := depths(1)),
        tuple(draw(st.integers(own_exit(depth - 1), num_blocks)) for depth in cond) if guided else (0,) * num_steps,
        num_blocks,
        draw(st.sampled_from(["ddim", "ddpm", "unipc"])),
        draw(st.text(max_size=8)),
        cfg_scale=draw(st.floats(1.1, 8)) if guided else 1.0,
        budget=draw(st.none() | st.floats(0.01, 1)),
        trunk=draw(st.sampled_from(["", "0123456789abcdef"])),
        figures=draw(st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False), max_size=2)),
    )


@given(plan=plans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_round_trip(plan: DepthPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    found = DepthPlan.load(tmp_path / "plan.json")
    assert found == plan
    assert found.figures == plan.figures
    assert isinstance(found.cond, tuple)


@given(plan=plans())
def test_counts(plan: DepthPlan) -> None:
    assert plan.num_steps == len(plan.timesteps) == len(plan.pairs)
    assert plan.guided == any(u > 0 for _, u in plan.pairs)
    branches = 2 if plan.cfg_scale != 1 else 1
    assert plan.share_of_blocks == pytest.approx(sum(plan.mean_depth) / plan.num_blocks / branches)
    assert 0 < plan.share_of_blocks <= 1
    assert plan.with_pairs(plan.pairs) == plan


@given(plan=plans(), cfg_scale=st.sampled_from([1.0, 1.5]))
def test_the_full_plan_runs_every_block(plan: DepthPlan, cfg_scale: float) -> None:
    full = DepthPlan.full(plan.timesteps, plan.num_blocks, plan.solver, cfg_scale)
    assert full.share_of_blocks == 1
    assert full.guided == (cfg_scale != 1)
    assert set(full.cond) == {plan.num_blocks}
    assert (plan.difference(full) == []) == (plan.pairs == full.pairs)


def test_share_of_blocks_by_hand() -> None:
    assert PLAN.share_of_blocks == pytest.approx((2 + 4 + 6 + 0 + 2 + 6) / 36)
    assert PLAN.mean_depth == (4, 8 / 3)
    unguided = replace(PLAN, uncond=(0, 0, 0), cfg_scale=1.0)
    assert unguided.share_of_blocks == pytest.approx(12 / 18)


def test_reused_guidance_costs_no_blocks_and_is_written_out() -> None:
    plan = PLAN.with_pairs([(2, 2), (4, REUSED), (6, 6)])
    assert plan.share_of_blocks == pytest.approx((2 + 2 + 4 + 6 + 6) / 36)
    assert plan.mean_depth == (4, 8 / 3)
    assert plan.guided
    assert (plan.reuses, PLAN.reuses) == (True, False)
    assert str(plan).splitlines()[-1].split() == ["uncond", "2", "reuse", "6"]
    plan.check(depths=(2, 4, 6))


def test_a_guide_of_its_own_costs_no_blocks_and_is_written_out() -> None:
    plan = PLAN.with_pairs([(2, own_exit(1)), (4, REUSED), (6, own_exit(4))])
    assert plan.share_of_blocks == pytest.approx(12 / 36)
    assert plan.guides == (1, 0, 4)
    assert not plan.guided  # no unconditional branch runs
    assert str(plan).splitlines()[-1].split() == ["uncond", "e1", "reuse", "e4"]
    plan.check(depths=(1, 2, 4, 6))
    with pytest.raises(PlanError, match="depth 1 has no exit"):
        plan.check(depths=(2, 4, 6))
    for guide in (2, 3):
        with pytest.raises(PlanError, match=f"own exit at {guide}, expected one below its depth 2"):
            PLAN.with_pairs([(2, own_exit(guide)), (4, 0), (6, 0)])


@given(depth=st.integers(1, 28))
def test_guides_and_depths_do_not_meet(depth: int) -> None:
    assert guide_of(own_exit(depth)) == depth
    assert own_exit(depth) < REUSED
    assert {guide_of(uncond) for uncond in (REUSED, 0, depth)} == {0}
    assert len({written(own_exit(depth)), written(REUSED), written(0), written(depth)}) == 4


def test_difference_names_the_steps() -> None:
    other = PLAN.with_pairs([(2, 0), (4, 4), (4, 6)])
    assert PLAN.difference(other) == [(1, (4, 2), (4, 4)), (2, (6, 6), (4, 6))]
    assert other.difference(PLAN) == [(1, (4, 4), (4, 2)), (2, (4, 6), (6, 6))]
    with pytest.raises(PlanError, match="3 and 2 steps"):
        PLAN.difference(DepthPlan.full((9, 1), 6, "ddim"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timesteps": (), "cond": (), "uncond": ()}, "no steps"),
        ({"cond": (2, 4)}, "2 cond depths for 3 timesteps"),
        ({"uncond": (0,)}, "1 uncond depths for 3 timesteps"),
        ({"cond": (0, 4, 6)}, r"cond depth 0 outside 1\.\.6"),
        ({"cond": (2, 4, 7)}, r"cond depth 7 outside 1\.\.6"),
        ({"uncond": (-7, 4, 6)}, r"uncond depth -7 outside -6\.\.6"),
    ],
)
def test_impossible_plans_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(PlanError, match=named) as caught:
        replace(PLAN, **changes)
    assert "\n" not in str(caught.value)


GOOD = {"format": "dyndit-plan", "version": 1, "timesteps": [9, 1], "cond": [1, 2], "uncond": [0, 0]}
GOOD |= {"num_blocks": 2, "solver": "ddim"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps(GOOD | {"format": "other"}),
        json.dumps(GOOD | {"version": 2}),
        json.dumps(GOOD | {"depths": [1]}),
        json.dumps({k: v for k, v in GOOD.items() if k != "cond"}),
        json.dumps(GOOD | {"cond": [1, 3]}),
        json.dumps(GOOD | {"cond": [1, 1.5]}),
        json.dumps(GOOD | {"cond": "12"}),
        json.dumps(GOOD | {"cond": [1, None]}),
        json.dumps(GOOD | {"cond": [1, float("inf")]}),
        json.dumps(GOOD | {"cond": 5}),
        json.dumps(GOOD | {"num_blocks": "2"}),
    ],
)
def test_bad_files_are_one_line_that_names_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json: ") as caught:
        DepthPlan.load(path)
    assert "\n" not in str(caught.value)


def test_good_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD))
    assert DepthPlan.load(path).pairs == ((1, 0), (2, 0))
    for bad in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            DepthPlan.load(bad)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not JSON"):
        DepthPlan.load(path)


FITS = {"depths": DEPTHS, "trunk": "aa", "exits": "bb", "timesteps": (900, 500, 100), "solver": "ddim"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (2, 4, 6, 8)}, "made for 6 blocks, but the model has 8"),
        ({"depths": (4, 6)}, r"depth 2 has no exit; the model has \[4, 6\]"),
        ({"trunk": "cc"}, "made for trunk aa, but the model's is cc"),
        ({"exits": "cc"}, "made for set of exits bb, but the model's is cc"),
        ({"exits": ""}, "made for set of exits bb, but the model's is absent"),
        ({"solver": "unipc"}, "made for solver ddim, but unipc is asked for"),
        ({"timesteps": (900, 500)}, "made for 3 steps, but 2 steps of ddim are asked for"),
        ({"timesteps": (900, 500, 99), "solver": None}, "made for other timesteps, but 3 steps of ddim"),
    ],
)
def test_check_refuses_what_does_not_fit(changes: dict, named: str) -> None:
    PLAN.check(**FITS)
    with pytest.raises(PlanError, match=f"--plan p.json: {named}") as caught:
        PLAN.check(**FITS | changes, origin="--plan p.json")
    assert "\n" not in str(caught.value)


def test_an_unbound_schedule_fits_any_trunk_of_its_depth() -> None:
    unbound = replace(PLAN, trunk="", exits="")
    other = FITS | {"trunk": "cc", "exits": ""}
    with pytest.raises(PlanError):
        PLAN.check(**other)  # otherwise the lines below prove nothing
    assert unbound.check(**other) is None
    assert PLAN.check(depths=DEPTHS) is None  # what is not given is not checked


def test_text_has_a_line_per_branch() -> None:
    lines = str(PLAN).splitlines()
    assert lines[0] == "hand, ddim, 3 steps, 56% of the blocks"
    assert [line.split() for line in lines[1:]] == [
        ["t", "900", "500", "100"],
        ["cond", "2", "4", "6"],
        ["uncond", "0", "2", "6"],
    ]
