"""Plans: plain data that survives JSON, counts its blocks, and refuses what it does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyndit.errors import PlanError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.step import Held, NoGuide, OwnExit, Step, Unconditional, steps
from dyndit.storage import load as checkpoints
from support.models import MakeModel

PLAN = DepthPlan((900, 500, 100), steps("2", "4|2", "6|6"), 6, "ddim", "hand", cfg_scale=1.5, backbone="aa", exits="bb")
ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = [path for path in sorted(ROOT.glob("docs/results/**/plans/*.json")) if ".manifest" not in path.name]


def named(path: Path) -> str:
    return f"{path.parents[1].name}-{path.stem}"


OF_VERSION_1 = [path for path in PUBLISHED if json.loads(path.read_text())["version"] == 1]
"""Those of version 1, whose depths are whole numbers with signs."""


@st.composite
def plans(draw: st.DrawFn, *, guided: bool | None = None) -> DepthPlan:
    """Any valid plan."""
    num_blocks, num_steps = draw(st.integers(1, 28)), draw(st.integers(1, 12))
    guided = draw(st.booleans()) if guided is None else guided
    found: list[Step] = []
    for _ in range(num_steps):
        depth = draw(st.integers(1, num_blocks))
        guides = st.just(NoGuide())
        if guided:
            guides |= st.just(Held()) | st.integers(1, num_blocks).map(Unconditional)
        if guided and depth > 1:
            guides |= st.integers(1, depth - 1).map(OwnExit)
        guide = draw(guides)
        built_on = depth < num_blocks and any(step.depth == num_blocks for step in found)
        found.append(Step(depth, guide, built_on and not isinstance(guide, Unconditional) and draw(st.booleans())))
    timesteps = sorted(draw(st.sets(st.integers(0, 999), min_size=num_steps, max_size=num_steps)), reverse=True)
    return DepthPlan(
        tuple(timesteps),
        tuple(found),
        num_blocks,
        draw(st.sampled_from(["ddim", "ddpm", "unipc"])),
        draw(st.text(max_size=8)),
        cfg_scale=draw(st.floats(1.1, 8)) if guided else 1.0,
        budget=draw(st.none() | st.floats(0.01, 1)),
        backbone=draw(st.sampled_from(["", "0123456789abcdef"])),
        figures=draw(
            st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False, allow_infinity=False), max_size=2)
        ),
    )


@given(plan=plans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_round_trip(plan: DepthPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    found = DepthPlan.load(tmp_path / "plan.json")
    assert found == plan
    assert found.figures == plan.figures
    assert isinstance(found.steps, tuple)


@given(plan=plans())
def test_counts(plan: DepthPlan) -> None:
    assert plan.num_steps == len(plan.timesteps) == len(plan.steps)
    assert plan.guided == any(depth > 0 for depth in plan.uncond_depths)
    branches = 2 if plan.cfg_scale != 1 else 1
    assert plan.share_of_blocks == pytest.approx(sum(plan.mean_depth) / plan.num_blocks / branches)
    assert 0 < plan.share_of_blocks <= 1
    assert plan.with_steps(plan.steps) == plan


@given(plan=plans(), cfg_scale=st.sampled_from([1.0, 1.5]))
def test_the_full_plan_runs_every_block(plan: DepthPlan, cfg_scale: float) -> None:
    full = DepthPlan.full(plan.timesteps, plan.num_blocks, plan.solver, cfg_scale)
    assert full.share_of_blocks == 1
    assert full.guided == (cfg_scale != 1)
    assert set(full.depths) == {plan.num_blocks}
    assert (plan.difference(full) == []) == (plan.steps == full.steps)


def test_share_of_blocks_by_hand() -> None:
    assert PLAN.share_of_blocks == pytest.approx((2 + 4 + 6 + 0 + 2 + 6) / 36)
    assert PLAN.mean_depth == (4, 8 / 3)
    unguided = replace(PLAN, steps=steps("2", "4", "6"), cfg_scale=1.0)
    assert unguided.share_of_blocks == pytest.approx(12 / 18)


def test_held_guidance_costs_no_blocks_and_is_written_out(make_model: MakeModel) -> None:
    plan = PLAN.with_steps(steps("2|2", "4|held", "6|6"))
    assert plan.share_of_blocks == pytest.approx((2 + 2 + 4 + 6 + 6) / 36)
    assert plan.mean_depth == (4, 8 / 3)
    assert plan.guided
    assert [work.held for work in plan.works] == [False, True, False]
    assert not any(work.held for work in PLAN.works)
    assert str(plan).splitlines()[-1].split() == ["step", "2|2", "4|held", "6|6"]
    bind(unbound(plan), make_model(layers=(2, 4)))


def test_a_guide_of_its_own_costs_no_blocks_and_is_written_out(make_model: MakeModel) -> None:
    plan = PLAN.with_steps(steps("2|e1", "4|held", "6|e4"))
    assert plan.share_of_blocks == pytest.approx(12 / 36)
    assert [work.own_exit for work in plan.works] == [1, 0, 4]
    assert not plan.guided  # no unconditional branch runs
    assert str(plan).splitlines()[-1].split() == ["step", "2|e1", "4|held", "6|e4"]
    bind(unbound(plan), make_model(layers=(1, 2, 4)))
    with pytest.raises(PlanError, match="depth 1 has no exit"):
        bind(unbound(plan), make_model(layers=(2, 4)))
    for guide in (2, 3):
        with pytest.raises(PlanError, match=f"own exit at {guide}, expected one below 2"):
            PLAN.with_steps([Step(2, OwnExit(guide)), Step(4), Step(6)])


@given(plan=plans())
def test_full_steps_keep_the_gaps_that_later_forecasts_build_on(plan: DepthPlan) -> None:
    """Each forecast finds its exit's gap at the last two steps at full depth; no other gap is kept."""
    needed = [set() for _ in plan.steps]
    for k, step in enumerate(plan.steps):
        if step.forecast:
            full = [i for i in range(k) if plan.depths[i] == plan.num_blocks]
            assert full
            for earlier in full[-2:]:
                needed[earlier].add(step.depth)
    assert [work.kept for work in plan.works] == [tuple(sorted(depths)) for depths in needed]
    assert [replace(work, kept=()) for work in plan.works] == [step.work() for step in plan.steps]


def test_difference_names_the_steps() -> None:
    other = PLAN.with_steps(steps("2", "4|4", "4|6"))
    assert PLAN.difference(other) == [(1, *steps("4|2", "4|4")), (2, *steps("6|6", "4|6"))]
    assert other.difference(PLAN) == [(1, *steps("4|4", "4|2")), (2, *steps("4|6", "6|6"))]
    with pytest.raises(PlanError, match="3 and 2 steps"):
        PLAN.difference(DepthPlan.full((9, 1), 6, "ddim"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timesteps": (), "steps": ()}, "no steps"),
        ({"timesteps": (900, 900, 100)}, "timesteps must fall"),
        ({"steps": ("2", "4")}, "2 steps for 3 timesteps"),
        ({"steps": ("2",)}, "1 steps for 3 timesteps"),
        ({"steps": ("0", "4", "6")}, "step '0': expected a depth"),
        ({"steps": (2, 4, 6)}, "step 2: expected a depth"),
        ({"steps": "246"}, "steps '246'"),
        ({"steps": ("2", "4", "7")}, r"step 2 \(7\) goes beyond 6 blocks"),
        ({"steps": ("2|7", "4", "6")}, r"step 0 \(2\|7\) goes beyond 6 blocks"),
        ({"steps": ("2+", "4", "6")}, "step 0 forecasts, but no step before it is at full depth"),
        ({"steps": ("6", "4", "6+")}, r"step 2 \(6\+\) forecasts at full depth"),
        ({"cfg_scale": 1.0}, r"step 1 \(4\|2\) is guided, but the guidance scale is 1"),
        ({"steps": ("6", "6|held", "6"), "cfg_scale": 1.0}, r"step 1 \(6\|held\) is guided"),
        ({"budget": 0.0}, "budget 0, expected above 0"),
        ({"budget": 1.01}, "budget 1.01, expected above 0 and at most 1"),
        ({"calls": (1, 2)}, r"calls \[1, 2\], expected a whole number for each step"),
        ({"calls": (1, 0, 1)}, r"calls \[1, 0, 1\]"),
        ({"calls": (1, 2.0, 1)}, r"calls \[1, 2.0, 1\]"),
        ({"calls": (True, 1, 1)}, r"calls \[True, 1, 1\]"),
    ],
)
def test_impossible_plans_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(PlanError, match=named) as caught:
        replace(PLAN, **changes)
    assert "\n" not in str(caught.value)


FIRST = {"format": "dyndit-plan", "version": 1, "timesteps": [9, 1], "cond": [1, 2], "uncond": [0, 0]}
FIRST |= {"num_blocks": 2, "solver": "ddim"}
GOOD = {"format": "dyndit-plan", "version": 2, "timesteps": [9, 1], "steps": ["1", "2"]}
GOOD |= {"num_blocks": 2, "solver": "ddim", "router": "manual"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps(FIRST | {"format": "other"}),
        json.dumps(FIRST | {"version": 2}),
        json.dumps(FIRST | {"depths": [1]}),
        json.dumps({k: v for k, v in FIRST.items() if k != "cond"}),
        json.dumps(FIRST | {"cond": [1, 3]}),
        json.dumps(FIRST | {"cond": [0, 2]}),
        json.dumps(FIRST | {"cond": [1, 1.5]}),
        json.dumps(FIRST | {"cond": "12"}),
        json.dumps(FIRST | {"cond": [1, None]}),
        json.dumps(FIRST | {"cond": [1, float("inf")]}),
        json.dumps(FIRST | {"cond": 5}),
        json.dumps(FIRST | {"cond": [1, 2, 2]}),
        json.dumps(FIRST | {"uncond": [0, -3], "cfg_scale": 1.5}),
        json.dumps(FIRST | {"uncond": [0, 1.5], "cfg_scale": 1.5}),
        json.dumps(FIRST | {"uncond": [0]}),
        json.dumps(FIRST | {"num_blocks": "2"}),
        json.dumps(GOOD | {"format": "other"}),
        json.dumps(GOOD | {"version": 1}),
        json.dumps(GOOD | {"version": 3}),
        json.dumps(GOOD | {"cond": [1, 2]}),
        json.dumps({k: v for k, v in GOOD.items() if k != "steps"}),
        json.dumps(GOOD | {"steps": ["1", "3"]}),
        json.dumps(GOOD | {"steps": ["1", "1.5"]}),
        json.dumps(GOOD | {"steps": "12"}),
        json.dumps(GOOD | {"steps": [1, 2]}),
        json.dumps(GOOD | {"steps": ["1", None]}),
        json.dumps(GOOD | {"steps": 5}),
        json.dumps(GOOD | {"steps": ["1", "2", "2"]}),
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
    for good in (FIRST, GOOD):
        path.write_text(json.dumps(good))
        assert DepthPlan.load(path).steps == steps("1", "2")
    for bad in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            DepthPlan.load(bad)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not JSON"):
        DepthPlan.load(path)


def test_a_file_holds_the_steps_as_they_are_printed(tmp_path: Path) -> None:
    plan = replace(PLAN, steps=steps("6|6", "4+|held", "6|e2"))
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["format"], data["version"]) == ("dyndit-plan", 2)
    assert data["steps"] == ["6|6", "4+|held", "6|e2"]
    assert (data["backbone"], data["exits"]) == ("aa", "bb")
    assert not list(tmp_path.glob("*.tmp"))


# Files of version 1.


@pytest.mark.parametrize("path", OF_VERSION_1, ids=named)
def test_every_published_plan_of_version_1_is_read(path: Path, tmp_path: Path) -> None:
    """Step by step it says what its whole numbers said, and it is the same plan once saved again."""
    data, plan = json.loads(path.read_text()), DepthPlan.load(path)
    assert [-step.depth if step.forecast else step.depth for step in plan.steps] == data["cond"]
    for work, uncond in zip(plan.works, data["uncond"], strict=True):
        assert work.depths[1:] == ((uncond,) if uncond > 0 else ())
        assert work.held == (uncond == -1)
        assert work.own_exit == (-1 - uncond if uncond < -1 else 0)
    assert plan.share_of_blocks == data["figures"]["share_of_blocks"]
    assert (plan.backbone, plan.exits) == (f"v1:{data['trunk']}", f"v1:{data['exits']}")
    for name in ("num_blocks", "solver", "router", "cfg_scale", "budget", "figures"):
        assert getattr(plan, name) == data[name]
    assert list(plan.timesteps) == data["timesteps"]
    plan.save(tmp_path / "plan.json")
    assert DepthPlan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2


@pytest.mark.parametrize("path", PUBLISHED, ids=named)
def test_every_published_plan_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    """It is the same plan once saved again, and a file of version 2 says the same steps."""
    data, plan = json.loads(path.read_text()), DepthPlan.load(path)
    plan.save(tmp_path / "plan.json")
    assert DepthPlan.load(tmp_path / "plan.json") == plan
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved == data or (data["version"], saved["version"]) == (1, 2)


def test_published_plans_use_every_kind_of_step() -> None:
    """Guard of the test above."""
    assert len(PUBLISHED) > 100
    published = [DepthPlan.load(path) for path in PUBLISHED]
    assert {type(step.guide) for plan in published for step in plan.steps} == {NoGuide, Unconditional, OwnExit, Held}
    assert any(step.forecast for plan in published for step in plan.steps)
    assert any(isinstance(step.guide, Held) and step.forecast for plan in published for step in plan.steps)


def test_at_guidance_scale_1_the_unconditional_depths_of_version_1_never_ran(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(FIRST | {"uncond": [1, 2], "cfg_scale": 1.0}))
    assert DepthPlan.load(path).steps == steps("1", "2")
    path.write_text(json.dumps(FIRST | {"uncond": [1, 2], "cfg_scale": 1.5}))
    assert DepthPlan.load(path).steps == steps("1|1", "2|2")


def test_a_schedule_of_version_1_stays_unbound(tmp_path: Path, make_model: MakeModel) -> None:
    path, model = tmp_path / "plan.json", make_model(num_blocks=2)
    path.write_text(json.dumps(FIRST | {"trunk": "", "exits": ""}))
    plan = DepthPlan.load(path)
    assert (plan.backbone, plan.exits) == ("", "")
    with pytest.raises(PlanError, match="expected a plan that names its model"):
        bind(plan, model)
    assert bind(plan, model, check_identity=False) is plan


def test_plans_of_version_1_fit_the_backbone_they_were_made_for() -> None:
    model = checkpoints.load("digits")
    plan = DepthPlan.load(ROOT / "docs" / "results" / "peers" / "plans" / "plan-unipc-10-b0.45.json")
    assert plan.backbone == f"v1:{model.backbone.checksum()}"
    model.check_identity(plan.backbone, "", origin="plan")
    for other in ("v1:0123456789abcdef", model.backbone.checksum()):  # without its mark it is another kind of hash
        with pytest.raises(PlanError, match=f"^p.json: made for backbone {other}, but the model's is "):
            model.check_identity(other, "", origin="p.json", error=PlanError)
    with pytest.raises(PlanError, match=f"made for exits {plan.exits}, but the model's is absent"):
        bind(plan, model)
    model.backbone.blocks[0].attn.qkv.weight.data[0, 0] += 1e-6  # an exact checksum, unlike an identity
    with pytest.raises(PlanError, match=f"made for backbone {plan.backbone}"):
        bind(plan, model)


# What a plan is bound to.


def unbound(plan: DepthPlan) -> DepthPlan:
    return replace(plan, backbone="", exits="")


def bound(plan: DepthPlan, model: DynamicDepth) -> DepthPlan:
    return replace(plan, backbone=model.identity.backbone, exits=model.identity.exits)


@pytest.fixture
def fitting(make_model: MakeModel) -> DynamicDepth:
    return make_model(layers=(2, 4))


FULL = DepthPlan.full(PLAN.timesteps, 6, "ddim", 1.5)


@pytest.mark.parametrize(
    ("changes", "asked", "named"),
    [
        ({"num_blocks": 8}, {}, "made for 8 blocks, but the model has 6"),
        ({"steps": ("3", "4", "6")}, {}, r"depth 3 has no exit; the model has \[2, 4, 6\]"),
        ({"steps": ("2|3", "4", "6")}, {}, "depth 3 has no exit"),
        ({"steps": ("6|e5", "4", "6")}, {}, "depth 5 has no exit"),
        ({"steps": ("6", "1+", "6")}, {}, "depth 1 has no exit"),
        ({"backbone": "cc"}, {}, "made for backbone cc, but the model's is [0-9a-f]{16}"),
        ({"exits": "cc"}, {}, "made for exits cc, but the model's is [0-9a-f]{16}"),
        ({}, {"full": replace(FULL, solver="unipc")}, "made for solver ddim, but unipc is asked for"),
        (
            {},
            {"full": replace(FULL, timesteps=(900, 500), steps=FULL.steps[:2])},
            "made for 3 steps, but 2 steps of ddim are asked for",
        ),
        ({}, {"full": replace(FULL, timesteps=(900, 500, 99))}, "made for other timesteps, but 3 steps of ddim"),
        ({}, {"full": replace(FULL, calls=(1, 2, 1))}, r"made for one calls a step, but ddim makes \(1, 2, 1\)"),
        ({"calls": (2, 1, 1)}, {}, r"made for \(2, 1, 1\) calls a step, but ddim makes \(\)"),
        ({}, {"cfg_scale": 2.0}, "made for guidance scale 1.5, but --cfg-scale 2 is asked for"),
        ({"backbone": ""}, {"cfg_scale": 1.0}, "made for guidance scale 1.5, but --cfg-scale 1 is asked for"),
    ],
)
def test_bind_refuses_what_does_not_fit(changes: dict, asked: dict, named: str, fitting: DynamicDepth) -> None:
    plan, fits = bound(PLAN, fitting), {"full": FULL, "cfg_scale": 1.5, "origin": "--plan p.json"}
    assert bind(plan, fitting, **fits) is plan
    with pytest.raises(PlanError, match=f"^--plan p.json: {named}") as caught:
        bind(replace(plan, **changes), fitting, **fits | asked)
    assert "\n" not in str(caught.value)


def test_bind_refuses_a_model_without_the_exits(fitting: DynamicDepth) -> None:
    bare, plan = DynamicDepth(fitting.backbone), bound(PLAN, fitting)
    with pytest.raises(PlanError, match=r"plan: made for exits .*, but the model's is absent"):
        bind(plan, bare)
    with pytest.raises(PlanError, match="depth 2 has no exit"):
        bind(unbound(plan), bare)


def test_an_unbound_schedule_fits_any_backbone_of_its_depth(fitting: DynamicDepth, make_model: MakeModel) -> None:
    other, plan = make_model(layers=(2, 4), seed=5), bound(PLAN, fitting)
    with pytest.raises(PlanError):
        bind(plan, other)  # otherwise the lines below prove nothing
    assert bind(unbound(plan), other) == unbound(plan)
    assert bind(unbound(plan), other, cfg_scale=2.0) == unbound(plan)  # a schedule is of any guidance
    assert bind(plan, other, check_identity=False) is plan  # the plug-in's opt-out
    assert bind(plan, fitting) is plan  # what is not given is not checked


def test_a_plan_fits_the_model_in_half_precision(fitting: DynamicDepth, make_model: MakeModel) -> None:
    plan = bound(PLAN, fitting)
    for half in ("half", "bfloat16"):
        assert bind(plan, getattr(make_model(layers=(2, 4)), half)()) is plan


def test_text_is_a_line_of_timesteps_and_one_of_steps() -> None:
    lines = str(PLAN).splitlines()
    assert lines[0] == "hand, ddim, 3 steps, 56% of the blocks"
    assert [line.split() for line in lines[1:]] == [["t", "900", "500", "100"], ["step", "2", "4|2", "6|6"]]
