"""What every adapter must do, on a tiny instance of the real class inside its own pipeline class.

Adapters are found by themselves: a new file in dyndit/adapters is tested once it has a tiny pipeline.
"""

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dyndit
from dyndit.errors import InputError
from dyndit.models.base import Inputs, State
from dyndit.models.conditions import Conditioning
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS, ExitConfig, Exits
from dyndit.plans.step import steps
from dyndit.plugin.adapters import Adapter, adapt, adapters, collect_exits
from support.models import randomise
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline, whole

FAMILIES = sorted(adapters())
OBLONG = (
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "LatteTransformer3DModel",
    "SanaTransformer2DModel",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
)

STRANGERS = {
    "SD3Transformer2DModel": {"joint_attention_kwargs", "skip_layers"},
    "FluxTransformer2DModel": {"controlnet_blocks_repeat", "joint_attention_kwargs"},
    "SanaTransformer2DModel": {"attention_kwargs"},
    "Lumina2Transformer2DModel": {"attention_kwargs"},
    "QwenImageTransformer2DModel": {"attention_kwargs", "guidance"},
    "Flux2Transformer2DModel": {"joint_attention_kwargs", "kv_cache", "kv_cache_mode"},
    "ZImageTransformer2DModel": {"joint_attention_kwargs", "siglip_feats", "image_noise_mask"},
    "WanTransformer3DModel": {"attention_kwargs"},
    "WanVACETransformer3DModel": {"attention_kwargs"},
    "CogVideoXTransformer3DModel": {"attention_kwargs", "timestep_cond"},
    "HunyuanVideo15Transformer3DModel": {"attention_kwargs"},
    "LTX2VideoTransformer3DModel": {
        "attention_kwargs",
        "isolate_modalities",
        "perturbation_mask",
        "spatio_temporal_guidance_blocks",
    },
}
"""Arguments whose silent loss would be worst: adapters may never come to know them by accident."""


@dataclass(frozen=True)
class Call:
    """What a pipeline passed to its transformer."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def of(self, transformer: nn.Module) -> Tensor:
        """The transformer's own prediction for it."""
        output = transformer(*self.args, **self.kwargs | {"return_dict": False})
        return whole(output)

    @classmethod
    def of_names(cls, transformer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> "Call":
        """The call with every argument by its name."""
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        return cls((), dict(zip(names, args, strict=False)) | kwargs)


def captured(tiny: TinyPipeline, **changes: object) -> list[Call]:
    """Every call that one run of the pipeline makes; the transformer is left as it was."""
    calls: list[Call] = []
    spy = tiny.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(Call.of_names(module, args, kwargs)), with_kwargs=True
    )
    try:
        tiny.run(**changes)
    finally:
        spy.remove()
    return calls


def both_branches(tiny: TinyPipeline) -> tuple[Inputs, Inputs]:
    """The branches of one guided step, two pictures each: (first as the pipeline calls, second)."""
    adapter, calls = adapt(tiny.transformer), captured(tiny, guided=True, count=2)
    inputs = [adapter.read(*call.args, **call.kwargs) for call in calls[:2]]
    if adapter.guidance == "calls":
        assert inputs[0].x is inputs[1].x
        return inputs[0], inputs[1]
    return inputs[0].rows(0, 2), inputs[0].rows(2, None)


def with_exits(transformer: nn.Module, head: str = "adaln-linear") -> DynamicDepth:
    """The adapter with random exits after every block."""
    adapter = adapt(transformer)
    exits = Exits(adapter, ExitConfig(head=head))
    randomise(exits, seed=3)
    return DynamicDepth(adapter, exits).eval()


def snapshot(transformer: nn.Module) -> tuple[dict[str, bytes], list[int], list[object]]:
    """Weights byte by byte, the very modules, and everything that hooks would show in."""
    weights = {name: value.numpy().tobytes() for name, value in transformer.state_dict().items()}
    names = ("forward", "_diffusers_hook", "_hf_hook")
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, [name in vars(m) for name in names])
        for m in transformer.modules()
    ]
    return weights, [id(m) for m in transformer.modules()], hooks


def blocks_of(transformer: nn.Module) -> Iterator[nn.Module]:
    """Every block of every kind."""
    for child in transformer.children():
        if isinstance(child, nn.ModuleList):
            yield from child


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("distil" in request.node.name):
        yield


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyPipeline:
    """A tiny pipeline per adapter."""
    return tiny_pipeline(request.param)


def test_families_are_found() -> None:
    assert set(TINY_PIPELINES) <= set(FAMILIES)
    for serves, adapter in adapters().items():
        assert adapter.family == serves
        assert issubclass(adapter, Adapter)


def test_the_pipelines_depend_on_what_they_are_given(tiny: TinyPipeline) -> None:
    """Otherwise nothing below proves anything."""
    picture = tiny.run()
    assert picture.isfinite().all()
    assert torch.equal(picture, tiny.run())
    for changes in ({"seed": 1}, {"guided": False}):
        assert (picture - tiny.run(**changes)).abs().max() > 0.05 * picture.std()


@pytest.mark.parametrize(("guided", "count"), [(False, 1), (False, 3), (True, 1), (True, 3)])
def test_full_depth_is_the_untouched_model_bit_for_bit(tiny: TinyPipeline, guided: bool, count: int) -> None:
    calls = captured(tiny, guided=guided, count=count)
    expected = [call.of(tiny.transformer) for call in calls]
    model = DynamicDepth(adapt(tiny.transformer))
    stacked = guided and model.backbone.guidance != "calls"
    for call, prediction in zip(calls, expected, strict=True):
        inputs = model.backbone.read(*call.args, **call.kwargs)
        assert len(inputs) == len(prediction) == count * (2 if stacked else 1)
        assert torch.equal(model.run([inputs], [model.num_blocks])[0], prediction)
        assert torch.equal(model.backbone(inputs.x, inputs.t, inputs.y), prediction)
    assert prediction.std() > 0.1
    assert len(calls) == tiny.num_steps * (2 if guided and not stacked else 1)
    assert not torch.allclose(expected[0], expected[-1], atol=1e-3)


def test_half_precision_is_the_untouched_model_too(tiny: TinyPipeline) -> None:
    def half(value: object) -> object:
        if isinstance(value, dict):
            return {name: half(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [half(entry) for entry in value]
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    call = captured(tiny, count=2)[0]
    call = Call(tuple(map(half, call.args)), half(call.kwargs))
    tiny.transformer.to(torch.bfloat16)
    predictions = collect_exits(tiny.transformer, None, *call.args, **call.kwargs)
    assert torch.equal(predictions[max(predictions)], call.of(tiny.transformer))
    assert {p.dtype for p in predictions.values()} == {torch.bfloat16}


def test_adapt_changes_nothing(tiny: TinyPipeline) -> None:
    call = captured(tiny)[0]
    before = snapshot(tiny.transformer)
    adapter = adapt(tiny.transformer)
    assert adapter.transformer is tiny.transformer
    collect_exits(tiny.transformer, None, *call.args, **call.kwargs)
    assert snapshot(tiny.transformer) == before
    ours, theirs = (
        {p.data_ptr() for p in m.parameters()}
        for m in (Exits(adapter, ExitConfig(head="adaln-linear")), tiny.transformer)
    )
    assert not ours & theirs


def test_output_has_the_shape_that_the_forward_returns(tiny: TinyPipeline) -> None:
    call, adapter = captured(tiny)[0], adapt(tiny.transformer)
    prediction, inputs = call.of(tiny.transformer), adapter.read(*call.args, **call.kwargs)
    theirs = tiny.transformer(*call.args, **call.kwargs | {"return_dict": True})
    ours = adapter.output(prediction, inputs, return_dict=True)
    assert type(ours).__name__ == type(theirs).__name__
    assert type(ours[0]) is type(theirs[0])
    for found in (ours.to_tuple(), adapter.output(prediction, inputs, return_dict=False)):
        assert torch.equal(whole(found), whole(theirs.to_tuple()))


def test_an_adapter_knows_its_sizes(tiny: TinyPipeline) -> None:
    call, adapter = captured(tiny)[0], adapt(tiny.transformer)
    inputs = adapter.read(*call.args, **call.kwargs)
    state = adapter.embed(inputs.x, inputs.t, inputs.y)
    assert adapter.num_blocks == 4
    assert state.tokens.shape[::2] == (len(inputs), adapter.width)
    assert state.cond.shape == (len(inputs), adapter.cond_width)
    channels = -1 if inputs.x.ndim == 3 else tiny.channels
    assert inputs.x.shape[channels] == adapter.in_channels
    assert call.of(tiny.transformer).shape[channels] == adapter.out_channels


def test_the_block_modules_are_the_transformers_in_the_order_they_run(tiny: TinyPipeline) -> None:
    adapter, call, ran = adapt(tiny.transformer), captured(tiny)[0], []
    modules = adapter.block_modules()
    every = list(blocks_of(tiny.transformer))
    assert {id(m) for m in modules} <= {id(m) for m in every}
    for module in every:
        module.register_forward_pre_hook(lambda module, _: ran.append(id(module)))
    call.of(tiny.transformer)
    refiners, blocks = ran[: -len(modules)], ran[-len(modules) :]  # refiners of text or latents belong to `embed`
    assert blocks == [id(m) for m in modules]
    assert set(refiners) == {id(m) for m in every} - set(blocks)


WAYS = {
    "a prompt without a mask": ("PixArtTransformer2DModel", {}, {"encoder_attention_mask": None}),
    "a prompt's mask as a bias": (
        "PixArtTransformer2DModel",
        {},
        {"encoder_attention_mask": -1e4 * (torch.arange(8) > torch.tensor([[2], [5]])).float()[:, None]},
    ),
    "a mask on tokens": (
        "PixArtTransformer2DModel",
        {},
        {"attention_mask": (torch.arange(24) < torch.tensor([[20], [7]])).long()},
    ),
    "no sizes": ("PixArtTransformer2DModel", {"use_additional_conditions": False}, {"added_cond_kwargs": None}),
    "text as wide as the backbone": (
        "PixArtTransformer2DModel",
        {"caption_channels": None},
        {"encoder_hidden_states": torch.linspace(-1, 1, 2 * 8 * 24).reshape(2, 8, 24)},
    ),
    "no dual attention": ("SD3Transformer2DModel", {"dual_attention_layers": (), "qk_norm": None}, {}),
    "no embedded guidance": ("FluxTransformer2DModel", {"guidance_embeds": False}, {"guidance": None}),
    "positions with a batch": (
        "FluxTransformer2DModel",
        {},
        {"txt_ids": torch.zeros(1, 8, 3), "img_ids": torch.arange(24.0)[None, :, None].expand(1, 24, 3)},
    ),
    "single blocks alone": ("FluxTransformer2DModel", {"num_layers": 0, "num_single_layers": 4}, {}),
    "guidance as an input of Sana": (
        "SanaTransformer2DModel",
        {"guidance_embeds": True},
        {"guidance": torch.tensor([0.4, 0.9])},
    ),
    "Sana's text without a mask": ("SanaTransformer2DModel", {}, {"encoder_attention_mask": None}),
    "Sana of another time scale": ("SanaTransformer2DModel", {"timestep_scale": 0.001}, {}),
    "Lumina's texts of one length": (
        "Lumina2Transformer2DModel",
        {},
        {"encoder_attention_mask": (torch.arange(16) < 7).long().expand(2, 16)},
    ),
    "Qwen's words masked in the middle": (
        "QwenImageTransformer2DModel",
        {},
        {
            "encoder_hidden_states": torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32),
            "encoder_hidden_states_mask": (torch.arange(8) % 3 > 0).long().expand(2, 8),
        },
    ),
    "Qwen's clean references": ("QwenImageTransformer2DModel", {"zero_cond_t": True}, {}),
    "guidance as an input of FLUX.2": (
        "Flux2Transformer2DModel",
        {"guidance_embeds": True},
        {"guidance": torch.tensor([1.0, 4.0])},
    ),
    "FLUX.2's double blocks alone": ("Flux2Transformer2DModel", {"num_layers": 4, "num_single_layers": 0}, {}),
    "FLUX.2's single blocks alone": ("Flux2Transformer2DModel", {"num_layers": 0, "num_single_layers": 4}, {}),
    "Z-Image's frames": (
        "ZImageTransformer2DModel",
        {},
        {"x": list(torch.linspace(-1, 1, 2 * 4 * 2 * 8 * 8).sin().reshape(2, 4, 2, 8, 8))},
    ),
    "frames apart": ("LatteTransformer3DModel", {}, {"enable_temporal_attentions": False}),
    "positions in the tokens": (
        "CogVideoXTransformer3DModel",
        {"use_rotary_positional_embeddings": False},
        {"image_rotary_emb": None},
    ),
    "learned positions": ("CogVideoXTransformer3DModel", {"use_learned_positional_embeddings": True}, {}),
    "no norm across attention": ("WanTransformer3DModel", {"cross_attn_norm": False}, {}),
    "patches of two frames": (
        "WanTransformer3DModel",
        {"patch_size": (2, 2, 2)},
        {"hidden_states": torch.linspace(-1, 1, 2 * 4 * 4 * 8 * 8).sin().reshape(2, 4, 4, 8, 8)},
    ),
    "control at full strength": ("WanVACETransformer3DModel", {}, {"control_hidden_states_scale": None}),
    "volumes of two frames": (
        "HunyuanVideo15Transformer3DModel",
        {"patch_size_t": 2},
        {"hidden_states": torch.linspace(-1, 1, 2 * 9 * 4 * 8 * 8).sin().reshape(2, 9, 4, 8, 8)},
    ),
    "positions of its own": (
        "LTX2VideoTransformer3DModel",
        {},
        {"fps": 24.0, "video_coords": None, "audio_coords": None},
    ),
    "interleaved positions": ("LTX2VideoTransformer3DModel", {"rope_type": "interleaved"}, {}),
    "text from the connectors": (
        "LTX2VideoTransformer3DModel",
        {"use_prompt_embeddings": False},
        {
            "encoder_hidden_states": torch.linspace(-1, 1, 2 * 8 * 24).sin().reshape(2, 8, 24),
            "audio_encoder_hidden_states": torch.linspace(-1, 1, 2 * 8 * 16).cos().reshape(2, 8, 16),
        },
    ),
    "an older clock across streams": (
        "LTX2VideoTransformer3DModel",
        {},
        {"use_cross_timestep": False, "audio_timestep": torch.full((2,), 300.0)},
    ),
    "attention within the video masked": (
        "LTX2VideoTransformer3DModel",
        {},
        {"video_self_attention_mask": (torch.arange(288) < 200).float()[None, None].expand(2, 288, 288)},
    ),
    "one frame": (
        "LatteTransformer3DModel",
        {},
        {"hidden_states": torch.linspace(-1, 1, 2 * 4 * 8 * 8).sin().reshape(2, 4, 1, 8, 8)},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_build_and_to_call_a_family(way: str) -> None:
    serves, config, arguments = WAYS[way]
    tiny = tiny_pipeline(serves)
    call = captured(tiny, guided=False, count=2)[0]
    usual = call.kwargs
    transformer = tiny.transformer
    if config:
        transformer = randomised(type(transformer).from_config(transformer.config, **config))
    call = Call((), usual | arguments)
    predictions = collect_exits(transformer, None, **call.kwargs)
    expected = call.of(transformer)
    assert expected.std() > 0.1
    assert torch.equal(predictions[4], expected)
    if not config:
        before = Call((), usual).of(transformer)
        assert before.shape != expected.shape or not torch.allclose(before, expected, atol=1e-3)


def randomised(module: nn.Module) -> nn.Module:
    randomise(module, seed=0)
    return module.eval()


@pytest.mark.parametrize("serves", OBLONG)
def test_pictures_need_not_be_square(serves: str) -> None:
    tiny = tiny_pipeline(serves)
    call = captured(tiny)[0]
    predictions = collect_exits(tiny.transformer, None, *call.args, **call.kwargs)
    expected = call.of(tiny.transformer)
    assert expected.shape[-2:] == (8, 12)
    assert torch.equal(predictions.pop(4), expected)
    assert {p.shape for p in predictions.values()} == {expected.shape}


def test_rows_do_not_depend_on_their_batch_mates(tiny: TinyPipeline) -> None:
    model = with_exits(tiny.transformer)
    whole, others = (
        model.backbone.read(*call.args, **call.kwargs)
        for call in (captured(tiny, guided=False, count=3)[0], captured(tiny, guided=False, count=3, seed=50)[1])
    )
    mixed = Inputs.joined([whole.rows(0, 1), others.rows(1, 3)])
    for depth in model.depths:
        expected = model.run([whole], [depth])[0]
        tolerance = {"atol": 2e-5 * expected.std().item(), "rtol": 1e-5}
        first, *rest = model.run([mixed], [depth])[0].split(1)
        torch.testing.assert_close(first, expected[:1], **tolerance)
        assert not torch.allclose(torch.cat(rest), expected[1:], atol=0.01 * expected.std().item())
        for row in range(3):
            alone = model.run([whole.rows(row, row + 1)], [depth])[0]
            torch.testing.assert_close(alone, expected[row : row + 1], **tolerance)


def test_branches_of_any_two_depths_equal_separate_calls(tiny: TinyPipeline) -> None:
    model, branches = with_exits(tiny.transformer), both_branches(tiny)
    alone = {depth: [model.run([branch], [depth])[0] for branch in branches] for depth in model.depths}
    for depths in itertools.product(model.depths, repeat=2):
        together = model.run(branches, depths)
        for which, (found, depth) in enumerate(zip(together, depths, strict=True)):
            expected = alone[depth][which]
            torch.testing.assert_close(found, expected, atol=2e-5 * expected.std().item(), rtol=1e-5)
    first, second = alone[4]
    assert (first - second).abs().max() > 0.01 * first.std()  # the prompt matters
    assert torch.pdist(torch.stack([alone[depth][0] for depth in model.depths]).flatten(1)).min() > 0.1


def test_collect_exits_runs_what_the_exits_are(tiny: TinyPipeline) -> None:
    model, call = with_exits(tiny.transformer), captured(tiny, count=2)[0]
    inputs = model.backbone.read(*call.args, **call.kwargs)
    predictions = collect_exits(tiny.transformer, model.exits, *call.args, **call.kwargs)
    assert tuple(predictions) == model.depths == (1, 2, 3, 4)
    for depth, prediction in predictions.items():
        assert torch.equal(prediction, model.run([inputs], [depth])[0])
    two = collect_exits(tiny.transformer, ExitConfig(layers=(2,)), *call.args, **call.kwargs)
    assert tuple(two) == (2, 4)
    fresh = collect_exits(tiny.transformer, None, *call.args, **call.kwargs)
    assert tuple(fresh) == (1, 2, 3, 4)
    assert torch.equal(fresh[2], two[2])
    assert not torch.allclose(fresh[2], predictions[2], atol=1e-2)
    with torch.enable_grad():
        graded = collect_exits(tiny.transformer, model.exits, *call.args, **call.kwargs)
    assert graded[1].requires_grad
    assert not predictions[1].requires_grad


@pytest.mark.parametrize("head", HEADS)
def test_a_new_exit_on_the_final_state_predicts_as_the_model(tiny: TinyPipeline, head: str) -> None:
    call, adapter = captured(tiny, count=2)[0], adapt(tiny.transformer)
    exits = Exits(adapter, ExitConfig(head=head))
    assert all(p.requires_grad for p in exits.parameters())
    state = final_state(adapter, adapter.read(*call.args, **call.kwargs))
    expected = call.of(tiny.transformer)
    for depth in exits.layers:
        found = adapter.unpatchify(exits.patches(state, depth), state)
        torch.testing.assert_close(found, expected, atol=1e-6 * expected.std().item(), rtol=1e-6)
    randomise(exits, seed=1)
    assert not torch.allclose(adapter.unpatchify(exits.patches(state, 1), state), expected, atol=1e-2)


def final_state(adapter: Adapter, inputs: Inputs) -> State:
    state = adapter.embed(inputs.x, inputs.t, inputs.y)
    for index in range(adapter.num_blocks):
        state = adapter.block(index, state)
    return state


def test_exits_distil(tiny: TinyPipeline) -> None:
    adapter = adapt(tiny.transformer)
    tiny.transformer.requires_grad_(False)
    exits = Exits(adapter, ExitConfig(head="adaln-linear"))

    def lessons(seeds: range) -> list[tuple[dict[int, State], Tensor]]:
        found = []
        for call in itertools.chain.from_iterable(captured(tiny, count=3, seed=3 * seed) for seed in seeds):
            inputs, states = adapter.read(*call.args, **call.kwargs), {}
            state = adapter.embed(inputs.x, inputs.t, inputs.y)
            for index in range(adapter.num_blocks):
                state = states[index + 1] = adapter.block(index, state)
            found.append((states, adapter.head(state)))
        return found

    def error(depth: int, lesson: tuple[dict[int, State], Tensor]) -> Tensor:
        state, target = lesson[0][depth], lesson[1]
        prediction = adapter.unpatchify(exits.patches(state, depth), state)
        return (prediction - target).square().mean() / target.var()

    def errors() -> dict[int, float]:
        with torch.no_grad():
            return {d: sum(error(d, lesson).item() for lesson in fresh) / len(fresh) for d in exits.layers}

    taught, fresh = lessons(range(6)), lessons(range(6, 8))
    before = errors()
    assert min(before.values()) > 0.02  # of the target's variance
    steps = 240
    optimiser = torch.optim.AdamW(exits.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        optimiser.zero_grad()
        sum(error(depth, taught[step % len(taught)]) for depth in exits.layers).backward()
        optimiser.step()
        schedule.step()
    after = errors()
    assert all(after[depth] <= 0.5 * before[depth] for depth in exits.layers), (before, after)


def test_unknown_arguments_are_refused_in_one_line(tiny: TinyPipeline) -> None:
    call, adapter = captured(tiny)[0], adapt(tiny.transformer)
    timestep = adapter.timestep_argument
    known = ("self", *adapter.latents_arguments, timestep, "return_dict")
    known = (*known, *adapter.row_arguments, *adapter.shared_arguments)
    strangers = {name: p.default for name, p in adapter._signature.parameters.items() if name not in known}
    assert set(STRANGERS.get(adapter.family, {})) <= set(strangers)
    assert strangers
    for name, default in strangers.items():
        for silent in (default, None, {}):
            adapter.read(*call.args, **call.kwargs | {name: silent})
        loud = True if default is False else {"scale": 0.5}
        with pytest.raises(InputError, match=f"^{adapter.family}: called with {name}, which cannot be .* exits$"):
            adapter.read(*call.args, **call.kwargs | {name: loud})
        with pytest.raises(InputError, match=name):
            collect_exits(tiny.transformer, None, *call.args, **call.kwargs | {name: loud})
    with pytest.raises(InputError, match=f"^{adapter.family}: .*'no_such_argument'$"):
        adapter.read(*call.args, **call.kwargs, no_such_argument=1)
    with pytest.raises(InputError, match=f"^{adapter.family}: called without {timestep}"):
        adapter.read(*call.args, **call.kwargs | {timestep: None})


@pytest.mark.parametrize("transformer", [nn.Linear(2, 2), nn.Identity()])
def test_a_transformer_without_an_adapter_is_refused(transformer: nn.Module) -> None:
    expected = ", ".join(FAMILIES)
    with pytest.raises(InputError, match=f"^transformer {type(transformer).__name__}: expected one of {expected}$"):
        adapt(transformer)
    with pytest.raises(InputError, match=type(transformer).__name__):
        collect_exits(transformer, None, torch.ones(1))


def test_a_subclass_is_served(tiny: TinyPipeline) -> None:
    kind = type(tiny.transformer)
    tiny.transformer.__class__ = type("Mine", (kind,), {})
    assert adapt(tiny.transformer).family == kind.__name__


def test_identity_tells_weights_and_architecture(tiny: TinyPipeline) -> None:
    first = adapt(tiny.transformer).identity()
    assert adapt(tiny_pipeline(type(tiny.transformer).__name__).transformer).identity() == first
    assert adapt(tiny_pipeline(type(tiny.transformer).__name__, seed=1).transformer).identity() != first
    heads = {"num_attention_heads": 3, "attention_head_dim": 8}  # no tensor shows them
    tiny.transformer.register_to_config(**heads)
    assert adapt(tiny.transformer).identity() != first


def test_unguided_calls_are_told_from_guided_ones(tiny: TinyPipeline) -> None:
    adapter = adapt(tiny.transformer)

    def told(**changes: object) -> bool | None:
        call = captured(tiny, **changes)[0]
        return adapter.is_guided(adapter.read(*call.args, **call.kwargs))

    unguided = [told(guided=False, count=count) for count in (1, 2, 3)]
    assert unguided == [None if adapter.guidance == "calls" else False] * 3
    # DiT's labels tell; of the others the latents are merely equal, as two pictures of one seed have them.
    twins = {"generator": [torch.Generator().manual_seed(0) for _ in range(2)]}
    assert not told(guided=False, count=2, **twins)
    assert told(guided=True, count=2) is not False


def test_rows_reach_every_argument(tiny: TinyPipeline) -> None:
    adapter, call = adapt(tiny.transformer), captured(tiny, count=3)[0]
    inputs = adapter.read(*call.args, **call.kwargs)
    if isinstance(inputs.y, Conditioning):
        assert all(len(value) == len(inputs) for value in inputs.y.rows.values())
        assert not any(isinstance(value, Tensor) and value.ndim > 2 for value in inputs.y.shared.values())
    for index, state in enumerate([adapter.embed(inputs.x, inputs.t, inputs.y)] * 2):
        state = adapter.block(0, state) if index else state
        tensors = {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}
        assert {len(value) for value in tensors.values()} == {len(inputs)}
        assert all(len(getattr(state.rows(1, 2), name)) == 1 for name in tensors)


def test_compiled_blocks_serve_every_depth_without_new_graphs(tiny: TinyPipeline) -> None:
    torch._dynamo.reset()
    model, branches = with_exits(tiny.transformer), both_branches(tiny)
    expected = {depths: model.run(branches, depths) for depths in itertools.product(model.depths, repeat=2)}
    for block in model.backbone.block_modules():
        block.compile(fullgraph=True, backend="eager")
    counters.clear()
    model.run(branches, (4, 4))  # both batch sizes that guided plans have
    model.run(branches[:1], (4,))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for depths, predictions in expected.items():
            for found, prediction in zip(model.run(branches, depths), predictions, strict=True):
                torch.testing.assert_close(found, prediction, atol=2e-5 * prediction.std().item(), rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_a_plan_runs_inside_the_familys_own_pipeline(tiny: TinyPipeline) -> None:
    before, expected = snapshot(tiny.transformer), tiny.run(count=2)
    model = with_exits(tiny.transformer)
    handle = dyndit.apply_dyndit(tiny.pipe, model.exits, None, cfg_scale=4.0)
    assert torch.equal(tiny.run(count=2), expected)

    full = handle.full_plan()
    assert (full.num_steps, full.guided, full.num_blocks) == (tiny.num_steps, True, 4)
    assert full.timesteps == pytest.approx(tiny.pipe.scheduler.timesteps.tolist(), rel=1e-6)
    handle.plan = full
    assert torch.equal(tiny.run(count=2), expected)
    assert depths_run(handle) == (full.depths, full.uncond_depths)

    shallow = full.with_steps(steps("1|1", "3", "4|2"))
    handle.plan = shallow
    picture = tiny.run(count=2)
    assert depths_run(handle) == (shallow.depths, shallow.uncond_depths)
    assert picture.isfinite().all()
    assert (picture - expected).abs().max() > 0.05 * expected.std()
    assert torch.equal(tiny.run(count=2), picture)  # nothing is left over from one call to the next
    handle.plan = full
    assert torch.equal(tiny.run(count=2), expected)

    dyndit.remove_dyndit(tiny.pipe)
    assert snapshot(tiny.transformer) == before
    assert torch.equal(tiny.run(count=2), expected)


def test_a_plan_without_unconditional_passes_is_the_unguided_call(tiny: TinyPipeline) -> None:
    """So the rows taken for conditional are the conditional ones."""
    expected = tiny.run(guided=False, count=2)
    handle = dyndit.apply_dyndit(tiny.pipe, None, None, cfg_scale=4.0)
    guided = tiny.run(count=2)
    handle.plan = handle.full_plan().with_steps(steps("4") * tiny.num_steps)
    torch.testing.assert_close(tiny.run(count=2), expected, atol=1e-4 * expected.std().item(), rtol=1e-4)
    assert (guided - expected).abs().max() > 0.05 * expected.std()


def test_an_unguided_plan_runs_inside_the_familys_own_pipeline(tiny: TinyPipeline) -> None:
    expected = tiny.run(guided=False, count=2)
    handle = dyndit.apply_dyndit(tiny.pipe, with_exits(tiny.transformer).exits, None)
    assert torch.equal(tiny.run(guided=False, count=2), expected)
    full = handle.full_plan()
    assert not full.guided
    handle.plan = full.with_steps(steps("2", "4", "1"))
    picture = tiny.run(guided=False, count=2)
    assert handle.stats()["depth"].tolist() == [2, 4, 1]
    assert set(handle.stats()["branch"]) == {"cond"}
    assert not torch.allclose(picture, expected, atol=1e-2)
    handle.remove()
    assert torch.equal(tiny.run(guided=False, count=2), expected)


def depths_run(handle: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Depths of the conditional and of the unconditional branch at every step of the last call, as a plan has them."""
    table = handle.stats().pivot(index="step", columns="branch", values="depth")
    return tuple(table["cond"]), tuple(table["uncond"])
