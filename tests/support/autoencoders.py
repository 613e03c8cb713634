"""Tiny autoencoders."""

from pathlib import Path

import diffusers
import torch

KL = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
TINY = {
    "in_channels": 1,
    "out_channels": 1,
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
DC = {
    "in_channels": 1,
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), ()),
    "decoder_qkv_multiscales": ((), ()),
    "scaling_factor": 0.4,
}
RAE = {
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "patch_size": 4,
    "encoder_input_size": 28,
    "latents_mean": torch.linspace(-1, 1, 64).reshape(64, 1, 1),
    "latents_std": torch.linspace(0.5, 2, 64).reshape(64, 1, 1),
}
OPTIONS = {"AutoencoderKL": KL, "AutoencoderTiny": TINY, "AutoencoderDC": DC, "AutoencoderRAE": RAE}


def make_autoencoder(folder: Path, seed: int = 0, kind: str = "AutoencoderKL", **options) -> Path:
    torch.manual_seed(seed)
    getattr(diffusers, kind)(**OPTIONS[kind] | options).save_pretrained(folder)
    return folder
