"""LTX-2, from prompts, pictures and given frames."""

from collections.abc import Callable
from dataclasses import replace

import diffusers
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from torch import nn

from support.tiny_pipelines import NEGATIVE, TEXT_LENGTH, TinyPipeline, picture, prompts, quiet, seeded, tokenizer

FAMILY = "LTX2VideoTransformer3DModel"
# Latents of 3 frames of 8 x 12, and 3 tokens of sound.
SIZE = {
    "height": 64,
    "width": 96,
    "num_frames": 5,
    "frame_rate": 48.0,
    "max_sequence_length": TEXT_LENGTH,
    "output_type": "latent",
}
GUIDANCE = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
"""Neither spatio-temporal nor modality guidance, which make further calls."""


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "vae_scale_factors": (2, 8, 8),
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 4,
        "caption_channels": 16,
        "rope_type": "split",
    }
    return seeded(diffusers.LTX2VideoTransformer3DModel(**config | changes), seed)


def video_vae() -> nn.Module:
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )
    return seeded(vae)


def parts() -> dict[str, object]:
    """Everything but the transformer."""
    text = transformers.Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        "vae": video_vae(),
        "audio_vae": seeded(audio_vae),
        "text_encoder": seeded(transformers.Gemma3TextModel(text)),
        "tokenizer": tokenizer(clip=False),
        "connectors": seeded(connectors),
        "vocoder": seeded(vocoder),
    }


def around(pipe: diffusers.DiffusionPipeline, **settings: object) -> TinyPipeline:
    """The pipeline with its calls."""

    def call(count: int, scale: float) -> dict[str, object]:
        scales = {"guidance_scale": scale, "audio_guidance_scale": scale}
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, **scales}

    settings = SIZE | GUIDANCE | settings
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings, channels=-1)


def tiny(seed: int) -> TinyPipeline:
    return around(diffusers.LTX2Pipeline(**parts(), transformer=transformer(seed)))


def image_to_video(seed: int) -> TinyPipeline:
    """A timestep per video token: the first frame's is 0."""
    pipe = diffusers.LTX2ImageToVideoPipeline(**parts(), transformer=transformer(seed))
    found = around(pipe, image_crf=0)

    def of(call: Callable[[int], dict[str, object]]) -> Callable[[int], dict[str, object]]:
        return lambda count: call(count) | {"image": [picture(96, 64)] * count}

    return replace(found, guided=of(found.guided), unguided=of(found.unguided))


def conditioned(seed: int) -> TinyPipeline:
    """A frame that is given in part: its tokens have a lower timestep."""
    pipe = diffusers.LTX2ConditionPipeline(**parts(), transformer=transformer(seed))
    return around(pipe, conditions=[LTX2VideoCondition(picture(96, 64), index=0, strength=0.6, crf=0)])


VERSION_2_3 = {"cross_attn_mod": True, "audio_cross_attn_mod": True, "gated_attn": True, "audio_gated_attn": True}
VARIANTS: dict[str, Callable[[int], TinyPipeline]] = {
    "ltx-2, picture to video": image_to_video,
    "ltx-2, a frame in part": conditioned,
    "ltx-2.3": lambda seed: around(
        diffusers.LTX2Pipeline(**parts(), transformer=transformer(seed, **VERSION_2_3, perturbed_attn=True))
    ),
}
