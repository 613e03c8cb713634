"""The plug-in inside pipelines of diffusers that know nothing of it."""

from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import dyndit
from dyndit.errors import CheckpointError, InputError, PlanError
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import constant, ramp
from dyndit.plans.step import NoGuide
from dyndit.plans.step import steps as parsed
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import HOOK
from dyndit.plugin.call import find_step
from dyndit.sampling.loop import noise, picture_generator, to_uint8
from dyndit.sampling.solvers import make_scheduler, timesteps_of
from dyndit.storage.diffusers_folder import to_diffusers
from dyndit.storage.load import save_exits
from dyndit.storage.names import match_frequencies, to_native
from dyndit.training.autoencoders import decode_latents
from support.tiny_pipelines import tiny_pipeline

STEPS, SCALE, SEED = 5, 1.5, 3
LABELS = [207, 360, 980]


def randomised(module: torch.nn.Module, seed: int, std: float = 0.15) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


def a_transformer(seed: int = 0, num_classes: int = 1000) -> diffusers.DiTTransformer2DModel:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=num_classes,
    )
    randomised(model, seed)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def a_vae(seed: int = 1) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


def a_pipeline(seed: int = 0) -> diffusers.DiTPipeline:
    pipe = diffusers.DiTPipeline(a_transformer(seed), a_vae(), make_scheduler("ddim", STEPS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def some_exits(transformer: torch.nn.Module, seed: int = 5) -> Exits:
    return randomised(Exits(adapt(transformer), ExitConfig(head="adaln-linear")), seed)


def the_plan(cfg_scale: float = SCALE) -> DepthPlan:
    """Unequal branches, equal ones, and a step without guidance."""
    full = DepthPlan.full(timesteps_of("ddim", STEPS), 4, "ddim", cfg_scale)
    texts = ("1|2", "2|1", "3|3", "3", "4|2") if cfg_scale != 1 else ("1", "2", "2", "3", "4")
    return full.with_steps(parsed(*texts), router="by hand")


def draw(pipe: diffusers.DiTPipeline, guidance: float = SCALE, steps: int = STEPS, labels=LABELS) -> torch.Tensor:
    """Pictures (B, 3, H, W) in 0..1 from the pipeline's own call, noise as `dyndit.sample` draws it."""
    generators = [picture_generator(SEED, i) for i in range(len(labels))]
    return pipe(
        class_labels=labels,
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=generators,
        output_type="pt",
    ).images


@pytest.fixture
def pipe() -> diffusers.DiTPipeline:
    return a_pipeline()


@pytest.mark.parametrize("guidance", [SCALE, 1.0])
@pytest.mark.parametrize("full", [True, False], ids=["full plan", "no plan"])
def test_full_depth_is_the_untouched_pipeline_bit_for_bit(pipe, guidance: float, full: bool) -> None:
    before = draw(pipe, guidance)
    plan = DepthPlan.full(timesteps_of("ddim", STEPS), 4, "ddim", guidance) if full else None
    handle = dyndit.apply_dyndit(pipe, some_exits(pipe.transformer), plan)
    assert torch.equal(draw(pipe, guidance), before)
    assert handle.stats()["depth"].eq(4).all()
    assert len(handle.stats()) == STEPS * (2 if full and guidance != 1 else 1)
    handle.plan = the_plan(guidance)
    assert not torch.allclose(draw(pipe, guidance), before, atol=1e-2), "exits predict as the model does"


@pytest.mark.parametrize(
    ("guidance", "texts"),
    [
        pytest.param(SCALE, (), id="guided"),
        pytest.param(1.0, (), id="unguided"),
        pytest.param(SCALE, ("1|2", "2|1", "3|3", "3|e1", "4|e2"), id="own exits"),
        pytest.param(SCALE, ("1|held", "4|1", "1|held", "1|held", "3|1"), id="held"),
        pytest.param(SCALE, ("4|4", "2+|e1", "4|e2", "2+", "3+|e2"), id="forecasts guided by own exits"),
        pytest.param(SCALE, ("4|4", "1+|held", "4|2", "2+|held", "1+"), id="forecasts with held guidance"),
        pytest.param(1.0, ("4", "1+", "4", "2+", "1+"), id="forecasts unguided"),
    ],
)
def test_pictures_are_those_of_dyndit_sample(pipe, guidance: float, texts: tuple[str, ...]) -> None:
    exits, plan = some_exits(pipe.transformer), the_plan(guidance)
    plan = plan.with_steps(parsed(*texts)) if texts else plan
    dyndit.apply_dyndit(pipe, exits, plan)
    pictures = (draw(pipe, guidance) * 255).round()
    native = DynamicDepth(a_native(pipe.transformer), exits, pixel_space=False)
    options = {"num_steps": STEPS, "cfg_scale": guidance, "seed": SEED}
    drawn = dyndit.sample(native, LABELS, plan=plan, **options)
    assert drawn.plan == plan
    expected = decode_latents(pipe.vae, drawn.latents).float()
    assert expected.std() > 5, "a flat picture proves nothing"
    assert (pictures - expected).abs().max() <= 1
    for less in ({"forecast": False}, {"guide": NoGuide()}):
        other = plan.with_steps([replace(step, **less) for step in plan.steps])
        if other != plan:
            latents = dyndit.sample(native, LABELS, plan=other, **options).latents
            assert (decode_latents(pipe.vae, latents).float() - expected).abs().max() > 5, f"the same without {less}"


def a_native(transformer: diffusers.DiTTransformer2DModel) -> ClassConditionalDiT:
    config = DiTConfig(
        8, 2, 4, width=32, num_blocks=4, num_heads=2, num_classes=1000, mlp_norm_eps=1e-5, frequency_shift=1
    )
    native = ClassConditionalDiT(config)
    native.load_state_dict(to_native(transformer.state_dict(), 4))
    return native.eval()


class Pixels(ModelMixin, ConfigMixin):
    """Stands where a pipeline wants an autoencoder, for a model that makes pixels."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        return DecoderOutput(sample=z)


@pytest.mark.shared
def test_the_cifar10_trunk_unguided_inside_dit_pipeline(cifar10_dit) -> None:
    model = dyndit.load(cifar10_dit)
    native = DynamicDepth(
        model.backbone, Exits(model.backbone, ExitConfig(head="adaln-linear")), pixel_space=False
    ).eval()
    transformer = to_diffusers(model)
    pipe = diffusers.DiTPipeline(transformer, Pixels(), make_scheduler("ddim", STEPS))
    pipe.set_progress_bar_config(disable=True)
    full = DepthPlan.full(timesteps_of("ddim", STEPS), 12, "ddim")
    plan = full.with_steps(parsed("4", "7", "9", "11", "12"))
    handle = dyndit.apply_dyndit(pipe, native.exits, plan)
    pictures = to_uint8(2 * draw(pipe, 1.0, labels=[3, 7]) - 1).float()
    drawn = dyndit.sample(native, [3, 7], plan=plan, num_steps=STEPS, cfg_scale=1.0, seed=SEED)
    assert (pictures - to_uint8(drawn.latents).float()).abs().max() <= 1
    assert handle.stats()["depth"].tolist() == [4, 7, 9, 11, 12]


def test_stats_are_what_the_plan_says(pipe) -> None:
    plan = the_plan()
    handle = dyndit.apply_dyndit(pipe, some_exits(pipe.transformer), plan)
    for _ in range(2):  # the second call's stats are its own
        draw(pipe)
        stats = handle.stats()
        assert stats.groupby("branch")["depth"].apply(tuple).to_dict() == {
            "cond": plan.depths,
            "uncond": plan.uncond_depths,
        }
        assert tuple(stats[stats["branch"] == "cond"]["timestep"]) == plan.timesteps
        assert (stats["rows"] == len(LABELS)).all()
        assert (stats["blocks"] == stats["rows"] * stats["depth"]).all()
        assert (stats["seconds"] > 0).eq(stats["depth"] > 0).all()


def test_nothing_leaks_from_one_call_to_the_next(pipe) -> None:
    exits = some_exits(pipe.transformer)
    first, second = the_plan(), the_plan().with_steps(parsed("2|2") * STEPS)
    handle = dyndit.apply_dyndit(pipe, exits, first)
    a = draw(pipe)
    handle.plan = second
    b = draw(pipe)
    handle.plan = first
    assert torch.equal(draw(pipe), a)
    assert not torch.equal(a, b)
    fresh = a_pipeline()
    dyndit.apply_dyndit(fresh, exits, second)
    assert torch.equal(draw(fresh), b)


@pytest.mark.parametrize("broken", range(STEPS))
def test_a_call_that_broke_off_leaves_nothing(pipe, broken: int, monkeypatch) -> None:
    handle = dyndit.apply_dyndit(pipe, some_exits(pipe.transformer), the_plan())
    expected = draw(pipe)
    step, calls = pipe.scheduler.step, []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == broken + 1:
            raise RuntimeError("power cut")
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            draw(pipe)
    assert torch.equal(draw(pipe), expected)
    assert len(handle.stats()) == 2 * STEPS


def test_two_pipelines_with_different_plans_live_side_by_side() -> None:
    one, two = a_pipeline(), a_pipeline()
    exits = some_exits(one.transformer)
    plans = the_plan(), the_plan().with_steps(parsed("3|1") * STEPS)
    handles = [dyndit.apply_dyndit(p, exits, plan) for p, plan in zip((one, two), plans, strict=True)]
    a, b, again = draw(one), draw(two), draw(one)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert [tuple(h.stats().query("branch == 'cond'")["depth"]) for h in handles] == [p.depths for p in plans]


def test_exits_serve_pipelines_of_several_precisions(pipe) -> None:
    other, exits, plan = a_pipeline(), some_exits(pipe.transformer), the_plan()
    before = {name: tensor.clone() for name, tensor in exits.state_dict().items()}
    for one in (pipe, other):
        dyndit.apply_dyndit(one, exits, plan)
    expected = draw(pipe)
    other.to(torch.bfloat16)
    assert draw(other).dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in exits.state_dict().items())
    assert torch.equal(draw(pipe), expected)
    other.to(torch.float32)  # the transformer stays rounded; its exits were never
    draw(other)
    assert other.transformer._diffusers_hook.get_hook(HOOK).handle.model.exits is exits


def test_steps_that_half_precision_rounds_together_are_steps() -> None:
    """Flux hands timesteps over in its own precision: 300 of them are fewer values in bf16."""
    steps, tiny = 300, tiny_pipeline("FluxTransformer2DModel")
    tiny.pipe.to(torch.bfloat16)
    handle = dyndit.apply_dyndit(tiny.pipe, None)
    tiny.run(guided=False, num_inference_steps=steps)
    assert handle.stats()["timestep"].nunique() < steps == len(handle.stats())
    full = handle.full_plan()
    assert full.timesteps == pytest.approx(tiny.pipe.scheduler.timesteps.tolist())
    handle.plan = full
    # Broken off after its first step, a call leaves nothing: the next one begins at step 0, not 1.
    with pytest.raises(ZeroDivisionError):
        tiny.run(guided=False, num_inference_steps=steps, callback_on_step_end=lambda *_: 1 // 0)
    tiny.run(guided=False, num_inference_steps=steps)
    assert handle.stats()["step"].tolist() == list(range(steps))


def test_a_loop_that_writes_into_its_latents_makes_one_call_a_step() -> None:
    """Two calls on one tensor are a step's two branches only at one timestep."""
    tiny, calls = tiny_pipeline("FluxTransformer2DModel"), []
    transformer = tiny.transformer
    watch = transformer.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    tiny.run(guided=False)
    watch.remove()
    handle = dyndit.apply_dyndit(transformer, None)
    args, kwargs = calls[0]
    x = kwargs["hidden_states"].clone()
    with torch.no_grad():
        for t in (1.0, 0.7, 0.4):
            x -= 0.3 * transformer(*args, **kwargs | {"hidden_states": x, "timestep": torch.tensor([t])})[0]
    assert handle.stats()[["step", "branch"]].values.tolist() == [[0, "cond"], [1, "cond"], [2, "cond"]]


def test_offloading_put_on_later_outlives_the_plug_in(pipe) -> None:
    plain = draw(pipe)
    dyndit.apply_dyndit(pipe, some_exits(pipe.transformer), the_plan())
    dynamic = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(torch.equal(draw(pipe), dynamic) for _ in range(2))
    dyndit.remove_dyndit(pipe)
    assert "_hf_hook" in pipe.transformer.__dict__
    moved, hook = [], pipe.transformer._hf_hook
    hook.pre_forward = lambda module, *args, **kwargs: moved.append(1) or (args, kwargs)
    assert torch.equal(draw(pipe), plain)
    assert len(moved) == STEPS, "it is moved as before"
    assert torch.equal(draw(pipe), plain), "the end of a call brings nothing back"
    pipe.remove_all_hooks()
    assert torch.equal(draw(pipe), plain)
    assert "_diffusers_hook" not in pipe.transformer.__dict__


def test_removing_from_a_transformer_compiled_since(pipe) -> None:
    plain, transformer = draw(pipe), pipe.transformer
    dyndit.apply_dyndit(pipe, some_exits(transformer), the_plan())
    pipe.transformer = torch.compile(transformer, backend="eager")
    dyndit.remove_dyndit(pipe)
    pipe.transformer = transformer
    assert torch.equal(draw(pipe), plain)


def test_removing_leaves_the_transformer_as_it_was(pipe) -> None:
    transformer = pipe.transformer
    before = {name: t.clone() for name, t in transformer.state_dict().items()}
    attributes, pictures = set(transformer.__dict__), draw(pipe)
    handle = dyndit.apply_dyndit(pipe, some_exits(transformer), the_plan())
    assert transformer.state_dict().keys() == before.keys(), "exits are no part of the transformer"
    draw(pipe)
    handle.remove()
    after = transformer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(transformer.__dict__) == attributes
    assert torch.equal(draw(pipe), pictures)
    dyndit.remove_dyndit(pipe)  # nothing to remove is no error
    dyndit.apply_dyndit(pipe, some_exits(transformer), the_plan())
    assert transformer._diffusers_hook.get_hook(HOOK) is not None


def test_other_hooks_on_the_transformer_stay(pipe) -> None:
    dyndit.apply_dyndit(pipe, some_exits(pipe.transformer), the_plan())
    seen: list[int] = []

    class Watch(diffusers.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(1)
            return args, kwargs

    pipe.transformer._diffusers_hook.register_hook(Watch(), "watch")
    plain = draw(pipe)
    assert len(seen) == STEPS
    dyndit.remove_dyndit(pipe)
    assert not torch.equal(draw(pipe), plain)
    assert len(seen) == 2 * STEPS


def test_a_router_writes_the_plan_of_every_call(pipe) -> None:
    exits, router = some_exits(pipe.transformer), partial(ramp, start=1)
    handle = dyndit.apply_dyndit(pipe, exits, router, cfg_scale=SCALE)
    for steps in (4, 6, 4):
        draw(pipe, steps=steps)
        full = DepthPlan.full(timesteps_of("ddim", steps), 4, "ddim", SCALE)
        assert handle.plan.steps == ramp(full, (1, 2, 3, 4), 1).steps
        assert tuple(handle.stats().query("branch == 'cond'")["depth"]) == handle.plan.depths


def test_the_full_plan_of_a_call_is_known_after_it(pipe) -> None:
    handle = dyndit.apply_dyndit(pipe, some_exits(pipe.transformer), None, cfg_scale=SCALE)
    with pytest.raises(InputError, match="no call"):
        handle.full_plan()
    draw(pipe)
    full = handle.full_plan()
    assert (full.timesteps, full.cfg_scale) == (timesteps_of("ddim", STEPS), SCALE)
    handle.plan = constant(full, handle.model.depths, 2)
    draw(pipe)
    assert handle.stats()["depth"].eq(2).all()


def test_exits_from_a_file_are_bound_to_the_trunk(pipe, tmp_path) -> None:
    adapter, exits = adapt(pipe.transformer), some_exits(pipe.transformer)
    save_exits(exits, tmp_path / "exits.safetensors", adapter.identity())
    dyndit.apply_dyndit(pipe, exits, the_plan())
    expected = draw(pipe)
    dyndit.remove_dyndit(pipe)
    the_plan().save(tmp_path / "plan.json")
    for path in (tmp_path, tmp_path / "exits.safetensors", str(tmp_path)):
        handle = dyndit.apply_dyndit(pipe, path, tmp_path / "plan.json")
        assert torch.equal(draw(pipe), expected)
        handle.remove()
    handle = dyndit.apply_dyndit(pipe, tmp_path)
    handle.plan = str(tmp_path / "plan.json")
    assert torch.equal(draw(pipe), expected)
    handle.remove()
    match_frequencies(pipe.transformer, 0)
    with pytest.raises(CheckpointError, match="exits of backbone"):
        dyndit.apply_dyndit(pipe, tmp_path, the_plan())
    dyndit.apply_dyndit(pipe, tmp_path, the_plan(), check_identity=False)


def test_a_converted_transformer_loaded_plainly_is_told_what_it_lacks(pipe, tmp_path) -> None:
    converted = to_diffusers(dyndit.load("digits"))
    converted.save_pretrained(tmp_path)
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"dyndit\.storage\.names\.match_frequencies\(transformer, 0\) after loading"
    ):
        dyndit.apply_dyndit(plain, None)
    match_frequencies(plain, 0)
    assert dyndit.apply_dyndit(plain, None).adapter.identity() == adapt(converted).identity()


def test_what_does_not_fit_is_refused_in_one_line(pipe, tmp_path) -> None:
    exits = some_exits(pipe.transformer)
    handle = dyndit.apply_dyndit(pipe, exits, the_plan())
    with pytest.raises(InputError, match="has the plug-in already"):
        dyndit.apply_dyndit(pipe, exits, the_plan())
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(PlanError, match=r"made for 5 steps of ddim, but the pipeline runs 7 of DDIMScheduler"):
        draw(pipe, steps=STEPS + 2)
    pipe.scheduler = make_scheduler("ddim", STEPS)
    bare = a_transformer()
    dyndit.apply_dyndit(bare, some_exits(bare), the_plan(1.0))
    with pytest.raises(PlanError, match=r"none of them at timestep 42; .* bare transformer"):
        bare(torch.zeros(1, 4, 8, 8), torch.tensor([42]), torch.tensor([3]))
    with pytest.raises(PlanError, match="guided sampling, but the pipeline's call is unguided"):
        draw(pipe, 1.0)
    handle.plan = the_plan(1.0)
    with pytest.raises(PlanError, match="unguided sampling, but the pipeline's call is guided"):
        draw(pipe)
    with pytest.raises(PlanError, match="made for 3 blocks"):
        handle.plan = DepthPlan.full((9, 5), 3, "ddim")
    assert handle.plan == the_plan(1.0), "a refused plan changes nothing"
    draw(pipe, 1.0)
    handle.remove()
    with pytest.raises(InputError, match="router needs"):
        dyndit.apply_dyndit(pipe.transformer, exits, partial(ramp, start=1))
    with pytest.raises(InputError, match="no transformer"):
        dyndit.apply_dyndit(
            diffusers.DDPMPipeline(
                diffusers.UNet2DModel(
                    8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
                ),
                pipe.scheduler,
            ),
            exits,
        )
    with pytest.raises(InputError, match="compiled as a whole"):
        dyndit.apply_dyndit(torch.compile(pipe.transformer), exits, the_plan())
    compiled = a_transformer()
    compiled.compile(backend="eager")
    with pytest.raises(InputError, match="compiled as a whole"):
        dyndit.apply_dyndit(compiled, exits, the_plan())
    deep = Exits(adapt(a_pipeline().transformer), ExitConfig(head="adaln-linear"))
    deep.config = ExitConfig((2, 4))
    with pytest.raises(InputError, match="exits: one after layer 4, but the transformer has 4 blocks"):
        dyndit.apply_dyndit(pipe, deep, None)
    with pytest.raises(InputError, match="no transformer"):
        dyndit.apply_dyndit(diffusers.DiTPipeline(None, pipe.vae, pipe.scheduler), exits)
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(diffusers.hooks.ModelHook(), "other")
    with pytest.raises(InputError, match="has the hook other"):
        dyndit.apply_dyndit(pipe, exits, the_plan())


def test_blocks_compile_whole_and_once_for_all_depths(pipe) -> None:
    exits = some_exits(pipe.transformer)
    handle = dyndit.apply_dyndit(pipe, exits, the_plan())
    expected = draw(pipe)
    torch._dynamo.reset()
    for block in [*pipe.transformer.transformer_blocks, *exits.heads.values()]:
        block.compile(fullgraph=True, backend="eager")
    compiled = draw(pipe)  # both numbers of rows: one branch's and two
    assert (compiled - expected).abs().max() < 1e-4
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for texts in (["4|4"] * STEPS, ["1|1", "2|1", "3|2", "4|3", "4"], ["2|4"] * STEPS):
            handle.plan = the_plan().with_steps(parsed(*texts))
            draw(pipe)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 900), st.sampled_from([torch.int64, torch.float32, torch.float16, torch.bfloat16]))
def test_every_step_is_found_in_any_precision(num_steps: int, dtype: torch.dtype) -> None:
    """A pipeline visits the steps in turn and hands over their timesteps as it rounds them."""
    timesteps, last = timesteps_of("ddim", num_steps), -1
    for step, t in enumerate(timesteps):
        rounded = torch.tensor(t).to(dtype)
        slack = torch.finfo(dtype).eps * rounded.item() if dtype.is_floating_point else 0.0
        last = find_step(timesteps, rounded.item(), slack + 1e-3, last)
        assert last == step
    assert find_step(timesteps, 1500.0, 1e-3, last) is None


def test_noise_is_that_of_the_sampler() -> None:
    rows = [torch.randn((1, 4, 8, 8), generator=picture_generator(SEED, i)) for i in range(2)]
    assert torch.equal(torch.cat(rows), noise(SEED, (0, 1), (4, 8, 8)))
