"""Routers that change the guide alone: by an own exit, and in an interval of noise levels."""

import pytest
import torch

from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.plans.schedules import guidance_interval, interval, own_exit, parse_router
from dyndit.plans.step import NoGuide, OwnExit, Step, Unconditional
from dyndit.process import DDPM, RectifiedFlow
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start


def test_own_exit_guides_every_guided_step_at_full_depth(model) -> None:
    plan = parse_router("own_exit:3")(full_plan(model, "ddim", 4, 2.0), model.depths)
    assert [str(step) for step in plan.steps] == ["6|e3"] * 4
    assert plan.router == "own_exit"
    unguided = own_exit(full_plan(model, "ddim", 4, 1.0), model.depths, 3)
    assert [str(step) for step in unguided.steps] == ["6"] * 4
    with pytest.raises(InputError, match="no exits"):
        own_exit(full_plan(model, "ddim", 4, 2.0), (6,), 3)


def test_own_exit_is_internal_guidance(model) -> None:
    """D_i + w (D_f - D_i), with the intermediate head's prediction D_i and the final one D_f (arXiv:2512.24176)."""
    x, w = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 2.5
    plan = own_exit(full_plan(model, "ddim", 1, w), model.depths, 3)
    batch = Batch(torch.tensor([4]), (0,), 0)
    trajectory = start(model, batch, "ddim", 1)
    t = torch.tensor([plan.timesteps[0]])
    with torch.no_grad():
        call = Inputs(trajectory.x, t, torch.tensor([4]))
        final, inner = (model(call.x, call.t, call.y, depth)[:, :1] for depth in (6, 3))
        found = advance(model, batch, trajectory, plan, Guidance(w)).x
    expected = model.process.x_0_of(call.x, inner + w * (final - inner), t).clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert x.shape == found.shape


def test_interval_is_the_guidance_interval_of_the_models_process(model) -> None:
    full = full_plan(model, "ddim", 8, 2.0)
    plan = parse_router("interval:0.5,10")(full, model.depths)
    assert plan.steps == guidance_interval(full, 0.5, 10).steps
    assert {type(step.guide) for step in plan.steps} == {NoGuide, Unconditional}
    flow = parse_router("interval:0.5,10", RectifiedFlow())(full, model.depths)
    assert flow.steps == guidance_interval(full, 0.5, 10, RectifiedFlow()).steps
    assert flow.steps != plan.steps
    assert interval(full, model.depths, 0.5, 10, DDPM()).steps == plan.steps
    for text in ("interval:0.5", "interval:0.5,10,3", "own_exit:"):
        with pytest.raises(InputError, match="expected"):
            parse_router(text)
    assert OwnExit(3) not in {step.guide for step in plan.steps}


@pytest.mark.parametrize("guide", ["6", "3", "e3"])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_a_strength_is_another_scale_at_its_step(model, guide: str, strength: float) -> None:
    """At the plan's scale s a step of strength f does what scale 1 + f (s - 1) does."""
    scale = 1.5

    def drawn(text: str, at: float) -> torch.Tensor:
        plan = full_plan(model, "unipc", 3, at).with_steps([Step.parse(text)] * 3)
        batch = Batch(torch.tensor([4, 1]), (0, 1), 0)
        return advance(model, batch, start(model, batch, "unipc", 3), plan, Guidance(at)).x

    strong = drawn(f"6|{guide}*{strength:g}", scale)
    torch.testing.assert_close(strong, drawn(f"6|{guide}", 1 + strength * (scale - 1)), atol=1e-4, rtol=0)
    assert not torch.equal(strong, drawn(f"6|{guide}", scale))


def test_held_guidance_is_not_held_as_strong_as_it_was_used(model) -> None:
    """A step holds the branches' difference, whatever the strength of the step that ran both."""
    batch = Batch(torch.tensor([4, 1]), (0, 1), 0)

    def after(first: str) -> list[torch.Tensor]:
        plan = full_plan(model, "ddim", 2, 2.0).with_steps([Step.parse(first), Step.parse("6|held")])
        trajectory = start(model, batch, "ddim", 2)
        advance(model, batch, trajectory, plan, Guidance(2.0), stop=1)
        return list(trajectory.memory.guided)

    assert all(torch.equal(one, other) for one, other in zip(after("6|3"), after("6|3*2"), strict=True))
