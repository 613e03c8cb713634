"""The class-conditional Diffusion Transformer of Peebles and Xie, "Scalable Diffusion Models with Transformers"
(ICCV 2023, arXiv:2212.09748), with adaLN-Zero blocks.

Parameter names are those of the published checkpoints (which are timm's), so their state dicts load as they are.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dyndit.errors import InputError
from dyndit.models.base import Backbone, State


@dataclass(frozen=True)
class DiTConfig:
    """The architecture of a class-conditional DiT. Sizes are in pixels (or latent pixels)."""

    image_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    width: int = 1152
    num_blocks: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    label_dropout: float = 0.1
    learn_variance: bool = True
    norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-6
    """Of the norms before the MLPs: as the others in the published code, 1e-5 by default in diffusers' DiT."""
    frequency_shift: int = 0
    """Timestep features cos(t * 10000^(-i / (128 - shift))): 0 in the published code, 1 in diffusers' DiT."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "in_channels", "width", "num_blocks", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.image_size % self.patch_size:
            raise InputError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads or self.width % 4:
            raise InputError(f"width {self.width} must be a multiple of 4 and of num_heads {self.num_heads}")


_UNSEEN = ("num_heads", "norm_eps", "mlp_norm_eps", "frequency_shift")

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

CARDS: dict[str, DiTConfig] = {
    f"DiT-{size}/{patch}": DiTConfig(num_blocks=blocks, width=width, num_heads=heads, patch_size=patch)
    for size, (blocks, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
} | {
    # The small presets work on pixels; each is what a recipe of this repository trains.
    "digits": DiTConfig(8, 2, 1, width=96, num_blocks=12, num_heads=3, num_classes=10),
    "cifar10": DiTConfig(32, 4, 3, width=192, num_blocks=12, num_heads=3, num_classes=10),
}
"""The twelve models of the paper (Table 1; 256 px: latents of 32 x 32 x 4) and the small presets."""


def timestep_features(t: Tensor, size: int, shift: int = 0) -> Tensor:
    """Sinusoidal features, cosines first.  t: (B,) -> (B, size)."""
    half = size // 2
    # In this order of operations the bits are those of the published code (shift 0) and of diffusers (shift 1).
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t[:, None].float() * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_features(side: int, width: int) -> Tensor:
    """Fixed 2-D sin-cos positions: half the width encodes the column, half the row.  -> (side * side, width)."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, N, D), shift and scale: (B, D) -> (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """t: (B,) -> (B, D): 256 sinusoidal features through a two-layer MLP."""

    num_features = 256

    def __init__(self, width: int, frequency_shift: int) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(self.num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B, D)."""
        features = timestep_features(t, self.num_features, self.frequency_shift)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y: (B,) -> (B, D). The row after the last class is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.null_class, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def drop(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Replace each label by the null label with probability `dropout`.

        The training loop calls this with its own generator, so that a step is a function of the seed alone.
        """
        lost = torch.rand(len(y), generator=generator) < self.dropout
        return torch.where(lost.to(y.device), self.null_class, y)

    def forward(self, y: Tensor) -> Tensor:
        """y: (B,) -> (B, D)."""
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float, mlp_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps or norm_eps, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, N, D), c: (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def reset(self) -> None:
        """Zero the modulation: the block starts as the identity."""
        _zero(self.adaLN_modulation[-1])


class FinalLayer(nn.Module):
    """adaLN and a linear map to patches; also the shape of an exit head."""

    def __init__(self, width: int, num_outputs: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.linear = nn.Linear(width, num_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, N, D), c: (B, D) -> (B, N, patch * patch * C_out)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ClassConditionalDiT(Backbone):
    """The standard DiT. Built from a `DiTConfig`; initialised as published."""

    family = "class_conditional"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self._config = config
        self.num_blocks, self.width = c.num_blocks, c.width
        self.num_classes = c.num_classes
        self.null_class = c.num_classes if c.label_dropout > 0 else None
        self.in_channels, self.out_channels = c.in_channels, c.in_channels * (1 + c.learn_variance)
        self.image_size = c.image_size
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(c.image_size, c.patch_size, c.in_channels, c.width, bias=True)
        self.t_embedder = TimestepEmbedder(c.width, c.frequency_shift)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width, c.label_dropout)
        side = c.image_size // c.patch_size
        self.pos_embed = nn.Parameter(position_features(side, c.width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(c.width, c.num_heads, c.mlp_ratio, c.norm_eps, c.mlp_norm_eps) for _ in range(c.num_blocks)
        )
        self.final_layer = FinalLayer(c.width, c.patch_size**2 * self.out_channels, c.norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for linear maps, N(0, 0.02) for embedders, zero for modulations and the output (Sec. 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.width, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            block.reset()
        _zero(self.final_layer.adaLN_modulation[-1])
        _zero(self.final_layer.linear)

    def config(self) -> dict[str, object]:
        """The fields of `DiTConfig`."""
        return asdict(self._config)

    def unseen(self) -> dict[str, object]:
        """Heads, the norms' epsilon, timestep frequencies."""
        return {name: getattr(self._config, name) for name in _UNSEEN}

    @classmethod
    def from_config(cls, config: dict[str, object]) -> "ClassConditionalDiT":
        """Build from what `config()` returned."""
        return cls(DiTConfig(**config))

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> State:
        """x: (B, C, H, W), t: (B,), y: (B,) -> State."""
        return State(self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y))

    def block(self, index: int, state: State) -> State:
        """Run block `index`; recomputed in the backward pass where gradient checkpointing is on."""
        block = self.blocks[index]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            tokens = torch.utils.checkpoint.checkpoint(block, state.tokens, state.cond, use_reentrant=False)
        else:
            tokens = block(state.tokens, state.cond)
        return State(tokens, state.cond)

    def block_modules(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def head(self, state: State) -> Tensor:
        """-> (B, C_out, H, W)."""
        return self.unpatchify(self.final_layer(state.tokens, state.cond), state)

    def new_exit_head(self) -> nn.Module:
        """A copy of the final layer."""
        head = FinalLayer(self.width, self.final_layer.linear.out_features, self._config.norm_eps)
        head.load_state_dict(self.final_layer.state_dict())
        return head

    def unpatchify(self, patches: Tensor, state: State) -> Tensor:
        """(B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        p, side = self._config.patch_size, self.image_size // self._config.patch_size
        grid = patches.reshape(len(patches), side, side, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), self.out_channels, side * p, side * p)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
