"""Lumina-Image 2.0 as diffusers ships it, tiny."""

import diffusers

from support.families.sana import gemma
from support.tiny_pipelines import NEGATIVE, TinyPipeline, prompts, quiet, seeded, tokenizer, vae

FAMILY = "Lumina2Transformer2DModel"


def tiny(seed: int) -> TinyPipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=32,
    )
    seeded(transformer, seed)
    for block in transformer.layers:  # so that depth matters: random gates are small
        block.norm2.weight.data *= 8
    pipe = diffusers.Lumina2Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae(scaling_factor=1.5, shift_factor=0.1),
        gemma(),
        tokenizer(clip=False),
    )
    pipe.tokenizer.model_max_length = 16

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    settings = {
        "height": 64,  # 8 x 12 latents: the pipeline takes every VAE for one of factor 8
        "width": 96,
        "output_type": "latent",
        "system_prompt": "the",
        "max_sequence_length": 16,
    }
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings)
