"""The pipelines of the video families: from pictures and videos, with control, with several timesteps at a step."""

import diffusers
import pytest
import torch
from torch import Tensor, nn

import dyndit
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import DynDiTHandle
from support.families import cogvideox, hunyuan_video15, ltx2, wan
from support.models import randomise
from support.tiny_pipelines import TinyPipeline, whole

VARIANTS = wan.VARIANTS | cogvideox.VARIANTS | hunyuan_video15.VARIANTS | ltx2.VARIANTS
FULL, COUNT = 4, 2
GUIDED, UNGUIDED = ("4|2", "3+|held", "2|e1", "4|4"), ("2", "3", "1", "4")


@pytest.fixture(params=sorted(VARIANTS))
def tiny(request: pytest.FixtureRequest) -> TinyPipeline:
    return VARIANTS[request.param](0)


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def plugged(tiny: TinyPipeline, scale: float, **options: object) -> DynDiTHandle:
    """The plug-in with random exits after every block."""
    exits = Exits(adapt(tiny.transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return dyndit.apply_dyndit(tiny.pipe, exits.eval(), cfg_scale=scale, **options)


def predictions(tiny: TinyPipeline, **changes: object) -> list[Tensor]:
    """What every call of the transformer returned in one run."""
    found: list[Tensor] = []
    watch = tiny.transformer.register_forward_hook(lambda *parts: found.append(whole(parts[-1])))
    tiny.run(count=COUNT, **changes)
    watch.remove()
    return found


@pytest.mark.parametrize("guided", [True, False])
def test_depth_combines_with_every_variant(tiny: TinyPipeline, guided: bool) -> None:
    expected = tiny.run(count=COUNT, guided=guided)
    assert not torch.allclose(tiny.run(count=COUNT, guided=guided, seed=1), expected, atol=1e-2)
    each = predictions(tiny, guided=guided)
    handle = plugged(tiny, 4.0 if guided else 1.0)
    assert torch.equal(tiny.run(count=COUNT, guided=guided), expected)
    full = handle.full_plan()
    handle.plan = full
    for mine, its in zip(predictions(tiny, guided=guided), each, strict=True):
        assert torch.equal(mine, its)

    handle.plan = full.with_steps(steps(*(GUIDED if guided else UNGUIDED)[: full.num_steps]))
    shallow = tiny.run(count=COUNT, guided=guided)
    depths = handle.stats().groupby("branch")["depth"].apply(tuple)
    assert depths["cond"] == handle.plan.depths
    assert not guided or depths["uncond"] == handle.plan.uncond_depths
    assert shallow.isfinite().all()
    assert (shallow - expected).abs().max() > 0.05 * expected.std()
    handle.remove()
    assert torch.equal(tiny.run(count=COUNT, guided=guided), expected)


def test_the_conditional_rows_are_taken_for_conditional(tiny: TinyPipeline) -> None:
    expected = tiny.run(count=COUNT, guided=False)
    handle = plugged(tiny, 4.0)
    guided = tiny.run(count=COUNT)
    handle.plan = handle.full_plan().with_steps(steps("4") * handle.full_plan().num_steps)
    torch.testing.assert_close(tiny.run(count=COUNT), expected, atol=1e-3 * expected.std().item(), rtol=1e-3)
    assert (guided - expected).abs().max() > 0.01 * expected.std()


def test_a_new_exit_on_the_final_state_predicts_as_the_model(tiny: TinyPipeline) -> None:
    """Also with a timestep per token, and with a head that has a layer before it."""
    adapter, calls = adapt(tiny.transformer), []
    watch = tiny.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(adapter.read(*args, **kwargs)), with_kwargs=True
    )
    tiny.run(count=COUNT)
    watch.remove()
    inputs = calls[-1]
    state = adapter.embed(inputs.x, inputs.t, inputs.y)
    for index in range(FULL):
        state = adapter.block(index, state)
    expected = adapter.head(state)
    for head in ("adaln-linear", "wide"):
        found = adapter.unpatchify(Exits(adapter, ExitConfig(head=head)).patches(state, 1), state)
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.std().item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("switched_on", "argument"),
    [
        ({"stg_scale": 1.0}, "spatio_temporal_guidance_blocks"),
        ({"modality_scale": 3.0}, "isolate_modalities"),
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs"),
    ],
)
def test_further_guidance_of_ltx_2_is_refused(switched_on: dict[str, object], argument: str) -> None:
    tiny = ltx2.tiny(0)
    handle = plugged(tiny, 4.0)
    expected = tiny.run()
    with pytest.raises(InputError, match=f"^LTX2Video.*: called with {argument}, which cannot be combined with exits$"):
        tiny.run(**switched_on)
    assert torch.equal(tiny.run(), expected), "a refused call leaves nothing behind"
    handle.remove()


def test_sound_of_other_channels_than_the_video_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^LTX2Video.*: channels \(4, 4\) of video, \(6, 4\) of sound; expected the same"
    ):
        adapt(ltx2.transformer(0, audio_in_channels=6))


def test_sound_leaves_early_too() -> None:
    tiny = ltx2.tiny(0)

    def both() -> tuple[Tensor, Tensor]:
        made = tiny.pipe(
            num_inference_steps=3, **tiny.settings, **tiny.guided(1), generator=torch.Generator().manual_seed(0)
        )
        return torch.as_tensor(made.frames), made.audio

    video, sound = both()
    handle = plugged(tiny, 4.0)
    assert all(torch.equal(mine, its) for mine, its in zip(both(), (video, sound), strict=True))
    handle.plan = handle.full_plan().with_steps(steps("2|1", "3", "4|4"))
    for mine, its in zip(both(), (video, sound), strict=True):
        assert (mine - its).abs().max() > 0.05 * its.std()


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.WanAnimateTransformer3DModel,
        diffusers.SkyReelsV2Transformer3DModel,
        diffusers.ChronoEditTransformer3DModel,
        diffusers.LTXVideoTransformer3DModel,
        diffusers.HunyuanVideoTransformer3DModel,
    ],
)
def test_relatives_without_an_adapter_are_refused_by_name(kind: type[nn.Module]) -> None:
    with pytest.raises(InputError, match=f"^transformer {kind.__name__}: expected one of .*WanTransformer3DModel"):
        adapt(object.__new__(kind))


def test_adaptive_guidance_of_two_branches_works() -> None:
    tiny = hunyuan_video15.tiny(0)
    tiny.pipe.guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0)
    expected = tiny.run()
    handle = plugged(tiny, 4.0)
    assert torch.equal(tiny.run(), expected)
    handle.plan = handle.full_plan().with_steps(steps("4|4", "3+|held", "2|e1"))
    assert (tiny.run() - expected).abs().max() > 0.05 * expected.std()


def test_a_timestep_per_token_is_refused_where_the_model_has_none() -> None:
    adapter = adapt(cogvideox.transformer(0))
    with pytest.raises(InputError, match=r"^CogVideoX.*: called with 144 timesteps for 2 rows"):
        adapter.read(torch.zeros(2, 3, 4, 8, 12), torch.zeros(2, 8, 32), torch.zeros(2, 72))
