"""Wan: one transformer (2.1), and two experts (2.2)."""

import diffusers
from torch import nn

from support.tiny_pipelines import NEGATIVE, TEXT_LENGTH, TinyPipeline, prompts, quiet, seeded, t5, tokenizer

FAMILY = "WanTransformer3DModel"
# Latents of 3 frames of 8 x 12.
SIZE = {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": TEXT_LENGTH, "output_type": "latent"}


def transformer(seed: int, kind: type[nn.Module] = diffusers.WanTransformer3DModel, **changes: object) -> nn.Module:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 4,
        "rope_max_seq_len": 16,
    }
    return seeded(kind(**config | changes), seed)


def video_vae() -> nn.Module:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return seeded(vae)


def parts() -> dict[str, object]:
    """Everything but transformers."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {"tokenizer": tokenizer(clip=False), "text_encoder": t5(), "vae": video_vae(), "scheduler": scheduler}


def around(pipe: diffusers.DiffusionPipeline, **settings: object) -> TinyPipeline:
    """The pipeline with its calls."""

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), SIZE | settings)


def tiny(seed: int) -> TinyPipeline:
    return around(diffusers.WanPipeline(**parts(), transformer=transformer(seed)))


def two_experts(seed: int, **config: object) -> TinyPipeline:
    """Wan 2.2: the second expert takes over below timestep 700."""
    experts = {"transformer": transformer(seed), "transformer_2": transformer(seed + 1)}
    return around(diffusers.WanPipeline(**parts(), **experts, boundary_ratio=0.7, **config))
