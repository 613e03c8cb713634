"""Plans that forecast, hold guidance and guide by own exits, inside every family's unmodified pipeline.

What each call of the transformer returns is compared with predictions put together here, from whole passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dyndit
from dyndit.errors import CheckpointError, PlanError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Held, OwnExit, Unconditional, steps
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import DynDiTHandle
from dyndit.process import Process
from dyndit.storage.load import EXITS, save_exits
from support.models import randomise
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline, whole

FULL, SCALE, COUNT = 4, 4.0, 2
GUIDED = steps("4|4", "3|1*2", "2+|held", "4|e2*1.5", "2+|e1", "1+", "2|held*0.5")
UNGUIDED = steps("4", "2+", "3", "4", "2+", "1+", "1")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=sorted(TINY_PIPELINES))
def tiny(request: pytest.FixtureRequest) -> Iterator[TinyPipeline]:
    with torch.no_grad():
        yield tiny_pipeline(request.param)


def random_exits(transformer: nn.Module) -> Exits:
    exits = Exits(adapt(transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return exits.eval()


def run(tiny: TinyPipeline, plan: DepthPlan, **changes: object) -> Tensor:
    options = {"guided": plan.cfg_scale != 1, "count": COUNT, "num_inference_steps": plan.num_steps}
    return tiny.run(**options | changes)


def plugged(tiny: TinyPipeline, guided: bool) -> tuple[DynDiTHandle, DepthPlan]:
    """The plug-in with random exits, and the plan above for the pipeline's own timesteps."""
    texts = GUIDED if guided else UNGUIDED
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer), cfg_scale=SCALE if guided else 1.0)
    tiny.run(guided=guided, count=COUNT, num_inference_steps=len(texts))
    return handle, handle.full_plan().with_steps(texts, router="by hand")


@contextmanager
def watched(transformer: nn.Module) -> Iterator[list[tuple[Inputs, Tensor]]]:
    """Inputs and prediction of every call."""
    adapter, calls = adapt(transformer), []

    def note(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        calls.append((adapter.read(*args, **kwargs), whole(output)))

    hook = transformer.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def by_step(
    calls: list[tuple[Inputs, Tensor]], how: str, guided: bool
) -> list[tuple[tuple[Inputs, ...], tuple[Tensor, ...]]]:
    """For each step the inputs and the predictions of its branches, the conditional one first."""
    if not guided:
        return [((inputs,), (prediction,)) for inputs, prediction in calls]
    if how == "calls":
        pairs = zip(calls[::2], calls[1::2], strict=True)
        return [((c[0], u[0]), (c[1], u[1])) for c, u in pairs]
    found = []
    for inputs, prediction in calls:
        rows, predicted = (inputs.rows(0, COUNT), inputs.rows(COUNT, None)), prediction.split(COUNT)
        found.append((rows, predicted) if how == "cond first" else (rows[::-1], predicted[::-1]))
    return found


def by_hand(model: DynamicDepth, plan: DepthPlan, inputs: list[tuple[Inputs, ...]]) -> list[tuple[Tensor, ...]]:
    """What each step should predict: its own prediction, and the one that guides it."""
    found, whole, difference = [], [], None
    for step, timestep, branches in zip(plan.steps, plan.timesteps, inputs, strict=True):
        first = branches[0]
        every = model.every_exit(first.x, first.t, first.y)
        own = every[step.depth]
        if step.forecast:
            own = own + first_order(whole, step.depth, timestep, model.process)
        if step.depth == FULL:
            whole.append((timestep, {depth: own - every[depth] for depth in every}))
        guide = own
        match step.guide:
            case Unconditional(depth):
                guide = model(branches[1].x, branches[1].t, branches[1].y, depth)
                difference = own - guide
            case OwnExit(depth):
                guide = every[depth]
            case Held():
                guide = own - difference
        guide = own - step.strength * (own - guide)
        found.append((own, guide)[: len(branches)])
    return found


def first_order(whole: list[tuple[float, dict[int, Tensor]]], depth: int, timestep: float, process: Process) -> Tensor:
    """What full depth would add, along the line through its last two steps, in the log-SNR."""
    if len(whole) == 1:
        return whole[0][1][depth]
    (before, old), (last, new) = whole[-2:]
    now, later, earlier = (process.log_snr_at(t) for t in (timestep, last, before))
    return new[depth] + (now - later) / (later - earlier) * (new[depth] - old[depth])


@pytest.mark.parametrize("guided", [True, False])
def test_every_step_predicts_what_its_plan_says(tiny: TinyPipeline, guided: bool) -> None:
    handle, plan = plugged(tiny, guided)
    handle.plan = plan
    with watched(tiny.transformer) as calls:
        picture = run(tiny, plan)
    inputs, found = zip(*by_step(calls, handle.adapter.guidance, guided), strict=True)
    expected = by_hand(handle.model, plan, list(inputs))
    for mine, theirs in zip(found, expected, strict=True):
        for prediction, wanted in zip(mine, theirs, strict=True):
            torch.testing.assert_close(prediction, wanted, atol=2e-4 * wanted.std().item(), rtol=1e-4)
    assert picture.isfinite().all()
    depths = {"cond": plan.depths} | ({"uncond": plan.uncond_depths} if guided else {})
    assert handle.stats().groupby("branch")["depth"].apply(tuple).to_dict() == depths


@pytest.mark.parametrize("guided", [True, False])
def test_memory_ends_with_the_call(tiny: TinyPipeline, guided: bool) -> None:
    """Also where the call broke off; and every lever of the plan counts."""
    handle, plan = plugged(tiny, guided)
    whole = run(tiny, plan)
    handle.plan = plan
    picture = run(tiny, plan)
    run(tiny, plan, seed=5)
    assert torch.equal(run(tiny, plan), picture)

    calls, step = [], tiny.pipe.scheduler.step

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.pipe.scheduler, "step", failing)
        with pytest.raises(ZeroDivisionError):
            run(tiny, plan, seed=5)
    assert torch.equal(run(tiny, plan), picture)

    kinds = (OwnExit, Held) if guided else ()
    less = [[s.unguided() if isinstance(s.guide, kind) else s for s in plan.steps] for kind in kinds]
    for other in (*less, [replace(s, forecast=False) for s in plan.steps]):
        handle.plan = plan.with_steps(other)
        assert (run(tiny, plan) - picture).abs().max() > 1e-3 * picture.std()
    handle.remove()
    assert torch.equal(run(tiny, plan), whole)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_memory_in_half_precision(tiny: TinyPipeline, dtype: torch.dtype) -> None:
    handle, plan = plugged(tiny, guided=True)
    handle.plan = plan
    tiny.pipe.to(dtype)
    with watched(tiny.transformer) as calls:
        run(tiny, plan)
    inputs, found = zip(*by_step(calls, handle.adapter.guidance, True), strict=True)
    for mine, theirs in zip(found, by_hand(handle.model, plan, list(inputs)), strict=True):
        for prediction, wanted in zip(mine, theirs, strict=True):
            assert prediction.dtype == dtype
            assert (prediction - wanted).float().abs().mean() < 0.05 * wanted.float().std()
    assert handle.stats()["step"].nunique() == plan.num_steps


# What a pipeline's call leaves out.


def test_a_step_that_builds_on_others_is_refused_without_them(tiny: TinyPipeline) -> None:
    """A plan that is switched in the middle of a call finds none of its earlier steps."""
    handle, plan = plugged(tiny, guided=True)
    step, calls = tiny.pipe.scheduler.step, []

    def switching(*args: object, **kwargs: object) -> object:
        calls.append(float(args[1]))  # LTX-2 copies its scheduler, and steps the copy too
        if len(set(calls)) == 2 and calls.count(calls[-1]) == 1:
            handle.plan = plan
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.pipe.scheduler, "step", switching)
        with pytest.raises(
            PlanError, match=r"step 2 \(2\+\|held\) builds on the steps before it.* left out 2"
        ) as found:
            run(tiny, plan)
    assert "\n" not in str(found.value)
    run(tiny, plan)


def test_guidance_that_stops_in_the_middle_is_refused() -> None:
    """The pipeline's rows are half as many then, and would be taken for both branches."""
    tiny = tiny_pipeline("SD3Transformer2DModel")
    handle, plan = plugged(tiny, guided=True)

    def stop(pipe: object, index: int, _: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 1.0 if index == 1 else pipe._guidance_scale
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            tensors[name] = tensors[name][COUNT:] if index == 1 else tensors[name]
        return tensors

    options = {
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    assert run(tiny, plan, **options).isfinite().all(), "at full depth the plug-in has nothing to refuse"
    handle.plan = plan.with_steps(steps("2|2") * plan.num_steps)
    with pytest.raises(PlanError, match="called with 2 rows at step 2, 4 before") as found:
        run(tiny, plan, **options)
    assert "\n" not in str(found.value)


# Identities in half precision.


@pytest.fixture
def bound(tmp_path: Path) -> tuple[TinyPipeline, Path, DepthPlan]:
    """A pipeline in single precision, a file of exits made for it, and a plan that is bound to both."""
    tiny = tiny_pipeline("DiTTransformer2DModel")
    handle, plan = plugged(tiny, guided=True)
    identity = handle.model.identity
    save_exits(handle.model.exits, tmp_path / EXITS, identity.backbone)
    handle.remove()
    return tiny, tmp_path, replace(plan, backbone=identity.backbone, exits=identity.exits)


def changed(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.05)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_keeps_what_was_bound_in_single(bound, dtype: torch.dtype) -> None:
    tiny, folder, plan = bound
    tiny.pipe.to(dtype)
    handle = dyndit.apply_dyndit(tiny.pipe, folder, plan)
    picture = run(tiny, plan)
    handle.plan = plan  # the exits are in half precision too by now
    assert {parameter.dtype for parameter in handle.model.exits.parameters()} == {dtype}
    assert torch.equal(run(tiny, plan), picture)
    tiny.pipe.to(torch.float32)  # rounded as it is
    run(tiny, plan)
    handle.plan = plan


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_plugged_in_pipeline_may_change_its_precision(bound, dtype: torch.dtype) -> None:
    tiny, folder, plan = bound
    handle = dyndit.apply_dyndit(tiny.pipe, folder, plan)
    run(tiny, plan)
    tiny.pipe.to(dtype)
    handle.plan = plan
    run(tiny, plan)
    handle.plan = replace(plan, cfg_scale=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_changed_weights_are_refused_when_the_plan_is_set_again(bound, dtype: torch.dtype) -> None:
    tiny, folder, plan = bound
    handle = dyndit.apply_dyndit(tiny.pipe.to(dtype), folder, plan)
    run(tiny, plan)
    before = {name: tensor.clone() for name, tensor in tiny.transformer.state_dict().items()}
    changed(tiny.transformer)
    with pytest.raises(PlanError, match=f"plan: made for backbone .*{plan.backbone[:16]}"):
        handle.plan = plan
    handle.plan = replace(plan, backbone="", exits="")
    tiny.transformer.load_state_dict(before)
    handle.plan = plan
    changed(handle.model.exits)
    with pytest.raises(PlanError, match=f"plan: made for exits .*{plan.exits[:16]}"):
        handle.plan = plan
    handle.remove()
    changed(tiny.transformer)
    with pytest.raises(CheckpointError, match="exits of backbone"):
        dyndit.apply_dyndit(tiny.pipe, folder)
    handle = dyndit.apply_dyndit(tiny.pipe, folder, plan, check_identity=False)
    handle.plan = plan  # the opt-out holds on
