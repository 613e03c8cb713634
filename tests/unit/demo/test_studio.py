"""The studio behind the page: the same pictures as the sampler, within bounds, one visitor at a time."""

import base64
import dataclasses
import io
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dyndit.demo import drawings
from dyndit.demo.planner import BUDGETS
from dyndit.demo.studio import MOST_TEXT, ModelStudio, Request, Studio
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.step import NoGuide
from dyndit.process import RectifiedFlow
from dyndit.sampling.sample import sample
from dyndit.stats import frechet_distance, moments
from support.models import MakeModel, randomise, tiny
from support.tables import random_table

ASKED = Request((3, 1, 4), seed=7, steps=4, budget=0.6)


@pytest.fixture
def studio(make_model: MakeModel) -> Studio:
    return ModelStudio(make_model(), name="tiny")


@pytest.fixture
def calibrated(make_model: MakeModel) -> Studio:
    """A model with a shift table, measured at guidance 1.5, that also holds full depth at 5 steps."""
    model = make_model(num_blocks=4)
    table = random_table(num_steps=10, num_depths=3, seed=3)
    fewer = moments(torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    bound = {"backbone": model.identity.backbone, "exits": model.identity.exits}
    return ModelStudio(model, replace(table, bases={("ddim", 5): fewer}, **bound), name="calibrated")


def last(studio: Studio, asked: Request) -> tuple[torch.Tensor, torch.Tensor]:
    *_, (full, dynamic) = studio.draw(asked)
    return full.pictures, dynamic.pictures


def test_the_last_step_shows_the_samplers_pictures(studio: Studio) -> None:
    full, dynamic = last(studio, ASKED)
    options = {"num_steps": ASKED.steps, "cfg_scale": ASKED.cfg_scale, "seed": ASKED.seed}
    assert torch.equal(full, sample(studio.model, ASKED.values, **options).pictures)
    plan = studio.plan(ASKED)
    assert torch.equal(dynamic, sample(studio.model, ASKED.values, plan=plan, **options).pictures)
    assert not torch.equal(full, dynamic)
    assert 0 < plan.share_of_blocks <= ASKED.budget


def test_every_step_is_shown_and_timed(studio: Studio) -> None:
    shown = list(studio.draw(ASKED))
    assert [full.step for full, _ in shown] == [dynamic.step for _, dynamic in shown] == [1, 2, 3, 4]
    for side in (0, 1):
        seconds = [pair[side].seconds for pair in shown]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0


def test_visitors_do_not_mix(studio: Studio) -> None:
    others = [dataclasses.replace(ASKED, seed=seed, values=(seed,)) for seed in range(4)]
    alone = [last(studio, asked) for asked in others]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    threads = [
        threading.Thread(target=lambda i=i, asked=asked: found.update({i: last(studio, asked)}))
        for i, asked in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pair in enumerate(alone):
        assert all(map(torch.equal, found[i], pair))


@pytest.mark.parametrize(
    "change",
    [
        {"values": ()}, {"values": (0,) * 9}, {"values": (10,)}, {"values": (-1,)}, {"seed": -1}, {"seed": 2**31},
        {"steps": 0}, {"steps": 51}, {"cfg_scale": float("nan")}, {"cfg_scale": float("inf")}, {"cfg_scale": -1},
        {"budget": 0}, {"budget": 1.1}, {"budget": float("nan")}, {"solver": "nope"},
    ],
)  # fmt: skip
def test_what_lies_outside_the_bounds_is_refused(studio: Studio, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        next(studio.draw(dataclasses.replace(ASKED, **change)))


def test_a_refused_drawing_leaves_the_door_open(studio: Studio) -> None:
    with pytest.raises(InputError):
        next(studio.draw(dataclasses.replace(ASKED, values=(99,))))
    drawing = studio.draw(ASKED)
    next(drawing)
    drawing.close()  # a visitor who leaves in the middle
    assert len(list(studio.draw(ASKED))) == ASKED.steps


def test_a_model_without_exits_gets_untrained_ones(make_model: MakeModel) -> None:
    """They forecast. Full depth is what the model gives without exits."""
    backbone = make_model().backbone
    studio = ModelStudio(DynamicDepth(backbone), name="alone")
    plan = studio.plan(ASKED)
    assert plan.router == "skips"
    assert any(step.forecast for step in plan.steps)
    assert "distill" in studio.planner.caution(studio.full(ASKED))
    options = {"num_steps": ASKED.steps, "cfg_scale": ASKED.cfg_scale, "seed": ASKED.seed}
    full, dynamic = last(studio, ASKED)
    assert torch.equal(full, sample(DynamicDepth(backbone), ASKED.values, **options).pictures)
    assert not torch.equal(full, dynamic)


def test_captions_and_a_flow_are_drawn() -> None:
    model = with_exits("mmdit", RectifiedFlow())
    studio = ModelStudio(model, name="captions")
    assert studio.form.first == ("a three", "number seven, bold", "a three", "number seven, bold")
    assert "seven" in studio.form.hint
    assert studio.form.solvers[0] == "flow-euler"
    asked = Request(("a seven", "number three, tilted"), steps=4, solver="flow-euler", seed=2)
    full, _ = last(studio, asked)
    options = {"num_steps": 4, "cfg_scale": 1.5, "seed": 2, "solver": "flow-euler"}
    assert torch.equal(full, sample(model, asked.values, **options).pictures)
    for wrong in ("a nine", "x" * (MOST_TEXT + 1)):
        with pytest.raises(InputError):
            studio.full(replace(asked, values=(wrong,)))


def test_clips_move() -> None:
    studio = ModelStudio(with_exits("video"), name="clips")
    full, _ = last(studio, ASKED)
    assert full.shape == (3, 1, 3, 8, 12)
    header, _, data = drawings.source(full).partition(",")
    assert header == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).n_frames == 3
    wide = ModelStudio(with_exits("video"), name="clips", shape=(2, 8, 16))
    assert last(wide, ASKED)[0].shape == (3, 1, 2, 8, 16)
    with pytest.raises(InputError, match="--shape"):
        ModelStudio(with_exits("mmdit"), shape=(2, 8, 16))


def with_exits(family: str, process: RectifiedFlow | None = None) -> DynamicDepth:
    backbone = tiny(family)
    exits = Exits(backbone, ExitConfig())
    randomise(exits, 1)
    return DynamicDepth(backbone, exits, process=process).eval()


TEN = Request((3, 1, 4), seed=7)


def test_the_frontier_falls_and_holds_the_chosen_plan(calibrated: Studio) -> None:
    planner, full = calibrated.planner, calibrated.full(TEN)
    points = planner.frontier(full)
    within = [budget for budget in BUDGETS if budget >= planner.least_budget]
    assert len(points) == len(within) >= 3
    assert all(a.fd >= b.fd - 1e-9 for a, b in itertools.pairwise(points))
    assert all(point.share <= budget + 1e-6 for point, budget in zip(points, within, strict=True))
    for budget in (0.47, 0.5, 0.83):
        plan = planner.plan(full, budget)
        point = planner.point(plan)
        assert plan.router == "searched"
        assert point.share <= budget + 1e-6
        assert point.fd <= max(p.fd for p, b in zip(points, within, strict=True) if b <= budget) + 1e-9
        assert 'id="chosen"' in drawings.frontier(points, planner.rivals(full), point)


def test_the_rivals_are_full_depth_at_these_and_at_fewer_steps(calibrated: Studio) -> None:
    planner, table = calibrated.planner, calibrated.planner.table
    fewer, same = planner.rivals(calibrated.full(TEN))
    assert (fewer.share, fewer.name) == (0.5, "5 steps")
    assert fewer.fd == pytest.approx(frechet_distance(table.bases["ddim", 5], table.reference))
    assert (same.share, same.fd) == (1.0, pytest.approx(frechet_distance(table.base, table.reference)))
    assert planner.caution(calibrated.full(TEN)) == ""


def test_full_depth_that_was_not_measured_is_said_to_be_so(calibrated: Studio) -> None:
    full = calibrated.full(replace(TEN, steps=12))
    (alone,) = calibrated.planner.rivals(full)
    assert alone.name == "full depth"
    caution = calibrated.planner.caution(full)
    assert "ddim at 10 steps" in caution
    assert caution in drawings.frontier(calibrated.planner.frontier(full), [alone], None, caution).replace(
        "&#x27;", "'"
    )


def test_another_guidance_is_drawn_but_not_predicted(calibrated: Studio) -> None:
    """A table measured with guidance serves other scales by its plans, and no guidance by ramps."""
    stronger = replace(TEN, cfg_scale=4.0)
    plan = calibrated.plan(stronger)
    assert (plan.steps, plan.cfg_scale) == (calibrated.plan(TEN).steps, 4.0)
    without = replace(TEN, cfg_scale=1.0)
    assert calibrated.plan(without).router == "ramp"
    assert all(step.guide == NoGuide() for step in calibrated.plan(without).steps)
    for asked in (stronger, without):
        full = calibrated.full(asked)
        assert calibrated.planner.frontier(full) == []
        assert "guidance 1.5" in drawings.frontier([], [], None, calibrated.planner.caution(full))
        assert len(list(calibrated.draw(replace(asked, steps=3)))) == 3


def test_no_search_runs_during_a_drawing(calibrated: Studio) -> None:
    """It would slow the drawing, whose time is measured."""
    drawing = calibrated.draw(TEN)
    next(drawing)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(calibrated.plan(replace(TEN, budget=0.91))))
    thread.start()
    thread.join(0.3)
    assert not found
    drawing.close()
    thread.join(60)
    assert found


def test_the_plan_of_another_model_is_refused(make_model: MakeModel) -> None:
    table = replace(random_table(num_steps=10, num_depths=3, seed=3), backbone="another")
    with pytest.raises(InputError, match="shift table"):
        ModelStudio(make_model(num_blocks=4), table)


def test_drawings_say_what_they_show(studio: Studio) -> None:
    plan = studio.plan(ASKED)
    text = drawings.plan_map(plan, done=2)
    assert text.count("<rect") == plan.num_blocks * plan.num_steps + 1
    assert all(str(step) in text for step in plan.steps)
    assert drawings.plan_map(plan).count("<rect") == plan.num_blocks * plan.num_steps
    full = studio.full(ASKED)
    assert "calibrate" in drawings.frontier(
        studio.planner.frontier(full), studio.planner.rivals(full), None, studio.planner.caution(full)
    )


def test_what_a_visitor_writes_is_no_markup(studio: Studio) -> None:
    (*_, (full, _)) = studio.draw(ASKED)
    assert "<script" not in drawings.sides(full, None, "<script>")
    assert "<script" not in drawings.frontier([], [], None, "<script>")
