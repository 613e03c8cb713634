"""What a pipeline may do to a transformer under the plug-in: the right picture, or one line; never a wrong picture."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from peft import LoraConfig
from torch import Tensor, nn

import dyndit
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.forecasts import Gaps, remembered
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import DynDiTHandle
from dyndit.storage.load import EXITS, save_exits
from support.models import randomise
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline

DIT, SD3, FLUX, LATTE = (
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "LatteTransformer3DModel",
)
SCALE = 4.0


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_exits(transformer: nn.Module) -> Exits:
    exits = Exits(adapt(transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return exits.eval()


def plugged(tiny: TinyPipeline, *texts: str, guided: bool = True, count: int = 1) -> DynDiTHandle:
    """The plug-in with random exits and a plan of these steps at the pipeline's own timesteps."""
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer), cfg_scale=SCALE if guided else 1.0)
    tiny.run(guided=guided, count=count, num_inference_steps=len(texts))
    handle.plan = handle.full_plan().with_steps(steps(*texts))
    return handle


def bound(handle: DynDiTHandle) -> DepthPlan:
    """The handle's plan, bound to its model as it is, and set."""
    identity = handle.model.identity
    handle.plan = replace(handle.plan, backbone=identity.backbone, exits=identity.exits)
    return handle.plan


def refused(run: Callable[[], object], match: str) -> None:
    with pytest.raises(InputError, match=match) as found:
        run()
    assert "\n" not in str(found.value)


# Guidance, looked at in every call.


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("text", ["4", "4|4", "2|1", "3|e1"])
def test_guidance_that_a_callback_of_diffusers_cuts_off_is_refused(count: int, text: str) -> None:
    tiny = tiny_pipeline(SD3)
    plugged(tiny, *[text] * 4, count=count)
    callback = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    refused(
        lambda: tiny.run(count=count, num_inference_steps=4, callback_on_step_end=callback),
        r"rows|unguided",
    )
    assert tiny.run(count=count, num_inference_steps=4).isfinite().all()


@pytest.mark.parametrize("text", ["4", "2"])
def test_guidance_that_begins_in_the_middle_is_refused(text: str) -> None:
    """Under an unguided plan too: its forecasts would meet twice the rows."""
    tiny = tiny_pipeline(SD3)
    plugged(tiny, *[text] * 4, guided=False)

    def begin(pipe: object, index: int, _: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == 1:
            pipe._guidance_scale = SCALE
            tensors = {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items() if name != "latents"}
        return tensors

    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    options = {"callback_on_step_end": begin, "callback_on_step_end_tensor_inputs": names}
    refused(lambda: tiny.run(guided=False, num_inference_steps=4, **options), "2 rows at step 2, 1 before")


def test_two_pictures_from_one_noise_are_not_two_branches() -> None:
    """Unguided under a guided plan, their first call looks guided; the second does not."""
    tiny = tiny_pipeline(SD3)
    plugged(tiny, "4|4", "2|1", "2|1", count=2)
    twins = [torch.Generator().manual_seed(0) for _ in range(2)]
    refused(lambda: tiny.run(guided=False, count=2, generator=twins), "guided sampling, but .* call is unguided")


def test_separate_calls_without_a_second_are_told_from_guided_ones() -> None:
    tiny = tiny_pipeline(FLUX)
    plugged(tiny, "4|4", "3|e1", "2|1")
    refused(lambda: tiny.run(guided=False), "guided sampling, but the pipeline's call is unguided")
    assert tiny.run().isfinite().all()


def test_branches_in_calls_of_their_own_are_refused_where_a_family_stacks_them() -> None:
    """As guiders of modular pipelines call."""
    tiny, calls = tiny_pipeline(SD3), []
    spy = tiny.transformer.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    handle = plugged(tiny, "4|4", "3|1", "2|1", count=2)
    spy.remove()
    args, kwargs = calls[0]
    rows = {name: value[:2] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    rows["hidden_states"] = rows["hidden_states"][:1].repeat(2, 1, 1, 1)
    handle.plan = handle.plan
    tiny.transformer(*args, **rows)  # two pictures from one noise look like both branches
    refused(lambda: tiny.transformer(*args, **rows), "calls once per branch")
    handle.plan = replace(handle.plan, cfg_scale=1.0, steps=steps("4", "3", "2"))
    tiny.transformer(*args, **rows)
    refused(lambda: tiny.transformer(*args, **rows), "unguided sampling, but .* is guided")


def test_a_second_call_is_told_by_the_values_of_its_latents() -> None:
    """A hook that moves inputs makes new tensors of them for every call."""
    tiny = tiny_pipeline(FLUX)
    handle = plugged(tiny, "4|4", "3|e1", "2|1")
    expected, depths = tiny.run(), handle.stats()[["branch", "depth"]].values.tolist()
    forward = tiny.transformer.forward
    tiny.transformer.forward = lambda *a, hidden_states, **k: forward(*a, hidden_states=hidden_states.clone(), **k)
    assert torch.equal(tiny.run(), expected)
    assert handle.stats()[["branch", "depth"]].values.tolist() == depths
    tiny.transformer.forward = forward


def test_rows_of_conditions_are_those_of_latents() -> None:
    tiny, calls = tiny_pipeline(SD3), []
    spy = tiny.transformer.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    plugged(tiny, "4", "2", "2", guided=False, count=2)
    spy.remove()
    args, kwargs = calls[0]
    short = kwargs | {"pooled_projections": kwargs["pooled_projections"][:1]}
    refused(lambda: tiny.transformer(*args, **short), "1 rows of pooled_projections for 2 of latents")


def test_a_third_branch_inside_attention_is_refused() -> None:
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    tiny = tiny_pipeline(SD3)
    plugged(tiny, "4|4", "2|1", "2|1")
    tiny.transformer.transformer_blocks[1].attn.processor = PAGJointAttnProcessor2_0()
    refused(tiny.run, "its attention is PAGJointAttnProcessor2_0, a further branch")


# Weights that change.

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)


def scaled_up(tiny: TinyPipeline) -> None:
    for parameter in tiny.transformer.parameters():
        parameter.mul_(1.05)


def one_weight(tiny: TinyPipeline) -> None:
    tiny.transformer.transformer_blocks[1].attn.to_out[0].weight[3, 5] += 0.5


def through_data(tiny: TinyPipeline) -> None:
    tiny.transformer.transformer_blocks[0].attn.to_q.weight.data += 0.05


def loaded(tiny: TinyPipeline) -> None:
    other = tiny_pipeline(type(tiny.transformer).__name__, seed=1)
    tiny.transformer.load_state_dict(other.transformer.state_dict())


def another_module(tiny: TinyPipeline) -> None:
    block = tiny.transformer.transformer_blocks[1]
    block.ff = randomised(copy.deepcopy(block.ff))


def randomised(module: nn.Module) -> nn.Module:
    randomise(module, 9)
    return module


def lora(tiny: TinyPipeline) -> None:
    tiny.transformer.add_adapter(LORA)


def fused(tiny: TinyPipeline) -> None:
    lora(tiny)
    tiny.transformer.fuse_lora()


def fused_and_unloaded(tiny: TinyPipeline) -> None:
    fused(tiny)
    tiny.transformer.unload_lora()


CHANGES = [scaled_up, one_weight, through_data, loaded, another_module, lora, fused, fused_and_unloaded]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", [SD3, FLUX])
def test_weights_that_changed_are_refused_at_the_next_call(family: str, change: Callable) -> None:
    tiny = tiny_pipeline(family)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    plan, expected = bound(handle), tiny.run()
    change(tiny)
    refused(tiny.run, "plan: made for backbone")
    refused(tiny.run, "plan: made for backbone")
    refused(lambda: setattr(handle, "plan", plan), "plan: made for backbone")
    handle.plan = None
    tiny.run()  # the model itself, whatever it is now
    handle.plan = free = replace(plan, backbone="", exits="")
    assert not torch.equal(tiny.run(), expected), "the change changes nothing"
    assert handle.plan == free


@pytest.mark.parametrize("family", [SD3, FLUX])
def test_weights_that_change_in_the_middle_of_a_call_are_refused(family: str) -> None:
    tiny = tiny_pipeline(family)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    tiny.transformer.add_adapter(LORA)
    plan, expected = bound(handle), tiny.run()

    def rescale(_: object, index: int, *__: object) -> dict:
        if index == 0:
            tiny.transformer.set_adapters("default", 0.5)
        return {}

    refused(lambda: tiny.run(callback_on_step_end=rescale), "plan: made for backbone")
    tiny.transformer.set_adapters("default", 1.0)
    assert torch.equal(tiny.run(), expected)
    assert handle.plan is plan


def test_weights_as_they_were_are_accepted_again() -> None:
    """Written again with the same values, an adapter switched off or unloaded, another precision."""
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    plan, expected = bound(handle), tiny.run()
    tiny.transformer.load_state_dict({name: t.clone() for name, t in tiny.transformer.state_dict().items()})
    assert torch.equal(tiny.run(), expected)
    lora(tiny)
    refused(tiny.run, "made for backbone")
    tiny.transformer.disable_adapters()
    assert torch.equal(tiny.run(), expected)
    tiny.transformer.enable_adapters()
    refused(tiny.run, "made for backbone")
    tiny.transformer.unload_lora()
    assert torch.equal(tiny.run(), expected)
    tiny.pipe.to(torch.bfloat16)
    assert tiny.run().isfinite().all()
    assert handle.plan is plan


def test_an_adapter_is_part_of_what_a_plan_is_made_for() -> None:
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    plain = handle.model.identity.backbone
    lora(tiny)
    plan = bound(handle)
    assert plan.backbone != plain
    expected = tiny.run()
    tiny.transformer.set_adapters("default", 0.5)
    refused(tiny.run, "made for backbone")
    tiny.transformer.set_adapters("default", 1.0)
    assert torch.equal(tiny.run(), expected)
    tiny.transformer.fuse_lora()
    fused_identity = handle.model.identity.backbone
    tiny.transformer.unload_lora()
    assert handle.model.identity.backbone == fused_identity not in (plain, plan.backbone)


def test_exits_from_a_file_stay_bound_to_their_backbone(tmp_path: Path) -> None:
    """Without a bound plan too; and the opt-out holds."""
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    plan = handle.plan
    save_exits(handle.model.exits, tmp_path / EXITS, handle.model.identity.backbone)
    handle.remove()
    handle = dyndit.apply_dyndit(tiny.pipe, tmp_path, plan)
    expected = tiny.run()
    lora(tiny)
    refused(tiny.run, "exits: made for backbone .*check_identity=False")
    tiny.transformer.unload_lora()
    assert torch.equal(tiny.run(), expected)
    handle.remove()
    lora(tiny)
    dyndit.apply_dyndit(tiny.pipe, tmp_path, plan, check_identity=False)
    assert not torch.equal(tiny.run(), expected)


def test_exits_that_change_are_refused_too() -> None:
    tiny = tiny_pipeline(SD3)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    bound(handle)
    tiny.run()
    randomise(handle.model.exits, 8)
    refused(tiny.run, "made for exits")


# Other hooks.


def caches() -> list[object]:
    now = {"current_timestep_callback": lambda: 500}
    return [
        diffusers.FirstBlockCacheConfig(threshold=0.1),
        diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **now),
        diffusers.FasterCacheConfig(spatial_attention_block_skip_range=2, **now),
        diffusers.TaylorSeerCacheConfig(),
    ]


@pytest.mark.parametrize(
    ("family", "config"),
    # diffusers has no first-block cache for Latte's blocks.
    [(FLUX, config) for config in caches()] + [(LATTE, config) for config in caches()[1:]],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_cache_put_on_later_is_refused(family: str, config: object) -> None:
    tiny = tiny_pipeline(family)
    plugged(tiny, "4|4", "3|1", "2|1")
    expected = tiny.run()
    tiny.transformer.enable_cache(config)
    refused(tiny.run, "has the cache .* beside the plug-in; expected one of them")
    tiny.transformer.disable_cache()
    assert torch.equal(tiny.run(), expected)


def test_a_cache_on_blocks_alone_is_refused() -> None:
    tiny = tiny_pipeline(SD3)
    plugged(tiny, "4|4", "3|1", "2|1")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.apply_pyramid_attention_broadcast(tiny.transformer, config)
    refused(tiny.run, "has the cache pyramid_attention_broadcast beside")


# Other sizes, classes, solvers.


@pytest.mark.parametrize("side", [4, 8, 16])
def test_a_dit_at_another_size_answers_as_without_the_plug_in(side: int) -> None:
    tiny = tiny_pipeline(DIT)
    call = {"timestep": torch.tensor([500] * 2), "class_labels": torch.tensor([3, 1000]), "return_dict": False}
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    expected = tiny.transformer(x, **call)[0]
    handle = dyndit.apply_dyndit(tiny.transformer, random_exits(tiny.transformer))
    assert torch.equal(tiny.transformer(x, **call)[0], expected)
    handle.plan = DepthPlan((500,), steps("2|1"), 4, "", cfg_scale=SCALE)
    found = tiny.transformer(x, **call)[0]
    assert found.shape == expected.shape
    assert not torch.allclose(found, expected, atol=1e-2)
    refused(
        lambda: tiny.transformer(x[:, :, : side // 2], **call), f"latents of {side // 2} x {side}; expected a square"
    )


def test_a_pipeline_of_ten_classes_is_served() -> None:
    """`DiTPipeline` passes 1000 for no class, whatever the model; without the plug-in that is an IndexError."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    randomise(model, 0)
    tiny = tiny_pipeline(DIT)
    pipe = diffusers.DiTPipeline(model.eval(), tiny.pipe.vae, tiny.pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def draw(scale: float = SCALE, labels: tuple[int, ...] = (3, 7)) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
        options = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": scale}
        return pipe(list(labels), generator=generators, **options).images

    with pytest.raises(IndexError):
        draw()
    unguided = draw(1.0)
    handle = dyndit.apply_dyndit(pipe, random_exits(model), cfg_scale=SCALE)
    full = draw()
    assert torch.equal(draw(1.0), unguided)
    assert not torch.equal(full, unguided)
    draw()
    handle.plan = handle.full_plan()
    assert torch.equal(draw(), full)
    handle.plan = handle.plan.with_steps(steps("4|4", "2|1", "3"))
    assert not torch.equal(draw(), full)
    assert handle.stats()["depth"].tolist() == [4, 4, 2, 1, 3, 0]


def test_heun_evaluates_a_step_twice_and_stats_keep_both() -> None:
    tiny = tiny_pipeline(SD3)
    tiny.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    expected = tiny.run(num_inference_steps=4)
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny.transformer), cfg_scale=SCALE)
    assert torch.equal(tiny.run(num_inference_steps=4), expected)
    full = handle.full_plan()
    assert full.num_steps == 4
    handle.plan = full
    for _ in range(2):
        assert torch.equal(tiny.run(num_inference_steps=4), expected)
        assert handle.stats().query("branch == 'cond'")["step"].tolist() == [0, 1, 1, 2, 2, 3, 3]
    handle.plan = full.with_steps(steps("4|4", "4|4", "2+|held", "1+"))
    assert tiny.run(num_inference_steps=4).isfinite().all()
    stats = handle.stats()
    assert stats.query("branch == 'cond'")["depth"].tolist() == [4, 4, 4, 2, 2, 1, 1]
    assert stats.query("branch == 'uncond'")["depth"].tolist() == [4, 4, 4, 0, 0, 0, 0]


def test_a_step_evaluated_again_replaces_what_it_left() -> None:
    first, again, other = (torch.full((1,), float(value)) for value in range(3))
    gaps = remembered(remembered((), 9.0, {1: other}), 5.0, {1: first})
    assert remembered(gaps, 5.0, {1: again}) == (Gaps(9.0, {1: other}), Gaps(5.0, {1: again}))


# Copies, files, and on and off.


def state(transformer: nn.Module) -> tuple[dict[str, bytes], list[tuple]]:
    """Weights byte by byte, and everything that hooks show in. A registry of no hooks is what a call leaves anyway."""
    hooks = [
        (
            *(len(m._forward_hooks), len(m._forward_pre_hooks), m.training),
            *("forward" in vars(m), "_hf_hook" in vars(m)),
            list(vars(m)["_diffusers_hook"].hooks) if "_diffusers_hook" in vars(m) else [],
        )
        for m in transformer.modules()
    ]
    return {name: value.numpy().tobytes() for name, value in transformer.state_dict().items()}, hooks


@pytest.mark.parametrize("family", sorted(TINY_PIPELINES))
def test_on_and_off_a_hundred_times(family: str) -> None:
    tiny = tiny_pipeline(family)
    plain, before, exits = tiny.run(), state(tiny.transformer), random_exits(tiny.transformer)
    for number in range(100):
        handle = dyndit.apply_dyndit(tiny.pipe, exits, cfg_scale=SCALE)
        if number % 25 == 0:
            assert torch.equal(tiny.run(), plain)
        handle.remove()
        assert state(tiny.transformer) == before
    assert torch.equal(tiny.run(), plain)


@pytest.mark.parametrize("family", sorted(TINY_PIPELINES))
def test_a_copy_never_runs_the_original_s_weights(family: str) -> None:
    tiny = tiny_pipeline(family)
    plain, before = tiny.run(), state(tiny.transformer)
    handle = plugged(tiny, "4|4", "3|1", "2|1")
    planned, plan = tiny.run(), handle.plan
    original, twin = tiny.transformer, copy.deepcopy(tiny.transformer)
    tiny.pipe.transformer = twin
    refused(tiny.run, r"a copy of one that has the plug-in.*remove_dyndit\(copy\)")
    dyndit.remove_dyndit(twin)
    assert state(twin) == before
    assert torch.equal(tiny.run(), plain)
    for parameter in twin.parameters():
        parameter.mul_(1.1)
    assert not torch.equal(tiny.run(), plain), "the copy runs its own weights"
    tiny.pipe.transformer = original
    assert torch.equal(tiny.run(), planned)
    assert handle.plan is plan


@pytest.mark.parametrize("family", sorted(TINY_PIPELINES))
def test_a_transformer_is_saved_as_without_the_plug_in(family: str, tmp_path: Path) -> None:
    tiny = tiny_pipeline(family)
    tiny.transformer.save_pretrained(tmp_path / "before")
    plugged(tiny, "4|4", "3|1", "2|1")
    planned = tiny.run()
    tiny.transformer.save_pretrained(tmp_path / "plugged")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "plugged").iterdir())
    assert all((tmp_path / "before" / n).read_bytes() == (tmp_path / "plugged" / n).read_bytes() for n in files)
    assert torch.equal(tiny.run(), planned)


@pytest.mark.parametrize("family", [SD3, FLUX])
def test_two_pipelines_share_one_transformer(family: str) -> None:
    one, two = tiny_pipeline(family), tiny_pipeline(family)
    two.pipe.transformer = one.transformer
    before = state(one.transformer)
    plain = [tiny.run(seed=seed) for seed, tiny in enumerate((one, two))]
    handle = plugged(one, "4|4", "2+|held", "2|1")
    expected = one.run(seed=0)
    # The other pipeline, with its own scheduler at the same timesteps, runs the plan too, before and after.
    beside = two.run(seed=1)
    assert torch.equal(one.run(seed=0), expected)
    assert torch.equal(two.run(seed=1), beside)
    assert not torch.equal(beside, plain[1])
    dyndit.remove_dyndit(two.pipe)
    assert state(one.transformer) == before
    assert [torch.equal(tiny.run(seed=seed), plain[seed]) for seed, tiny in enumerate((one, two))] == [True, True]
    assert handle.plan is not None
