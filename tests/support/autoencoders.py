"""Tiny autoencoders."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def make_autoencoder(folder: Path, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    AutoencoderKL(
        **{
            "in_channels": 1,
            "out_channels": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
            **options,
        }
    ).save_pretrained(folder)
    return folder
