"""Layers of Diffusion Transformers: functions hold the maths, modules hold the parameters."""

import math
from functools import cache, partial
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

TANH_GELU: Any = partial(nn.GELU, approximate="tanh")
"""The activation of the published code. `Any`: timm asks for a class."""


def timestep_features(t: Tensor, size: int, shift: int = 0) -> Tensor:
    """Return sinusoidal features, cosines first.  t: (B,) -> (B, size)."""
    half = size // 2
    # This order of operations gives the bits of the published code (shift 0) and of diffusers (shift 1).
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t[:, None].float() * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_features(rows: int, columns: int, width: int) -> Tensor:
    """Encode 2-D positions: half the width encodes the column, half the row.  -> (rows * columns, width)."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def axis(num: int) -> Tensor:
        angles = torch.arange(num, dtype=torch.float64)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across, down = axis(columns).repeat(rows, 1), axis(rows).repeat_interleave(columns, dim=0)
    return torch.cat([across, down], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift every token.  x: (B, N, D), shift and scale: (B, D) or (B, N, D) -> (B, N, D)."""
    if shift.ndim == 3:
        return x * (1 + scale) + shift
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Embed timesteps: 256 sinusoidal features, then a two-layer MLP.  t: (B,) -> (B, D)."""

    num_features = 256

    def __init__(self, width: int, frequency_shift: int) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(self.num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps.  t: (B,) -> (B, D)."""
        features = timestep_features(t, self.num_features, self.frequency_shift)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embed labels. The row after the last class is the null label of classifier-free guidance.  y: (B,) -> (B, D)."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels.  y: (B,) -> (B, D)."""
        return self.embedding_table(y)


@cache
def _fuses_bf16() -> bool:
    """Whether this torch build and this CPU have oneDNN's bf16 product that ends in an activation."""
    mkldnn: Any = torch.ops.mkldnn
    built = torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_linear_pointwise")
    return built and bool(mkldnn._is_mkldnn_bf16_supported())


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU of a linear map, in its tanh form.  x: (..., D), weight: (H, D), bias: (H,) -> (..., H).

    On a CPU, bf16 inference takes the product of oneDNN that applies the activation itself. Torch's own tanh costs
    about as much as the product does. Outputs differ by bf16 rounding.
    """
    halved = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if x.device.type == "cpu" and halved and inference and _fuses_bf16():
        mkldnn: Any = torch.ops.mkldnn
        inputs = (tensor.to(torch.bfloat16) for tensor in (x, weight, bias))
        return mkldnn._linear_pointwise(*inputs, "gelu", [], "tanh")
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


class Mlp(timm.layers.Mlp):
    """The MLP of a transformer block, with tanh GELU.  x: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden, act_layer=TANH_GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP.  x: (..., D) -> (..., D)."""
        first = self.fc1
        if type(first) is nn.Linear and not (first._forward_hooks or first._forward_pre_hooks):
            return self.fc2(linear_gelu(x, first.weight, first.bias))
        return super().forward(x)  # adapters, quantised layers and watchers have a forward of their own


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    num_modulations = 6

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float, mlp_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps or norm_eps, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.num_modulations * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the block.  x: (B, N, D), c: (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def reset(self) -> None:
        """Zero the modulation: the block starts as the identity."""
        zero_linear(self.adaLN_modulation[-1])


class FinalLayer(nn.Module):
    """adaLN and a linear map to patches. Exit heads have the same shape."""

    def __init__(self, width: int, num_outputs: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.linear = nn.Linear(width, num_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Predict patches.  x: (B, N, D), c: (B, D) -> (B, N, patch * patch * C_out)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

    def reset(self) -> None:
        """Zero the modulation and the output."""
        zero_linear(self.adaLN_modulation[-1])
        zero_linear(self.linear)


def zero_linear(linear: Any) -> None:
    """Set weight and bias of an `nn.Linear` to zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
