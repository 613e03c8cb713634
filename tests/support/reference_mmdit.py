"""A second MM-DiT to compare with, and random weights for it: plain tensor arithmetic, no modules.

Written from Esser et al. (arXiv:2403.03206), Section 4, Figure 2 and Section 5.3.2: two streams with weights of their
own, joined for attention alone; y = MLP(timestep) + MLP(pooled text) modulates both; queries and keys are normalised by
their root mean square; the last block's text is only read. Weights have the names of the published checkpoints.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from support.reference_dit import EPSILON, NUM_FEATURES, Weights


@dataclass(frozen=True)
class Architecture:
    """What a state dict is the state dict of."""

    rows: int
    columns: int
    patch_size: int
    channels: int
    width: int
    num_blocks: int
    num_heads: int
    text_width: int
    pooled_width: int
    qk_norm: bool = True


def random_weights(arch: Architecture, seed: int = 0) -> Weights:
    """Every tensor, all random. Each linear map keeps the size of what goes through it."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def linear(name: str, num_outputs: int, num_inputs: int) -> None:
        weights[f"{name}.weight"] = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
        weights[f"{name}.bias"] = torch.randn(num_outputs, generator=generator) * 0.2

    d, p, c = arch.width, arch.patch_size, arch.channels
    linear("x_embedder.proj", d, c * p * p)
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].reshape(d, c, p, p)
    weights["pos_embed"] = torch.randn(1, arch.rows * arch.columns, d, generator=generator)
    for name, inputs in (("t_embedder", NUM_FEATURES), ("y_embedder", arch.pooled_width)):
        linear(f"{name}.mlp.0", d, inputs)
        linear(f"{name}.mlp.2", d, d)
    linear("context_embedder", d, arch.text_width)
    for index in range(arch.num_blocks):
        for stream in ("x_block", "context_block"):
            only_read = stream == "context_block" and index == arch.num_blocks - 1
            name = f"joint_blocks.{index}.{stream}"
            linear(f"{name}.attn.qkv", 3 * d, d)
            if arch.qk_norm:
                for norm in ("ln_q", "ln_k"):
                    scale = 1 + 0.3 * torch.randn(d // arch.num_heads, generator=generator)
                    weights[f"{name}.attn.{norm}.weight"] = scale
            linear(f"{name}.adaLN_modulation.1", (2 if only_read else 6) * d, d)
            if not only_read:
                linear(f"{name}.attn.proj", d, d)
                linear(f"{name}.mlp.fc1", 4 * d, d)
                linear(f"{name}.mlp.fc2", d, 4 * d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    linear("final_layer.linear", p * p * c, d)
    return weights


def reference_mmdit(
    weights: Weights, arch: Architecture, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, depth: int | None = None
) -> Tensor:
    """The velocity after `depth` blocks (all by default).  x: (B, C, H, W), text: (B, S, D_text) -> (B, C, H, W)."""

    def linear(name: str, z: Tensor) -> Tensor:
        return z @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def two_layers(name: str, z: Tensor) -> Tensor:
        hidden = linear(f"{name}.mlp.0", z)
        return linear(f"{name}.mlp.2", hidden * torch.sigmoid(hidden))

    def modulation(name: str, parts: int) -> list[Tensor]:
        m = linear(f"{name}.adaLN_modulation.1", y * torch.sigmoid(y))
        return [m[:, None, i * arch.width : (i + 1) * arch.width] for i in range(parts)]

    def normed(z: Tensor) -> Tensor:
        mean = z.mean(-1, keepdim=True)
        return (z - mean) / ((z - mean).pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()

    def by_heads(z: Tensor) -> Tensor:
        return z.reshape(*z.shape[:2], arch.num_heads, -1).transpose(1, 2)

    def queries(name: str, z: Tensor) -> list[Tensor]:
        parts = [by_heads(part) for part in linear(f"{name}.attn.qkv", z).split(arch.width, dim=-1)]
        if arch.qk_norm:
            for i, norm in enumerate(("ln_q", "ln_k")):
                size = (parts[i].pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
                parts[i] = parts[i] / size * weights[f"{name}.attn.{norm}.weight"]
        return parts

    def mlp(name: str, z: Tensor) -> Tensor:
        hidden = linear(f"{name}.mlp.fc1", z)
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return linear(f"{name}.mlp.fc2", 0.5 * hidden * (1 + torch.tanh(inner)))

    batch, p = len(x), arch.patch_size
    patches = x.reshape(batch, arch.channels, arch.rows, p, arch.columns, p).permute(0, 2, 4, 1, 3, 5)
    picture = linear("x_embedder.proj", patches.reshape(batch, arch.rows * arch.columns, -1)) + weights["pos_embed"]
    half = NUM_FEATURES // 2
    frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    y = two_layers("t_embedder", torch.cat([angles.cos(), angles.sin()], 1).to(x)) + two_layers("y_embedder", pooled)
    caption = linear("context_embedder", text)

    for index in range(arch.num_blocks if depth is None else depth):
        names = [f"joint_blocks.{index}.{stream}" for stream in ("x_block", "context_block")]
        last = index == arch.num_blocks - 1
        of_picture, of_caption = modulation(names[0], 6), modulation(names[1], 2 if last else 6)
        q, k, v = (
            torch.cat(both, dim=2)
            for both in zip(
                queries(names[0], normed(picture) * (1 + of_picture[1]) + of_picture[0]),
                queries(names[1], normed(caption) * (1 + of_caption[1]) + of_caption[0]),
                strict=True,
            )
        )
        weight = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(arch.width / arch.num_heads), dim=-1)
        attended = (weight @ v).transpose(1, 2).reshape(batch, -1, arch.width)
        streams = []
        for name, z, own, found in (
            (names[0], picture, of_picture, attended[:, : picture.shape[1]]),
            (names[1], caption, of_caption, attended[:, picture.shape[1] :]),
        ):
            if len(own) == 2:
                streams.append(z)
                continue
            z = z + own[2] * linear(f"{name}.attn.proj", found)
            streams.append(z + own[5] * mlp(name, normed(z) * (1 + own[4]) + own[3]))
        picture, caption = streams

    shift, scale = modulation("final_layer", 2)
    out = linear("final_layer.linear", normed(picture) * (1 + scale) + shift)
    out = out.reshape(batch, arch.rows, arch.columns, p, p, arch.channels).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, arch.channels, arch.rows * p, arch.columns * p)
