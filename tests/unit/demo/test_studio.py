"""The studio behind the page: the same pictures as the sampler, within bounds, one visitor at a time."""

import dataclasses
import threading

import pytest
import torch

from dyndit.demo import drawings
from dyndit.demo.studio import Request, Studio
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.sampling.sample import sample
from support.models import MakeModel

ASKED = Request((3, 1, 4), seed=7, steps=4, budget=0.6)


@pytest.fixture
def studio(make_model: MakeModel) -> Studio:
    return Studio(make_model(), name="tiny")


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


def test_a_model_without_exits_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(InputError, match="no exits"):
        Studio(DynamicDepth(model.backbone, pixel_space=model.pixel_space))


def test_drawings_say_what_they_show(studio: Studio) -> None:
    plan = studio.plan(ASKED)
    text = drawings.plan_map(plan, done=2)
    assert text.count("<rect") == plan.num_blocks * plan.num_steps + 1
    assert all(str(step) in text for step in plan.steps)
    assert drawings.plan_map(plan).count("<rect") == plan.num_blocks * plan.num_steps
    assert "calibrate" in drawings.frontier(studio.frontier(ASKED), None)
