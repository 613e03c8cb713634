"""DynDiTPipeline: the pictures of `dyndit.sample` inside diffusers, and what its `DiTPipeline` lacks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor

import dyndit
from dyndit.errors import CheckpointError, InputError, PlanError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import guidance_interval, ramp
from dyndit.plans.step import Step, Unconditional, steps
from dyndit.plans.table import FILE, ShiftTable
from dyndit.plugin.pipeline import DynDiTPipeline
from dyndit.sampling.budget import plan_on_table
from dyndit.sampling.loop import full_plan, noise
from dyndit.sampling.sample import sample, unguided
from dyndit.sampling.solvers import SOLVERS, make_scheduler
from dyndit.stats import moments
from dyndit.storage.load import TABLE
from dyndit.training.autoencoders import decode_latents
from support.models import randomise

LABELS = [3, 1, 4, 9]
STEPS = 4


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    """Pixels of 3 channels, 10 classes."""
    return make_model(in_channels=3)


@pytest.fixture(scope="module")
def latent_model(make_model) -> DynamicDepth:
    model = make_model(in_channels=4)
    return DynamicDepth(model.backbone, model.exits, pixel_space=False).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    randomise(vae, 3)
    return vae.eval()


@pytest.fixture
def pipe(model) -> DynDiTPipeline:
    return DynDiTPipeline.from_model(model)


def rising(model: DynamicDepth, solver: str = "ddim", cfg_scale: float = 1.5, steps: int = STEPS) -> DepthPlan:
    """Several depths; guided, also unequal branches and a step without the second."""
    plan = ramp(full_plan(model, solver, steps, cfg_scale), model.depths, 1)
    if cfg_scale == 1:
        return plan
    return plan.with_steps([Step(plan.depths[0]), *(Step(d, Unconditional(max(1, d - 1))) for d in plan.depths[1:])])


def table_of(model: DynamicDepth) -> ShiftTable:
    """A shift table of this model with made-up shifts."""
    g = torch.Generator().manual_seed(5)
    choices = tuple(Step.equal(depth, guided) for depth in model.depths[:-1] for guided in (False, True))

    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    parts = PartTimes(embed=0.1, block=1.0, exit=0.1, head=0.1)
    second = 0.01 * features(2, len(choices), 3, 3)
    return ShiftTable(
        edges=(999.0, 500.0, 0.0),
        choices=choices,
        mean=0.1 * features(2, len(choices), 3),
        second=second + second.mT,
        base=moments(features(64, 3)),
        reference=moments(features(64, 3)),
        cost=CostModel(8, model.num_blocks, one=parts, two=replace(parts, block=1.9), solver=0.05),
        num_blocks=model.num_blocks,
        solver="ddim",
        num_steps=2,
        cfg_scale=1.5,
        seed=0,
        num_pictures=64,
        extractor="toy",
        extractor_fingerprint="toy",
        backbone=model.identity.backbone,
        exits=model.identity.exits,
    )


def uint8(images: list[Image.Image]) -> Tensor:
    """Pictures as `dyndit.sample` gives them: (N, C, H, W) uint8."""
    return torch.stack([torch.tensor(np.array(image)) for image in images]).permute(0, 3, 1, 2)


# Pictures are those of dyndit.sample.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_pictures_are_those_of_sample(model, solver: str, cfg_scale: float, dynamic: bool) -> None:
    model = DynamicDepth(model.backbone, model.exits, process=SOLVERS[solver].process()).eval()
    plan = rising(model, solver, cfg_scale) if dynamic else None
    pipe = DynDiTPipeline.from_model(model, solver=solver)
    call = {} if dynamic else {"num_inference_steps": STEPS, "guidance_scale": cfg_scale}
    here = uint8(pipe(LABELS, plan=plan, seed=5, **call).images)
    there = sample(model, LABELS, plan=plan, solver=solver, num_steps=STEPS, cfg_scale=cfg_scale, seed=5).pictures
    assert torch.equal(here, there)
    assert here.unique().numel() > 30  # otherwise blank pictures are compared
    if dynamic:
        full = uint8(pipe(LABELS, num_inference_steps=STEPS, guidance_scale=cfg_scale, seed=5).images)
        assert not torch.equal(here, full)


def test_the_full_plan_is_no_plan(model, pipe) -> None:
    plan = full_plan(model, "ddim", STEPS, 1.5)
    none = pipe(LABELS, num_inference_steps=STEPS, seed=0, output_type="latent").images
    assert torch.equal(none, pipe(LABELS, plan=plan, seed=0, output_type="latent").images)


def test_steps_and_scale_are_the_plans_or_the_defaults(make_model, model, pipe) -> None:
    plan = rising(model, cfg_scale=3.0, steps=3)
    assert pipe.plan_for(plan=plan) == plan
    assert (pipe.plan_for().num_steps, pipe.plan_for().cfg_scale) == (20, 1.5)
    without_null = DynDiTPipeline.from_model(make_model(in_channels=3, label_dropout=0.0))
    assert without_null.plan_for().cfg_scale == 1
    assert pipe.plan_for(plan=plan, guidance_scale=2.0) == replace(plan, cfg_scale=2.0)
    pictures = sample(model, LABELS, plan=plan, num_steps=3, cfg_scale=2.0).pictures
    assert torch.equal(uint8(pipe(LABELS, plan=plan, guidance_scale=2.0, seed=0).images), pictures)


def test_a_plan_may_be_a_file(model, pipe, tmp_path: Path) -> None:
    plan = replace(rising(model), backbone=model.identity.backbone, exits=model.identity.exits)
    plan.save(tmp_path / "plan.json")
    from_file = pipe(LABELS, plan=tmp_path / "plan.json", seed=1, output_type="latent").images
    assert torch.equal(from_file, pipe(LABELS, plan=plan, seed=1, output_type="latent").images)


def test_labels_may_be_a_number_or_a_tensor(pipe) -> None:
    def draw(labels):
        return pipe(labels, num_inference_steps=2, seed=0, output_type="latent").images

    assert torch.equal(draw(7), draw([7]))
    assert torch.equal(draw(torch.tensor(LABELS)), draw(LABELS))
    assert torch.equal(draw(np.array(LABELS)), draw(LABELS))


# Noise.


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_seed_per_picture_is_independent_of_batch_mates(model, solver: str) -> None:
    pipe = DynDiTPipeline.from_model(model, solver=solver)
    seeds, plan = [7, 8, 7, 9], rising(model, solver)
    together = uint8(pipe(LABELS, plan=plan, seeds=seeds).images).int()
    for i in (1, 2):
        alone = uint8(pipe([LABELS[i]], plan=plan, seeds=[seeds[i]]).images).int()
        assert (alone[0] - together[i]).abs().max() <= 1
        same = sample(model, [LABELS[i]], plan=plan, solver=solver, num_steps=STEPS, seed=seeds[i]).pictures
        assert torch.equal(alone, same.int())
    twice = pipe([3, 3, 3], plan=plan, seeds=[7, 7, 8], output_type="latent").images
    assert torch.allclose(twice[0], twice[1], atol=1e-5)
    assert not torch.allclose(twice[0], twice[2], atol=0.1)


def test_picture_numbers_go_on_from_the_first_index(model, pipe) -> None:
    whole = sample(model, LABELS, num_steps=2, seed=3).pictures.int()
    part = uint8(pipe(LABELS[2:], seed=3, first_index=2, num_inference_steps=2).images).int()
    assert (whole[2:] - part).abs().max() <= 1
    assert not torch.equal(part, uint8(pipe(LABELS[2:], seed=3, num_inference_steps=2).images).int())


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_generator_per_picture(model, solver: str) -> None:
    pipe = DynDiTPipeline.from_model(model, solver=solver)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(labels: list[int], generator) -> Tensor:
        return pipe(labels, num_inference_steps=STEPS, generator=generator, output_type="latent").images

    together = draw(LABELS, generators(4, 5, 6, 7))
    assert torch.allclose(draw([LABELS[2]], generators(6))[0], together[2], atol=1e-4)
    assert not torch.allclose(draw([LABELS[2]], generators(7))[0], together[2], atol=0.1)
    shared = draw(LABELS, generators(4)[0])
    assert torch.equal(shared, draw(LABELS, generators(4)[0]))
    assert not torch.allclose(shared[1:], together[1:], atol=0.1)
    used = generators(4)[0]
    draw(LABELS, used)
    drawn = torch.randn(4, *model.backbone.sample_shape, generator=(first := generators(4)[0]))
    # A stochastic solver goes on drawing from the generator that is given, another leaves it after the start.
    assert torch.equal(used.get_state(), first.get_state()) == (solver == "ddim")
    if solver == "ddim":
        given = pipe(LABELS, num_inference_steps=STEPS, latents=drawn, output_type="latent").images
        assert torch.equal(given, shared)


def test_latents_take_the_place_of_noise(model, pipe) -> None:
    latents = noise(3, range(len(LABELS)), model.backbone.sample_shape)
    given = pipe(LABELS, num_inference_steps=2, latents=latents.double(), output_type="latent").images
    assert torch.equal(given, pipe(LABELS, num_inference_steps=2, seed=3, output_type="latent").images)


def test_without_a_seed_torch_decides(pipe) -> None:
    def draw() -> Tensor:
        return pipe(LABELS, num_inference_steps=2, output_type="latent").images

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


# Callbacks and the bar.


def test_the_callback_sees_every_step(model, pipe) -> None:
    seen = []

    def look(*arguments) -> dict:
        seen.append(arguments)
        return arguments[3]

    looked = pipe(LABELS, num_inference_steps=STEPS, seed=0, output_type="latent", callback_on_step_end=look).images
    assert torch.equal(looked, pipe(LABELS, num_inference_steps=STEPS, seed=0, output_type="latent").images)
    pipes, steps, times, tensors = zip(*seen, strict=True)
    assert set(pipes) == {pipe}
    assert steps == tuple(range(STEPS))
    assert [int(t) for t in times] == list(full_plan(model, "ddim", STEPS, 1.5).timesteps)
    assert torch.equal(tensors[-1]["latents"], looked)
    assert not torch.equal(tensors[0]["latents"], looked)


def test_the_callback_may_replace_the_latents(model, pipe) -> None:
    """Replaced after the first step: what comes out is the sampling continued from there."""
    other = noise(9, range(len(LABELS)), model.backbone.sample_shape)

    def replace_them(pipe, step: int, timestep: Tensor, tensors: dict) -> dict | None:
        assert tensors == {}
        return {"latents": other} if step == 0 else None

    options = {"callback_on_step_end": replace_them, "callback_on_step_end_tensor_inputs": []}
    replaced = pipe(LABELS, num_inference_steps=2, seed=0, guidance_scale=1.0, output_type="latent", **options).images
    scheduler, y = make_scheduler("ddim", 2), torch.tensor(LABELS)
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            x = noise(0, range(len(LABELS)), model.backbone.sample_shape) if k == 0 else other
            eps = model(x, torch.full_like(y, int(t)), y)[:, :3]
            bar = scheduler.alphas_cumprod[int(t)]
            x_0 = ((x - (1 - bar).sqrt() * eps) / bar.sqrt()).clamp(-1, 1)
            x = scheduler.step((x - bar.sqrt() * x_0) / (1 - bar).sqrt(), t, x, return_dict=False)[0]
    assert torch.allclose(replaced, x, atol=1e-4)
    assert not torch.allclose(
        replaced, pipe(LABELS, num_inference_steps=2, seed=0, output_type="latent").images, atol=0.1
    )


def test_callback_objects_of_diffusers_name_their_own_tensors(pipe) -> None:
    class Zeroes(diffusers.callbacks.PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index: int, timestep, callback_kwargs: dict) -> dict:
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    callback = Zeroes(cutoff_step_ratio=1.0)
    made = pipe(LABELS, num_inference_steps=2, seed=0, output_type="latent", callback_on_step_end=callback).images
    assert not made.any()


def test_the_bar_counts_the_steps(model) -> None:
    updates = []

    class Bar:
        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            updates.append("closed")

        def update(self) -> None:
            updates.append(1)

    class Barred(DynDiTPipeline):
        def progress_bar(self, iterable=None, total: int | None = None) -> Bar:
            updates.append(total)
            return Bar()

    Barred.from_model(model)(LABELS, num_inference_steps=3, seed=0)
    assert updates == [3, 1, 1, 1, "closed"]


# Guidance.


def test_guidance_on_three_of_four_channels(latent_model) -> None:
    pipe, x = DynDiTPipeline.from_model(latent_model), noise(0, range(len(LABELS)), (4, 8, 8))
    made = pipe(LABELS, num_inference_steps=1, guidance_scale=3.0, guided_channels=3, seed=0, output_type="latent")
    scheduler, y = make_scheduler("ddim", 1), torch.tensor(LABELS)
    null = torch.full_like(y, 10)
    with torch.no_grad():
        both = latent_model.backbone(torch.cat([x, x]), torch.full((8,), 999), torch.cat([y, null]))
    cond, uncond = both.chunk(2)
    eps = torch.cat([uncond[:, :3] + 3 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:4]], dim=1)
    assert torch.equal(made.images, scheduler.step(eps, scheduler.timesteps[0], x, return_dict=False)[0])
    all_four = pipe(LABELS, num_inference_steps=1, guidance_scale=3.0, seed=0, output_type="latent").images
    assert torch.equal(all_four[:, :3], made.images[:, :3])
    assert not torch.allclose(all_four[:, 3], made.images[:, 3], atol=1e-2)


def test_a_guidance_interval_is_a_plan_without_second_branch_outside(model, pipe) -> None:
    """Timesteps 999, 749, 500, 250 have noise levels 157, 17, 3.4 and 0.96."""
    call = {"num_inference_steps": STEPS, "seed": 0, "output_type": "latent"}
    full = full_plan(model, "ddim", STEPS, 1.5)
    some = full.with_steps(steps("6", "6|6", "6|6", "6"))
    made = pipe(LABELS, guidance_interval=(1.0, 20.0), **call).images
    assert torch.equal(made, pipe(LABELS, plan=some, seed=0, output_type="latent").images)
    assert torch.equal(
        pipe(LABELS, guidance_interval=(200.0, 300.0), **call).images, pipe(LABELS, guidance_scale=1.0, **call).images
    )
    assert torch.equal(pipe(LABELS, guidance_interval=(0.0, 200.0), **call).images, pipe(LABELS, **call).images)
    for other in (full, unguided(full)):
        assert not torch.equal(made, pipe(LABELS, plan=other, seed=0, output_type="latent").images)
    dynamic = guidance_interval(rising(model), 1.0, 20.0)
    assert dynamic.depths == rising(model).depths
    assert torch.equal(
        pipe(LABELS, plan=rising(model), guidance_interval=(1.0, 20.0), seed=0, output_type="latent").images,
        pipe(LABELS, plan=dynamic, seed=0, output_type="latent").images,
    )


# What comes out.


def test_output_types_hold_the_same_pictures(pipe) -> None:
    made = {
        kind: pipe(LABELS, num_inference_steps=2, seed=0, output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in made["pil"])
    assert isinstance(made["np"], np.ndarray)
    assert made["np"].shape == (4, 8, 8, 3)
    assert made["pt"].shape == made["latent"].shape == (4, 3, 8, 8)
    assert torch.equal(made["pt"], (made["latent"] / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    assert (255 * made["pt"] - uint8(made["pil"])).abs().max() <= 0.501
    assert 0 <= made["np"].min() < made["np"].max() <= 1
    made["latent"].mul_(2)  # a tensor like any other: not one of inference mode
    (images,) = pipe(LABELS, num_inference_steps=2, seed=0, return_dict=False)
    assert torch.equal(uint8(images), uint8(made["pil"]))


def test_grey_pictures(make_model) -> None:
    model = make_model()
    images = DynDiTPipeline.from_model(model)(LABELS, num_inference_steps=2, seed=0).images
    assert images[0].mode == "L"
    there = sample(model, LABELS, num_steps=2).pictures[:, 0]
    assert torch.equal(torch.stack([torch.tensor(np.array(image)) for image in images]), there)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_latents_are_decoded(latent_model, vae, solver: str) -> None:
    pipe, plan = DynDiTPipeline.from_model(latent_model, solver=solver, vae=vae), rising(latent_model, solver)
    made = pipe(LABELS, plan=plan, guided_channels=3, seed=2)
    there = sample(latent_model, LABELS, plan=plan, solver=solver, num_steps=STEPS, guided_channels=3, seed=2).latents
    assert torch.equal(uint8(made.images), decode_latents(vae, there))
    assert uint8(made.images).unique().numel() > 30
    latents = pipe(LABELS, plan=plan, guided_channels=3, seed=2, output_type="latent").images
    assert torch.equal(latents, there)
    bare = DynDiTPipeline.from_model(latent_model, solver=solver)
    assert torch.equal(bare(LABELS, plan=plan, guided_channels=3, seed=2, output_type="latent").images, there)
    with pytest.raises(InputError, match="output_type pil: this model makes latents and the pipeline has no vae"):
        bare(LABELS, plan=plan)


def halved(model: DynamicDepth) -> DynamicDepth:
    """A copy whose weights are rounded to bfloat16."""
    copy = DynamicDepth(type(model.backbone).from_config(model.backbone.config()), pixel_space=model.pixel_space)
    copy.exits = Exits(copy.backbone, model.exits.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_the_plans_of_the_whole(model, dtype: torch.dtype) -> None:
    """A plan bound to the model is not refused for the rounded weights."""
    plan = replace(rising(model), backbone=model.identity.backbone, exits=model.identity.exits)
    half = DynDiTPipeline(halved(model), SOLVERS["ddim"].build(), router=table_of(model)).to(dtype)
    made = half(LABELS, plan=plan, seed=0, output_type="pt").images
    assert made.dtype == torch.float32
    whole = DynDiTPipeline.from_model(model)(LABELS, plan=plan, seed=0, output_type="pt").images
    assert 0 < (made - whole).abs().mean() < 0.05
    assert half.plan_for(budget=0.6).share_of_blocks < 1


def test_the_solver_and_guidance_stay_in_float32(latent_model) -> None:
    pipe = DynDiTPipeline.from_model(halved(latent_model)).to(torch.bfloat16)
    made = pipe(LABELS, num_inference_steps=1, guidance_scale=3.0, seed=0, output_type="latent").images
    scheduler, y, x = make_scheduler("ddim", 1), torch.tensor(LABELS), noise(0, range(len(LABELS)), (4, 8, 8))
    with torch.no_grad():
        both = pipe.transformer.backbone(
            torch.cat([x, x]).bfloat16(), torch.full((8,), 999), torch.cat([y, torch.full_like(y, 10)])
        )
    assert both.dtype == torch.bfloat16
    cond, uncond = both[:, :4].float().chunk(2)
    eps = uncond + 3 * (cond - uncond)
    assert torch.equal(made, scheduler.step(eps, scheduler.timesteps[0], x, return_dict=False)[0])


# Saved and loaded.


@pytest.mark.parametrize("parts", [(), ("vae",), ("router",), ("vae", "router")])
def test_reloaded_by_plain_diffusers(model, latent_model, vae, tmp_path: Path, parts: tuple[str, ...]) -> None:
    chosen = latent_model if "vae" in parts else model
    there = {"vae": vae, "router": table_of(chosen)}
    pipe = DynDiTPipeline(chosen, make_scheduler("unipc", 5), **{name: there[name] for name in parts})
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is DynDiTPipeline
    assert [name for name in ("vae", "router") if getattr(again, name) is not None] == list(parts)
    plan = replace(rising(chosen, "unipc"), backbone=chosen.identity.backbone, exits=chosen.identity.exits)
    for call in ({"plan": plan}, {"num_inference_steps": 3}, *([{"budget": 0.6}] if "router" in parts else [])):
        call |= {"seed": 4, "output_type": "pt"}
        assert torch.equal(again(LABELS, **call).images, pipe(LABELS, **call).images)


@pytest.mark.parametrize("first", ["dyndit", "diffusers"])
def test_a_fresh_interpreter_loads_it(model, tmp_path: Path, first: str) -> None:
    """In either order of imports."""
    pipe = DynDiTPipeline.from_model(model)
    pipe.save_pretrained(tmp_path / "pipe")
    imports = {
        "dyndit": "from dyndit import DynDiTPipeline\n",
        "diffusers": "from diffusers import DiffusionPipeline\n",
    }
    code = imports.pop(first) + "".join(imports.values())
    code += (
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'pipe')!r})\n"
        "assert type(pipe) is DynDiTPipeline\n"
        "print(pipe([3], seed=1, num_inference_steps=2, output_type='np').images.sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = pipe([3], seed=1, num_inference_steps=2, output_type="np").images.sum()
    assert float(done.stdout) == pytest.approx(float(here), rel=1e-5)


def test_from_the_hub_come_exits_and_table_too(model, tmp_path: Path, monkeypatch) -> None:
    """diffusers fetches the weights' usual names alone: its own download is not used."""
    DynDiTPipeline(model, SOLVERS["ddim"].build(), router=table_of(model)).save_pretrained(tmp_path)
    asked = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("dyndit.plugin.pipeline.snapshot_download", fetch)
    pipe = DynDiTPipeline.from_pretrained("org/name", revision="abc")
    assert (asked["name"], asked["revision"]) == ("org/name", "abc")
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".safetensors")]
    assert {path.name for path in files} >= {"exits.safetensors", FILE, "model.safetensors", "model_index.json"}
    assert all(any(path.match(pattern) for pattern in asked["allow_patterns"]) for path in files)
    assert pipe.transformer.depths == model.depths
    assert pipe.router.choices == table_of(model).choices


def test_components_may_be_given_in_place_of_the_saved(model, tmp_path: Path) -> None:
    DynDiTPipeline.from_model(model).save_pretrained(tmp_path)
    scheduler = SOLVERS["unipc"].build()
    pipe = DiffusionPipeline.from_pretrained(tmp_path, transformer=model, scheduler=scheduler, router=table_of(model))
    assert pipe.transformer is model
    assert pipe.plan_for(budget=0.6, num_inference_steps=3).solver == "unipc"
    other = DynDiTPipeline.from_pipe(pipe)
    assert other.transformer is model
    assert other.router is pipe.router
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert again.plan_for(budget=0.6, num_inference_steps=3) == pipe.plan_for(budget=0.6, num_inference_steps=3)


def test_other_names_of_diffusers_are_as_they_were() -> None:
    assert diffusers.DynDiTPipeline is DynDiTPipeline is dyndit.DynDiTPipeline
    assert diffusers.DiTPipeline.__name__ == "DiTPipeline"
    assert not issubclass(DynDiTPipeline, diffusers.DiTPipeline)
    with pytest.raises(AttributeError):
        _ = diffusers.NoSuchPipeline


def test_a_damaged_router_is_refused(model, tmp_path: Path) -> None:
    DynDiTPipeline(model, SOLVERS["ddim"].build(), router=table_of(model)).save_pretrained(tmp_path)
    (tmp_path / "router" / FILE).write_bytes(b"not a table")
    with pytest.raises(CheckpointError, match=FILE):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_pipeline_of_a_models_folder_has_its_table(model, tmp_path: Path) -> None:
    assert FILE == TABLE
    model.save_pretrained(tmp_path)
    assert DynDiTPipeline.from_model(tmp_path).router is None
    table_of(model).save(tmp_path / FILE)
    pipe = DynDiTPipeline.from_model(str(tmp_path), solver="dpmpp")
    assert pipe.router.choices == table_of(model).choices
    assert pipe.plan_for(num_inference_steps=3).solver == "dpmpp"
    assert torch.equal(
        uint8(pipe(LABELS, num_inference_steps=3, seed=0).images),
        sample(model, LABELS, solver="dpmpp", num_steps=3).pictures,
    )


# The router.


def test_a_budget_is_searched_on_the_router(model) -> None:
    table = table_of(model)
    pipe = DynDiTPipeline(model, SOLVERS["ddim"].build(), router=table)
    plan = pipe.plan_for(budget=0.6, num_inference_steps=STEPS)
    assert plan == plan_on_table(model, table, budget=0.6, solver="ddim", num_steps=STEPS)
    assert plan.share_of_blocks < 0.7
    assert len(set(plan.steps)) > 1
    by_budget = pipe(LABELS, budget=0.6, num_inference_steps=STEPS, seed=0, output_type="latent").images
    assert torch.equal(by_budget, pipe(LABELS, plan=plan, seed=0, output_type="latent").images)


def test_what_a_plan_was_made_for_is_compared_again_when_weights_change(make_model) -> None:
    model = make_model(in_channels=3)
    pipe = DynDiTPipeline(model, SOLVERS["ddim"].build(), router=table_of(model))
    plan = replace(rising(model), backbone=model.identity.backbone, exits=model.identity.exits)
    for _ in range(2):
        pipe.plan_for(plan=plan)
        pipe.plan_for(budget=0.7)
    with torch.no_grad():
        model.backbone.x_embedder.proj.weight.add_(1e-3)
    with pytest.raises(PlanError, match="backbone"):
        pipe.plan_for(plan=plan)
    with pytest.raises(InputError, match="backbone"):
        pipe.plan_for(budget=0.7)


# Any scheduler of the process; calls that leave nothing behind.


def test_foreign_schedulers_sample_as_in_the_loop(model) -> None:
    for scheduler in (
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.EulerDiscreteScheduler(),  # between whole timesteps
    ):
        pipe = DynDiTPipeline(model, scheduler)
        plan = rising(model, scheduler)
        assert plan.solver == type(scheduler).__name__
        here = uint8(pipe(LABELS, plan=plan, seed=6).images)
        assert torch.equal(here, sample(model, LABELS, plan=plan, solver=scheduler, num_steps=STEPS, seed=6).pictures)
        with pytest.raises(PlanError, match="made for solver ddim"):
            pipe(LABELS, plan=rising(model))


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_nothing_leaks_from_one_call_to_the_next(model, solver: str) -> None:
    pipe = DynDiTPipeline(model, SOLVERS[solver].build(), router=table_of(model))
    config, state = dict(pipe.scheduler.config), {k: repr(v) for k, v in vars(pipe.scheduler).items()}
    call = {"num_inference_steps": STEPS, "seed": 3, "output_type": "latent"}
    fresh = DynDiTPipeline.from_model(model, solver=solver)(LABELS, **call).images
    for before in (
        {"plan": rising(model, solver), "guidance_interval": (1.0, 20.0)},
        {"budget": 0.6, "num_inference_steps": 3, "callback_on_step_end": lambda *_: {}},
        {"guidance_scale": 1.0, "num_inference_steps": 7, "generator": torch.Generator()},
    ):
        pipe(LABELS[:2], **before)
        assert torch.equal(pipe(LABELS, **call).images, fresh)
    assert dict(pipe.scheduler.config) == config
    assert {k: repr(v) for k, v in vars(pipe.scheduler).items()} == state


def test_a_call_that_fails_leaves_nothing_either(model, pipe) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    call = {"num_inference_steps": STEPS, "seed": 3, "output_type": "latent"}
    before = pipe(LABELS, **call).images
    with pytest.raises(KeyboardInterrupt):
        pipe(LABELS, plan=rising(model), callback_on_step_end=stop)
    assert torch.equal(before, pipe(LABELS, **call).images)


def test_models_move_to_their_device_under_offload(latent_model, vae) -> None:
    """The loop calls no `forward` of the model, whose hook moves it: here from the CPU to the CPU, but told so."""
    pipe = DynDiTPipeline.from_model(latent_model, vae=vae)
    before = uint8(pipe(LABELS, num_inference_steps=2, seed=0).images)
    pipe.enable_model_cpu_offload(device="cpu")
    hook, moved = latent_model._hf_hook, []
    hook.pre_forward = lambda module, *a, **k: moved.append(module)
    try:
        assert torch.equal(uint8(pipe(LABELS, num_inference_steps=2, seed=0).images), before)
        assert moved == [latent_model]
        assert latent_model._hf_hook is not hook  # freed and set anew at the end of the call
    finally:
        pipe.remove_all_hooks()


# Bad input: one line each.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [10]}, "--class-labels 10: expected 0 to 9"),
        ({"class_labels": [-1]}, "--class-labels -1"),
        ({"class_labels": []}, "at least 1"),
        ({"class_labels": ["cat"]}, "class_labels: .*expected the numbers"),
        ({"class_labels": torch.tensor([1.5])}, "class_labels"),
        ({"num_inference_steps": 0}, "--steps 0"),
        ({"output_type": "jpg"}, "output_type jpg: expected one of pil, np, pt, latent"),
        ({"budget": 0.6}, "budget 0.6: this pipeline has no router"),
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"seeds": [1, 2]}, "seeds: 2 for 4 pictures"),
        ({"seeds": [1, 2, 3, -4]}, "seed -4"),
        ({"seed": -1}, "seed -1"),
        ({"generator": [torch.Generator()]}, "generator: 1 for 4 pictures"),
        ({"latents": torch.zeros(4, 1, 8, 8)}, "latents of shape"),
        ({"guidance_interval": (3.0, 1.0)}, "guidance interval"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]}, "noise; expected latents"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, "callback_on_step_end: latents of shape"),
    ],
)
def test_bad_calls_are_refused_in_one_line(pipe, call: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipe(**{"class_labels": LABELS, "num_inference_steps": 2, **call})
    assert "\n" not in str(caught.value)


def test_plans_that_do_not_fit_are_refused(make_model, model, pipe, tmp_path: Path) -> None:
    plan = rising(model)
    deeper = rising(make_model(in_channels=3, num_blocks=7))
    for bad, call, message in (
        (replace(plan, backbone="another"), {}, "made for backbone another"),
        (replace(plan, exits="others"), {}, "made for exits others"),
        (deeper, {}, "made for 7 blocks"),
        (rising(model, "unipc"), {}, "made for solver unipc"),
        (plan, {"num_inference_steps": 5}, "made for 4 steps"),
        (plan, {"guidance_scale": 1.0}, "guidance scale"),
        (tmp_path / "none.json", {}, "none.json"),
    ):
        with pytest.raises(PlanError, match=message) as caught:
            pipe(LABELS, plan=bad, **call)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="plan and budget are both given"):
        pipe(LABELS, plan=plan, budget=0.5)
    routed = DynDiTPipeline(model, SOLVERS["ddim"].build(), router=table_of(model))
    with pytest.raises(InputError, match=r"guidance_scale 3: the router's table was measured at 1.5"):
        routed(LABELS, budget=0.6, guidance_scale=3.0)
    with pytest.raises(InputError, match="shift table: made for backbone another"):
        DynDiTPipeline(model, SOLVERS["ddim"].build(), router=replace(table_of(model), backbone="another"))(
            LABELS, budget=0.6
        )


def test_components_that_do_not_fit_are_refused(make_model, model, latent_model, vae) -> None:
    scheduler = SOLVERS["ddim"].build()
    with pytest.raises(InputError, match=r"transformer: ClassConditionalDiT; expected a dyndit.DynamicDepth"):
        DynDiTPipeline(model.backbone, scheduler)
    with pytest.raises(InputError, match="vae: this transformer makes pixels"):
        DynDiTPipeline(model, scheduler, vae)
    three = DynamicDepth(model.backbone, model.exits, pixel_space=False)
    with pytest.raises(InputError, match="vae: 4 latent channels; the transformer's have 3"):
        DynDiTPipeline(three, scheduler, vae)
    with pytest.raises(InputError, match="solver magic"):
        DynDiTPipeline.from_model(model, solver="magic")
    with pytest.raises(InputError, match="of another process"):
        DynDiTPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler())(LABELS)
    with pytest.raises(InputError, match="trained without a null class"):
        DynDiTPipeline.from_model(make_model(label_dropout=0.0))(LABELS, guidance_scale=2.0)


# The real thing.


@pytest.mark.shared
def test_a_trained_trunk_guided_is_as_in_sample(cifar10_dit: Path) -> None:
    backbone = dyndit.load(cifar10_dit, num_heads=3)
    exits = Exits(backbone.backbone, ExitConfig(head="adaln-linear"))
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for parameter in exits.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    model = DynamicDepth(backbone.backbone, exits).eval()
    plan = rising(model)
    made = uint8(DynDiTPipeline.from_model(model)(LABELS, plan=plan, seed=1).images).int()
    there = sample(model, LABELS, plan=plan, num_steps=STEPS, cfg_scale=1.5, seed=1).pictures.int()
    assert (made - there).abs().max() <= 1
    full = sample(model, LABELS, num_steps=STEPS, cfg_scale=1.5, seed=1).pictures.int()
    assert (made - full).abs().float().mean() > 1
