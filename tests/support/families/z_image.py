"""Z-Image as diffusers ships it, tiny."""

import diffusers
from torch import nn

from support.families.flux2 import chat_tokenizer, qwen3
from support.tiny_pipelines import NEGATIVE, SIZE, TinyPipeline, prompts, quiet, seeded, vae

FAMILY = "ZImageTransformer2DModel"


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "in_channels": 4,
        "dim": 24,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 4, 4],
        "axes_lens": [128, 16, 16],
    }
    made = seeded(diffusers.ZImageTransformer2DModel(**config | changes), seed)
    for block in made.layers:  # so that depth matters: random gates are small
        block.attention_norm2.weight.data *= 8
    return made


def scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def tiny(seed: int) -> TinyPipeline:
    pipe = diffusers.ZImagePipeline(
        scheduler(), vae(scaling_factor=1.5, shift_factor=0.1), qwen3(), chat_tokenizer(), transformer(seed)
    )
    return TinyPipeline(quiet(pipe), lambda n: call(n, 3.0), lambda n: call(n, 0.0), SETTINGS)


def call(count: int, scale: float) -> dict[str, object]:
    return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}


SETTINGS = {**SIZE, "output_type": "latent", "max_sequence_length": 16}
