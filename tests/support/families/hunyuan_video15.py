"""HunyuanVideo 1.5, from prompts and pictures."""

from collections.abc import Callable

import diffusers
import transformers
from torch import nn

from support.tiny_pipelines import NEGATIVE, TinyPipeline, picture, prompts, quiet, seeded, t5, tokenizer

FAMILY = "HunyuanVideo15Transformer3DModel"
# Latents of 3 frames of 8 x 12.
SIZE = {"height": 32, "width": 48, "num_frames": 9, "output_type": "latent"}


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "in_channels": 9,  # latents, a given picture's latents, and their mask
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 2,
        "text_embed_dim": 16,
        "text_embed_2_dim": 32,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 4, 4),
        "target_size": 32,
    }
    return seeded(diffusers.HunyuanVideo15Transformer3DModel(**config | changes), seed)


def parts(guidance_scale: float = 4.0) -> dict[str, object]:
    """Everything but the transformer."""
    config = transformers.Qwen2_5_VLTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    )
    chat = tokenizer(clip=False)
    chat.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return {
        "text_encoder": seeded(transformers.Qwen2_5_VLTextModel(config)),
        "tokenizer": chat,
        "vae": seeded(vae),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(clip=False),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=guidance_scale),
    }


def around(pipe: diffusers.DiffusionPipeline, **settings: object) -> TinyPipeline:
    """The pipeline with its calls, and with fewer tokens than the real text encoders and picture encoder give."""
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 0, 8, 6
    pipe.vision_num_semantic_tokens = 4

    def call(count: int, scale: float) -> dict[str, object]:
        pipe.guider.guidance_scale = scale  # the pipeline's calls have no scale
        quoting = [f'{text} "{text}"' if index % 2 == 0 else text for index, text in enumerate(prompts(count))]
        return {"prompt": quoting, "negative_prompt": [NEGATIVE] * count}

    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), SIZE | settings)


def tiny(seed: int) -> TinyPipeline:
    return around(diffusers.HunyuanVideo15Pipeline(**parts(), transformer=transformer(seed)))


def image_to_video(seed: int, **changes: object) -> TinyPipeline:
    """The picture's latents as further channels, and its features among the text."""
    config = transformers.SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(
        **parts(),
        transformer=transformer(seed, patch_size=1, **changes),
        image_encoder=seeded(transformers.SiglipVisionModel(config)),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    )
    found = around(pipe, image=picture(48, 32))
    del found.settings["height"], found.settings["width"]
    return found


VARIANTS: dict[str, Callable[[int], TinyPipeline]] = {
    "hunyuan, picture to video": image_to_video,
    "hunyuan, mean flow": lambda seed: image_to_video(seed, use_meanflow=True),
}
