"""Rectified flow beyond Euler's steps: the time shift, Heun's solver, and the SDE of SiT."""

import copy
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor

from dyndit.analysis.metrics.macs import model_macs, sampling_macs
from dyndit.errors import InputError, PlanError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import constant
from dyndit.plans.search import search
from dyndit.plans.step import Step, Unconditional
from dyndit.process import DDPM, RectifiedFlow, from_config
from dyndit.process.flow_sde import FlowSDEScheduler
from dyndit.sampling.loop import full_plan, noise
from dyndit.sampling.sample import resolve_plan, sample
from dyndit.sampling.solvers import calls_of, draws_noise, make_scheduler, timesteps_of
from support.tables import COST, NUM_BLOCKS, random_table

FLOW = RectifiedFlow()
SOLVERS = ("flow-euler", "flow-heun", "flow-sde")


@pytest.fixture
def flow(make_model) -> DynamicDepth:
    model = make_model(learn_variance=False)
    return DynamicDepth(model.backbone, model.exits, process=FLOW).eval()


# The time shift.


def test_the_shift_of_a_resolution_keeps_the_uncertainty() -> None:
    """Of a constant picture of n pixels, the mean of x_t tells the value to within s / ((1 - s) sqrt(n))."""
    shift = RectifiedFlow.shift_for((16, 8), (8, 4))
    assert shift == 2
    for share in (0.1, 0.5, 0.8):
        moved = shift * share / (1 + (shift - 1) * share)
        assert moved / (1 - moved) / math.sqrt(128) == pytest.approx(share / (1 - share) / math.sqrt(32))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shift_moves_the_timesteps_of_named_solvers(solver: str) -> None:
    plain, shifted = (torch.tensor(timesteps_of(solver, 5, RectifiedFlow(a))) / 1000 for a in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    torch.testing.assert_close(plain, torch.tensor([1, 0.8, 0.6, 0.4, 0.2]))


def test_a_shift_moves_the_timesteps_of_training() -> None:
    """The logit's mean moves by log(shift); its scale stays."""
    t = RectifiedFlow(time_shift=3.0).sample_timesteps(20_000, torch.Generator().manual_seed(0)) / 1000
    logits = torch.log(t / (1 - t))
    assert logits.mean().item() == pytest.approx(math.log(3), abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)


def test_a_shift_is_saved_and_no_shift_changes_no_identity(make_backbone) -> None:
    assert FLOW.config() == {"name": "flow"}
    shifted = RectifiedFlow(time_shift=3.0)
    assert from_config(shifted.config()) == shifted != FLOW
    assert str(shifted) == "flow time_shift=3.0"
    backbone = make_backbone()
    assert backbone.identity(process=shifted) != backbone.identity(process=FLOW)
    for bad in (0, -1.0, float("inf"), "a"):
        with pytest.raises(InputError, match="time_shift"):
            from_config({"name": "flow", "time_shift": bad})


# Heun's solver.


class OfGaussian(DynamicDepth):
    """Knows the velocity of Gaussian pictures N(0, 0.5^2) exactly: noise and picture are jointly Gaussian."""

    def predict(self, step, memory):
        share = (step.times / 1000).view(-1, 1, 1, 1).to(step.x_t)
        variance = (1 - share) ** 2 * 0.25 + share**2
        velocity = step.x_t * (share - (1 - share) * 0.25) / variance
        return [velocity] * len(step.branches), memory


def drawn(model: DynamicDepth, solver: object, num_steps: int, num: int = 64) -> Tensor:
    model = OfGaussian(model.backbone, pixel_space=False, process=model.process)
    return sample(model, [0] * num, solver=solver, num_steps=num_steps, cfg_scale=1, batch_size=num).latents


def test_heun_is_of_second_order(flow: DynamicDepth) -> None:
    exact = 0.5 * noise(0, range(64), (1, 8, 8))
    errors = {
        (solver, steps): (drawn(flow, solver, steps) - exact).abs().mean().item()
        for solver in ("flow-euler", "flow-heun")
        for steps in (20, 40)
    }
    assert errors["flow-heun", 20] < 0.3 * errors["flow-euler", 40]
    assert errors["flow-euler", 20] / errors["flow-euler", 40] == pytest.approx(2, rel=0.2)
    assert errors["flow-heun", 20] / errors["flow-heun", 40] > 2.5


def test_heun_is_a_plain_loop_over_the_scheduler_of_diffusers(flow: DynamicDepth) -> None:
    flow.pixel_space = False
    ours = sample(flow, [1, 2, 3], solver="flow-heun", num_steps=4, cfg_scale=1.5).latents
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.sigma_min = 0.25
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 750, 750, 500, 500, 250, 250]
    x, labels = noise(0, range(3), (1, 8, 8)), torch.tensor([1, 2, 3, 10, 10, 10])
    with torch.inference_mode():
        for t in scheduler.timesteps:
            cond, uncond = flow.backbone(torch.cat([x, x]), torch.full((6,), t.item()), labels).chunk(2)
            x = scheduler.step(uncond + 1.5 * (cond - uncond), t, x, return_dict=False)[0]
    assert torch.equal(ours, x)


def test_heuns_calls_are_counted(flow: DynamicDepth) -> None:
    full = full_plan(flow, "flow-heun", 4, 1.5)
    assert full.timesteps == (1000, 750, 500, 250)
    assert full.calls == full.calls_by_step == (1, 2, 2, 2)
    assert [list(calls) for calls in calls_of(make_scheduler("flow-heun", 4, FLOW))] == [[0], [1, 2], [3, 4], [5, 6]]
    steps = [Step(3, Unconditional(2)), *full.steps[1:3], Step(4, Unconditional(4))]
    plan = full.with_steps(steps)
    assert model_macs(flow).plan(plan) == sampling_macs(flow, plan)
    assert plan.share_of_blocks == pytest.approx((5 + 2 * (12 + 12 + 8)) / (12 * 7))
    assert full_plan(flow, "flow-euler", 4, 1.5).calls == ()


def test_heuns_plans_are_saved_with_their_calls_and_fit_no_other_solver(flow: DynamicDepth, tmp_path) -> None:
    plan = constant(full_plan(flow, "flow-heun", 3, 1.5), flow.depths, 2)
    plan.save(tmp_path / "plan.json")
    assert DepthPlan.load(tmp_path / "plan.json") == plan
    options = {"solver": "flow-heun", "num_steps": 3, "cfg_scale": 1.5}
    pictures = sample(flow, [1, 2], plan=plan, stats=True, **options)
    assert len(pictures.step_seconds) == 3
    assert not torch.equal(pictures.pictures, sample(flow, [1, 2], **options).pictures)
    with pytest.raises(PlanError, match="calls a step"):
        resolve_plan(flow, replace(plan, calls=()), "flow-heun", 3, 1.5)
    with pytest.raises(PlanError, match="expected a whole number for each step"):
        replace(plan, calls=(1, 2))
    euler = constant(full_plan(flow, "flow-euler", 3, 1.5), flow.depths, 2)
    assert "calls" not in euler.to_json()


def test_a_search_pays_for_every_call() -> None:
    table = random_table(4, 3, seed=5)
    full = DepthPlan.full((999, 749, 500, 250), NUM_BLOCKS, "flow-heun", 1.5, (1, 2, 2, 2))
    for budget in (0.5, 0.7):
        plan = search(table, full, budget)
        assert plan.calls == full.calls
        spent = sum(n * COST.step_seconds(step) for n, step in zip((1, 2, 2, 2), plan.steps, strict=True))
        assert spent == pytest.approx(COST.plan_seconds(plan))
        assert spent <= budget * COST.plan_seconds(full) * (1 + 1e-6)


def test_forecasts_and_held_guidance_run_under_heun(flow: DynamicDepth) -> None:
    """The two calls of a timestep leave one memory: a forecast's slope is between two timesteps."""
    full = full_plan(flow, "flow-heun", 4, 1.5)
    plan = full.with_steps([full.steps[0], full.steps[1], Step.parse("3+"), Step.parse("2|held")])
    options = {"solver": "flow-heun", "num_steps": 4, "cfg_scale": 1.5}
    pictures = sample(flow, [1, 2], plan=plan, **options).pictures
    alone = sample(flow, [2], plan=plan, first_index=1, **options).pictures
    assert (pictures[1:].int() - alone.int()).abs().max() <= 1
    assert pictures.unique().numel() > 10


# The SDE of SiT.


def test_the_sde_without_diffusion_is_eulers_ode() -> None:
    generator = torch.Generator().manual_seed(0)
    ode, sde = make_scheduler("flow-euler", 6, FLOW), FlowSDEScheduler(norm=0.0)
    sde.set_timesteps(6)
    torch.testing.assert_close(sde.timesteps, ode.timesteps)
    x = y = torch.randn(2, 1, 4, 4, generator=generator)
    for t in ode.timesteps:
        velocity = torch.randn(x.shape, generator=generator)
        x, y = (s.step(velocity, t, z, return_dict=False)[0] for s, z in ((ode, x), (sde, y)))
    torch.testing.assert_close(x, y)


def test_the_sde_draws_the_distribution_of_the_pictures(flow: DynamicDepth) -> None:
    pictures = drawn(flow, "flow-sde", 200, num=128)
    assert pictures.mean().item() == pytest.approx(0, abs=0.02)
    assert pictures.std().item() == pytest.approx(0.5, abs=0.015)
    ode = drawn(flow, "flow-euler", 200, num=128)
    assert torch.corrcoef(torch.stack([pictures.flatten(), ode.flatten()]))[0, 1] < 0.9  # other noise came in


def test_the_last_step_of_the_sde_is_long_and_draws_no_noise() -> None:
    scheduler = make_scheduler("flow-sde", 250, FLOW)
    assert scheduler.sigmas[-2:].tolist() == pytest.approx([0.04, 0.0])
    assert draws_noise(scheduler)
    scheduler = make_scheduler("flow-sde", 1, FLOW)
    x = torch.ones(1, 1, 2, 2)
    found = scheduler.step(0 * x, scheduler.timesteps[0], x, torch.Generator(), return_dict=False)[0]
    torch.testing.assert_close(found, 0.5 * x)  # x - (v + eps / 2), and eps is x itself at s = 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_picture_depends_on_no_batch_mate_and_forks_go_their_own_way(flow: DynamicDepth, solver: str) -> None:
    options = {"solver": solver, "num_steps": 4, "cfg_scale": 1.5}
    both = sample(flow, [1, 2], **options).pictures
    assert torch.equal(both, sample(flow, [1, 2], **options).pictures)
    alone = sample(flow, [2], first_index=1, **options).pictures
    assert (both[1:].int() - alone.int()).abs().max() <= 1
    scheduler = make_scheduler(solver, 4, FLOW)
    copy.deepcopy(scheduler).step(both[:1].float(), scheduler.timesteps[0], both[:1].float(), return_dict=False)
    assert torch.equal(
        sample(flow, [1, 2], **options | {"solver": scheduler}).pictures, both
    )  # a given scheduler is copied


def test_a_model_of_another_process_refuses_them(flow: DynamicDepth) -> None:
    other = DynamicDepth(flow.backbone, process=DDPM())
    for solver in (*SOLVERS, FlowSDEScheduler(), diffusers.FlowMatchHeunDiscreteScheduler()):
        with pytest.raises(InputError, match="process"):
            full_plan(other, solver, 4, 1.5)
