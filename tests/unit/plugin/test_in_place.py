"""Calibrating an unmodified pipeline: the same table as our own sampling gives, on the same weights and noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dyndit
from dyndit.analysis.metrics.extractors import Extractor, load_extractor
from dyndit.calibration.measure import CalibrationSettings, measure_shifts, measure_table
from dyndit.calibration.samplers import OwnSampler
from dyndit.errors import InputError, PlanError
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import constant
from dyndit.plans.step import Step, steps
from dyndit.plans.table import ShiftTable
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import DynDiTHandle, apply_dyndit
from dyndit.plugin.calibrate import PipelineSampler, calibrate_pipeline
from dyndit.sampling.loop import picture_generator, to_uint8
from dyndit.sampling.solvers import make_scheduler
from dyndit.stats import Moments, frechet_distance, moments
from dyndit.storage import load as checkpoints
from dyndit.storage.names import to_native
from dyndit.training.data import load_digits
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, randomise, tiny_pipeline

DIT = "DiTTransformer2DModel"
NUM_STEPS, NUM_PICTURES, SEED = 4, 12, 5
CHOICES = steps("2|2", "3|1", "2")
PART = PartTimes(embed=1.0, block=2.0, exit=1.0, head=1.0)
COST = CostModel(4, 4, PART, PART, 0.5)


class Projections(nn.Module):
    """Seven fixed random directions among the pixels of a 16 x 16 picture: a rounded pixel moves them by little."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = torch.randn(3 * 16 * 16, 7, generator=torch.Generator().manual_seed(0)) / 10

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = pictures.flatten(1) / 255 @ self.directions
        return features, features


EXTRACTOR = Extractor("projections", Projections(), "projections")


@pytest.fixture(scope="module")
def reference() -> Moments:
    generator = torch.Generator().manual_seed(0)
    return moments(EXTRACTOR.features(torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)))


@pytest.fixture
def tiny() -> TinyPipeline:
    found = tiny_pipeline(DIT)
    found.pipe.scheduler = make_scheduler("ddim", NUM_STEPS)
    return found


def native(tiny: TinyPipeline, exits: Exits) -> DynamicDepth:
    """Our own model of the same weights."""
    c = tiny.transformer.config
    config = DiTConfig(
        image_size=c.sample_size,
        patch_size=c.patch_size,
        in_channels=c.in_channels,
        width=tiny.transformer.inner_dim,
        num_blocks=c.num_layers,
        num_heads=c.num_attention_heads,
        num_classes=1000,
        norm_eps=1e-6,
        mlp_norm_eps=c.norm_eps,
        frequency_shift=1,
    )
    backbone = ClassConditionalDiT(config)
    backbone.load_state_dict(to_native(tiny.transformer.state_dict(), c.sample_size // c.patch_size))
    return DynamicDepth(backbone, exits, pixel_space=False).eval()


def random_exits(tiny: TinyPipeline) -> Exits:
    exits = Exits(adapt(tiny.transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return exits.eval()


def call_of(tiny: TinyPipeline, scale: float) -> Callable[[Sequence[int]], Tensor]:
    """As a user writes it: labels, generators and the conversion to uint8 by picture number."""

    def call(indices: Sequence[int]) -> Tensor:
        generators = [picture_generator(SEED, index) for index in indices]
        made = tiny.pipe(
            list(indices),
            guidance_scale=scale,
            generator=generators,
            num_inference_steps=NUM_STEPS,
            output_type="pt",
        )
        return (255 * made.images + 0.5).to(torch.uint8)

    return call


def decoded(tiny: TinyPipeline) -> Callable[[Tensor], Tensor]:
    vae = tiny.pipe.vae

    def to_pictures(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return to_uint8(vae.decode(latents / vae.config.scaling_factor).sample)

    return to_pictures


@pytest.mark.parametrize(("scale", "choices"), [(4.0, CHOICES), (4.0, steps("2|held", "3|e1")), (1.0, steps("2", "3"))])
def test_a_pipeline_s_table_is_our_own_sampling_s(tiny, reference, scale: float, choices) -> None:
    """Same weights, noise, solver and decoder: two ways of sampler, one table."""
    exits = random_exits(tiny)
    settings = CalibrationSettings(NUM_PICTURES, num_bands=2, batch_size=5, seed=SEED, choices=choices)
    model = native(tiny, exits)
    options = {"num_steps": NUM_STEPS, "cfg_scale": scale, "settings": settings, "cost": COST}
    ours = measure_shifts(model, EXTRACTOR, reference, to_pictures=decoded(tiny), **options)

    handle = apply_dyndit(tiny.pipe, exits)
    sampler = PipelineSampler(tiny.pipe, handle, call_of(tiny, scale), cfg_scale=scale, batch_size=5)
    theirs = measure_table(sampler, EXTRACTOR, reference, settings=settings, cost=COST)
    assert (theirs.edges, theirs.choices) == (ours.edges, ours.choices)
    assert (theirs.backbone, theirs.exits) == (ours.backbone, ours.exits)
    assert (theirs.solver, theirs.cfg_scale) == ("ddim", scale)
    # Room for a pixel that is rounded the other way; every entry is far larger.
    for name, room in (("mean", 2e-4), ("second", 1e-3)):
        entries = getattr(ours, name).flatten(2) if name == "second" else ours.mean
        assert entries.abs().amax(dim=2).min() > 5 * room
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), atol=room, rtol=0)
        torch.testing.assert_close(getattr(theirs.base, name), getattr(ours.base, name), atol=room, rtol=0)

    plan = sampler.full.with_steps([*choices[:2], *sampler.full.steps[2:]])
    fresh = sampler.drawn(plan, NUM_PICTURES, fresh=True)
    assert fresh.shape == (NUM_PICTURES, 3, 16, 16)
    assert not torch.equal(fresh, sampler.drawn(plan, NUM_PICTURES, fresh=False))
    mine = OwnSampler(model, "ddim", NUM_STEPS, scale, None, decoded(tiny), SEED).drawn(
        replace(plan, solver="ddim"), NUM_PICTURES, fresh=False
    )
    assert (mine.int() - sampler.drawn(plan, NUM_PICTURES, fresh=False).int()).abs().max() <= 1


@pytest.mark.usefixtures("known_times")
def test_calibrate_pipeline_gives_a_plan_that_the_handle_takes(tiny, reference, tmp_path: Path) -> None:
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))
    numbers: list[int] = []
    inner = call_of(tiny, 4.0)

    def call(indices: Sequence[int]) -> Tensor:
        numbers.extend(indices)
        return inner(indices)

    before = DepthPlan.full((999, 749, 500, 250), 4, "", 4.0)
    handle.plan = before
    options = {"cfg_scale": 4.0, "batch_size": 6, "extractor": EXTRACTOR, "out": tmp_path}
    seen: list[tuple[int, int]] = []
    plan = calibrate_pipeline(
        tiny.pipe,
        handle,
        call,
        budget=0.7,
        reference=reference,
        num_pictures=NUM_PICTURES,
        num_bands=2,
        choices=CHOICES,
        on_progress=lambda done, total: seen.append((done, total)),
        **options,
    )
    assert handle.plan is before
    assert seen[-1] == (2 * 2 * 3, 2 * 2 * 3)
    assert {*numbers} == {*range(2 * NUM_PICTURES)}
    assert plan.figures["predicted_share_of_time"] <= 0.7
    assert plan.timesteps == tuple(make_scheduler("ddim", NUM_STEPS).timesteps.tolist())
    assert (plan.backbone, plan.exits) == (handle.model.identity.backbone, handle.model.identity.exits)
    handle.plan = plan
    fresh = torch.cat([call(range(low, low + 6)) for low in (12, 18)])
    expected = frechet_distance(moments(EXTRACTOR.features(fresh)), reference)
    assert plan.figures["measured_fd"] == pytest.approx(expected)

    # The table is on disk, where other budgets and step counts find it.
    table = ShiftTable.load(tmp_path / checkpoints.TABLE)
    assert (table.backbone, table.num_pictures, table.cost.num_blocks) == (plan.backbone, NUM_PICTURES, 4)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.TABLE]
    numbers.clear()
    other = calibrate_pipeline(tiny.pipe, handle, call, budget=0.9, **options)
    assert other.figures["predicted_share_of_time"] <= 0.9
    assert len(numbers) == 1 + 2 * NUM_PICTURES  # a first look, and both plans on fresh numbers


def test_an_interrupted_measurement_goes_on(tiny, reference, tmp_path: Path) -> None:
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))
    settings = CalibrationSettings(NUM_PICTURES, num_bands=2, batch_size=4, choices=("2",))
    path = tmp_path / "table.partial"

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    def measure(seed_of_call: Callable, **options: object) -> ShiftTable:
        sampler = PipelineSampler(tiny.pipe, handle, seed_of_call, batch_size=4)
        return measure_table(sampler, EXTRACTOR, reference, settings=settings, cost=COST, partial=path, **options)

    with pytest.raises(Stop):
        measure(call_of(tiny, 1.0), on_progress=stop)
    seen: list[int] = []
    again = measure(call_of(tiny, 1.0), on_progress=lambda done, _: seen.append(done))
    assert seen == [3, 4, 5, 6]
    path.unlink()
    whole = measure(call_of(tiny, 1.0))
    torch.testing.assert_close(again.mean, whole.mean)
    # Another function of the user's is another measurement.
    seen.clear()
    darker = measure(lambda indices: call_of(tiny, 1.0)(indices) // 2, on_progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert not torch.allclose(darker.mean, whole.mean)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("family", sorted(TINY_PIPELINES))
def test_every_family_is_drawn_and_timed(family: str, guided: bool) -> None:
    """The scheduler's own timesteps, floats among them; the plan that runs; parts of a step on a real call."""
    tiny = tiny_pipeline(family)
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))
    tiny.settings["output_type"] = "latent" if family != DIT else "pt"

    def call(indices: Sequence[int]) -> Tensor:
        generators = [picture_generator(SEED, index) for index in indices]
        made = tiny.run(guided=guided, count=len(indices), generator=generators)
        flat = made.detach().flatten(1)[:, : 3 * 4 * 4].reshape(-1, 3, 4, 4)
        return (40 * flat + 128).clamp(0, 255).to(torch.uint8)

    scale = 4.0 if guided else 1.0
    sampler = PipelineSampler(tiny.pipe, handle, call, cfg_scale=scale, rounds=2)
    timesteps = tiny.pipe.scheduler.timesteps.tolist()
    assert sampler.full == DepthPlan.full(tuple(timesteps), 4, type(tiny.pipe.scheduler).__name__, scale)
    choice = Step.parse("2|1" if guided else "2")
    full, *changed = sampler.replaced((0, 1), [[0, 1], [2]], [choice])
    handle.plan = None
    assert torch.equal(full, call((0, 1)))
    assert len(changed) == 2
    assert all(not torch.equal(part, full) for part in changed)
    stats = handle.stats()
    assert set(stats["depth"]) == {4}

    cost = sampler.cost(2)
    assert (cost.batch_size, cost.num_blocks, cost.device) == (2, 4, "cpu")
    times = [getattr(part, name) for part in (cost.one, cost.two) for name in ("embed", "block", "exit", "head")]
    assert all(seconds > 0 for seconds in (*times, cost.solver))
    assert cost.one.exits == {}  # all exits are alike
    separate = guided and handle.adapter.guidance == "calls"
    assert (cost.two.block == pytest.approx(2 * cost.one.block)) or not separate
    assert cost.share_of_time(sampler.full) == pytest.approx(1)


@pytest.mark.parametrize(
    "family",
    [
        DIT,
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "Lumina2Transformer2DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",
    ],
)
@pytest.mark.parametrize("guided", [True, False])
def test_a_call_that_is_not_guided_as_said_is_refused(family: str, guided: bool) -> None:
    tiny = tiny_pipeline(family)
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))

    def call(indices: Sequence[int]) -> Tensor:
        tiny.run(guided=guided)
        return torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8)

    with pytest.raises((InputError, PlanError), match="cfg_scale") as found:
        PipelineSampler(tiny.pipe, handle, call, cfg_scale=1.0 if guided else 4.0)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8)]
)
def test_a_call_that_returns_other_things_is_refused(tiny, wrong: Tensor) -> None:
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))
    with pytest.raises(
        InputError, match=r"call: returned \w+ \([\d, ]+\) for 1 numbers; expected uint8 \(1, 3, H, W\)"
    ):
        PipelineSampler(tiny.pipe, handle, lambda _: wrong)


def test_the_plan_comes_back_after_an_error(tiny, reference) -> None:
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))
    handle.plan = before = DepthPlan.full((999, 749, 500, 250), 4, "", 4.0)
    with pytest.raises(InputError, match="--num-pictures 4"):
        calibrate_pipeline(
            tiny.pipe,
            handle,
            call_of(tiny, 4.0),
            budget=0.5,
            cfg_scale=4.0,
            extractor=EXTRACTOR,
            reference=reference,
            num_pictures=4,
        )
    with pytest.raises(InputError, match="no table"):
        calibrate_pipeline(tiny.pipe, handle, call_of(tiny, 4.0), budget=0.5, cfg_scale=4.0)
    assert handle.plan is before


def test_a_router_stays_on(tiny, reference) -> None:
    handle = apply_dyndit(tiny.pipe, random_exits(tiny), partial(constant, depth=2), cfg_scale=4.0)
    call = call_of(tiny, 4.0)
    routed = call((0, 1))
    with pytest.raises(InputError, match="no table"):
        calibrate_pipeline(tiny.pipe, handle, call, budget=0.5, cfg_scale=4.0)
    assert torch.equal(call((0, 1)), routed)
    assert handle.router is not None
    handle.plan = None
    assert not torch.equal(call((0, 1)), routed)


def test_our_own_table_keeps_its_numbers(make_model) -> None:
    """Golden figures of the measurement as it was before pipelines could be drawn from."""
    extractor = load_extractor("digits")
    real = moments(extractor.features(load_digits().uint8()[:400].expand(-1, 3, -1, -1)))
    settings = CalibrationSettings(num_pictures=80, num_bands=2, batch_size=32, choices=("2|2", "4|2", "6"))
    cost = replace(COST, num_blocks=6)
    table = measure_shifts(make_model(), extractor, real, num_steps=3, settings=settings, cost=cost)
    assert table.edges == (999.0, 333.0, 0.0)
    assert table.mean[0, 0, :4].tolist() == pytest.approx([0.197928, -0.051551, -0.004036, -0.012209], abs=5e-4)
    # A small difference of large sums: it is 37.7682 on a CPU that rounds otherwise.
    assert table.second.sum().item() == pytest.approx(37.6862, rel=4e-3)
    assert table.base.mean.sum().item() == pytest.approx(19.9991, rel=5e-4)


def test_a_table_of_other_exits_is_refused(tiny, reference, tmp_path: Path) -> None:
    """One that is given; one that lies in the folder is measured again."""
    handle: DynDiTHandle = apply_dyndit(tiny.pipe, random_exits(tiny))
    settings = CalibrationSettings(NUM_PICTURES, num_bands=1, batch_size=12, choices=("2",))
    sampler = PipelineSampler(tiny.pipe, handle, call_of(tiny, 1.0))
    table = replace(measure_table(sampler, EXTRACTOR, reference, settings=settings, cost=COST), exits="another")
    with pytest.raises(InputError, match="exits another"):
        calibrate_pipeline(tiny.pipe, handle, call_of(tiny, 1.0), budget=0.9, table=table)
    table.save(tmp_path / checkpoints.TABLE)
    with pytest.raises(InputError, match="no table"):
        calibrate_pipeline(tiny.pipe, handle, call_of(tiny, 1.0), budget=0.9, out=tmp_path)


def test_a_table_in_the_folder_serves_half_precision_too(tiny, reference, tmp_path: Path) -> None:
    handle = apply_dyndit(tiny.pipe, random_exits(tiny))
    settings = CalibrationSettings(NUM_PICTURES, num_bands=1, batch_size=12, choices=("2",))
    sampler = PipelineSampler(tiny.pipe, handle, call_of(tiny, 1.0))
    measure_table(sampler, EXTRACTOR, reference, settings=settings, cost=COST).save(tmp_path / checkpoints.TABLE)
    tiny.pipe.to(torch.bfloat16)
    plans = [calibrate_pipeline(tiny.pipe, handle, call_of(tiny, 1.0), budget=0.9, out=tmp_path) for _ in range(2)]
    assert plans[0] == plans[1], "the second finds the exits in half precision"
    handle.plan = plans[0]
    assert handle.plan.share_of_blocks < 1


@pytest.mark.usefixtures("known_times")
def test_the_whole_way_in_place(tiny, reference, tmp_path: Path) -> None:
    """Record, distil, plug in, calibrate, run: every public name, on a pipeline that knows nothing of it."""
    call = call_of(tiny, 4.0)
    plain = call((0, 1))
    with dyndit.record_calls(tiny.pipe, tmp_path / "calls"):
        call(range(4))
    fit = dyndit.Distill().fit
    recipe = dyndit.Distill(ExitConfig((2,)), replace(fit, steps=20, batch_size=8))
    dyndit.distill_exits(tiny.pipe, tmp_path / "calls", recipe, tmp_path / "exits")
    handle = dyndit.apply_dyndit(tiny.pipe, tmp_path / "exits")
    handle.plan = dyndit.calibrate_pipeline(
        tiny.pipe,
        handle,
        call,
        budget=0.9,
        cfg_scale=4.0,
        extractor=EXTRACTOR,
        reference=reference,
        num_pictures=NUM_PICTURES,
        num_bands=2,
        batch_size=6,
    )
    assert handle.plan.share_of_blocks < 1
    assert not torch.equal(call((0, 1)), plain)
    handle.remove()
    assert torch.equal(call((0, 1)), plain)
