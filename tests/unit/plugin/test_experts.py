"""Wan 2.2: two transformers in a pipeline, each with its own exits, plan and handle."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dyndit
from dyndit.errors import CheckpointError, InputError, PlanError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.schedules import ramp
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import DynDiTHandle
from dyndit.plugin.calibrate import PipelineSampler
from dyndit.storage.load import EXITS, save_exits
from dyndit.training.recorded import RecordedCalls
from support.families.wan import two_experts
from support.models import randomise
from support.tiny_pipelines import TinyPipeline, tiny_pipeline

COMPONENTS = ("transformer", "transformer_2")
SCALE, NUM_STEPS = 4.0, 6
HIGH, LOW = steps("4|2", "3|1", "1+|held", "2|e1"), steps("4|4", "1+|held")


@pytest.fixture
def tiny() -> Iterator[TinyPipeline]:
    with torch.no_grad():
        yield two_experts(0)


def random_exits(transformer: nn.Module) -> Exits:
    exits = Exits(adapt(transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return exits.eval()


def run(tiny: TinyPipeline, **changes: object) -> Tensor:
    return tiny.run(**{"count": 2, "num_inference_steps": NUM_STEPS} | changes)


def plugged(tiny: TinyPipeline, plan: object = None) -> list[DynDiTHandle]:
    """A handle per expert, with random exits after every block."""
    return [
        dyndit.apply_dyndit(tiny.pipe, random_exits(getattr(tiny.pipe, name)), plan, cfg_scale=SCALE, component=name)
        for name in COMPONENTS
    ]


def test_each_expert_runs_its_own_plan(tiny: TinyPipeline) -> None:
    expected = run(tiny)
    handles = plugged(tiny)
    assert torch.equal(run(tiny), expected)
    full = [handle.full_plan() for handle in handles]
    assert [plan.num_steps for plan in full] == [len(HIGH), len(LOW)]
    assert [*full[0].timesteps, *full[1].timesteps] == tiny.pipe.scheduler.timesteps.tolist()
    assert full[0].timesteps[-1] >= 700 > full[1].timesteps[0]
    for handle, plan in zip(handles, full, strict=True):
        handle.plan = plan
    assert torch.equal(run(tiny), expected)

    for handle, plan, texts in zip(handles, full, (HIGH, LOW), strict=True):
        handle.plan = plan.with_steps(texts)
    shallow = run(tiny)
    for handle in handles:
        depths = handle.stats().groupby("branch")["depth"].apply(tuple)
        assert (depths["cond"], depths["uncond"]) == (handle.plan.depths, handle.plan.uncond_depths)
    assert (shallow - expected).abs().max() > 0.05 * expected.std()
    run(tiny, seed=5)
    assert torch.equal(run(tiny), shallow), "nothing is left over from one call to the next"

    handles[0].remove()
    half = run(tiny)
    assert not torch.equal(half, shallow)
    assert not torch.equal(half, expected)
    dyndit.remove_dyndit(tiny.pipe)
    assert torch.equal(run(tiny), expected)
    plugged(tiny)  # which refuses a transformer with the plug-in on


def test_both_leave_at_once(tiny: TinyPipeline) -> None:
    expected = run(tiny)
    plugged(tiny, partial(ramp, start=1))
    assert not torch.equal(run(tiny), expected)
    dyndit.remove_dyndit(tiny.pipe)
    assert torch.equal(run(tiny), expected)


def test_a_router_writes_a_plan_for_each_experts_timesteps(tiny: TinyPipeline) -> None:
    handles = plugged(tiny, partial(ramp, start=1))
    for num_steps in (NUM_STEPS, 5, NUM_STEPS):
        run(tiny, num_inference_steps=num_steps)
        times = [time for handle in handles for time in handle.plan.timesteps]
        assert times == tiny.pipe.scheduler.timesteps.tolist()
        assert [handle.plan.depths[0] for handle in handles] == [1, 1]
    with pytest.raises(InputError, match="a router needs the scheduler's timesteps"):
        dyndit.apply_dyndit(two_experts(1).pipe.transformer_2, None, partial(ramp, start=1))


def test_another_experts_exits_and_plan_are_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    high, low = (adapt(getattr(tiny.pipe, name)) for name in COMPONENTS)
    save_exits(random_exits(high.transformer), tmp_path / EXITS, high.identity())
    dyndit.apply_dyndit(tiny.pipe, tmp_path).remove()
    with pytest.raises(CheckpointError, match="exits of backbone"):
        dyndit.apply_dyndit(tiny.pipe, tmp_path, component="transformer_2")

    handles = plugged(tiny)
    run(tiny)
    first, second = (handle.full_plan() for handle in handles)
    handles[0].plan = first
    handles[1].plan = first
    with pytest.raises(PlanError, match=r"none of them at timesteps of this expert, which runs \d+ to \d+;") as found:
        run(tiny)
    assert "\n" not in str(found.value)
    handles[1].plan = second
    run(tiny)
    with pytest.raises(InputError, match=r"^WanPipeline: has no transformer_2; expected"):
        dyndit.apply_dyndit(tiny_pipeline("WanTransformer3DModel").pipe, None, component="transformer_2")
    assert low.identity() != high.identity()


def test_each_expert_is_calibrated_and_recorded_alone(tiny: TinyPipeline, tmp_path: Path) -> None:
    handles, times = plugged(tiny), []

    def call(indices: tuple[int, ...]) -> Tensor:
        made = run(tiny, count=len(indices), generator=[torch.Generator().manual_seed(index) for index in indices])
        return (40 * made[:, :3, 0] + 128).clamp(0, 255).to(torch.uint8)

    for handle in handles:
        sampler = PipelineSampler(tiny.pipe, handle, call, cfg_scale=SCALE)
        times += sampler.full.timesteps
        full, changed = sampler.replaced((0,), [[0, 1]], steps("2|1"))
        assert not torch.equal(full, changed)
        handle.plan = None
        assert torch.equal(full, call((0,)))
    assert times == tiny.pipe.scheduler.timesteps.tolist()

    dyndit.remove_dyndit(tiny.pipe)
    with dyndit.record_calls(tiny.pipe.transformer_2, tmp_path / "low"):
        run(tiny)
    calls = RecordedCalls(tmp_path / "low")
    assert len(calls) == 2 * 2 * len(LOW), "two pictures, two calls a step"
    with torch.enable_grad():
        recipe = dyndit.Distill(fit=dyndit.FitConfig(steps=2, batch_size=4))
        exits = dyndit.distill_exits(tiny.pipe.transformer_2, calls, recipe, tmp_path / "exits")
    dyndit.apply_dyndit(tiny.pipe, exits, component="transformer_2")
    assert run(tiny).isfinite().all()
