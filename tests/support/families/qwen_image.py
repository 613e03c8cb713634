"""Qwen-Image as diffusers ships it, tiny."""

import diffusers
import transformers
from torch import nn

from support.tiny_pipelines import NEGATIVE, SIZE, TinyPipeline, prompts, quiet, seeded, tokenizer

FAMILY = "QwenImageTransformer2DModel"


def qwen_vl() -> nn.Module:
    text = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=28,
        video_token_id=29,
        vision_start_token_id=30,
        vision_end_token_id=31,
    )
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration(config))


def vae() -> nn.Module:
    """Half the size of the picture, four channels."""
    config = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "latents_mean": [0.1, -0.1, 0.2, 0.0],
        "latents_std": [1.5, 1.2, 0.8, 1.0],
    }
    return seeded(diffusers.AutoencoderKLQwenImage(**config))


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 4),
    }
    return seeded(diffusers.QwenImageTransformer2DModel(**config | changes), seed)


def long_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The pipelines put a long text before every prompt, and cut its tokens off again."""
    words = tokenizer(clip=False)
    words.model_max_length = 256
    return words


def scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def tiny(seed: int) -> TinyPipeline:
    pipe = diffusers.QwenImagePipeline(scheduler(), vae(), qwen_vl(), long_tokenizer(), transformer(seed))
    pipe.prompt_template_encode = "moon " * 3 + "{}"
    pipe.prompt_template_encode_start_idx = 3
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), SETTINGS)


def call(count: int, scale: float) -> dict[str, object]:
    return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "true_cfg_scale": scale}


SETTINGS = {**SIZE, "output_type": "latent"}
