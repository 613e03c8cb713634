"""`apply_dyndit(pipe)`: something in one line, without exits of one's own."""

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import dyndit
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig
from dyndit.plans.schedules import ramp, skips
from dyndit.plans.step import Held, NoGuide
from dyndit.plans.step import steps as parsed
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline

STEPS = 8


@pytest.fixture(params=sorted(TINY_PIPELINES))
def tiny(request: pytest.FixtureRequest) -> Iterator[TinyPipeline]:
    with torch.no_grad():
        yield tiny_pipeline(request.param)


@pytest.mark.parametrize("count", [1, 2])
def test_one_line_saves_blocks_in_every_family(tiny: TinyPipeline, count: int, caplog) -> None:
    """Guided and unguided calls are told apart without being said."""
    plain = {guided: tiny.run(guided=guided, count=count, num_inference_steps=STEPS) for guided in (True, False)}
    with caplog.at_level(logging.WARNING):
        handle = dyndit.apply_dyndit(tiny.pipe)
    (message,) = [record.getMessage() for record in caplog.records if "dyndit" in record.name]
    assert "distill_exits" in message
    assert "calibrate_pipeline" in message
    assert "\n" not in message
    for guided in (True, False, True):
        picture = tiny.run(guided=guided, count=count, num_inference_steps=STEPS)
        assert picture.isfinite().all()
        assert not torch.equal(picture, plain[guided])
        plan = handle.running
        assert plan.router == "skips"
        assert (plan.cfg_scale != 1) == guided
        assert plan.share_of_blocks < 0.8
        stats = handle.stats()
        assert stats.query("branch == 'cond'")["depth"].tolist() == list(plan.depths)
        assert ("uncond" in set(stats["branch"])) == guided
        again = tiny.run(guided=guided, count=count, num_inference_steps=STEPS)
        assert torch.equal(again, picture)
    handle.remove()
    assert torch.equal(tiny.run(guided=True, count=count, num_inference_steps=STEPS), plain[True])


def test_few_steps_stay_whole(tiny: TinyPipeline) -> None:
    plain = tiny.run(num_inference_steps=2)
    dyndit.apply_dyndit(tiny.pipe)
    assert torch.equal(tiny.run(num_inference_steps=2), plain)


def test_untrained_exits_may_be_chosen_and_planned(tiny: TinyPipeline) -> None:
    handle = dyndit.apply_dyndit(tiny.pipe, ExitConfig((2,)), partial(skips, every=3))
    assert handle.model.depths == (2, 4)
    tiny.run(num_inference_steps=STEPS)
    assert handle.running.depths == (4, 4, 2, 2, 4, 2, 2, 4)
    handle.remove()
    plain = tiny.run()
    handle = dyndit.apply_dyndit(tiny.pipe, None)
    assert handle.router is None
    assert torch.equal(tiny.run(), plain)


def test_a_router_that_cannot_turn_guided_in_the_middle_says_so() -> None:
    """Separate calls show their guidance after the first ran."""
    tiny = tiny_pipeline("FluxTransformer2DModel")

    def by_guidance(full: dyndit.DepthPlan, depths: tuple[int, ...]) -> dyndit.DepthPlan:
        return ramp(full, depths, start=2 if full.cfg_scale == 1 else 1)

    dyndit.apply_dyndit(tiny.pipe, ExitConfig(), by_guidance)
    tiny.run(guided=False)
    with pytest.raises(InputError, match=r"unguided call, which is guided; expected apply_dyndit\(cfg_scale") as found:
        tiny.run()
    assert "\n" not in str(found.value)


def test_a_bare_transformer_needs_a_plan() -> None:
    with pytest.raises(InputError, match="a router needs the scheduler's timesteps"):
        dyndit.apply_dyndit(tiny_pipeline("DiTTransformer2DModel").transformer)


def test_skips_alternates_full_depth_and_forecasts() -> None:
    full = dyndit.DepthPlan.full(tuple(range(900, 0, -100)), 12, "any", 4.0)
    depths = tuple(range(1, 13))
    plan = skips(full, depths)
    assert plan.steps == parsed("12|12", "12|12", "2+|held", "12|12", "3+|held", "12|12", "5+|held", "12|12", "12|12")
    assert {type(step.guide) for step in skips(full, depths, every=3).steps if step.forecast} == {Held}
    unguided = skips(dyndit.DepthPlan.full(full.timesteps, 12, "any"), depths, 3, 3, 4)
    assert unguided.steps == parsed("12", "12", "3+", "3+", "3+", "12", "3+", "3+", "12")
    assert {step.guide for step in unguided.steps} == {NoGuide()}
    assert skips(full, (12,)).steps == full.steps
    with pytest.raises(InputError, match="every 1; expected at least 2"):
        skips(full, depths, every=1)
