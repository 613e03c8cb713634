"""The sampling loop: pictures as functions of (seed, class, index), plans, guidance, solvers."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from dyndit.errors import InputError, PlanError
from dyndit.models.base import State
from dyndit.models.conditions import ClassLabels
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp
from dyndit.plans.step import NoGuide, Step, Unconditional, steps
from dyndit.process import DDPM
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, noise, start, to_uint8
from dyndit.sampling.sample import sample, unguided
from dyndit.sampling.solvers import (
    SOLVERS,
    draws_noise,
    make_scheduler,
    solver_name,
    takes_variance,
    timesteps_of,
)
from support.models import balanced_labels

PROCESS = DDPM()
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@pytest.fixture(scope="module")
def tiny_dynamic(make_model):
    return make_model()


def stepped_by(model: DynamicDepth, solver: str) -> DynamicDepth:
    """The same modules, of the process that a solver steps."""
    return DynamicDepth(model.backbone, model.exits, process=SOLVERS[solver].process()).eval()


def rising(model, solver: str = "ddim", num_steps: int = 4) -> DepthPlan:
    """A plan that uses several depths, unequal branches, and no second branch once."""
    plan = ramp(full_plan(model, solver, num_steps, 1.5), model.depths, 1)
    first, *rest = plan.depths
    return plan.with_steps([Step(first), *(Step(depth, Unconditional(max(1, depth - 1))) for depth in rest)])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_pictures_do_not_depend_on_the_batch(tiny_dynamic, solver: str, dynamic: bool) -> None:
    model = stepped_by(tiny_dynamic, solver)
    plan = rising(model, solver) if dynamic else None
    draw = {"plan": plan, "solver": solver, "num_steps": 4, "seed": 5}
    whole = sample(model, LABELS, batch_size=9, **draw).pictures.int()
    for size in (1, 4):
        parts = sample(model, LABELS, batch_size=size, **draw).pictures.int()
        assert (whole - parts).abs().max() <= 1
    assert whole.unique().numel() > 10  # otherwise the lines above compare blank pictures


def test_strict_pictures_are_bit_equal_however_they_are_grouped(tiny_dynamic) -> None:
    draw = {"plan": rising(tiny_dynamic), "num_steps": 4, "seed": 5, "strict": True, "batch_size": 4}
    whole = sample(tiny_dynamic, LABELS, **draw).pictures
    for index in (0, 4, 7):
        alone = sample(tiny_dynamic, [LABELS[index]], first_index=index, **draw).pictures
        assert torch.equal(whole[index], alone[0])


def test_pictures_depend_on_seed_class_and_index(tiny_dynamic) -> None:
    def one(label: int, seed: int, index: int) -> torch.Tensor:
        return sample(tiny_dynamic, [label], seed=seed, first_index=index, num_steps=3).pictures

    same = one(1, 2, 3)
    assert torch.equal(same, one(1, 2, 3))
    for other in (one(2, 2, 3), one(1, 3, 3), one(1, 2, 4)):
        assert not torch.equal(same, other)


def test_full_plan_is_the_original_model(tiny_dynamic) -> None:
    """The loop at full depth against a few lines of the textbook around the bare backbone."""
    batch = Batch(torch.tensor(LABELS), tuple(range(len(LABELS))), seed=0)
    plan = full_plan(tiny_dynamic, "ddim", 4, 1.5)
    model = replace_pixel_space(tiny_dynamic, False)
    ours = advance(model, batch, start(model, batch, "ddim", 4), plan, Guidance(1.5)).x
    x = noise(0, range(len(LABELS)), (1, 8, 8))
    scheduler = make_scheduler("ddim", 4)
    null = torch.full_like(batch.condition, model.backbone.condition.null_label)
    with torch.inference_mode():
        for t in plan.timesteps:
            both = model.backbone(torch.cat([x, x]), torch.full((2 * len(x),), t), torch.cat([batch.condition, null]))[
                :, :1
            ]
            cond, uncond = both.chunk(2)
            x = scheduler.step(uncond + 1.5 * (cond - uncond), t, x, return_dict=False)[0]
    assert torch.equal(ours, x)


def replace_pixel_space(model, pixel_space: bool):
    return DynamicDepth(model.backbone, model.exits, pixel_space=pixel_space)


def test_sampling_in_two_legs_is_sampling_at_once(tiny_dynamic) -> None:
    """A forked trajectory carries the solver's whole memory (UniPC has two steps of it)."""
    batch = Batch(torch.tensor(LABELS), tuple(range(len(LABELS))), seed=1)
    plan = rising(tiny_dynamic, "unipc", 6)
    at_once = advance(tiny_dynamic, batch, start(tiny_dynamic, batch, "unipc", 6), plan, Guidance(1.5)).x
    first = advance(tiny_dynamic, batch, start(tiny_dynamic, batch, "unipc", 6), plan, Guidance(1.5), stop=3)
    fork = first.fork()
    advance(tiny_dynamic, batch, first, plan, Guidance(3.0), first=3)  # must leave the fork alone
    assert torch.equal(at_once, advance(tiny_dynamic, batch, fork, plan, Guidance(1.5), first=3).x)


def test_ddim_equals_diffusers_where_that_steps_exactly() -> None:
    """With trailing-even timesteps DDIMScheduler's previous timestep is right, and both classes agree."""
    theirs = DDIMScheduler(beta_end=0.02, beta_start=1e-4, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(10)
    ours = make_scheduler("ddim", 10)
    for mine, other in zip(ours.timesteps.tolist(), theirs.timesteps.tolist(), strict=True):
        assert abs(mine - other) <= 1


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddpm"])
@pytest.mark.parametrize("num_steps", [3, 10, 25])
def test_no_step_is_spent_at_zero_noise(solver: str, num_steps: int) -> None:
    process = SOLVERS[solver].process()
    times = timesteps_of(solver, num_steps, process)
    assert len(times) == num_steps
    assert times[0] == {"ddpm": 999, "flow": 1000}[process.name]
    assert times[-1] > 0
    assert list(times) == sorted(set(times), reverse=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_log_snr_rises_along_every_schedule(solver: str) -> None:
    process = SOLVERS[solver].process()
    values = process.log_snr(torch.tensor(timesteps_of(solver, 12, process))).tolist()
    assert list(values) == sorted(values)
    first = {"ddpm": -10.118, "flow": -15.201}  # at t = 999 of the linear schedule; half a timestep from pure noise
    assert values[0] == pytest.approx(first[process.name], abs=2e-3)
    assert values[-1] > 1


def test_clamping_keeps_noise_predictions_that_imply_legal_pixels(tiny_dynamic) -> None:
    g = torch.Generator().manual_seed(0)
    x_0 = torch.rand(3, 1, 8, 8, generator=g) * 2 - 1
    eps, t = torch.randn(x_0.shape, generator=g), torch.tensor([500, 500, 500])
    x_t = PROCESS.noised(x_0, eps, t)
    both = torch.cat([eps, torch.zeros_like(eps)], dim=1)
    assert torch.allclose(PROCESS.clamp(both, x_t, 500, 1)[:, :1], eps, atol=1e-4)
    wild = PROCESS.clamp(3 * both, x_t, 500, 1)[:, :1]
    assert PROCESS.x_0_of(x_t, wild, t).abs().max() <= 1 + 1e-4
    assert PROCESS.x_0_of(x_t, 3 * eps, t).abs().max() > 1.1


def test_guidance_on_some_channels_leaves_the_rest_conditional() -> None:
    cond, uncond = torch.full((1, 8, 1, 1), 2.0), torch.ones(1, 8, 1, 1)
    combined = Guidance(1.5, channels=3).combine(cond, uncond, 4).flatten()
    assert combined.tolist() == [2.5, 2.5, 2.5, 2, 2, 2, 2, 2]
    assert Guidance(1.5).combine(cond, uncond, 4).flatten().tolist() == [2.5] * 4 + [2] * 4


def test_a_step_without_second_branch_is_unguided(tiny_dynamic) -> None:
    full = full_plan(tiny_dynamic, "ddim", 3, 1.5)
    none_but_first = full.with_steps([full.steps[0], *(Step(depth) for depth in full.depths[1:])])
    batch = Batch(torch.tensor([1, 2]), (0, 1), seed=0)

    def run(plan: DepthPlan, scale: float, first: int, stop: int, trajectory):
        return advance(tiny_dynamic, batch, trajectory, plan, Guidance(scale), first=first, stop=stop)

    here = run(full, 1.5, 0, 1, start(tiny_dynamic, batch, "ddim", 3))
    there = here.fork()
    plain = run(unguided(full), 1.0, 1, 3, there).x
    assert torch.equal(run(none_but_first, 1.5, 1, 3, here).x, plain)


def test_held_guidance_is_the_difference_of_the_last_guided_step(tiny_dynamic) -> None:
    """By hand: with the prediction p and the last difference d, guidance at scale w gives p + (w - 1) d."""
    scale, plan = 2.5, full_plan(tiny_dynamic, "ddim", 4, 2.5)
    plan = plan.with_steps(steps("6|6", "6|held", "6", "6|held"))
    batch, channels = Batch(torch.tensor(LABELS), tuple(range(len(LABELS)))), tiny_dynamic.backbone.sample_shape[0]
    trajectory = start(tiny_dynamic, batch, "ddim", 4)
    null = torch.full_like(batch.condition, tiny_dynamic.backbone.condition.null_label)
    x, scheduler = trajectory.x, make_scheduler("ddim", 4)
    with torch.inference_mode():
        for k, (t, step) in enumerate(zip(plan.timesteps, plan.steps, strict=True)):
            times = torch.full_like(batch.condition, t)
            eps = tiny_dynamic(x, times, batch.condition)[:, :channels]
            if k == 0:
                difference = eps - tiny_dynamic(x, times, null)[:, :channels]
            if step.guide != NoGuide():
                eps = eps + (scale - 1) * difference
            signal, sigma = PROCESS.alpha_bar(t) ** 0.5, (1 - PROCESS.alpha_bar(t)) ** 0.5
            eps = (x - signal * ((x - sigma * eps) / signal).clamp(-1, 1)) / sigma
            x = scheduler.step(eps, scheduler.timesteps[k], x, return_dict=False)[0]
    ours = advance(tiny_dynamic, batch, trajectory, plan, Guidance(scale)).x
    assert torch.allclose(ours, x, atol=1e-4)
    without = advance(
        tiny_dynamic,
        batch,
        start(tiny_dynamic, batch, "ddim", 4),
        plan.with_steps(steps("6|6", "6", "6", "6")),
        Guidance(scale),
    ).x
    assert not torch.allclose(ours, without, atol=1e-2)


def test_an_own_guide_is_an_exit_of_the_same_pass(tiny_dynamic, monkeypatch) -> None:
    """By hand: with the prediction p and that of the guide g, guidance at scale w gives g + w (p - g)."""
    scale, guides = 2.5, (2, 1, 3)
    plan = full_plan(tiny_dynamic, "ddim", 3, scale).with_steps(steps("6|e2", "4|e1", "6|e3"))
    batch, channels = Batch(torch.tensor(LABELS), tuple(range(len(LABELS)))), tiny_dynamic.backbone.sample_shape[0]
    trajectory = start(tiny_dynamic, batch, "ddim", 3)
    x, scheduler = trajectory.x, make_scheduler("ddim", 3)
    with torch.inference_mode():
        for k, (t, depth, guide) in enumerate(zip(plan.timesteps, plan.depths, guides, strict=True)):
            times = torch.full_like(batch.condition, t)
            weak, eps = (tiny_dynamic(x, times, batch.condition, d)[:, :channels] for d in (guide, depth))
            eps = weak + scale * (eps - weak)
            signal, sigma = PROCESS.alpha_bar(t) ** 0.5, (1 - PROCESS.alpha_bar(t)) ** 0.5
            eps = (x - signal * ((x - sigma * eps) / signal).clamp(-1, 1)) / sigma
            x = scheduler.step(eps, scheduler.timesteps[k], x, return_dict=False)[0]
    ran, block = [], tiny_dynamic.backbone.block

    def counted(index: int, state: State) -> State:
        ran.append(len(state.tokens))
        return block(index, state)

    monkeypatch.setattr(tiny_dynamic.backbone, "block", counted)
    ours = advance(tiny_dynamic, batch, trajectory, plan, Guidance(scale)).x
    assert torch.allclose(ours, x, atol=1e-4)
    assert ran == [len(LABELS)] * sum(plan.depths)  # no block more than without guidance
    plain = advance(tiny_dynamic, batch, start(tiny_dynamic, batch, "ddim", 3), unguided(plan), Guidance(scale)).x
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_own_guides_do_not_know_their_batch_mates(tiny_dynamic) -> None:
    plan = full_plan(tiny_dynamic, "unipc", 3, 1.5).with_steps(steps("4|e2", "5|2", "6|e3"))
    together = sample(tiny_dynamic, LABELS, plan=plan, solver="unipc", num_steps=3).pictures
    alone = [
        sample(tiny_dynamic, [label], plan=plan, solver="unipc", num_steps=3, first_index=i).pictures
        for i, label in enumerate(LABELS)
    ]
    assert (together.int() - torch.cat(alone).int()).abs().max() <= 1


def test_there_is_nothing_to_hold_before_the_first_guided_step(tiny_dynamic) -> None:
    full = full_plan(tiny_dynamic, "ddim", 3, 1.5)
    holding, unguided_first = (full.with_steps(steps(first, "3|3", "6|held")) for first in ("6|held", "6"))
    assert holding.share_of_blocks == pytest.approx((6 + 3 + 3 + 6) / 36)
    drawn = [sample(tiny_dynamic, LABELS, plan=plan, num_steps=3).pictures for plan in (holding, unguided_first)]
    assert torch.equal(*drawn)


def test_held_guidance_survives_a_fork(tiny_dynamic) -> None:
    full = full_plan(tiny_dynamic, "unipc", 4, 1.5)
    plan = full.with_steps(steps("6|6", "4|held", "3|2", "6|held"))
    batch, guidance = Batch(torch.tensor(LABELS), tuple(range(len(LABELS)))), Guidance(1.5)
    whole = advance(tiny_dynamic, batch, start(tiny_dynamic, batch, "unipc", 4), plan, guidance).x
    trajectory = advance(tiny_dynamic, batch, start(tiny_dynamic, batch, "unipc", 4), plan, guidance, stop=1)
    fork = trajectory.fork()
    advance(tiny_dynamic, batch, trajectory, full, guidance, first=1)
    assert torch.equal(advance(tiny_dynamic, batch, fork, plan, guidance, first=1).x, whole)


def test_uint8_is_unbiased() -> None:
    levels = torch.arange(256)
    exact = levels / 127.5 - 1
    assert torch.equal(to_uint8(exact), levels.to(torch.uint8))
    inside = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95
    assert abs((to_uint8(inside).double() / 127.5 - 1 - inside).mean()) < 2e-5


def test_stats_time_every_step(tiny_dynamic) -> None:
    result = sample(tiny_dynamic, LABELS, num_steps=3, batch_size=4, stats=True)
    assert len(result.step_seconds) == len(result.network_seconds) == 3
    assert all(0 < n < s for n, s in zip(result.network_seconds, result.step_seconds, strict=True))
    assert sum(result.step_seconds) < result.seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "magic"}, "--solver magic"),
        ({"num_steps": 0}, "--steps 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"num_steps": 1000}, "--steps 1000"),
    ],
)
def test_bad_settings_are_refused(tiny_dynamic, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(tiny_dynamic, LABELS, **{"num_steps": 2, **change})


@pytest.mark.parametrize("label", [-1, 10])
def test_unknown_classes_are_refused(tiny_dynamic, label: int) -> None:
    with pytest.raises(InputError, match="--class-labels"):
        sample(tiny_dynamic, [label], num_steps=2)


def test_plans_that_do_not_fit_are_refused(tiny_dynamic) -> None:
    plan = rising(tiny_dynamic)
    for change in ({"num_steps": 5}, {"solver": "unipc"}):
        with pytest.raises(PlanError):
            sample(tiny_dynamic, LABELS, plan=plan, **{"num_steps": 4, **change})
    with pytest.raises(PlanError, match="guidance scale"):
        sample(tiny_dynamic, LABELS, plan=full_plan(tiny_dynamic, "ddim", 4, 1.0), num_steps=4, cfg_scale=1.5)
    with pytest.raises(PlanError, match="guidance scale"):
        sample(tiny_dynamic, LABELS, plan=plan, num_steps=4, cfg_scale=1.0)
    with pytest.raises(PlanError, match="backbone"):
        sample(tiny_dynamic, LABELS, plan=replace(plan, backbone="another"), num_steps=4)


def test_classes_come_in_turn() -> None:
    assert ClassLabels(3).in_turn(5) == balanced_labels(5, 3) == [0, 1, 2, 0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", SOLVERS)
def test_pictures_of_a_gpu_are_those_of_the_cpu(make_model, solver: str) -> None:
    """To a few levels: kernels differ, the noise does not."""
    model = stepped_by(make_model(), solver)
    plan = rising(model, solver)
    draw = {"plan": plan, "solver": solver, "num_steps": 4, "seed": 5}
    here = sample(model, LABELS, **draw).pictures.int()
    there = sample(stepped_by(make_model(), solver).to("cuda"), LABELS, **draw).pictures.int()
    assert (here - there).abs().float().mean() < 1


def test_a_plan_may_drop_guidance_at_every_step(tiny_dynamic) -> None:
    """A search under a tight budget can come to that; it is the unguided sampling."""
    plan = unguided(full_plan(tiny_dynamic, "ddim", 3, 1.5))
    here = sample(tiny_dynamic, LABELS, plan=plan, num_steps=3, cfg_scale=1.5).pictures
    assert torch.equal(here, sample(tiny_dynamic, LABELS, num_steps=3, cfg_scale=1.0).pictures)


def test_models_are_not_asked_for_what_they_cannot_predict(make_model) -> None:
    with pytest.raises(InputError, match="null class"):
        sample(make_model(label_dropout=0.0), LABELS, num_steps=2, cfg_scale=1.5)
    with pytest.raises(InputError, match="predicts no variance"):
        sample(make_model(learn_variance=False), LABELS, num_steps=2, solver="ddpm")


# Schedulers of diffusers that are none of the named ones.

PUBLISHED = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

FOREIGN = [
    diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    diffusers.DDPMScheduler(clip_sample=False),
    diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    diffusers.DEISMultistepScheduler(),
    diffusers.EulerDiscreteScheduler(),
    diffusers.EulerAncestralDiscreteScheduler(),
    diffusers.LMSDiscreteScheduler(),
    diffusers.SASolverScheduler(),
]


@pytest.mark.parametrize("scheduler", FOREIGN, ids=lambda s: type(s).__name__)
def test_any_scheduler_of_the_process_samples(tiny_dynamic, scheduler) -> None:
    """Its plan carries its class and timesteps; a picture is still a function of seed, class and index."""
    plan = rising(tiny_dynamic, scheduler)
    assert plan.solver == type(scheduler).__name__
    assert plan.timesteps == timesteps_of(scheduler, 4)
    draw = {"solver": scheduler, "num_steps": 4, "seed": 5}
    whole = sample(tiny_dynamic, LABELS, plan=plan, **draw)
    assert whole.settings["solver"] == plan.solver
    parts = sample(tiny_dynamic, LABELS, plan=plan, batch_size=2, **draw).pictures.int()
    assert (whole.pictures.int() - parts).abs().max() <= 1
    assert not torch.equal(whole.pictures, sample(tiny_dynamic, LABELS, **draw).pictures)
    assert whole.pictures.unique().numel() > 10
    assert scheduler.num_inference_steps != 4  # what is given is a recipe, not the one that steps


def test_foreign_steps_are_the_textbooks(tiny_dynamic) -> None:
    """Euler between whole timesteps: the loop against a few lines around the bare backbone, no clamping."""
    model, scheduler = replace_pixel_space(tiny_dynamic, False), diffusers.EulerDiscreteScheduler()
    ours = sample(model, LABELS, solver=scheduler, num_steps=5, cfg_scale=1.0, seed=2).latents
    scheduler.set_timesteps(5)
    assert not all(t.is_integer() for t in scheduler.timesteps.tolist())
    y, x = torch.tensor(LABELS), noise(2, range(len(LABELS)), model.backbone.sample_shape) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = model.backbone(scheduler.scale_model_input(x, t), t.repeat(len(y)), y)[:, :1]
            x = scheduler.step(eps, t, x, return_dict=False)[0]
    assert torch.equal(ours, x)


def test_noise_levels_between_whole_timesteps_are_eulers() -> None:
    """The clamping of x0 has to take x_t to hold the noise that the solver takes it to hold."""
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    for t, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        assert PROCESS.noise_level(t) == pytest.approx(sigma, rel=1e-4)
        assert PROCESS.alpha_bar(t) == pytest.approx(1 / (1 + sigma**2), rel=1e-4)
    assert not scheduler.timesteps[1].item().is_integer()
    assert PROCESS.alpha_bar(500) == PROCESS.alphas_bar[500].item()


def test_a_schedulers_traits_are_read_off_it() -> None:
    named = {name: make_scheduler(name, 3, known.process()) for name, known in SOLVERS.items()}
    assert {name for name, scheduler in named.items() if takes_variance(scheduler)} == {"ddpm"}
    assert {name for name, scheduler in named.items() if draws_noise(scheduler)} == {"ddpm", "flow-sde"}
    assert {name: solver_name(scheduler) for name, scheduler in named.items()} == {name: name for name in SOLVERS}
    for scheduler in named.values():
        again = type(scheduler).from_config(scheduler.config)
        assert solver_name(again) == solver_name(scheduler)
    changed = diffusers.DPMSolverMultistepScheduler.from_config(named["dpmpp"].config, algorithm_type="sde-dpmsolver++")
    assert solver_name(changed) == "DPMSolverMultistepScheduler"
    assert draws_noise(changed)
    assert draws_noise(diffusers.EulerAncestralDiscreteScheduler())
    assert not draws_noise(diffusers.LMSDiscreteScheduler())
    fixed = diffusers.DDPMScheduler(variance_type="fixed_small")
    assert (takes_variance(fixed), draws_noise(fixed), solver_name(fixed)) == (False, True, "DDPMScheduler")


def test_a_scheduler_of_the_same_settings_is_the_named_one(tiny_dynamic) -> None:
    """So plans made for "unipc" run on the scheduler that a pipeline loaded from its folder."""
    plan = rising(tiny_dynamic, "unipc")
    scheduler = SOLVERS["unipc"].build()
    here = sample(tiny_dynamic, LABELS, plan=plan, solver=scheduler, num_steps=4).pictures
    assert torch.equal(here, sample(tiny_dynamic, LABELS, plan=plan, solver="unipc", num_steps=4).pictures)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: object(), "object: expected a diffusers scheduler"),
        (
            diffusers.HeunDiscreteScheduler,
            "HeunDiscreteScheduler: runs the model 2 times a step; expected one of order 1",
        ),
        (diffusers.KDPM2DiscreteScheduler, "runs the model 2 times"),
        (diffusers.FlowMatchEulerDiscreteScheduler, "of another process; expected one of noise prediction"),
        (lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "of another process"),
        (diffusers.EDMEulerScheduler, "of another process"),
        (lambda: DDIMScheduler(prediction_type="v_prediction"), "prediction_type v_prediction; expected epsilon"),
        (lambda: DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "betas from .* expected the training schedule's"),
        (lambda: DDIMScheduler(rescale_betas_zero_snr=True), "betas from"),
        (lambda: DDIMScheduler(num_train_timesteps=500), "500 linear betas"),
        (lambda: DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.02), "1000 scaled_linear betas"),
        (diffusers.PNDMScheduler, "9 timesteps .* for 4 steps|timesteps .* for 4 steps; expected as many, falling"),
        (diffusers.DDIMInverseScheduler, "for 4 steps; expected as many, falling"),
        (diffusers.RePaintScheduler, "its step needs model_output, timestep, sample, original_image, mask"),
        (lambda: diffusers.LCMScheduler(original_inference_steps=3, **PUBLISHED), "LCMScheduler: no 4 steps"),
    ],
)
def test_schedulers_of_other_processes_are_refused(tiny_dynamic, make, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        sample(tiny_dynamic, LABELS, solver=make(), num_steps=4)
    assert "\n" not in str(caught.value)


def test_schedulers_that_do_not_fit_the_model_are_refused(make_model) -> None:
    four = make_model(in_channels=4)
    latents = DynamicDepth(four.backbone, four.exits, pixel_space=False)
    cutting = diffusers.DPMSolverMultistepScheduler(variance_type="learned_range")
    with pytest.raises(InputError, match=r"learned_range variances of 3 channels alone, the model has 4"):
        sample(latents, LABELS, solver=cutting, num_steps=2)
    with pytest.raises(InputError, match="expected clip_sample=False"):
        sample(latents, LABELS, solver=DDIMScheduler(), num_steps=2)
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(InputError, match="predicts no variance"):
        sample(make_model(learn_variance=False), LABELS, solver=learned, num_steps=2)
    parallel = diffusers.DDPMParallelScheduler(variance_type="learned_range", clip_sample=False)
    assert sample(latents, LABELS, solver=parallel, num_steps=2).latents.isfinite().all()
    three = make_model(in_channels=3)
    plain = diffusers.DPMSolverMultistepScheduler()
    draw = {"num_steps": 3, "seed": 1}
    cut, whole = (sample(three, LABELS, solver=s, **draw).pictures for s in (cutting, plain))
    assert torch.equal(cut, whole)


def test_the_end_of_a_step_may_change_the_state(tiny_dynamic) -> None:
    batch = Batch(torch.tensor(LABELS), tuple(range(len(LABELS))), seed=0)
    plan, other = (
        full_plan(tiny_dynamic, "ddim", 3, 1.5),
        noise(8, range(len(LABELS)), tiny_dynamic.backbone.sample_shape),
    )
    seen = []

    def put(k: int, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        seen.append((k, int(t), x.shape))
        return other if k == 0 else None

    trajectory = start(tiny_dynamic, batch, "ddim", 3)
    changed = advance(tiny_dynamic, batch, trajectory, plan, Guidance(1.5), on_step_end=put).x
    assert seen == [(k, t, other.shape) for k, t in enumerate(plan.timesteps)]
    first = advance(tiny_dynamic, batch, start(tiny_dynamic, batch, "ddim", 3), plan, Guidance(1.5), stop=1)
    first.x = other
    assert torch.equal(changed, advance(tiny_dynamic, batch, first, plan, Guidance(1.5), first=1).x)


def test_a_batch_may_have_a_seed_per_picture_or_generators_of_its_own(tiny_dynamic) -> None:
    y, shape = torch.tensor([1, 2, 3]), tiny_dynamic.backbone.sample_shape
    mixed = Batch(y, (4, 4, 5), (0, 1, 0)).noise(shape)
    assert torch.equal(mixed[0], noise(0, [4], shape)[0])
    assert torch.equal(mixed[1], noise(1, [4], shape)[0])
    assert torch.equal(mixed[2], noise(0, [5], shape)[0])
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    given = Batch(y, (0, 1, 2), generators=generators)
    assert torch.equal(given.noise(shape)[1], torch.randn(shape, generator=torch.Generator().manual_seed(8)))
    assert given.generators_of(3) is generators
