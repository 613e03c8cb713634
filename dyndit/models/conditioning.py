"""Four ways to give timestep and label to the blocks of a DiT (Peebles and Xie 2022, arXiv:2212.09748, Section 3.2).

| name | how the blocks learn of t and y |
|---|---|
| in-context | both embeddings are appended to the sequence as two more tokens; the head removes them |
| cross-attention | every block also attends to a sequence of the two embeddings |
| adaln | the sum of the embeddings gives each layer norm its shift and scale |
| adaln-zero | the same, and a gate before each addition; gates start at zero, so a block starts as the identity |

The first two keep standard layer norms with learned scale and shift, in the final layer too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.layers import DiTBlock, FinalLayer, Mlp, modulate, zero_linear

ConditioningName = Literal["in-context", "cross-attention", "adaln", "adaln-zero"]

NUM_CONTEXT_TOKENS = 2
"""Tokens that carry the condition: the timestep's embedding, then the label's."""


class PlainBlock(nn.Module):
    """A standard transformer block: attention and MLP after layer norms, without conditioning of its own."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float, mlp_norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """Run the block.  x: (B, N + 2, D) with the condition among the tokens; `given` is not read."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def reset(self) -> None:
        """Keep the standard initialisation."""


class CrossAttentionBlock(PlainBlock):
    """A standard block with multi-head cross-attention between attention and MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float, mlp_norm_eps: float) -> None:
        super().__init__(width, num_heads, mlp_ratio, norm_eps, mlp_norm_eps)
        self.norm_cross = nn.LayerNorm(width, eps=norm_eps)
        self.cross_attn = CrossAttention(width, num_heads)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """Run the block.  x: (B, N, D), given: (B, 2, D), the condition's tokens -> (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), given)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Multi-head attention from picture tokens to the tokens of the condition."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend.  x: (B, N, D), context: (B, M, D) -> (B, N, D)."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(x), *self.kv(context).chunk(2, dim=-1))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AdaLNBlock(DiTBlock):
    """Attention and MLP after layer norms whose shift and scale come from the condition; no gates."""

    num_modulations = 4

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the block.  x: (B, N, D), c: (B, D) -> (B, N, D)."""
        shift_a, scale_a, shift_m, scale_m = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def reset(self) -> None:
        """Keep the standard initialisation: only adaLN-Zero starts as the identity."""


class PlainFinalLayer(nn.Module):
    """A standard layer norm and a linear map to patches. It removes tokens of the condition first."""

    def __init__(self, width: int, num_outputs: int, norm_eps: float, num_extra: int = 0) -> None:
        super().__init__()
        self.num_extra = num_extra
        self.norm_final = nn.LayerNorm(width, eps=norm_eps)
        self.linear = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Predict patches.  x: (B, N + num_extra, D); c is not read -> (B, N, patch * patch * C_out)."""
        return self.linear(self.norm_final(x[:, : x.shape[1] - self.num_extra]))

    def reset(self) -> None:
        """Zero the output."""
        zero_linear(self.linear)


class AdaLNFinalLayer(FinalLayer):
    """The final layer of adaLN: only its output starts at zero, its modulation as any other linear map."""

    def reset(self) -> None:
        """Zero the output."""
        zero_linear(self.linear)


@dataclass(frozen=True)
class ContextState(State):
    """The state of a backbone with cross-attention.  context: (B, 2, D), the tokens that blocks attend to."""

    context: Tensor


class ConditioningKind(Protocol):
    """One way to condition: the modules of a backbone, and what they read of the condition."""

    block: Callable[..., nn.Module]
    """Makes a block of (width, num_heads, mlp_ratio, norm_eps, mlp_norm_eps): (tokens, what `given` returns) -> tokens.
    Its `reset` sets the first weights."""
    final: Callable[..., nn.Module]
    """Makes a final layer of (width, num_outputs, norm_eps): (tokens, cond (B, D)) -> patches (B, N, p * p * C_out)."""

    def state(self, tokens: Tensor, t: Tensor, y: Tensor) -> State:
        """Return the state before block 0.  tokens: (B, N, D), embeddings t and y: (B, D)."""
        ...

    def given(self, state: Any) -> Tensor:
        """Return what a block reads of the condition beside the tokens."""
        ...


class AdaLNZero:
    """Shift, scale and gate from the condition: the published model."""

    block: Callable[..., nn.Module] = staticmethod(DiTBlock)
    final: Callable[..., nn.Module] = staticmethod(FinalLayer)

    def state(self, tokens: Tensor, t: Tensor, y: Tensor) -> State:
        """See `ConditioningKind`."""
        return State(tokens, t + y)

    def given(self, state: Any) -> Tensor:
        """See `ConditioningKind`."""
        return state.cond


class AdaLN(AdaLNZero):
    """Shift and scale from the condition."""

    block, final = staticmethod(AdaLNBlock), staticmethod(AdaLNFinalLayer)


class InContext(AdaLNZero):
    """Timestep and label as two tokens at the end of the sequence."""

    block = staticmethod(PlainBlock)
    final = staticmethod(partial(PlainFinalLayer, num_extra=NUM_CONTEXT_TOKENS))

    def state(self, tokens: Tensor, t: Tensor, y: Tensor) -> State:
        """See `ConditioningKind`."""
        return State(torch.cat([tokens, t[:, None], y[:, None]], dim=1), t + y)


class CrossAttended(AdaLNZero):
    """Timestep and label as a sequence of two tokens that every block attends to."""

    block, final = staticmethod(CrossAttentionBlock), staticmethod(PlainFinalLayer)

    def state(self, tokens: Tensor, t: Tensor, y: Tensor) -> State:
        """See `ConditioningKind`."""
        return ContextState(tokens, t + y, torch.stack([t, y], dim=1))

    def given(self, state: Any) -> Tensor:
        """See `ConditioningKind`."""
        return state.context


CONDITIONINGS: dict[ConditioningName, Any] = {
    "in-context": InContext(),
    "cross-attention": CrossAttended(),
    "adaln": AdaLN(),
    "adaln-zero": AdaLNZero(),
}
"""Every conditioning by its name in `DiTConfig.conditioning`."""
