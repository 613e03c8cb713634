"""Wan: one transformer (2.1), two experts (2.2), a timestep per token (2.2's 5B model), from pictures and videos."""

from collections.abc import Callable
from dataclasses import replace

import diffusers
import torch
import transformers
from torch import Tensor, nn

from support.tiny_pipelines import NEGATIVE, TEXT_LENGTH, TinyPipeline, picture, prompts, quiet, seeded, t5, tokenizer

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


def from_embeddings(tiny: TinyPipeline, length: int = TEXT_LENGTH) -> TinyPipeline:
    """Calls with embedded prompts: the pipelines that start from pictures need ftfy to read text."""

    def embedded(count: int, first: int) -> Tensor:
        return torch.stack([torch.randn(length, 32, generator=numbered(first + index)) for index in range(count)])

    def of(call: Callable[[int], dict[str, object]]) -> Callable[[int], dict[str, object]]:
        return lambda count: {
            "guidance_scale": call(count)["guidance_scale"],
            "prompt_embeds": embedded(count, 1),
            "negative_prompt_embeds": embedded(1, 0).expand(count, -1, -1),
        }

    def numbered(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return replace(tiny, guided=of(tiny.guided), unguided=of(tiny.unguided))


def tiny(seed: int) -> TinyPipeline:
    return around(diffusers.WanPipeline(**parts(), transformer=transformer(seed)))


def two_experts(seed: int, **config: object) -> TinyPipeline:
    """Wan 2.2: the second expert takes over below timestep 700."""
    experts = {"transformer": transformer(seed), "transformer_2": transformer(seed + 1)}
    return around(diffusers.WanPipeline(**parts(), **experts, boundary_ratio=0.7, **config))


def image_to_video(seed: int, **config: object) -> TinyPipeline:
    """The picture's latents and their mask as further channels; no features of it (2.2)."""
    channels = 4 if config.get("expand_timesteps") else 12
    pipe = diffusers.WanImageToVideoPipeline(**parts(), transformer=transformer(seed, in_channels=channels), **config)
    return from_embeddings(around(pipe, image=picture(96, 64)))


def with_features(seed: int, *, last: bool) -> TinyPipeline:
    """Wan 2.1: the blocks attend to features of the picture, or of a first and a last picture."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    changes = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
    pipe = diffusers.WanImageToVideoPipeline(
        **parts(),
        transformer=transformer(seed, **changes, pos_embed_seq_len=10 if last else None),
        image_encoder=seeded(transformers.CLIPVisionModel(config)),
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )
    pictures = {"image": picture(96, 64)} | ({"last_image": picture(96, 64, seed=1)} if last else {})
    return from_embeddings(around(pipe, **pictures), length=512)  # the blocks take prompts to be so long


def video_to_video(seed: int) -> TinyPipeline:
    """Starts at the second of three steps."""
    pipe = diffusers.WanVideoToVideoPipeline(**parts(), transformer=transformer(seed))
    found = around(pipe, video=[picture(96, 64, seed=index) for index in range(9)], strength=0.7)
    del found.settings["num_frames"]
    return from_embeddings(found)


VARIANTS: dict[str, Callable[[int], TinyPipeline]] = {
    "wan, a timestep per token": lambda seed: around(
        diffusers.WanPipeline(**parts(), transformer=transformer(seed), expand_timesteps=True)
    ),
    "wan, picture to video": image_to_video,
    "wan, picture to video with a timestep per token": lambda seed: image_to_video(seed, expand_timesteps=True),
    "wan, features of a picture": lambda seed: with_features(seed, last=False),
    "wan, features of two pictures": lambda seed: with_features(seed, last=True),
    "wan, video to video": video_to_video,
}
