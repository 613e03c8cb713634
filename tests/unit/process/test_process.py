"""What every process promises, for every process there is."""

import json

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import DDPM, Process, RectifiedFlow, from_config, processes
from dyndit.sampling.loop import full_plan, noise
from dyndit.sampling.sample import sample
from dyndit.sampling.solvers import SOLVERS, draws_noise, make_scheduler, solvers_of, timesteps_of

PROCESSES = [DDPM(), DDPM(beta_end=0.01), RectifiedFlow()]
EVERY = pytest.mark.parametrize("process", PROCESSES, ids=str)


def pairs(batch: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1], and noise."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(batch, 2, 4, 4, generator=generator, dtype=dtype) * 2 - 1
    return x_0, torch.randn(x_0.shape, generator=generator, dtype=dtype)


def test_every_process_is_tried_here() -> None:
    assert {type(process) for process in PROCESSES} == set(processes().values())


@EVERY
def test_its_config_builds_it_again(process: Process) -> None:
    config = json.loads(json.dumps(process.config()))
    assert config["name"] == process.name
    assert from_config(config) == process
    assert sum(from_config(config) == other for other in PROCESSES) == 1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"name": "edm"}, "process 'edm': expected one of ddpm, "),
        ({}, "process None"),
        ({"name": "ddpm", "beta": 1}, "beta"),
        ({"name": "ddpm", "beta_end": "a"}, "process ddpm"),
        ({"name": "ddpm", "beta_start": 0.5, "beta_end": 0.1}, "betas 0.5 to 0.1"),
        ({"name": "flow", "shift": 3}, "process flow: .*shift"),
    ],
)
def test_bad_configs_are_refused(config: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        from_config(config)


@EVERY
def test_the_target_gives_the_picture_back(process: Process) -> None:
    x_0, eps = pairs()
    t = torch.tensor([1, 30, 500, 800, 999])
    x_t, target = process.noised(x_0, eps, t), process.target(x_0, eps, t)
    torch.testing.assert_close(process.x_0_of(x_t, target, t), x_0, atol=1e-9, rtol=0)
    both = torch.cat([target, eps], dim=1)
    assert torch.equal(process.x_0_of(x_t, both, t), process.x_0_of(x_t, target, t))
    each = [process.noised(x_0[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    assert torch.equal(torch.cat(each), x_t)


@EVERY
def test_pictures_become_noise(process: Process) -> None:
    x_0, eps = pairs(2)
    start, end = process.noised(x_0, eps, torch.tensor([0, 999])).unbind()
    assert (start - x_0[0]).abs().max() < 0.05
    assert (end - eps[1]).abs().max() < 0.1


@EVERY
def test_log_snr_falls_with_t_and_is_the_ratio_of_what_is_mixed(process: Process) -> None:
    t = torch.arange(1, 1000)
    log_snr = process.log_snr(t)
    assert log_snr.dtype == torch.float64
    assert (log_snr.diff() < 0).all()
    one, none = torch.ones(999, 1, 1, 1).double(), torch.zeros(999, 1, 1, 1).double()
    signal, sigma = process.noised(one, none, t).flatten(), process.noised(none, one, t).flatten()
    torch.testing.assert_close(log_snr, 2 * torch.log(signal / sigma))
    for k in (1, 250, 998):
        assert process.log_snr_at(k) == pytest.approx(log_snr[k - 1].item())
        assert process.noise_level(k) == pytest.approx((sigma / signal)[k - 1].item())
        assert log_snr[k - 1] > process.log_snr_at(k + 0.5) > log_snr[k]


@EVERY
def test_noise_levels_are_finite_at_every_timestep_a_solver_has(process: Process) -> None:
    for t in (0, 0.2, 999, 999.7, 1000):
        assert 0 < process.noise_level(t) < float("inf")
        assert abs(process.log_snr_at(t)) < 20


@EVERY
@given(t=st.integers(1, 999))
def test_clamping_is_to_legal_pixels_and_once_is_enough(process: Process, t: int) -> None:
    x_0, eps = pairs()
    times = torch.full((len(x_0),), t)
    x_t = process.noised(x_0, eps, times)
    wild = torch.cat([3 * process.target(x_0, eps, times) + 1, eps], dim=1)
    once = process.clamp(wild, x_t, t, 2)
    assert torch.equal(once[:, 2:], eps)  # what comes after the guided channels stays
    assert process.x_0_of(x_t, once, times).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(process.clamp(once, x_t, t, 2), once, atol=1e-6, rtol=1e-6)
    legal = torch.cat([process.target(x_0, eps, times), eps], dim=1)
    torch.testing.assert_close(process.clamp(legal, x_t, t, 2), legal, atol=1e-6, rtol=1e-6)


@EVERY
def test_the_target_costs_nothing_and_any_other_prediction_something(process: Process) -> None:
    x_0, eps = pairs(dtype=torch.float32)
    t = process.sample_timesteps(len(x_0), torch.Generator().manual_seed(1))
    x_t, target = process.noised(x_0, eps, t), process.target(x_0, eps, t)
    loss, figures = process.loss(target, x_0, eps, x_t, t)
    assert loss == 0
    assert figures.keys() == {"mse"}
    loss, figures = process.loss(target + 0.5, x_0, eps, x_t, t)
    torch.testing.assert_close(loss, torch.tensor(0.25))
    torch.testing.assert_close(figures["mse"], loss)


@EVERY
def test_training_timesteps_come_from_the_generator_alone(process: Process) -> None:
    def drawn(seed: int) -> Tensor:
        return process.sample_timesteps(4000, torch.Generator().manual_seed(seed))

    t = drawn(0)
    assert torch.equal(t, drawn(0))
    assert not torch.equal(t, drawn(1))
    assert t.min() >= 0
    assert t.max() < process.num_timesteps
    assert t.double().mean().item() == pytest.approx(500, abs=15)


@EVERY
def test_path_kl_weights_are_there_for_every_timestep_of_a_state(process: Process) -> None:
    weights = process.path_kl_weights()
    assert weights.mean().item() == pytest.approx(1)
    assert weights.min() >= 0
    times = timesteps_of(process.usual_solver, 10, process)
    assert max(times) < len(weights)


@EVERY
def test_the_usual_solver_is_one_of_its_own(process: Process) -> None:
    assert process.usual_solver in solvers_of(process)
    for name in solvers_of(process):
        process.check_scheduler(make_scheduler(name, 5, process))


@EVERY
def test_full_depth_is_a_plain_loop_over_the_scheduler(make_model, process: Process) -> None:
    """Whatever the process calls for: guided, in latents, and bit for bit."""
    model = make_model(learn_variance=False)
    model = DynamicDepth(model.backbone, model.exits, pixel_space=False, process=process)
    labels = torch.tensor([1, 2, 3])
    ours = sample(model, labels.tolist(), num_steps=4, cfg_scale=1.5).latents  # by the usual solver
    x, scheduler = noise(0, range(3), (1, 8, 8)), SOLVERS[process.usual_solver].build(process)
    if process.name == "flow":
        scheduler.set_timesteps(sigmas=np.array([1.0, 0.75, 0.5, 0.25]))
        assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    else:
        scheduler.set_timesteps(4)
        x = x * scheduler.init_noise_sigma
    with torch.inference_mode():
        for t in scheduler.timesteps:
            times = torch.full((6,), t.item())
            cond, uncond = model.backbone(torch.cat([x, x]), times, torch.cat([labels, torch.full((3,), 10)])).chunk(2)
            x = scheduler.step(uncond + 1.5 * (cond - uncond), t, x, return_dict=False)[0]
    assert torch.equal(ours, x)


@EVERY
def test_a_model_that_knows_the_picture_is_sampled_to_it(make_model, process: Process) -> None:
    """With the true target as prediction, every solver of a process ends at x_0."""
    x_0 = pairs(1, torch.float32)[0][:, :1].repeat(1, 1, 2, 2)

    class Knows(DynamicDepth):
        def predict(self, step, memory):
            t = step.times
            one, none = torch.ones_like(x_0), torch.zeros_like(x_0)
            signal, sigma = process.noised(one, none, t), process.noised(none, one, t)
            eps = (step.x_t - signal * x_0) / sigma
            prediction = process.target(x_0.expand_as(eps), eps, t)
            return [torch.cat([prediction, -torch.ones_like(prediction)], dim=1)] * len(step.labels), memory

    model = Knows(make_model().backbone, process=process)
    found = sample(model, [3], solver=process.usual_solver, num_steps=6).pictures
    wanted = (127.5 * x_0 + 128).clamp(0, 255).to(torch.uint8)
    assert (found.int() - wanted.int()).abs().max() <= 1


FOREIGN = {
    DDPM: [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    RectifiedFlow: [diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler(), diffusers.DDPMScheduler()],
}


@EVERY
def test_solvers_of_another_process_are_refused_by_name(make_model, process: Process) -> None:
    model = DynamicDepth(make_model().backbone, process=process)
    others = SOLVERS.keys() - solvers_of(process).keys()
    assert others
    for name in others:
        theirs = SOLVERS[name].process.name
        wanted = f"--solver {name}: steps the process {theirs}, but this model's is {process.name}; expected one of "
        with pytest.raises(InputError, match=wanted + ", ".join(solvers_of(process))):
            full_plan(model, name, 5, 1.5)
    for scheduler in next(foreign for kind, foreign in FOREIGN.items() if isinstance(process, kind)):
        with pytest.raises(InputError, match=f"scheduler {type(scheduler).__name__}: of another process"):
            sample(model, [1], solver=scheduler, num_steps=4)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.FlowMatchLCMScheduler(),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="dpmsolver++"),
        diffusers.DEISMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flows_are_stepped_by_any_scheduler_of_flows(make_model, scheduler) -> None:
    model = DynamicDepth(make_model(learn_variance=False).backbone, process=RectifiedFlow())
    times = timesteps_of(scheduler, 4, model.process)
    assert times[-1] > 100  # the last step moves something
    pictures = sample(model, [1, 2], solver=scheduler, num_steps=4, batch_size=2).pictures
    alone = [sample(model, [y], first_index=i, solver=scheduler, num_steps=4).pictures for i, y in enumerate((1, 2))]
    assert (pictures.int() - torch.cat(alone).int()).abs().max() <= 1
    assert pictures.unique().numel() > 10


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps 100; expected 1000"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "no 4 steps"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "expected as many, falling"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type epsilon; expected flow_prediction"),
        (diffusers.DPMSolverMultistepScheduler(**FLOW, variance_type="learned_range"), "variance_type learned_range"),
    ],
)
def test_flow_schedulers_of_other_settings_are_refused(make_model, scheduler, named: str) -> None:
    model = DynamicDepth(make_model().backbone, process=RectifiedFlow())
    with pytest.raises(InputError, match=named):
        sample(model, [1], solver=scheduler, num_steps=4)


def test_only_stochastic_flow_schedulers_draw_noise() -> None:
    assert not draws_noise(diffusers.FlowMatchEulerDiscreteScheduler())
    assert draws_noise(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    assert draws_noise(diffusers.FlowMatchLCMScheduler())


def test_flow_timesteps_are_logit_normal() -> None:
    """Median at the middle, and 68% within one scale of the logit's mean."""
    t = RectifiedFlow().sample_timesteps(20_000, torch.Generator().manual_seed(0)) / 1000
    logits = torch.log(t / (1 - t))
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)
    assert ((t > 0.2689) & (t < 0.7311)).float().mean().item() == pytest.approx(0.6827, abs=0.015)


def test_flow_path_kl_weights_are_those_of_the_noise_that_a_velocity_implies() -> None:
    """By differences: |dlambda| times the squared share by which an error of v moves eps."""
    flow, t = RectifiedFlow(), torch.arange(100, 900)
    change = (flow.log_snr(t - 1) - flow.log_snr(t + 1)) / 2
    moved = (1 - t.double() / 1000) ** 2
    weights = flow.path_kl_weights()[t]
    torch.testing.assert_close(weights / weights.sum(), change * moved / (change * moved).sum(), rtol=1e-3, atol=0)


def test_the_published_betas_are_ddpms_own() -> None:
    assert DDPM() == from_config({"name": "ddpm"})
    assert str(DDPM()) == "ddpm"
    assert str(DDPM(beta_end=0.01)) == "ddpm beta_end=0.01"
    assert str(RectifiedFlow()) == "flow"
