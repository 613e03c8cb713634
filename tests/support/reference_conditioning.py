"""The three other ways to condition, written a second time: plain tensor arithmetic, no modules.

From Peebles and Xie (arXiv:2212.09748), Section 3.2: in-context tokens, cross-attention as in Vaswani et al.
(arXiv:1706.03762), and adaptive layer norm without gates. Weights are a state dict under the package's names.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from support.reference_dit import (
    Weights,
    _attention,
    _linear,
    _mlp,
    _normalise,
    _parts,
    _patchify,
    _silu,
    _timestep_features,
    _under,
    _unpatchify,
)


@dataclass(frozen=True)
class Embedded:
    """The inputs after their embeddings.  tokens: (B, N, D), t and y: (B, D)."""

    tokens: Tensor
    t: Tensor
    y: Tensor
    side: int
    patch: int


def embedded(weights: Weights, x: Tensor, t: Tensor, y: Tensor) -> Embedded:
    """Patches with positions, the timestep through its network, the label's row."""
    kernel = weights["x_embedder.proj.weight"]
    patch = kernel.shape[-1]
    tokens = _patchify(x.to(kernel.dtype), patch) @ kernel.flatten(1).T
    tokens = tokens + weights["x_embedder.proj.bias"] + weights["pos_embed"]
    hidden = _silu(_linear(_under(weights, "t_embedder.mlp.0"), _timestep_features(t).to(kernel.dtype)))
    time = _linear(_under(weights, "t_embedder.mlp.2"), hidden)
    label = weights["y_embedder.embedding_table.weight"][y]
    return Embedded(tokens, time, label, x.shape[-1] // patch, patch)


def _norm(w: Weights, v: Tensor) -> Tensor:
    """Layer norm with learned scale and shift."""
    return _normalise(v) * w["weight"] + w["bias"]


def _cross(w: Weights, tokens: Tensor, context: Tensor, num_heads: int) -> Tensor:
    """Queries from the picture, keys and values from the condition, one head after the other."""
    q = _linear(_under(w, "q"), tokens)
    k, v = _linear(_under(w, "kv"), context).chunk(2, dim=-1)
    d = tokens.shape[-1] // num_heads
    heads = []
    for low in range(0, num_heads * d, d):
        scores = torch.einsum("bid,bjd->bij", q[..., low : low + d], k[..., low : low + d]) / math.sqrt(d)
        heads.append(torch.softmax(scores, dim=-1) @ v[..., low : low + d])
    return _linear(_under(w, "proj"), torch.cat(heads, dim=-1))


def in_context(weights: Weights, x: Tensor, t: Tensor, y: Tensor, num_heads: int, depth: int) -> Tensor:
    """The prediction after `depth` standard blocks on N + 2 tokens."""
    e = embedded(weights, x, t, y)
    tokens = torch.cat([e.tokens, e.t[:, None], e.y[:, None]], dim=1)
    for index in range(depth):
        w = _under(weights, f"blocks.{index}")
        tokens = tokens + _attention(_under(w, "attn"), _norm(_under(w, "norm1"), tokens), num_heads)
        tokens = tokens + _mlp(_under(w, "mlp"), _norm(_under(w, "norm2"), tokens))
    return _plain_head(weights, tokens[:, : e.side**2], e)


def cross_attention(weights: Weights, x: Tensor, t: Tensor, y: Tensor, num_heads: int, depth: int) -> Tensor:
    """The prediction after `depth` blocks that attend to themselves, then to timestep and label."""
    e = embedded(weights, x, t, y)
    tokens, context = e.tokens, torch.stack([e.t, e.y], dim=1)
    for index in range(depth):
        w = _under(weights, f"blocks.{index}")
        tokens = tokens + _attention(_under(w, "attn"), _norm(_under(w, "norm1"), tokens), num_heads)
        asked = _norm(_under(w, "norm_cross"), tokens)
        tokens = tokens + _cross(_under(w, "cross_attn"), asked, context, num_heads)
        tokens = tokens + _mlp(_under(w, "mlp"), _norm(_under(w, "norm2"), tokens))
    return _plain_head(weights, tokens, e)


def adaln(weights: Weights, x: Tensor, t: Tensor, y: Tensor, num_heads: int, depth: int) -> Tensor:
    """The prediction after `depth` blocks with shift and scale from the condition, and no gate."""
    e = embedded(weights, x, t, y)
    tokens, c = e.tokens, _silu(e.t + e.y)
    for index in range(depth):
        w = _under(weights, f"blocks.{index}")
        shift_a, scale_a, shift_m, scale_m = _parts(_linear(_under(w, "adaLN_modulation.1"), c), 4)
        tokens = tokens + _attention(_under(w, "attn"), _normalise(tokens) * (1 + scale_a) + shift_a, num_heads)
        tokens = tokens + _mlp(_under(w, "mlp"), _normalise(tokens) * (1 + scale_m) + shift_m)
    final = _under(weights, "final_layer")
    shift, scale = _parts(_linear(_under(final, "adaLN_modulation.1"), c), 2)
    return _unpatchify(_linear(_under(final, "linear"), _normalise(tokens) * (1 + scale) + shift), e.side, e.patch)


def _plain_head(weights: Weights, tokens: Tensor, e: Embedded) -> Tensor:
    final = _under(weights, "final_layer")
    return _unpatchify(_linear(_under(final, "linear"), _norm(_under(final, "norm_final"), tokens)), e.side, e.patch)


REFERENCES = {"in-context": in_context, "cross-attention": cross_attention, "adaln": adaln}
"""Reference of each conditioning: (weights, x, t, y, num_heads, depth) -> (B, C_out, H, W)."""
