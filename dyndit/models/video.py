"""A spatial-temporal Diffusion Transformer for clips of any size, shape and duration, as Sora's report describes one
(Brooks et al., "Video generation models as world simulators", 2024).

A clip is cut into patches over space and time. The blocks are DiT's, with adaLN-Zero. Attention runs over all tokens,
or is factorised as in ViViT (Arnab et al. 2021, arXiv:2103.15691): within each frame, then over time at each place.
Queries and keys are rotated by their 3-D position (Su et al. 2021, arXiv:2104.09864), so no weight depends on the
clip's shape. A picture is a clip of one frame.

    T, H, W  frames, height and width of a clip        F, R, S  patches over time, rows and columns of patches
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dyndit.errors import InputError
from dyndit.models.base import Backbone, State
from dyndit.models.conditions import ClassLabels
from dyndit.models.layers import FinalLayer, LabelEmbedder, Mlp, TimestepEmbedder, modulate, zero_linear
from dyndit.models.sizes import check_sizes, sides

Attends = Literal["factorised", "full"]
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' angles, (N, head width / 2) each."""


@dataclass(frozen=True)
class VideoConfig:
    """The architecture of a spatial-temporal DiT. Sizes are in pixels (or latent pixels).

    `num_frames` and `image_size` are the usual shape of a clip. The weights take every other shape too.
    """

    num_frames: int = 16
    image_size: int | tuple[int, int] = 32
    """Side of a square clip, or (height, width)."""
    patch_size: int = 2
    patch_frames: int = 2
    """Frames of a patch. A clip is filled up with its last frame; the prediction has the clip's own frames."""
    in_channels: int = 4
    width: int = 384
    num_blocks: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    attention: Attends = "factorised"
    """"factorised": attend within each frame, then over time. "full": attend to all tokens at once."""
    rotary_base: float = 10_000.0
    """Longest wavelength of the rotations, in patches / 2 pi."""
    num_classes: int = 1000
    label_dropout: float = 0.1
    learn_variance: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("num_frames", "patch_frames", "in_channels", "width", "num_blocks", "num_heads", "num_classes")
        check_sizes(self, *sizes)
        if self.attention not in get_args(Attends):
            raise InputError(f"attention {self.attention!r:.40}: expected one of {', '.join(get_args(Attends))}")
        if self.rotary_base <= 1:
            raise InputError(f"rotary_base {self.rotary_base:g}: expected above 1")
        if self.width % self.num_heads or self.head_width % 2 or self.head_width < 6:
            raise InputError(f"width {self.width}: expected an even number of at least 6 for each of the num_heads")

    @property
    def clip(self) -> tuple[int, int, int]:
        """Return (T, H, W) of the usual clip."""
        return (self.num_frames, *sides(self.image_size))

    @property
    def head_width(self) -> int:
        """Return the width of an attention head."""
        return self.width // self.num_heads

    def grid(self, clip: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (F, R, S) of a clip (T, H, W)."""
        return -(-clip[0] // self.patch_frames), clip[1] // self.patch_size, clip[2] // self.patch_size

    def build(self) -> "VideoDiT":
        """Make a freshly initialised backbone."""
        return VideoDiT(self)


def rotary(grid: tuple[int, int, int], head_width: int, base: float, device: torch.device | None = None) -> Rotary:
    """Return the rotations of a grid's tokens, the columns running fastest.  -> (F R S, head width / 2) each.

    A third of the pairs turns with time, a third with the row and the rest with the column. Pair i of n turns by
    base^(-i / n) a patch.
    """
    pairs = head_width // 2
    of_time = pairs // 3
    of_row = (pairs - of_time) // 2
    angles = []
    for axis, num in enumerate((of_time, of_row, pairs - of_time - of_row)):
        turns = base ** -(torch.arange(num, device=device, dtype=torch.float32) / num)
        each = torch.arange(grid[axis], device=device, dtype=torch.float32)[:, None] * turns
        shape = [1, 1, 1, num]
        shape[axis] = grid[axis]
        angles.append(each.view(shape).expand(*grid, num))
    joined = torch.cat(angles, dim=-1).flatten(0, 2)
    return joined.cos(), joined.sin()


def rotated(x: Tensor, turns: Rotary) -> Tensor:
    """Turn the pairs (i, i + half of the width) of every token.  x: (B, heads, N, head width)."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are rotated by position."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, turns: Rotary) -> Tensor:
        """Attend within each sequence.  x: (B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(rotated(q, turns), rotated(k, turns), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class VideoBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-Zero).

    Factorised attention is two layers: `attn` within a frame, then `time_attn` over time.
    """

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        c, self.factorised = config, config.attention == "factorised"
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps, elementwise_affine=False)
        self.attn = RotaryAttention(c.width, c.num_heads)
        if self.factorised:
            self.time_attn = RotaryAttention(c.width, c.num_heads)
        self.mlp = Mlp(c.width, int(c.width * c.mlp_ratio))
        num = 9 if self.factorised else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, num * c.width))

    def forward(self, x: Tensor, c: Tensor, turns: Rotary, frames: int) -> Tensor:
        """Run the block.  x: (B, N, D), c: (B, D), frames: F -> (B, N, D)."""
        parts = self.adaLN_modulation(c).chunk(9 if self.factorised else 6, dim=1)
        attend = self._over_space if self.factorised else self._over_all
        x = x + parts[2].unsqueeze(1) * attend(modulate(self.norm(x), *parts[:2]), turns, frames)
        if self.factorised:
            x = x + parts[5].unsqueeze(1) * self._over_time(modulate(self.norm(x), *parts[3:5]), turns, frames)
        return x + parts[-1].unsqueeze(1) * self.mlp(modulate(self.norm(x), *parts[-3:-1]))

    def _over_all(self, x: Tensor, turns: Rotary, frames: int) -> Tensor:
        return self.attn(x, turns)

    def _over_space(self, x: Tensor, turns: Rotary, frames: int) -> Tensor:
        places = x.shape[1] // frames
        first = (turns[0][:places], turns[1][:places])  # rotations are relative: frame 0 serves every frame
        return self.attn(x.reshape(-1, places, x.shape[2]), first).view_as(x)

    def _over_time(self, x: Tensor, turns: Rotary, frames: int) -> Tensor:
        places = x.shape[1] // frames
        first = (turns[0][::places], turns[1][::places])
        lines = x.unflatten(1, (frames, places)).transpose(1, 2)
        mixed = self.time_attn(lines.flatten(0, 1), first)
        return mixed.view_as(lines).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class ClipState(State):
    """The state between two blocks, with the clip's shape. All rows share the shape."""

    clip: tuple[int, int, int]
    """(T, H, W)."""
    turns: Rotary


class VideoDiT(Backbone):
    """The spatial-temporal DiT, built from a `VideoConfig` and initialised as DiT."""

    family = "video"

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        c = self._config = config
        self.num_blocks, self.width = c.num_blocks, c.width
        self.condition = ClassLabels(c.num_classes, c.label_dropout)
        self.sample_shape = (c.in_channels, *c.clip)
        self.out_channels = c.in_channels * (1 + c.learn_variance)
        self.gradient_checkpointing = False

        voxels = c.patch_frames * c.patch_size**2
        self.x_embedder = nn.Linear(voxels * c.in_channels, c.width)
        self.t_embedder = TimestepEmbedder(c.width, 0)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width, c.label_dropout)
        self.blocks = nn.ModuleList(VideoBlock(c) for _ in range(c.num_blocks))
        self.final_layer = FinalLayer(c.width, voxels * self.out_channels, c.norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Set weights: Xavier in linear maps, N(0, 0.02) in embedders, zero in modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedders: tuple[Any, ...] = (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2])
        for embedder in embedders:
            nn.init.normal_(embedder.weight, std=0.02)
        parts: list[Any] = [*self.blocks, self.final_layer]
        for part in parts:
            zero_linear(part.adaLN_modulation[-1])
        zero_linear(self.final_layer.linear)

    def config(self) -> dict[str, Any]:
        """Return the fields of `VideoConfig`."""
        return asdict(self._config)

    def unseen(self) -> dict[str, Any]:
        """Return heads, the norms' epsilon, the rotations and the sides of a patch."""
        names = ("num_heads", "norm_eps", "rotary_base", "patch_size", "patch_frames")
        return {name: getattr(self._config, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VideoDiT":
        """Build the backbone from the fields of `config()`."""
        return cls(VideoConfig(**config))

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Accept clips (C, T, H, W) of any number of frames, and of any size that patches fill."""
        fits = len(shape) == 4 and shape[0] == self.in_channels and min(shape) > 0
        return fits and not any(size % self._config.patch_size for size in shape[2:])

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> ClipState:
        """Embed the inputs.  x: (B, C, T, H, W), t: (B,), y: (B,) -> ClipState."""
        c = self._config
        frames, height, width = x.shape[2:]
        clip = frames, height, width
        if not self.accepts(tuple(x.shape[1:])):
            found, sides = " x ".join(map(str, x.shape[1:])), f"sides multiples of {c.patch_size}"
            raise InputError(f"clips of {found}: expected {c.in_channels} x frames x height x width, {sides}")
        grid = c.grid(clip)
        if missing := grid[0] * c.patch_frames - clip[0]:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        cut = x.unflatten(4, (grid[2], -1)).unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
        patches = cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, F R S, pf p p C)
        cos, sin = rotary(grid, c.head_width, c.rotary_base, x.device)
        turns = cos.to(x.dtype), sin.to(x.dtype)
        return ClipState(self.x_embedder(patches), self.t_embedder(t) + self.y_embedder(y), clip, turns)

    def block(self, index: int, state: ClipState) -> ClipState:
        """Run block `index`. With gradient checkpointing, the backward pass runs it again."""
        block = self.blocks[index]
        inputs = (state.tokens, state.cond, state.turns, self._config.grid(state.clip)[0])
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return replace(state, tokens=checkpoint(block, *inputs, use_reentrant=False))
        return replace(state, tokens=block(*inputs))

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def head(self, state: ClipState) -> Tensor:
        """Predict from the state after the last block.  -> (B, C_out, T, H, W)."""
        return self.unpatchify(self.final_layer(state.tokens, state.cond), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        head = FinalLayer(self.width, self.final_layer.linear.out_features, self._config.norm_eps)
        head.load_state_dict(self.final_layer.state_dict())
        return head

    def unpatchify(self, patches: Tensor, state: ClipState) -> Tensor:
        """Join patches to clips of the state's shape.  (B, N, pf * p * p * C_out) -> (B, C_out, T, H, W)."""
        c = self._config
        grid = c.grid(state.clip)
        cut = patches.reshape(-1, *grid, c.patch_frames, c.patch_size, c.patch_size, self.out_channels)
        joined = cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        return joined[:, :, : state.clip[0]]
