"""FLUX.2 Klein as diffusers ships it, tiny."""

import diffusers
import transformers
from torch import nn

from support.tiny_pipelines import SIZE, TinyPipeline, prompts, quiet, seeded, tokenizer

FAMILY = "Flux2Transformer2DModel"
TEXT_LENGTH = 12


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return seeded(transformers.Qwen3ForCausalLM(config))


def chat_tokenizer(length: int = TEXT_LENGTH) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a chat template of two words."""
    words = tokenizer(clip=False)
    words.model_max_length = length
    words.chat_template = "{% for message in messages %}the {{ message['content'] }} moon{% endfor %}"
    return words


def vae() -> nn.Module:
    """Half the size of the picture, four channels."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return seeded(diffusers.AutoencoderKLFlux2(**config))


def transformer(seed: int, **changes: object) -> nn.Module:
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    made = seeded(diffusers.Flux2Transformer2DModel(**config | changes), seed)
    for block in made.single_transformer_blocks:  # so that depth matters: random gates are small
        attention, mlp = block.attn.to_out.weight.data.split((block.attn.inner_dim, block.attn.mlp_hidden_dim), dim=1)
        attention *= 4
        mlp *= 0.5
    return made


def scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def tiny(seed: int) -> TinyPipeline:
    pipe = diffusers.Flux2KleinPipeline(scheduler(), vae(), qwen3(), chat_tokenizer(), transformer(seed))
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), SETTINGS)


def call(count: int, scale: float) -> dict[str, object]:
    return {"prompt": prompts(count), "guidance_scale": scale}


SETTINGS = {
    **SIZE,
    "output_type": "latent",
    "max_sequence_length": TEXT_LENGTH,
    "text_encoder_out_layers": (1, 2),
}
