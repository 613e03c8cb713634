"""Translate tensor names between diffusers' `DiTTransformer2DModel` and the native (published) names.

diffusers splits `attn.qkv` into thirds, stores the timestep and label embedders once per block, and computes the
positions at each load instead of storing them.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dyndit.errors import CheckpointError
from dyndit.models.layers import position_features

FREQUENCY_SHIFT = "_dyndit_frequency_shift"
"""Name in config.json of the frequency shift that the weights were trained with. diffusers keeps and ignores it."""

PROCESS = "_dyndit_process"
"""Name in config.json of the process that the weights were trained for."""

_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
POSITIONS = "pos_embed.pos_embed"
"""Buffer that diffusers computes at each load and does not store."""
_THIRDS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def to_native(tensors: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Rename the tensors of `DiTTransformer2DModel.state_dict()`.  side: patches along an edge of the picture.

    Raises CheckpointError: a tensor is missing or extra, or blocks have different embedders.
    """
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise CheckpointError(f"DiTTransformer2DModel: lacks the tensor {name}")
        return left.pop(name)

    native: dict[str, Tensor] = {}
    for theirs, ours in _OUTER.items():
        for kind in ("weight", "bias"):
            native[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
    native["pos_embed"] = position_features(side, side, native["x_embedder.proj.weight"].shape[0])[None]
    if POSITIONS in left:
        native["pos_embed"] = take(POSITIONS)
        own_positions(native)  # refuses learned positions
    for theirs, ours in _EMBEDDERS.items():
        native[ours] = left.get(f"transformer_blocks.0.norm1.emb.{theirs}", torch.empty(0))
    for index in range(num_blocks(tensors)):
        here, there = f"transformer_blocks.{index}", f"blocks.{index}"
        for theirs, ours in _EMBEDDERS.items():
            if not torch.equal(take(f"{here}.norm1.emb.{theirs}"), native[ours]):
                raise CheckpointError(
                    f"DiTTransformer2DModel: {here}.norm1.emb.{theirs} differs from block 0's; a DiT has one embedder"
                )
        for kind in ("weight", "bias"):
            native[f"{there}.attn.qkv.{kind}"] = torch.cat([take(f"{here}.{third}.{kind}") for third in _THIRDS])
            for theirs, ours in _BLOCK.items():
                native[f"{there}.{ours}.{kind}"] = take(f"{here}.{theirs}.{kind}")
    if left:
        raise CheckpointError(f"DiTTransformer2DModel: has {len(left)} extra tensors, first {min(left)}")
    return native


def from_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a native state dict for `DiTTransformer2DModel`. Leave out the positions, which the class computes.

    Positions that were rounded to half precision are kept, under a name that diffusers ignores.

    Raises CheckpointError: the positions are not the sin-cos positions that diffusers computes.
    """
    positions = own_positions(tensors)
    theirs = {} if positions is None else {POSITIONS: positions}
    theirs |= {f"{t}.{kind}": tensors[f"{o}.{kind}"] for t, o in _OUTER.items() for kind in ("weight", "bias")}
    for index in range(1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks."))):
        here, there = f"transformer_blocks.{index}", f"blocks.{index}"
        theirs |= {f"{here}.norm1.emb.{t}": tensors[o].clone() for t, o in _EMBEDDERS.items()}
        for kind in ("weight", "bias"):
            thirds = tensors[f"{there}.attn.qkv.{kind}"].chunk(3)
            theirs |= {f"{here}.{t}.{kind}": third.clone() for t, third in zip(_THIRDS, thirds, strict=True)}
            theirs |= {f"{here}.{t}.{kind}": tensors[f"{there}.{o}.{kind}"] for t, o in _BLOCK.items()}
    return theirs


def own_positions(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the positions of a native state dict if they differ from computed positions by rounding, else None.

    Raises CheckpointError: they differ by more than rounding.
    """
    found = tensors["pos_embed"]
    side = isqrt(found.shape[1]) if found.ndim == 3 else 0
    computed = position_features(side, side, tensors["x_embedder.proj.weight"].shape[0])[None].to(found.device)
    if found.shape == computed.shape and torch.equal(found.float(), computed):
        return None
    # Half precision moves values in [-1, 1] by up to 2 ** -12, bfloat16 by up to 2 ** -9.
    if found.shape != computed.shape or not torch.allclose(found.float(), computed, rtol=0, atol=2**-8):
        raise CheckpointError("pos_embed: not the fixed 2-D sin-cos positions, which are all that diffusers' DiT has")
    return found


def num_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Count the blocks in a diffusers state dict."""
    return 1 + max((int(n.split(".")[1]) for n in tensors if n.startswith("transformer_blocks.")), default=-1)


def frequency_shift_of(transformer: Any) -> int:
    """Return the shift of the timestep features: 1 as diffusers builds them, or as `match_frequencies` set it."""
    return int(transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift)


def match_frequencies(transformer: Any, frequency_shift: int) -> None:
    """Set the frequency shift of a `DiTTransformer2DModel`: 0 for weights trained with the published code.

    Call it after every load: diffusers builds the class with 1 and has no argument for it.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift
