"""MM-DiT, the transformer of Stable Diffusion 3 (Esser et al., "Scaling Rectified Flow Transformers for High-Resolution
Image Synthesis", 2024, arXiv:2403.03206, Section 4 and Figure 2).

Picture tokens and text tokens are two streams. Each stream has its own weights; in every block both attend to all
tokens of both. The timestep and a pooled vector of the text modulate every layer. The last block reads the text without
writing it. Parameters have the names of the published checkpoints, but for `text_embedder`, which is ours: it embeds
words or class labels. A model of text features has none.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dyndit.errors import InputError
from dyndit.models.base import Backbone, State
from dyndit.models.captions import POOLED, TOKENS, Encoded, Words
from dyndit.models.conditions import ClassLabels, Condition, Conditioning, ConditionType
from dyndit.models.layers import FinalLayer, Mlp, TimestepEmbedder, modulate, position_features, zero_linear
from dyndit.models.sizes import check_sizes, sides
from dyndit.process import RectifiedFlow

NORM_EPS = 1e-6
"""Epsilon of every norm, as in diffusers' class."""


@dataclass(frozen=True)
class MMDiTConfig:
    """The architecture of an MM-DiT. Sizes are in pixels (or latent pixels).

    The text stream has one of three sources: words that are embedded along (`vocabulary`), class labels (`num_classes`,
    one token each), or features of a text encoder (neither of both; `text_encoder` says which).
    """

    image_size: int | tuple[int, int] = 128
    """Side of a square picture, or (height, width)."""
    patch_size: int = 2
    in_channels: int = 16
    width: int = 1536
    num_blocks: int = 24
    num_heads: int = 24
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    """Normalise queries and keys by their root mean square (Section 5.3.2)."""
    text_width: int = 4096
    """D_text: width of a text token before its projection to the model's width."""
    pooled_width: int = 2048
    """D_pooled: width of the pooled text. Words and labels are pooled to `text_width`."""
    text_length: int = 154
    """S: text tokens of a caption."""
    vocabulary: tuple[str, ...] = ()
    num_classes: int = 0
    text_encoder: str = ""
    """Folder of a text encoder of `transformers`, see `with_text_encoder`. Empty: conditions come from elsewhere."""
    text_encoder_hash: str = ""
    prompts: tuple[str, ...] = ()
    """Captions that an evaluation takes in turn."""
    dropout: float = 0.1
    """Share of captions or labels that training replaces by the null."""

    learn_variance = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "prompts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = ("in_channels", "width", "num_blocks", "num_heads", "text_width", "text_length", "pooled_width")
        check_sizes(self, *sizes)
        if self.width % self.num_heads or self.width % 4:
            raise InputError(f"width {self.width} must be a multiple of 4 and of num_heads {self.num_heads}")
        if sum(map(bool, (self.vocabulary, self.num_classes, self.text_encoder))) > 1:
            raise InputError("vocabulary, num_classes, text_encoder: expected one of them")
        if self.embeds and self.pooled_width != self.text_width:
            raise InputError(f"pooled_width {self.pooled_width}: expected text_width {self.text_width}")

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width)."""
        return sides(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def embeds(self) -> bool:
        """Tell if the model embeds its text itself: words or labels."""
        return bool(self.vocabulary or self.num_classes)

    def condition(self) -> ConditionType:
        """Return the kind of condition."""
        if self.num_classes:
            return ClassLabels(self.num_classes, self.dropout)
        if self.vocabulary:
            return Words(self.vocabulary, self.text_length, self.prompts, self.dropout)
        widths = (self.text_width, self.pooled_width, self.text_length)
        return Encoded(self.text_encoder, self.text_encoder_hash, *widths, self.prompts, self.dropout)

    def build(self) -> "MMDiT":
        """Make a freshly initialised backbone."""
        return MMDiT(self)


def with_text_encoder(config: MMDiTConfig, encoder: Encoded) -> MMDiTConfig:
    """Return the architecture for captions under a text encoder, in place of words or labels."""
    text = {
        "vocabulary": (),
        "num_classes": 0,
        "text_encoder": encoder.folder,
        "text_encoder_hash": encoder.fingerprint,
    }
    widths = {"text_width": encoder.width, "pooled_width": encoder.pooled_width, "text_length": encoder.length}
    return replace(config, **text, **widths)


@dataclass(frozen=True)
class _State(State):
    """The state between two blocks, with the text stream."""

    text: Tensor | None
    """(B, S, D); None after the last block."""


class MMDiT(Backbone):
    """The MM-DiT, built from an `MMDiTConfig`."""

    family = "mmdit"
    usual_process = RectifiedFlow()

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        c = self._config = config
        self.num_blocks, self.width = c.num_blocks, c.width
        self.condition = c.condition()
        self.sample_shape, self.out_channels = (c.in_channels, *c.size), c.in_channels
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(c.size, c.patch_size, c.in_channels, c.width, bias=True)
        self.pos_embed = nn.Parameter(position_features(*c.grid, c.width)[None], requires_grad=False)
        self.t_embedder = TimestepEmbedder(c.width, frequency_shift=0)
        self.y_embedder = PooledEmbedder(c.pooled_width, c.width)
        self.context_embedder = nn.Linear(c.text_width, c.width)
        if c.embeds:
            words, length = (c.num_classes, 1) if c.num_classes else (len(c.vocabulary), c.text_length)
            self.text_embedder = TextEmbedder(words + 1, length, c.text_width)
        block = partial(JointBlock, c.width, c.num_heads, c.mlp_ratio, c.qk_norm)
        self.joint_blocks = nn.ModuleList(block(pre_only=index + 1 == c.num_blocks) for index in range(c.num_blocks))
        self.final_layer = FinalLayer(c.width, c.patch_size**2 * c.in_channels, NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        """Set weights as the class-conditional DiT: Xavier in linear maps, N(0, 0.02) in embedders, zero modulation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(self.width, -1))
        nn.init.zeros_(projection.bias)
        mlps: tuple[Any, ...] = (self.t_embedder.mlp, self.y_embedder.mlp)
        for mlp in mlps:
            nn.init.normal_(mlp[0].weight, std=0.02)
            nn.init.normal_(mlp[2].weight, std=0.02)
        blocks: list[Any] = list(self.joint_blocks)
        for block in blocks:
            zero_linear(block.x_block.adaLN_modulation[-1])
            zero_linear(block.context_block.adaLN_modulation[-1])
        zero_linear(self.final_layer.adaLN_modulation[-1])
        zero_linear(self.final_layer.linear)

    def config(self) -> dict[str, Any]:
        """Return the fields of `MMDiTConfig`."""
        return asdict(self._config)

    def unseen(self) -> dict[str, Any]:
        """Return heads, the order of the words, and the hash of the text encoder: no tensor shows them."""
        c = self._config
        return {"num_heads": c.num_heads, "vocabulary": c.vocabulary, "text_encoder": c.text_encoder_hash}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MMDiT":
        """Build the backbone from the fields of `config()`."""
        return cls(MMDiTConfig(**config))

    def text_of(self, y: Condition) -> Conditioning:
        """Embed a condition as diffusers' SD3 class takes it: `encoder_hidden_states` and `pooled_projections`."""
        if isinstance(y, Conditioning):
            return y
        tokens = self.text_embedder(y)
        return Conditioning({TOKENS: tokens, POOLED: tokens.mean(dim=1)})

    def embed(self, x: Tensor, t: Tensor, y: Condition) -> State:
        """Embed the inputs.  x: (B, C, H, W), t: (B,), y: words (B, S), labels (B,) or features -> State."""
        text = {name: value.to(x.dtype) for name, value in self.text_of(y).rows.items()}
        cond = self.t_embedder(t) + self.y_embedder(text[POOLED])
        return _State(self.x_embedder(x) + self.pos_embed, cond, self.context_embedder(text[TOKENS]))

    def block(self, index: int, state: _State) -> State:
        """Run block `index`. With gradient checkpointing, the backward pass runs it again."""
        block, inputs = self.joint_blocks[index], (state.tokens, state.text, state.cond)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            tokens, text = checkpoint(block, *inputs, use_reentrant=False)
        else:
            tokens, text = block(*inputs)
        return _State(tokens, state.cond, text)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.joint_blocks)

    def head(self, state: State) -> Tensor:
        """Predict from the state after the last block.  -> (B, C, H, W)."""
        return self.unpatchify(self.final_layer(state.tokens, state.cond), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer. Exits read the picture's stream."""
        head = FinalLayer(self.width, self.final_layer.linear.out_features, NORM_EPS)
        head.load_state_dict(self.final_layer.state_dict())
        return head

    def unpatchify(self, patches: Tensor, state: State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C) -> (B, C, H, W)."""
        p, (rows, columns) = self._config.patch_size, self._config.grid
        grid = patches.reshape(len(patches), rows, columns, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), self.out_channels, rows * p, columns * p)


class TextEmbedder(nn.Module):
    """Embed words or labels, each with its place in the caption: the model itself knows no order of its text tokens."""

    def __init__(self, num_words: int, length: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_words, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.1)

    def forward(self, words: Tensor) -> Tensor:
        """Embed words or labels.  words: (B, S) or (B,) -> (B, S, D_text)."""
        return self.embedding_table(words.view(len(words), -1)) + self.places


class PooledEmbedder(nn.Module):
    """Embed the pooled text: a two-layer MLP.  (B, D_pooled) -> (B, D)."""

    def __init__(self, pooled_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(pooled_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, pooled: Tensor) -> Tensor:
        """Embed the pooled text.  (B, D_pooled) -> (B, D)."""
        return self.mlp(pooled)


class JointBlock(nn.Module):
    """One block: joint attention over both streams, then an MLP for each stream.

    pre_only: the text is only read; the block returns None for it.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, pre_only: bool) -> None:
        super().__init__()
        self.x_block = StreamBlock(width, num_heads, mlp_ratio, qk_norm)
        self.context_block = StreamBlock(width, num_heads, mlp_ratio, qk_norm, pre_only)

    def forward(self, tokens: Tensor, text: Tensor, cond: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the block.  tokens: (B, N, D), text: (B, S, D), cond: (B, D) -> both streams."""
        picture, *of_picture = self.x_block.queries(tokens, cond)
        caption, *of_caption = self.context_block.queries(text, cond)
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(picture, caption, strict=True))
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        num = tokens.shape[1]
        updated = self.x_block.update(tokens, attended[:, :num], *of_picture)
        assert updated is not None  # of the picture; the text may be read only
        return updated, self.context_block.update(text, attended[:, num:], *of_caption)


class StreamBlock(nn.Module):
    """One stream's half of a joint block, modulated and gated by the conditioning (adaLN-Zero).

    pre_only: it gives queries, keys and values, and is not updated: without projection, MLP and gates.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, pre_only: bool = False) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = StreamAttention(width, num_heads, qk_norm, pre_only)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if pre_only else 6) * width))
        if not pre_only:
            self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
            self.mlp = Mlp(width, int(width * mlp_ratio))

    def queries(self, tokens: Tensor, cond: Tensor) -> tuple[tuple[Tensor, ...], *tuple[Tensor, ...]]:
        """Return queries, keys and values, (B, H, N, D / H) each, and the modulation that `update` takes."""
        shift, scale, *rest = self.adaLN_modulation(cond).chunk(2 if self.pre_only else 6, dim=1)
        return self.attn.queries(modulate(self.norm1(tokens), shift, scale)), *rest

    def update(self, tokens: Tensor, attended: Tensor, *modulation: Tensor) -> Tensor | None:
        """Add what the tokens attended to, then the MLP.  attended: (B, N, D) -> (B, N, D)."""
        if self.pre_only:
            return None
        gate_a, shift_m, scale_m, gate_m = modulation
        tokens = tokens + gate_a.unsqueeze(1) * self.attn.proj(attended)
        return tokens + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(tokens), shift_m, scale_m))


class StreamAttention(nn.Module):
    """One stream's maps of a joint attention: queries, keys, values, and the projection of what was attended to."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, pre_only: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q, self.ln_k = (RMSNorm(width // num_heads) if qk_norm else nn.Identity() for _ in range(2))
        if not pre_only:
            self.proj = nn.Linear(width, width)

    def queries(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values.  (B, N, D) -> (B, H, N, D / H) each."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in single precision, and scale.

    `nn.RMSNorm` computes in another order, with other last bits than published models.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.  (..., width) -> (..., width)."""
        square = x.float().square().mean(dim=-1, keepdim=True)
        return (x * torch.rsqrt(square + NORM_EPS)).to(self.weight.dtype) * self.weight
