"""AuraFlow as diffusers ships it, tiny: a family that no adapter knows."""

import diffusers
import torch
from torch import Tensor

from support.tiny_pipelines import NEGATIVE, SIZE, TEXT_LENGTH, TinyPipeline, prompts, quiet, seeded, t5, tokenizer, vae


def aura_flow() -> TinyPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=24,
        pos_embed_max_size=64,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.7)
    pipe = diffusers.AuraFlowPipeline(tokenizer(clip=False), t5(), vae(), seeded(transformer), scheduler)

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    settings = {**SIZE, "output_type": "latent", "max_sequence_length": TEXT_LENGTH}
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings)


def one_sequence(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What its single blocks run on: text and picture."""
    return {"hidden_states": torch.cat([values["encoder_hidden_states"], values["hidden_states"]], dim=1)}
