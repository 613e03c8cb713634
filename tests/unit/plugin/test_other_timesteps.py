"""A plan in calls of other timesteps: another resolution, step count, shift, strength; calibrated on flow matching."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

import dyndit
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.errors import InputError, PlanError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import steps
from dyndit.plans.table import FILE
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import DynDiTHandle
from dyndit.plugin.calibrate import PipelineSampler, calibrate_pipeline
from dyndit.stats import Moments, moments
from support.models import randomise
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
SCALE = 4.0
LARGER = {"height": 32, "width": 32}
"""Another resolution, at which a dynamic shift moves the timesteps."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_exits(transformer: nn.Module) -> Exits:
    exits = Exits(adapt(transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return exits.eval()


def plugged(tiny: TinyPipeline, *texts: str, guided: bool = True) -> DynDiTHandle:
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer), cfg_scale=SCALE if guided else 1.0)
    tiny.run(guided=guided, num_inference_steps=len(texts))
    handle.plan = handle.full_plan().with_steps(steps(*texts))
    return handle


def dynamically_shifted() -> TinyPipeline:
    """Flux's pipeline, whose shift differs between tiny resolutions as much as between those that people use."""
    tiny = tiny_pipeline(FLUX)
    tiny.pipe.scheduler.register_to_config(base_image_seq_len=16, max_image_seq_len=256)
    return tiny


def ran(handle: DynDiTHandle) -> list[list[int]]:
    return handle.stats()[["step", "depth"]].values.tolist()


@pytest.mark.parametrize("guided", [True, False])
def test_another_resolution_under_dynamic_shifting_takes_the_plan(guided: bool) -> None:
    tiny = dynamically_shifted()
    texts = ("4|4", "2+|held", "4|4", "2|1") if guided else ("4", "2+", "3", "2")
    handle = plugged(tiny, *texts, guided=guided)
    tiny.run(guided=guided, num_inference_steps=4)
    assert handle.running is handle.plan
    picture = tiny.run(guided=guided, num_inference_steps=4, **LARGER)
    expected = handle.plan.at(tiny.pipe.scheduler.timesteps.tolist(), handle.model.process)
    assert handle.running == expected
    assert expected.timesteps != handle.plan.timesteps
    assert handle.stats().query("branch == 'cond'")["depth"].tolist() == list(expected.depths)
    handle.plan = expected  # a plan at these timesteps is the same
    assert torch.equal(tiny.run(guided=guided, num_inference_steps=4, **LARGER), picture)


@pytest.mark.parametrize("family", sorted(TINY_PIPELINES))
@pytest.mark.parametrize("count", [2, 5, 12])
def test_another_step_count_takes_the_plan(family: str, count: int) -> None:
    tiny = tiny_pipeline(family)
    handle = plugged(tiny, "4|4", "3|1", "2+|held", "4|e2", "1+")
    exact = tiny.run(num_inference_steps=5)
    before = ran(handle)
    assert tiny.run(num_inference_steps=count).isfinite().all()
    assert handle.running.num_steps == count
    assert handle.stats().query("branch == 'cond'")["depth"].tolist() == list(handle.running.depths)
    assert handle.stats().query("branch == 'uncond'")["depth"].tolist() == list(handle.running.uncond_depths)
    assert torch.equal(tiny.run(num_inference_steps=5), exact)  # exact again where timesteps agree
    assert ran(handle) == before


def test_another_shift_takes_the_plan() -> None:
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    tiny.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(tiny.pipe.scheduler.config, shift=1.0)
    tiny.run()
    assert handle.running.timesteps != handle.plan.timesteps
    assert handle.running == handle.plan.at(tiny.pipe.scheduler.timesteps.tolist(), handle.model.process)


def test_another_solver_at_other_timesteps_is_refused_with_the_reason() -> None:
    tiny = tiny_pipeline(SD3)
    plugged(tiny, "4|4", "3|1", "2|1")
    tiny.pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    with pytest.raises(PlanError, match=r"made for 3 steps of FlowMatch.*pipeline runs 3 of UniPCMultistep") as found:
        tiny.run()
    assert "\n" not in str(found.value)


def test_a_call_from_a_picture_runs_the_plan_s_last_steps() -> None:
    """Its own timesteps are kept; at another step count the whole plan is rescaled first."""
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1", "1|1")
    parts = {
        name: part for name, part in tiny.pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    handle.remove()
    plan = handle.plan
    handle = dyndit.apply_dyndit(pipe, random_exits(tiny.transformer), plan)
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))

    def draw(num_steps: int) -> None:
        call = {"prompt": "a red cat", "negative_prompt": "blurry", "guidance_scale": SCALE, "strength": 0.5}
        options = {"output_type": "latent", "max_sequence_length": 8, "num_inference_steps": num_steps}
        pipe(image=image, generator=torch.Generator().manual_seed(0), height=16, width=24, **call, **options)

    draw(4)
    assert handle.running is plan
    assert ran(handle) == [[2, 2], [2, 1], [3, 1], [3, 1]]
    draw(8)
    assert handle.running.num_steps == 8
    assert sorted({step for step, _ in ran(handle)}) == [4, 5, 6, 7]


# Calibrated on flow matching.


class Projections(nn.Module):
    """Five fixed random directions among 48 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = torch.randn(48, 5, generator=torch.Generator().manual_seed(0)) / 10

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = pictures.flatten(1) / 255 @ self.directions
        return features, features


EXTRACTOR = Extractor("projections", Projections(), "projections")


@pytest.fixture(scope="module")
def reference() -> Moments:
    generator = torch.Generator().manual_seed(0)
    return moments(EXTRACTOR.features(torch.randint(256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)))


def call_of(tiny: TinyPipeline, guided: bool, num_steps: int, **changes: object) -> Callable[[Sequence[int]], Tensor]:
    def call(indices: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(index) for index in indices]
        made = tiny.run(
            guided=guided, count=len(indices), generator=generators, num_inference_steps=num_steps, **changes
        )
        flat = made.flatten(1)[:, :48].reshape(-1, 3, 4, 4)
        return (40 * flat + 128).clamp(0, 255).to(torch.uint8)

    return call


def calibrated(
    tiny: TinyPipeline, handle: DynDiTHandle, call: Callable, reference: Moments, **options: object
) -> DepthPlan:
    usual = {"budget": 0.7, "num_pictures": 8, "num_bands": 2, "choices": ("2", "1"), "batch_size": 8}
    return calibrate_pipeline(tiny.pipe, handle, call, extractor=EXTRACTOR, reference=reference, **usual | options)


@pytest.mark.usefixtures("known_times")
def test_a_pipeline_of_flow_matching_is_calibrated_and_runs_at_other_resolutions(reference, tmp_path: Path) -> None:
    tiny = dynamically_shifted()
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer))
    plan = calibrated(tiny, handle, call_of(tiny, False, 4), reference, out=tmp_path)
    assert plan.timesteps == tuple(tiny.pipe.scheduler.timesteps.tolist())
    assert 0 < plan.share_of_blocks < 1
    handle.plan = plan
    tiny.run(guided=False, num_inference_steps=4)
    assert handle.running is plan
    tiny.run(guided=False, num_inference_steps=4, **LARGER)
    assert handle.running == plan.at(tiny.pipe.scheduler.timesteps.tolist(), handle.model.process) != plan
    # The table serves calls of another resolution too: its bands are noise levels.
    larger = call_of(tiny, False, 4, **LARGER)
    other = calibrate_pipeline(tiny.pipe, handle, larger, budget=0.7, extractor=EXTRACTOR, out=tmp_path, batch_size=8)
    assert other.timesteps == tuple(tiny.pipe.scheduler.timesteps.tolist()) != plan.timesteps


@pytest.mark.usefixtures("known_times")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_bands": 4}, "2 bands, but 4 asked for"),
        ({"choices": ("3", "1")}, "choices 1, 2, but 1, 3 asked for"),
        ({"num_depths": 2}, "choices 1, 2, but 1 asked for"),
        ({"num_pictures": 9}, "8 pictures, but 9 asked for"),
    ],
)
def test_a_stored_table_of_other_bands_or_choices_is_refused(
    reference, tmp_path: Path, asked: dict, message: str
) -> None:
    tiny = tiny_pipeline(FLUX)
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer))
    call = call_of(tiny, False, 4)
    calibrated(tiny, handle, call, reference, out=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    options = {"extractor": EXTRACTOR, "reference": reference, "out": tmp_path, "batch_size": 8, "budget": 0.7}
    with pytest.raises(InputError, match=f"{FILE}: measured with {message}") as found:
        calibrate_pipeline(tiny.pipe, handle, call, **options | asked)
    assert "\n" not in str(found.value)
    assert (tmp_path / FILE).read_bytes() == before
    calibrate_pipeline(tiny.pipe, handle, call, **options, num_bands=2, choices=("1", "2"), num_pictures=8)
    calibrate_pipeline(tiny.pipe, handle, call, **options)


@pytest.mark.usefixtures("known_times")
def test_a_student_of_four_steps_without_guidance_gets_a_plan(reference) -> None:
    """As of FLUX.1-schnell: four steps, no second branch, no embedded guidance."""
    tiny = tiny_pipeline(FLUX)
    student = diffusers.FluxTransformer2DModel.from_config(tiny.transformer.config, guidance_embeds=False)
    randomise(student.eval(), 5)
    tiny.pipe.transformer = student
    tiny.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    call = call_of(tiny, False, 4, guidance_scale=0.0)
    plain = call((0, 1))
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(student))
    assert torch.equal(call((0, 1)), plain)
    plan = calibrated(tiny, handle, call, reference, num_bands=4, choices=("1", "2", "3"))
    assert (plan.num_steps, plan.cfg_scale, plan.solver) == (4, 1.0, "flow-euler")
    assert plan.share_of_blocks < 1
    assert plan.figures["predicted_share_of_time"] <= 0.7
    handle.plan = plan
    assert not torch.equal(call((0, 1)), plain)
    assert handle.stats()["depth"].tolist() == list(plan.depths)
    for count in (1, 2, 8):
        assert call_of(tiny, False, count, guidance_scale=0.0)((0,)).shape == (1, 3, 4, 4)
        assert handle.running.num_steps == count


def test_a_solver_that_evaluates_steps_twice_is_not_calibrated() -> None:
    tiny = tiny_pipeline(SD3)
    tiny.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer))
    with pytest.raises(InputError, match=r"FlowMatchHeunDiscreteScheduler.* more than once a step") as found:
        PipelineSampler(tiny.pipe, handle, call_of(tiny, True, 4), cfg_scale=SCALE)
    assert "\n" not in str(found.value)


def test_a_plan_without_a_solver_is_rescaled_too() -> None:
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    handle.plan = replace(handle.plan, solver="")
    tiny.run(num_inference_steps=6)
    assert handle.running.num_steps == 6
