"""The class-conditional Diffusion Transformer of Peebles and Xie, "Scalable Diffusion Models with Transformers"
(ICCV 2023, arXiv:2212.09748), with adaLN-Zero blocks or one of the paper's three other ways to condition.

Parameters have the names of the published checkpoints (and of timm), so published state dicts load directly.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyndit.errors import InputError, expected_one_of
from dyndit.models.base import Backbone, State
from dyndit.models.conditioning import CONDITIONINGS, ConditioningName
from dyndit.models.conditions import ClassLabels
from dyndit.models.layers import LabelEmbedder, TimestepEmbedder, position_features
from dyndit.models.sizes import check_sizes, sides
from dyndit.process import Process

Convention = Literal["timesteps", "sit", "repa"]


@dataclass(frozen=True)
class DiTConfig:
    """The architecture of a class-conditional DiT. Sizes are in pixels (or latent pixels)."""

    image_size: int | tuple[int, int] = 32
    """Side of a square picture, or (height, width)."""
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
    """Epsilon of the norms before the MLPs: 1e-6 in the published code, 1e-5 by default in diffusers' DiT."""
    frequency_shift: int = 0
    """Timestep features cos(t * 10000^(-i / (128 - shift))): 0 in the published code, 1 in diffusers' DiT."""
    convention: Convention = "timesteps"
    """Time and velocity that the weights expect. "timesteps": time rises from 0 (the picture) to 1000, velocity is
    eps - x_0. "sit", as in SiT's code: time is 1 - t / 1000, velocity is x_0 - eps. "repa", as in REPA's code: time is
    t / 1000, velocity is eps - x_0. The backbone converts both."""
    conditioning: ConditioningName = "adaln-zero"
    """How blocks learn of timestep and label (`dyndit.models.conditioning`). Published weights are adaln-zero."""

    def __post_init__(self) -> None:
        check_sizes(self, "in_channels", "width", "num_blocks", "num_heads", "num_classes")
        for name, known in (("convention", get_args(Convention)), ("conditioning", CONDITIONINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r:.40}: {expected_one_of(getattr(self, name), known)}")
        if self.width % self.num_heads or self.width % 4:
            raise InputError(f"width {self.width} must be a multiple of 4 and of num_heads {self.num_heads}")

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width)."""
        return sides(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    def build(self) -> "ClassConditionalDiT":
        """Make a freshly initialised backbone."""
        return ClassConditionalDiT(self)


_UNSEEN = ("num_heads", "norm_eps", "mlp_norm_eps", "frequency_shift")

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

CARDS: dict[str, DiTConfig] = {
    f"DiT-{size}/{patch}{suffix}": DiTConfig(side, patch, num_blocks=blocks, width=width, num_heads=heads)
    for suffix, side in (("", 32), ("-512", 64))
    for size, (blocks, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
} | {
    # The small presets work on pixels. A recipe of this repository trains each of them.
    "digits": DiTConfig(8, 2, 1, width=96, num_blocks=12, num_heads=3, num_classes=10),
    "cifar10": DiTConfig(32, 4, 3, width=192, num_blocks=12, num_heads=3, num_classes=10),
}
"""The twelve models of the paper (Table 1) for 256 px (latents of 32 x 32 x 4) and, with "-512", for 512 px, and the
small presets."""


class ClassConditionalDiT(Backbone):
    """The standard DiT, built from a `DiTConfig` and initialised as published."""

    family = "class_conditional"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self._config = config
        self.num_blocks, self.width = c.num_blocks, c.width
        self.condition = ClassLabels(c.num_classes, c.label_dropout)
        self.sample_shape = (c.in_channels, *c.size)
        self.out_channels = c.in_channels * (1 + c.learn_variance)
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(c.size, c.patch_size, c.in_channels, c.width, bias=True)
        self.t_embedder = TimestepEmbedder(c.width, c.frequency_shift)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width, c.label_dropout)
        self.pos_embed = nn.Parameter(position_features(*c.grid, c.width)[None], requires_grad=False)
        self._conditioning = CONDITIONINGS[c.conditioning]
        self.blocks = nn.ModuleList(
            self._conditioning.block(c.width, c.num_heads, c.mlp_ratio, c.norm_eps, c.mlp_norm_eps)
            for _ in range(c.num_blocks)
        )
        self.final_layer: Any = self._conditioning.final(c.width, c.patch_size**2 * self.out_channels, c.norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Set weights: Xavier in linear maps, N(0, 0.02) in embedders, zero in the output (Sections 3.2 and 4).

        Of the modulations, only adaLN-Zero's are zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(self.width, -1))
        nn.init.zeros_(projection.bias)
        embedders: tuple[Any, ...] = (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2])
        for embedder in embedders:
            nn.init.normal_(embedder.weight, std=0.02)
        parts: list[Any] = [*self.blocks, self.final_layer]
        for part in parts:
            part.reset()

    def config(self) -> dict[str, Any]:
        """Return the fields of `DiTConfig`."""
        return asdict(self._config)

    def unseen(self) -> dict[str, Any]:
        """Return heads, the norms' epsilon, timestep frequencies, and a convention other than "timesteps"."""
        names = _UNSEEN if self._config.convention == "timesteps" else (*_UNSEEN, "convention")
        return {name: getattr(self._config, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ClassConditionalDiT":
        """Build the backbone from the fields of `config()`."""
        return cls(DiTConfig(**config))

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> State:
        """Embed the inputs.  x: (B, C, H, W), t: (B,), y: (B,) -> State."""
        if self._config.convention != "timesteps":
            t = t / Process.num_timesteps
        if self._config.convention == "sit":
            t = 1 - t
        # Patches come channels first in memory. Every block would keep that order, which is slower, and the code that
        # torch 2.14 compiles for it on CPUs gives NaN in bf16.
        tokens = self.x_embedder(x).contiguous() + self.pos_embed
        return self._conditioning.state(tokens, self.t_embedder(t), self.y_embedder(y))

    def block(self, index: int, state: State) -> State:
        """Run block `index`. With gradient checkpointing, the backward pass runs it again."""
        block, given = self.blocks[index], self._conditioning.given(state)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, state.tokens, given, use_reentrant=False)
        else:
            tokens = block(state.tokens, given)
        return replace(state, tokens=tokens)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def head(self, state: State) -> Tensor:
        """Predict from the state after the last block.  -> (B, C_out, H, W)."""
        return self.unpatchify(self.final_layer(state.tokens, state.cond), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        head = self._conditioning.final(self.width, self.final_layer.linear.out_features, self._config.norm_eps)
        head.load_state_dict(self.final_layer.state_dict())
        return head

    def unpatchify(self, patches: Tensor, state: State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        p, (rows, columns) = self._config.patch_size, self._config.grid
        grid = patches.reshape(len(patches), rows, columns, p, p, self.out_channels)
        if self._config.convention == "sit":
            grid = -grid
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), self.out_channels, rows * p, columns * p)
