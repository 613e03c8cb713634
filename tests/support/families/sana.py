"""Sana as diffusers ships it, tiny."""

import diffusers
import transformers
from torch import nn

from support.tiny_pipelines import NEGATIVE, TEXT_LENGTH, TinyPipeline, prompts, quiet, seeded, tokenizer

FAMILY = "SanaTransformer2DModel"


def gemma() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return seeded(transformers.Gemma2Model(config))


def vae() -> nn.Module:
    """An eighth of the size of the picture, four channels."""
    config = {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "encoder_layers_per_block": (1,) * 4,
        "decoder_layers_per_block": (1,) * 4,
        "encoder_qkv_multiscales": ((),) * 4,
        "decoder_qkv_multiscales": ((),) * 4,
    }
    return seeded(diffusers.AutoencoderDC(**config))


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "sample_size": 8,
        "patch_size": 2,
    }
    return seeded(diffusers.SanaTransformer2DModel(**config | changes), seed)


def tiny(seed: int) -> TinyPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(tokenizer(clip=False), gemma(), vae(), transformer(seed), scheduler)

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), SETTINGS)


SETTINGS = {
    "height": 64,  # 8 x 12 latents
    "width": 96,
    "output_type": "latent",
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
    "max_sequence_length": TEXT_LENGTH,
}
