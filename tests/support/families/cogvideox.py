"""CogVideoX, from prompts, pictures, videos and control videos."""

from collections.abc import Callable
from dataclasses import replace

import diffusers
import torch
from torch import nn

from support.tiny_pipelines import NEGATIVE, TEXT_LENGTH, TinyPipeline, picture, prompts, quiet, seeded, t5, tokenizer

FAMILY = "CogVideoXTransformer3DModel"
# Latents of 3 frames of 8 x 12.
SIZE = {"height": 64, "width": 96, "max_sequence_length": TEXT_LENGTH, "output_type": "latent"}


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 24,
        "text_embed_dim": 32,
        "num_layers": 4,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_LENGTH,
        "use_rotary_positional_embeddings": True,
    }
    model = seeded(diffusers.CogVideoXTransformer3DModel(**config | changes), seed)
    with torch.no_grad():  # random norms shrink the tokens, so that attention would hardly see the prompt
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                norm.norm.weight.fill_(1.0)
                norm.linear.weight.mul_(3.0)
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.fill_(3.0)
    return model


def parts() -> dict[str, object]:
    """Everything but the transformer."""
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return {"tokenizer": tokenizer(clip=False), "text_encoder": t5(), "vae": seeded(vae), "scheduler": scheduler}


def around(pipe: diffusers.DiffusionPipeline, **settings: object) -> TinyPipeline:
    """The pipeline with its calls."""

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), SIZE | settings, channels=2)


def tiny(seed: int) -> TinyPipeline:
    return around(diffusers.CogVideoXPipeline(**parts(), transformer=transformer(seed)), num_frames=9)


def video() -> list[object]:
    return [picture(96, 64, seed=index) for index in range(9)]


def with_each(tiny: TinyPipeline, name: str, value: object) -> TinyPipeline:
    """Calls that pass the value once for each picture."""

    def of(call: Callable[[int], dict[str, object]]) -> Callable[[int], dict[str, object]]:
        return lambda count: call(count) | {name: [value] * count}

    return replace(tiny, guided=of(tiny.guided), unguided=of(tiny.unguided))


def image_to_video(seed: int, **changes: object) -> TinyPipeline:
    """The picture's latents as further channels."""
    pipe = diffusers.CogVideoXImageToVideoPipeline(**parts(), transformer=transformer(seed, in_channels=8, **changes))
    return with_each(around(pipe, num_frames=9), "image", picture(96, 64))


def control(seed: int) -> TinyPipeline:
    """The control video's latents as further channels."""
    pipe = diffusers.CogVideoXFunControlPipeline(**parts(), transformer=transformer(seed, in_channels=8))
    return with_each(around(pipe), "control_video", video())


def video_to_video(seed: int) -> TinyPipeline:
    """Starts at the second of three steps."""
    pipe = diffusers.CogVideoXVideoToVideoPipeline(**parts(), transformer=transformer(seed))
    return with_each(around(pipe, strength=0.7), "video", video())


def multistep(seed: int) -> TinyPipeline:
    """The solver that is handed its own last prediction."""
    scheduler = diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipe = diffusers.CogVideoXPipeline(**parts() | {"scheduler": scheduler}, transformer=transformer(seed))
    return around(pipe, num_frames=9)


VERSION_1_5 = {"patch_size_t": 2, "ofs_embed_dim": 24, "sample_frames": 13}
VARIANTS: dict[str, Callable[[int], TinyPipeline]] = {
    "cogvideox, picture to video": image_to_video,
    "cogvideox 1.5, picture to video": lambda seed: image_to_video(seed, **VERSION_1_5),
    "cogvideox, control": control,
    "cogvideox, video to video": video_to_video,
    "cogvideox, multistep": multistep,
}
