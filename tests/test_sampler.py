"""The sampling loop: pictures as functions of (seed, class, index), plans, guidance, solvers."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from dyndit.errors import InputError, PlanError
from dyndit.plan import DepthPlan
from dyndit.routers.schedules import ramp
from dyndit.sampler import (
    SCHEDULE,
    SOLVERS,
    Batch,
    Guidance,
    advance,
    balanced_labels,
    full_plan,
    log_snr_of,
    make_scheduler,
    noise,
    sample,
    start,
    timesteps_of,
    to_uint8,
    unguided,
)

LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@pytest.fixture(scope="module")
def tiny_dynamic(make_model):
    return make_model()


def rising(model, solver: str = "ddim", steps: int = 4) -> DepthPlan:
    """A plan that uses several depths, unequal branches, and no second branch once."""
    plan = ramp(full_plan(model, solver, steps, 1.5), model.depths, 1)
    pairs = [(c, max(1, c - 1)) for c in plan.cond]
    return plan.with_pairs([(pairs[0][0], 0), *pairs[1:]])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_pictures_do_not_depend_on_the_batch(tiny_dynamic, solver: str, dynamic: bool) -> None:
    plan = rising(tiny_dynamic, solver) if dynamic else None
    draw = {"plan": plan, "solver": solver, "num_steps": 4, "seed": 5}
    whole = sample(tiny_dynamic, LABELS, batch_size=9, **draw).pictures.int()
    for size in (1, 4):
        parts = sample(tiny_dynamic, LABELS, batch_size=size, **draw).pictures.int()
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
    null = torch.full_like(batch.labels, model.backbone.null_class)
    with torch.inference_mode():
        for t in plan.timesteps:
            both = model.backbone(torch.cat([x, x]), torch.full((2 * len(x),), t), torch.cat([batch.labels, null]))[
                :, :1
            ]
            cond, uncond = both.chunk(2)
            x = scheduler.step(uncond + 1.5 * (cond - uncond), t, x, return_dict=False)[0]
    assert torch.equal(ours, x)


def replace_pixel_space(model, pixel_space: bool):
    from dyndit.dynamic import DynamicDepth

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


@pytest.mark.parametrize("steps", [1, 7, 10, 50])
def test_ddim_is_ddim(steps: int) -> None:
    """Order-1 DPM-Solver++ against the DDIM update (Song et al. 2021, Equation 12, eta 0) in float64."""
    scheduler, g = make_scheduler("ddim", steps), torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, generator=g)
    reference, times = x.double(), timesteps_of("ddim", steps)
    for k, t in enumerate(times):
        eps = torch.randn(x.shape, generator=g)
        bar = SCHEDULE.alphas_bar[t]
        before = SCHEDULE.alphas_bar[times[k + 1]] if k + 1 < steps else torch.tensor(1.0, dtype=torch.float64)
        x_0 = (reference - (1 - bar).sqrt() * eps) / bar.sqrt()
        reference = before.sqrt() * x_0 + (1 - before).sqrt() * eps
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    assert (x - reference).abs().max() < 1e-3 * reference.abs().max()


def test_ddim_equals_diffusers_where_that_steps_exactly() -> None:
    """With trailing-even timesteps DDIMScheduler's previous timestep is right, and both classes agree."""
    theirs = DDIMScheduler(beta_end=0.02, beta_start=1e-4, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(10)
    ours = make_scheduler("ddim", 10)
    for mine, other in zip(ours.timesteps.tolist(), theirs.timesteps.tolist(), strict=True):
        assert abs(mine - other) <= 1


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddpm"])
@pytest.mark.parametrize("steps", [3, 10, 25])
def test_no_step_is_spent_at_zero_noise(solver: str, steps: int) -> None:
    times = timesteps_of(solver, steps)
    assert len(times) == steps
    assert times[0] == 999
    assert times[-1] > 0
    assert list(times) == sorted(set(times), reverse=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_log_snr_rises_along_every_schedule(solver: str) -> None:
    values = log_snr_of(solver, 12)
    assert list(values) == sorted(values)
    assert values[0] == pytest.approx(-10.118, abs=2e-3)  # t = 999 of the linear schedule
    assert values[-1] > 1


def test_clamping_keeps_noise_predictions_that_imply_legal_pixels(tiny_dynamic) -> None:
    from dyndit.sampler import _clamp_x_0

    g = torch.Generator().manual_seed(0)
    x_0 = torch.rand(3, 1, 8, 8, generator=g) * 2 - 1
    eps, t = torch.randn(x_0.shape, generator=g), torch.tensor([500, 500, 500])
    x_t = SCHEDULE.add_noise(x_0, eps, t)
    both = torch.cat([eps, torch.zeros_like(eps)], dim=1)
    assert torch.allclose(_clamp_x_0(both, x_t, 500, 1)[:, :1], eps, atol=1e-4)
    wild = _clamp_x_0(3 * both, x_t, 500, 1)[:, :1]
    assert SCHEDULE.predict_x_0(x_t, wild, t).abs().max() <= 1 + 1e-4
    assert SCHEDULE.predict_x_0(x_t, 3 * eps, t).abs().max() > 1.1


def test_guidance_on_some_channels_leaves_the_rest_conditional() -> None:
    cond, uncond = torch.full((1, 8, 1, 1), 2.0), torch.ones(1, 8, 1, 1)
    combined = Guidance(1.5, channels=3).combine(cond, uncond, 4).flatten()
    assert combined.tolist() == [2.5, 2.5, 2.5, 2, 2, 2, 2, 2]
    assert Guidance(1.5).combine(cond, uncond, 4).flatten().tolist() == [2.5] * 4 + [2] * 4


def test_a_step_without_second_branch_is_unguided(tiny_dynamic) -> None:
    full = full_plan(tiny_dynamic, "ddim", 3, 1.5)
    none_but_first = full.with_pairs([full.pairs[0], *[(p[0], 0) for p in full.pairs[1:]]])
    batch = Batch(torch.tensor([1, 2]), (0, 1), seed=0)

    def run(plan: DepthPlan, scale: float, first: int, stop: int, trajectory):
        return advance(tiny_dynamic, batch, trajectory, plan, Guidance(scale), first=first, stop=stop)

    here = run(full, 1.5, 0, 1, start(tiny_dynamic, batch, "ddim", 3))
    there = here.fork()
    unguided = run(replace(full, uncond=(0, 0, 0)), 1.0, 1, 3, there).x
    assert torch.equal(run(none_but_first, 1.5, 1, 3, here).x, unguided)


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
        sample(tiny_dynamic, LABELS, plan=full_plan(tiny_dynamic, "ddim", 4, 1.0), num_steps=4)
    with pytest.raises(PlanError, match="guidance scale"):
        sample(tiny_dynamic, LABELS, plan=plan, num_steps=4, cfg_scale=1.0)
    with pytest.raises(PlanError, match="trunk"):
        sample(tiny_dynamic, LABELS, plan=replace(plan, trunk="another"), num_steps=4)


def test_balanced_labels() -> None:
    assert balanced_labels(5, 3) == [0, 1, 2, 0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", SOLVERS)
def test_pictures_of_a_gpu_are_those_of_the_cpu(make_model, solver: str) -> None:
    """To a few levels: kernels differ, the noise does not."""
    model = make_model()
    plan = rising(model, solver)
    draw = {"plan": plan, "solver": solver, "num_steps": 4, "seed": 5}
    here = sample(model, LABELS, **draw).pictures.int()
    there = sample(make_model().to("cuda"), LABELS, **draw).pictures.int()
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
