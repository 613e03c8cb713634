"""What of a backbone trains beside its exits: a copy of it, whole, or low-rank adapters on a copy."""

from typing import TYPE_CHECKING

import torch

from dyndit.models.dit import ClassConditionalDiT

if TYPE_CHECKING:
    from peft import LoraModel

LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
"""What gets adapters: the linear maps of a block, without its modulation."""


def trainable_copy(backbone: ClassConditionalDiT) -> ClassConditionalDiT:
    """A copy in single precision, on the same device, with every parameter trainable that a fresh model trains."""
    with torch.random.fork_rng(devices=[]):  # what a fresh model starts from is overwritten
        copy = ClassConditionalDiT.from_config(backbone.config())
    copy.load_state_dict(backbone.state_dict())
    return copy.to(next(backbone.parameters()).device)


def with_adapters(backbone: ClassConditionalDiT, rank: int) -> "LoraModel":
    """Freeze a backbone and put adapters of this rank on its blocks, in place (LoRA: Hu et al. 2021, arXiv:2106.09685).

    It predicts what it did until they are trained. `merge_and_unload()` of what is returned adds them to the weights
    and leaves the plain backbone.
    """
    from peft import LoraConfig, LoraModel  # imports much, for one rung of the ladder

    backbone.requires_grad_(False)
    # Around the blocks, since peft takes the `config` of a module it wraps for a dictionary.
    return LoraModel(backbone.blocks, LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS), "exits")
