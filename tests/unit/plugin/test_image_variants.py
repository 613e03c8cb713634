"""Pipelines beside a family's first: image to image, inpainting, edits, ControlNets. Depth combines, or is refused."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from PIL import Image
from torch import Tensor

import dyndit
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt, collect_exits
from dyndit.plugin.adapters.base import first_image
from support.families import flux2, qwen_image, sana, z_image
from support.models import randomise
from support.tiny_pipelines import TinyPipeline, quiet, seeded, t5, tiny_pipeline, tokenizer, vae

SIZE = (16, 24)
SD3, FLUX, QWEN = "SD3Transformer2DModel", "FluxTransformer2DModel", qwen_image.FAMILY


def picture(height: int = SIZE[0], width: int = SIZE[1]) -> Image.Image:
    waves = np.sin(np.arange(height * width * 3).reshape(height, width, 3))
    return Image.fromarray((127.5 * waves + 128).astype(np.uint8))


def mask() -> Image.Image:
    left = np.zeros(SIZE, np.uint8)
    left[:, : SIZE[1] // 2] = 255
    return Image.fromarray(left)


def variant(family: str, kind: str, given: dict[str, object] | None = None, **settings: object) -> TinyPipeline:
    """The family's tiny pipeline as another pipeline class, with the same components and further settings."""
    tiny = tiny_pipeline(family)
    pipe = assembled(kind, tiny.pipe.components | (given or {}))
    for name in ("prompt_template_encode", "prompt_template_encode_start_idx"):
        if name in vars(tiny.pipe):
            setattr(pipe, name, getattr(tiny.pipe, name))
    return replace(tiny, pipe=quiet(pipe), settings={**tiny.settings, **settings}, num_steps=4)


def assembled(kind: str, parts: dict[str, object]) -> diffusers.DiffusionPipeline:
    """The pipeline of this class, of those parts that it takes."""
    accepted = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return getattr(diffusers, kind)(**{name: part for name, part in parts.items() if name in accepted})


def image_to_image(family: str, kind: str, **settings: object) -> Callable[[], TinyPipeline]:
    return lambda: variant(family, kind, image=picture(), strength=0.75, **settings)


def inpainting(family: str, kind: str, **settings: object) -> Callable[[], TinyPipeline]:
    return lambda: variant(family, kind, image=picture(), mask_image=mask(), strength=0.75, **settings)


def sd3_inpainting() -> TinyPipeline:
    """Of 16 channels, as the pipeline demands."""
    tiny = tiny_pipeline(SD3)
    config = {**tiny.transformer.config, "in_channels": 16, "out_channels": 16}
    parts = tiny.pipe.components | {
        "transformer": seeded(diffusers.SD3Transformer2DModel.from_config(config)),
        "vae": vae(latent_channels=16, scaling_factor=1.5, shift_factor=0.1),
    }
    pipe = diffusers.StableDiffusion3InpaintPipeline(**parts)
    settings = {**tiny.settings, "image": picture(), "mask_image": mask(), "strength": 0.75}
    return replace(tiny, pipe=quiet(pipe), settings=settings, num_steps=4)


def sd3_controlnet(kind: str = "ControlNet", extra: int = 0, **settings: object) -> TinyPipeline:
    tiny = tiny_pipeline(SD3)
    config = {**tiny.transformer.config, "num_layers": 2, "extra_conditioning_channels": extra}
    given = {"controlnet": seeded(diffusers.SD3ControlNetModel.from_config(config))}
    return variant(SD3, f"StableDiffusion3{kind}Pipeline", given, control_image=picture(), **settings)


def flux_controlnet(kind: str = "ControlNet", **settings: object) -> TinyPipeline:
    config = {**tiny_pipeline(FLUX).transformer.config, "num_layers": 1, "num_single_layers": 1}
    given = {"controlnet": seeded(diffusers.FluxControlNetModel.from_config(config))}
    return variant(FLUX, f"Flux{kind}Pipeline", given, control_image=picture(), **settings)


def prompted(tiny: TinyPipeline) -> TinyPipeline:
    """Pipelines that take no negative prompt."""

    def call(_: int) -> dict[str, object]:
        return {"prompt": "a red cat"}

    return replace(tiny, guided=call, unguided=call)


def flux_with_more_channels(kind: str, channels: int, **settings: object) -> TinyPipeline:
    """Fill and Control: pictures beside the latents, as more channels of each token."""
    tiny = tiny_pipeline(FLUX)
    config = {name: value for name, value in tiny.transformer.config.items() if not name.startswith("_")}
    transformer = diffusers.FluxTransformer2DModel(**config | {"in_channels": channels, "out_channels": 16})
    pipe = assembled(kind, tiny.pipe.components | {"transformer": seeded(transformer)})
    return prompted(replace(tiny, pipe=quiet(pipe), settings={**tiny.settings, **settings}))


def sana_controlnet() -> TinyPipeline:
    config = {**sana.transformer(0).config, "num_layers": 2}
    controlnet = seeded(diffusers.SanaControlNetModel.from_config(config))
    return variant(sana.FAMILY, "SanaControlNetPipeline", {"controlnet": controlnet}, control_image=picture(64, 96))


def sana_sprint(kind: str = "SanaSprintPipeline", **settings: object) -> TinyPipeline:
    tiny = tiny_pipeline(sana.FAMILY)
    transformer = sana.transformer(0, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    parts = tiny.pipe.components | {"transformer": transformer, "scheduler": diffusers.SCMScheduler()}

    def call(count: int) -> dict[str, object]:
        return {"prompt": ["a red cat", "a moon"][:count]}

    pipe = quiet(getattr(diffusers, kind)(**parts))
    return TinyPipeline(pipe, call, call, {**sana.SETTINGS, **settings}, num_steps=2)


def qwen_controlnet(kind: str = "ControlNet", extra: int = 0, **settings: object) -> TinyPipeline:
    config = {**qwen_image.transformer(0).config, "num_layers": 2, "extra_condition_channels": extra}
    given = {"controlnet": seeded(diffusers.QwenImageControlNetModel.from_config(config))}
    return variant(QWEN, f"QwenImage{kind}Pipeline", given, control_image=picture(), **settings)


def qwen_edit(kind: str = "Edit", given: dict[str, object] | None = None, **config: object) -> TinyPipeline:
    """With embedded prompts: a processor of pictures and text is not needed."""
    tiny = tiny_pipeline(QWEN)
    embeds = {}
    for name, prompt in (("prompt", "a red cat"), ("negative_prompt", "a blurry dog on the moon")):
        embeds[f"{name}_embeds"], _ = tiny.pipe.encode_prompt(prompt)
        embeds[f"{name}_embeds_mask"] = torch.ones(embeds[f"{name}_embeds"].shape[:2], dtype=torch.long)
    parts = tiny.pipe.components | {"processor": None, "transformer": qwen_image.transformer(0, **config)}
    settings = {**qwen_image.SETTINGS, "image": picture(), **(given or {})}
    return TinyPipeline(
        quiet(getattr(diffusers, f"QwenImage{kind}Pipeline")(**parts)),
        lambda _: {**embeds, "true_cfg_scale": 4.0},
        lambda _: {**embeds, "true_cfg_scale": 1.0},
        settings,
    )


def flux2_dev() -> TinyPipeline:
    """Guidance is an input of the transformer. The prompt comes embedded: its encoder is of no matter here."""
    tiny = tiny_pipeline(flux2.FAMILY)
    embeds, _ = tiny.pipe.encode_prompt("a red cat", max_sequence_length=8, text_encoder_out_layers=(1, 2))
    parts = {**tiny.pipe.components, "transformer": flux2.transformer(0, guidance_embeds=True), "text_encoder": None}
    settings = {"height": SIZE[0], "width": SIZE[1], "output_type": "latent", "image": [picture(64, 64)]}
    call = {"prompt_embeds": embeds, "guidance_scale": 4.0}
    return TinyPipeline(quiet(diffusers.Flux2Pipeline(**parts)), lambda _: call, lambda _: call, settings)


def flux2_klein_kv(image: Image.Image | None) -> TinyPipeline:
    tiny = tiny_pipeline(flux2.FAMILY)
    pipe = quiet(diffusers.Flux2KleinKVPipeline(**tiny.pipe.components))
    settings = {**flux2.SETTINGS, "image": image}
    return TinyPipeline(pipe, lambda _: {"prompt": "a cat"}, lambda _: {"prompt": "a cat"}, settings)


def z_image_controlnet(kind: str = "ControlNet", channels: int = 4, **settings: object) -> TinyPipeline:
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=24,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    given = {"controlnet": seeded(controlnet)}
    return variant(z_image.FAMILY, f"ZImage{kind}Pipeline", given, control_image=picture(), **settings)


def pixart_sigma() -> TinyPipeline:
    tiny = tiny_pipeline("PixArtTransformer2DModel")
    config = {**tiny.transformer.config, "sample_size": 8, "use_additional_conditions": False}
    transformer = seeded(diffusers.PixArtTransformer2DModel.from_config(config))
    parts = (tokenizer(clip=False), t5(), tiny.pipe.vae, transformer, tiny.pipe.scheduler)
    return replace(tiny, pipe=quiet(diffusers.PixArtSigmaPipeline(*parts)))


MASKED = {"image": picture(), "mask_image": mask(), "strength": 0.75}
KONTEXT = {"image": picture(), "max_area": SIZE[0] * SIZE[1], "_auto_resize": False}

GUIDED: dict[str, Callable[[], TinyPipeline]] = {
    "SD3, image to image": image_to_image(SD3, "StableDiffusion3Img2ImgPipeline"),
    "SD3, inpainting": sd3_inpainting,
    "SD3, ControlNet": sd3_controlnet,
    "Flux, image to image": image_to_image(FLUX, "FluxImg2ImgPipeline"),
    "Flux, inpainting": inpainting(FLUX, "FluxInpaintPipeline"),
    "Flux, ControlNet": flux_controlnet,
    "SD3, ControlNet, inpainting": lambda: sd3_controlnet("ControlNetInpainting", 1, control_mask=mask()),
    "Flux Kontext": lambda: variant(FLUX, "FluxKontextPipeline", **KONTEXT),
    "PixArt-Sigma": pixart_sigma,
    "Sana, ControlNet": sana_controlnet,
    "Qwen-Image, image to image": image_to_image(QWEN, "QwenImageImg2ImgPipeline"),
    "Qwen-Image, inpainting": inpainting(QWEN, "QwenImageInpaintPipeline"),
    "Qwen-Image, ControlNet": qwen_controlnet,
    "Qwen-Image, ControlNet, inpainting": lambda: qwen_controlnet("ControlNetInpaint", 4, control_mask=mask()),
    "Qwen-Image-Edit": qwen_edit,
    "Qwen-Image-Edit, several images": lambda: qwen_edit("EditPlus", {"image": [picture(), picture()]}),
    "Qwen-Image-Edit, inpainting": lambda: qwen_edit("EditInpaint", MASKED),
    "Qwen-Image-Edit of 2511": lambda: qwen_edit(zero_cond_t=True),
    "FLUX.2 Klein with a reference image": lambda: variant(flux2.FAMILY, "Flux2KleinPipeline", image=[picture(64, 64)]),
    "FLUX.2 Klein, inpainting": inpainting(flux2.FAMILY, "Flux2KleinInpaintPipeline"),
    "Z-Image, image to image": image_to_image(z_image.FAMILY, "ZImageImg2ImgPipeline"),
    "Z-Image, inpainting": inpainting(z_image.FAMILY, "ZImageInpaintPipeline"),
    "Z-Image, ControlNet": z_image_controlnet,
    "Z-Image, ControlNet, inpainting": lambda: z_image_controlnet(
        "ControlNetInpaint", 9, image=picture(), mask_image=mask()
    ),
}

UNGUIDED: dict[str, Callable[[], TinyPipeline]] = {
    "Sana-Sprint": sana_sprint,
    "Sana-Sprint, image to image": lambda: sana_sprint("SanaSprintImg2ImgPipeline", image=picture(64, 96)),
    "Flux Fill": lambda: flux_with_more_channels("FluxFillPipeline", 48, image=picture(), mask_image=mask()),
    "Flux Control": lambda: flux_with_more_channels("FluxControlPipeline", 32, control_image=picture()),
    "Flux Control, image to image": lambda: flux_with_more_channels(
        "FluxControlImg2ImgPipeline", 32, control_image=picture(), image=picture()
    ),
    "Flux, ControlNet, image to image": lambda: prompted(flux_controlnet("ControlNetImg2Img", image=picture())),
    "Flux, ControlNet, inpainting": lambda: prompted(flux_controlnet("ControlNetInpaint", **MASKED)),
    "FLUX.2 with a reference image": flux2_dev,
    "FLUX.2 Klein with kept keys, no reference": lambda: flux2_klein_kv(None),
}
"""Pipelines whose guidance is distilled."""

REFERENCES = (
    "Flux Kontext",
    "Qwen-Image-Edit",
    "Qwen-Image-Edit, several images",
    "Qwen-Image-Edit of 2511",
    "FLUX.2 Klein with a reference image",
)


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Qwen's edit pipeline scales every reference image to a megapixel.
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
        monkeypatch.setattr(module, "calculate_dimensions", lambda *_: (*SIZE[::-1], None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda *_: SIZE[::-1])
    with torch.no_grad():
        yield


def run(tiny: TinyPipeline, guided: bool = True) -> Tensor:
    """Some pipelines draw the control picture's latents from torch's own generator."""
    torch.manual_seed(0)
    return tiny.run(guided=guided)


def random_exits(tiny: TinyPipeline) -> Exits:
    exits = Exits(adapt(tiny.transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    return exits.eval()


@pytest.mark.parametrize("name", [*GUIDED, *UNGUIDED])
def test_depth_combines(name: str) -> None:
    guided = name in GUIDED
    tiny = (GUIDED | UNGUIDED)[name]()
    expected = run(tiny, guided)
    assert expected.isfinite().all()
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny), cfg_scale=4.0 if guided else 1.0)
    assert torch.equal(run(tiny, guided), expected)
    handle.plan = full = handle.full_plan()
    assert torch.equal(run(tiny, guided), expected)

    wanted = steps("2|1" if guided else "2") * full.num_steps
    handle.plan = full.with_steps(wanted)
    found = run(tiny, guided)
    assert found.isfinite().all()
    assert (found - expected).abs().max() > 0.01 * expected.std()
    depths = {"cond": {2}} | ({"uncond": {1}} if guided else {})
    assert handle.stats().groupby("branch")["depth"].apply(set).to_dict() == depths
    assert handle.stats()["step"].nunique() == full.num_steps
    handle.remove()
    assert torch.equal(run(tiny, guided), expected)


@pytest.mark.parametrize("name", REFERENCES)
def test_heads_predict_the_picture_and_not_its_references(name: str) -> None:
    tiny, calls = GUIDED[name](), []
    watch = tiny.transformer.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    latents = run(tiny)
    watch.remove()
    args, kwargs, whole = calls[0]
    size = latents.shape[1] if latents.ndim == 3 else 24
    assert whole.shape[1] > size
    predictions = collect_exits(tiny.transformer, random_exits(tiny), *args, **kwargs)
    assert {prediction.shape[1] for prediction in predictions.values()} == {size}
    assert torch.equal(predictions[4], whole[:, :size])


@pytest.mark.parametrize("name", [name for name in GUIDED | UNGUIDED if "ControlNet" in name])
def test_residuals_reach_every_depth(name: str) -> None:
    """Without them each depth predicts something else."""
    tiny, calls = (GUIDED | UNGUIDED)[name](), []
    watch = tiny.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run(tiny)
    watch.remove()
    args, kwargs = calls[0]
    exits = random_exits(tiny)
    without = {key: None if "controlnet" in key else value for key, value in kwargs.items()}
    with_them, plain = (collect_exits(tiny.transformer, exits, *args, **given) for given in (kwargs, without))
    first = 2 if name.startswith("Sana") else 1  # Sana's residuals begin after the second block
    for depth in range(first, 5):
        assert (with_them[depth] - plain[depth]).abs().max() > 1e-3 * plain[depth].std()


def test_residuals_of_other_rows_are_refused() -> None:
    tiny, calls = sd3_controlnet(), []
    adapter = adapt(tiny.transformer)
    watch = tiny.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    tiny.run()
    watch.remove()
    name = "block_controlnet_hidden_states"
    half = {name: [sample[:1] for sample in calls[0][name]]}
    with pytest.raises(InputError, match=f"called with 1 rows of {name}, expected 2 as of the latents"):
        adapter.read(**calls[0] | half)


REFUSED: dict[str, tuple[Callable[[], TinyPipeline], str]] = {
    "FLUX.2 Klein with kept keys": (lambda: flux2_klein_kv(picture(64, 64)), "kv_cache_mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_refused_by_name(name: str) -> None:
    build, argument = REFUSED[name]
    tiny = build()
    expected = run(tiny)
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(tiny))
    with pytest.raises(InputError, match=f"called with {argument}, which cannot be combined with exits"):
        run(tiny)
    handle.remove()
    assert torch.equal(run(tiny), expected)


def z_call(**changes: object) -> dict[str, object]:
    latents = [torch.ones(4, 1, 8, 12), torch.zeros(4, 1, 8, 12)]
    texts = [torch.ones(5, 16), torch.ones(9, 16)]
    return {"x": latents, "t": torch.tensor([0.5, 0.5]), "cap_feats": texts} | changes


BAD_CALLS: dict[str, dict[str, object]] = {
    "x of several images or sizes": z_call(x=[torch.ones(4, 1, 8, 12), torch.ones(4, 1, 8, 8)]),
    "siglip_feats": z_call(siglip_feats=[[torch.ones(2, 2, 4)]]),
    "image_noise_mask": z_call(image_noise_mask=[[0, 1], [0, 1]]),
    "x of several images": z_call(x=[[torch.ones(4, 1, 8, 12)] * 2] * 2),
    "patch_size": z_call(patch_size=1),
}


@pytest.mark.parametrize("words", BAD_CALLS)
def test_z_images_other_calls_are_refused(words: str) -> None:
    transformer = z_image.transformer(0)
    assert collect_exits(transformer, None, **z_call())[4].shape == (2, 4, 1, 8, 12)
    with pytest.raises(InputError, match=f"called with {words}") as found:
        collect_exits(transformer, None, **BAD_CALLS[words])
    assert "\n" not in str(found.value)


def test_qwens_rows_share_one_set_of_positions() -> None:
    transformer = qwen_image.transformer(0)
    call = {
        "hidden_states": torch.ones(2, 24, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.ones(2, 5, 32),
    }
    with pytest.raises(InputError, match="img_shapes of several sizes"):
        collect_exits(transformer, None, **call, img_shapes=[[(1, 4, 6)], [(1, 6, 4)]])
    assert collect_exits(transformer, None, **call, img_shapes=[[(1, 4, 6)]] * 2)[4].shape == (2, 24, 16)


def test_a_layered_picture_has_all_layers_but_the_reference() -> None:
    transformer = qwen_image.transformer(0, use_layer3d_rope=True, use_additional_t_cond=True)
    call = {
        "hidden_states": torch.randn(2, 3 * 24, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.ones(2, 5, 32),
        "img_shapes": [[(1, 4, 6)] * 3] * 2,
        "additional_t_cond": torch.tensor([0, 1]),
    }
    predictions = collect_exits(transformer, None, **call)
    assert {tuple(prediction.shape) for prediction in predictions.values()} == {(2, 48, 16)}
    assert torch.equal(predictions[4], transformer(**call, return_dict=False)[0][:, :48])


IDS = {
    "a picture alone": ([(0, 0, 0), (0, 0, 1)], 2),
    "a reference": ([(0, 0, 0), (0, 0, 1), (1, 0, 0)], 2),
    "two references": ([(0, 0, 0, 0), (10, 0, 0, 0), (10, 0, 1, 0), (20, 0, 0, 0)], 1),
    "a reference in front": ([(1, 0, 0), (0, 0, 0), (0, 0, 1)], 3),
    "numbers that are no images": ([(0, 0, 0), (1, 1, 1), (2, 2, 2)], 3),
}


@pytest.mark.parametrize("name", IDS)
def test_a_picture_ends_where_a_reference_starts(name: str) -> None:
    """What is not known for a reference image is predicted, as the transformer's own forward does."""
    ids, size = IDS[name]
    assert first_image(torch.tensor(ids)) == size


@pytest.mark.parametrize("family", [QWEN, z_image.FAMILY])
def test_prompts_of_any_length_fit_together(family: str) -> None:
    """Calls with texts of 2 and of 7 tokens, joined as rows of one batch, predict what they do alone."""
    tiny, seen = tiny_pipeline(family), []
    adapter = adapt(tiny.transformer)
    watch = tiny.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(adapter.read(*args, **kwargs)), with_kwargs=True
    )
    for prompt in ("a", "the blue dog on a red cat"):
        tiny.run(guided=False, prompt=[prompt], negative_prompt=None)
    watch.remove()
    short, long = seen[0], seen[tiny.num_steps]
    joined = type(short).joined([short, long])
    found = adapter(joined.x, joined.t, joined.y)
    for row, inputs in enumerate((short, long)):
        alone = adapter(inputs.x, inputs.t, inputs.y)
        torch.testing.assert_close(found[row : row + 1], alone, atol=2e-5 * alone.std().item(), rtol=1e-5)
    assert (adapter(short.x, short.t, long.y) - adapter(short.x, short.t, short.y)).abs().max() > 1e-3


def test_wide_heads_take_a_narrow_conditioning() -> None:
    """Z-Image and Lumina 2 have conditionings narrower than their tokens."""
    transformer = z_image.transformer(0, dim=264, n_heads=22, n_kv_heads=22, n_layers=4)
    adapter = adapt(transformer)
    assert (adapter.width, adapter.cond_width) == (264, 256)
    exits = Exits(adapter, ExitConfig(head="wide"))
    predictions = collect_exits(transformer, exits, **z_call())
    assert all(isinstance(p, Tensor) and p.isfinite().all() for p in predictions.values())
