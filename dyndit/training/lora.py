"""Train a backbone beside its exits: a copy of it as a whole, or low-rank adapters on a copy."""

from typing import TYPE_CHECKING

import torch

from dyndit.models.base import Backbone
from dyndit.models.dit import ClassConditionalDiT

if TYPE_CHECKING:
    from peft import LoraModel

LINEARS = ["attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj", "mlp.fc1", "mlp.fc2"]
"""Modules that get adapters: the linear maps of a block, without its modulation."""


def trainable_copy(backbone: Backbone) -> Backbone:
    """Copy a backbone in single precision, on the same device, with the same trainable parameters as a fresh model."""
    with torch.random.fork_rng(devices=[]):  # building draws weights, which are overwritten below
        copy = type(backbone).from_config(backbone.config())
    copy.load_state_dict(backbone.state_dict())
    return copy.to(next(backbone.parameters()).device)


def with_adapters(backbone: ClassConditionalDiT, rank: int) -> "LoraModel":
    """Freeze a backbone and put adapters of this rank on its blocks, in place (LoRA: Hu et al. 2021, arXiv:2106.09685).

    Until the adapters are trained, predictions stay the same. `merge_and_unload()` of the returned module adds them to
    the weights and leaves the plain backbone.
    """
    from peft import LoraConfig, LoraModel  # a large import, needed only here

    backbone.requires_grad_(False)
    # Wrap the blocks, not the backbone: peft takes the `config` of a wrapped module for a dictionary.
    return LoraModel(backbone.blocks, LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS), "exits")
