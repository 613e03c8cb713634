"""Multiply-accumulates: published figures, direct counting of a sampling, and that counting computes nothing."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyndit.analysis.metrics.macs import count_macs, flops, full_macs, model_macs, plan_macs, sampling_macs
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dit import CARDS, ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth, compile_parts
from dyndit.models.exits import HEADS, ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp
from dyndit.plans.step import OwnExit, Step, steps
from dyndit.plugin.adapters import adapt
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.storage.diffusers_folder import to_diffusers

# Peebles and Xie 2022 (arXiv:2212.09748), Table 4 and appendix: "Gflops" at 256 px, which are multiply-accumulates.
PUBLISHED = {
    "DiT-S/2": 6.06,
    "DiT-B/2": 23.01,
    "DiT-L/2": 80.71,
    "DiT-XL/2": 118.64,
    "DiT-S/8": 0.36,
    "DiT-B/4": 5.56,
    "DiT-L/8": 5.01,
    "DiT-XL/4": 29.05,
}


def on_meta(card: str) -> DynamicDepth:
    with torch.device("meta"):
        return DynamicDepth(ClassConditionalDiT(CARDS[card]), pixel_space=False).eval()


@pytest.mark.parametrize("card", PUBLISHED)
def test_full_depth_is_what_the_paper_says(card: str) -> None:
    assert full_macs(on_meta(card)) / 1e9 == pytest.approx(PUBLISHED[card], rel=5e-4, abs=0.006)


def test_the_largest_is_118_6_giga() -> None:
    assert f"{full_macs(on_meta('DiT-XL/2')) / 1e9:.1f}" == "118.6"


def test_flops_are_twice_as_many() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_macs(lambda: a @ b) == 3 * 5 * 7
    with FlopCounterMode(display=False) as counter:
        a @ b
    assert counter.get_total_flops() == flops(3 * 5 * 7)


def every_kind_of_step(model: DynamicDepth, cfg_scale: float) -> DepthPlan:
    """Shallow and deep, equal and unequal branches, either the deeper, one alone, one guided by an exit."""
    full = full_plan(model, "ddim", 6, cfg_scale)
    steps = [Step.parse(text) for text in ("1|1", "2|5", "5|2", "6|e3", "6|3", "4")]
    return full.with_steps(steps if cfg_scale != 1 else [Step(step.depth) for step in steps])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_plan_costs_what_its_sampling_computes(make_model, head: str, cfg_scale: float) -> None:
    model = make_model(head=head)
    costs = []
    for plan in (every_kind_of_step(model, cfg_scale), full_plan(model, "ddim", 6, cfg_scale)):
        with FlopCounterMode(display=False) as counter:
            sample(model, [3, 4], plan=plan, num_steps=6, cfg_scale=cfg_scale)
        assert counter.get_total_flops() == 2 * flops(plan_macs(model, plan))  # of two pictures
        costs.append(plan_macs(model, plan))
    assert costs[0] < 0.9 * costs[1]  # the plan does save something


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_what_a_plan_remembers_is_counted(make_model, cfg_scale: float) -> None:
    """Heads that run at full depth for later forecasts; held guidance costs nothing."""
    model = make_model()
    guided, unguided = ("6|6", "2+|held", "6|6", "2+|e1", "3+", "2|held"), ("6", "2+", "6", "2+", "3+", "2")
    plan = full_plan(model, "ddim", 6, cfg_scale).with_steps(steps(*(guided if cfg_scale != 1 else unguided)))
    assert sampling_macs(model, plan) == plan_macs(model, plan)
    plain = plan.with_steps([replace(step, forecast=False) for step in plan.steps])
    leave = model_macs(model).leave
    assert plan_macs(model, plan) - plan_macs(model, plain) == 2 * (leave[2] + leave[3])


def test_each_head_is_counted_as_what_it_is(make_model) -> None:
    plain, wide = (model_macs(make_model(head=head)).leave for head in ("adaln-linear", "wide"))
    num_tokens, width = 4, 24
    more = {depth: wide[depth] - plain[depth] for depth in plain}
    mlps = {depth: 2 * num_tokens * width * ratio * width for depth, ratio in {1: 4, 2: 4, 3: 2, 4: 2}.items()}
    assert more == {depth: mlp + 2 * width * width for depth, mlp in mlps.items()} | {5: 0, 6: 0}


def test_a_model_that_does_other_than_its_plan_is_counted_by_sampling(make_model) -> None:
    model = make_model()
    plan = every_kind_of_step(model, 1.5)
    assert sampling_macs(model, plan) == plan_macs(model, plan)

    class EverySecondStep(DynamicDepth):
        """Runs the network at every second step alone, whatever the plan says."""

        def run(self, branches, depths, passing=(), **order):
            self.calls = getattr(self, "calls", 0) + 1
            return super().run(branches, depths, passing, **order) if self.calls % 2 else [each.x for each in branches]

    plan = plan.with_steps([Step(s.depth) if isinstance(s.guide, OwnExit) else s for s in plan.steps])
    lazy = EverySecondStep(model.backbone, model.exits)
    kept = replace(plan, timesteps=plan.timesteps[::2], steps=plan.steps[::2])
    assert sampling_macs(lazy, plan) == model_macs(model).plan(kept)


def test_without_guidance_an_unconditional_depth_runs_nothing(make_model) -> None:
    model = make_model()
    plan = full_plan(model, "ddim", 4, 1.0)
    assert plan_macs(model, plan) == 4 * full_macs(model)
    assert plan_macs(model, full_plan(model, "ddim", 4, 1.5)) == 8 * full_macs(model)


def test_counting_leaves_the_model_as_it_was(make_model, make_inputs) -> None:
    model = make_model()
    x, t, y = make_inputs(model.backbone)
    before, weights = model(x, t, y, depth=3), {k: v.clone() for k, v in model.state_dict().items()}
    first = model_macs(model)
    assert first == model_macs(model)
    assert torch.equal(model(x, t, y, depth=3), before)
    assert all(torch.equal(weights[k], v) and type(v) is type(weights[k]) for k, v in model.state_dict().items())


def test_a_given_call_counts_as_one_made_up(make_model, make_inputs) -> None:
    model = make_model()
    x, t, y = make_inputs(model.backbone, batch=1)
    assert model_macs(model, Inputs(x, t, y)) == model_macs(model)
    with pytest.raises(InputError, match="2 rows"):
        model_macs(model, Inputs(x.repeat(2, 1, 1, 1), t.repeat(2), y.repeat(2)))


def test_a_large_model_with_exits_is_counted_without_weights() -> None:
    with torch.device("meta"):
        backbone = ClassConditionalDiT(CARDS["DiT-XL/2"])
        model = DynamicDepth(backbone, Exits(backbone, ExitConfig(head="adaln-linear")), pixel_space=False).eval()
    full = full_plan(model, "ddim", 20, 1.5)
    macs = model_macs(model)
    assert macs.plan(full) == 40 * macs.full
    sloped = ramp(full, model.depths, start=4)
    # Nearly all of the arithmetic is in the blocks, so a plan's share of it is nearly its share of blocks.
    assert macs.plan(sloped) / macs.plan(full) == pytest.approx(sloped.share_of_blocks, abs=0.01)
    assert sloped.share_of_blocks < 0.7


def test_a_plan_for_other_exits_is_refused(make_model) -> None:
    model = make_model(layers=(2, 4))
    plan = full_plan(model, "ddim", 2, 1.0).with_steps([Step(3), Step(6)])
    with pytest.raises(InputError, match="depth 3"):
        plan_macs(model, plan)


def test_diffusers_embeds_the_timestep_again_in_every_block(make_model) -> None:
    """The same backbone in diffusers' own modules: equal but for the timestep MLP, which each block repeats."""
    model = make_model(in_channels=4)
    theirs = model_macs(DynamicDepth(adapt(to_diffusers(model).eval()), pixel_space=False))
    mine, width = model_macs(model), model.backbone.width
    assert set(theirs.blocks) == {mine.blocks[0] + 256 * width + width**2}
    assert theirs.leave[6] == mine.leave[6]


def test_a_compiled_model_is_counted_without_compiling(make_model) -> None:
    plain, compiled = make_model(), make_model()
    compile_parts(compiled, backend=lambda *_: pytest.fail("was compiled"))
    assert model_macs(compiled) == model_macs(plain)
