"""A second Diffusion Transformer to compare with, and random weights for it: plain tensor arithmetic, no modules.

Written from Peebles and Xie (arXiv:2212.09748), Section 3.2 and Figure 3 (adaLN-Zero): patches as tokens, fixed 2-D
sin-cos positions, the timestep as 256 sinusoidal features (DDPM, GLIDE) through a two-layer SiLU network, tanh-GELU in
the MLPs. Weights are a state dict under the names of the published checkpoints; it computes in their dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]

NUM_FEATURES = 256
EPSILON = 1e-6


@dataclass(frozen=True)
class Architecture:
    """What a state dict is the state dict of. Every field shows in the shapes, save `num_heads`."""

    image_size: int
    patch_size: int
    in_channels: int
    width: int
    num_blocks: int
    num_heads: int
    num_classes: int
    learn_variance: bool = True
    mlp_ratio: int = 4

    @property
    def side(self) -> int:
        """Patches along an edge of the picture."""
        return self.image_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """C_out."""
        return self.in_channels * (2 if self.learn_variance else 1)


def random_weights(arch: Architecture, seed: int = 0) -> Weights:
    """Every tensor of a published checkpoint, all random but the positions.

    Each linear map keeps the size of what goes through it, so that activations stay near 1; none is zero, as gates
    and output are in a fresh model.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def add_linear(name: str, num_outputs: int, num_inputs: int) -> None:
        weights[f"{name}.weight"] = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
        weights[f"{name}.bias"] = torch.randn(num_outputs, generator=generator) * 0.2

    d, p, channels = arch.width, arch.patch_size, arch.in_channels
    add_linear("x_embedder.proj", d, channels * p * p)
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].reshape(d, channels, p, p)
    weights["pos_embed"] = positions(arch.side, d).float()[None]
    add_linear("t_embedder.mlp.0", d, NUM_FEATURES)
    add_linear("t_embedder.mlp.2", d, d)
    weights["y_embedder.embedding_table.weight"] = torch.randn(arch.num_classes + 1, d, generator=generator)
    for index in range(arch.num_blocks):
        block = f"blocks.{index}"
        add_linear(f"{block}.attn.qkv", 3 * d, d)
        add_linear(f"{block}.attn.proj", d, d)
        add_linear(f"{block}.mlp.fc1", arch.mlp_ratio * d, d)
        add_linear(f"{block}.mlp.fc2", d, arch.mlp_ratio * d)
        add_linear(f"{block}.adaLN_modulation.1", 6 * d, d)
    add_linear("final_layer.adaLN_modulation.1", 2 * d, d)
    add_linear("final_layer.linear", p * p * arch.out_channels, d)
    return weights


def positions(side: int, width: int) -> Tensor:
    """The token at (row, column): sin and cos of the column, then of the row, each at width / 4 frequencies."""
    table = torch.empty(side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                omega = 1 / 10000 ** (i / quarter)
                values = (
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                )
                for part, value in enumerate(values):
                    table[row * side + column, part * quarter + i] = value
    return table


def reference_dit(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    num_heads: int,
    depth: int | None = None,
    exit_weights: Weights | None = None,
) -> Tensor:
    """The prediction after `depth` blocks (default: all).  x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W).

    exit_weights: the head that stands there, `final.*` and, where it has a block or an MLP of its own or scales and
    shifts the channels, `block.*`, `hidden.*`, `scale` and `shift`; default: the model's final layer.
    """
    dtype = weights["pos_embed"].dtype
    kernel = weights["x_embedder.proj.weight"]
    p = kernel.shape[-1]
    side = x.shape[-1] // p
    tokens = _patchify(x.to(dtype), p) @ kernel.flatten(1).T + weights["x_embedder.proj.bias"] + weights["pos_embed"]

    hidden = _silu(_linear(_under(weights, "t_embedder.mlp.0"), _timestep_features(t).to(dtype)))
    c = _linear(_under(weights, "t_embedder.mlp.2"), hidden) + weights["y_embedder.embedding_table.weight"][y]

    num_blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for index in range(num_blocks if depth is None else depth):
        tokens = _block(_under(weights, f"blocks.{index}"), tokens, c, num_heads)
    final = _under(weights, "final_layer")
    if exit_weights is not None:
        final = _under(exit_weights, "final")
        if own_block := _under(exit_weights, "block"):
            tokens = _block(own_block, tokens, c, num_heads)
        if hidden := _under(exit_weights, "hidden"):
            if "norm.weight" in hidden:  # scale and shift of its own
                inner = _normalise(tokens) * hidden["norm.weight"] + hidden["norm.bias"]
            else:
                shift, scale = _parts(_linear(_under(hidden, "adaLN_modulation.1"), _silu(c)), 2)
                inner = _normalise(tokens) * (1 + scale) + shift
            tokens = tokens + _mlp(_under(hidden, "mlp"), inner)
        if "scale" in exit_weights:
            tokens = tokens * (1 + exit_weights["scale"]) + exit_weights["shift"]

    shift, scale = _parts(_linear(_under(final, "adaLN_modulation.1"), _silu(c)), 2)
    return _unpatchify(_linear(_under(final, "linear"), _normalise(tokens) * (1 + scale) + shift), side, p)


def _block(w: Weights, tokens: Tensor, c: Tensor, num_heads: int) -> Tensor:
    """Attention, then the MLP, each between its shift and scale and its gate."""
    modulation = _linear(_under(w, "adaLN_modulation.1"), _silu(c))
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = _parts(modulation, 6)
    inside = _normalise(tokens) * (1 + scale_attn) + shift_attn
    tokens = tokens + gate_attn * _attention(_under(w, "attn"), inside, num_heads)
    inside = _normalise(tokens) * (1 + scale_mlp) + shift_mlp
    return tokens + gate_mlp * _mlp(_under(w, "mlp"), inside)


def _mlp(w: Weights, v: Tensor) -> Tensor:
    return _linear(_under(w, "fc2"), _gelu(_linear(_under(w, "fc1"), v)))


def _attention(w: Weights, tokens: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, one head after the other (Vaswani et al., arXiv:1706.03762, Equation 1)."""
    q, k, v = _linear(_under(w, "qkv"), tokens).chunk(3, dim=-1)
    d = tokens.shape[-1] // num_heads
    heads = []
    for low in range(0, num_heads * d, d):
        q_h, k_h, v_h = (part[..., low : low + d] for part in (q, k, v))
        scores = torch.einsum("bid,bjd->bij", q_h, k_h) / math.sqrt(d)
        shares = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        heads.append(shares / shares.sum(dim=-1, keepdim=True) @ v_h)
    return _linear(_under(w, "proj"), torch.cat(heads, dim=-1))


def _timestep_features(t: Tensor) -> Tensor:
    """cos(t w_i), then sin(t w_i), w_i = 10000^(-i / 128).  (B,) -> (B, 256).

    Frequencies and angles are rounded to float32, in the order of the published code: an angle near 1000 is known to
    3e-5 only, and those are the features that models were trained on.
    """
    half = NUM_FEATURES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.double().cos(), angles.double().sin()], dim=1)


def _patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * p * p): patches row by row, each channel by channel."""
    rows, columns = range(0, x.shape[2], p), range(0, x.shape[3], p)
    return torch.stack([x[:, :, i : i + p, j : j + p].flatten(1) for i in rows for j in columns], dim=1)


def _unpatchify(tokens: Tensor, side: int, p: int) -> Tensor:
    """(B, N, p * p * C_out) -> (B, C_out, H, W). Here a patch is pixel by pixel, the channels of each together."""
    batch, _, size = tokens.shape
    picture = tokens.new_empty(batch, size // p**2, side * p, side * p)
    for token in range(side * side):
        top, left = token // side * p, token % side * p
        for pixel in range(p * p):
            channels = tokens[:, token, pixel * picture.shape[1] : (pixel + 1) * picture.shape[1]]
            picture[:, :, top + pixel // p, left + pixel % p] = channels
    return picture


def _under(weights: Weights, prefix: str) -> Weights:
    """The tensors below a name, without it."""
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def _linear(w: Weights, v: Tensor) -> Tensor:
    return v @ w["weight"].T + w["bias"]


def _parts(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, count * D) -> count times (B, 1, D)."""
    return modulation[:, None].chunk(count, dim=-1)


def _normalise(v: Tensor) -> Tensor:
    """Layer norm without learned scale and shift."""
    centred = v - v.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + EPSILON)


def _silu(v: Tensor) -> Tensor:
    return v * torch.sigmoid(v)


def _gelu(v: Tensor) -> Tensor:
    """The tanh form (Hendrycks and Gimpel, arXiv:1606.08415, Section 2)."""
    return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
