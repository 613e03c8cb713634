"""diffusers' `LatteTransformer3DModel`: Latte, video (Ma et al. 2024, arXiv:2401.03048).

A block here is a pair: a spatial block over the tokens of a frame, and a temporal block over the frames of a token.

`timestep` tells the step; the pipeline passes the scheduler's timestep, one per row. A guided call (`guidance_scale`
above 1) stacks [unconditional; conditional]: the same latents twice, the embedded negative prompt first. A row is a
video, (C, F, H, W), of F frames.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, TableHead, join_patches


@dataclass(frozen=True)
class _State(State):
    """tokens: (B, F * N, D), frame by frame."""

    text: Tensor
    """(B, F, S, D): the same for every frame."""
    spatial: Tensor
    """(B, F, 6 D): modulation of the spatial blocks; each block adds its own table."""
    temporal: Tensor
    """(B, N, 6 D): modulation of the temporal blocks; each block adds its own table."""
    grid: tuple[int, int, int]
    """Frames; rows and columns of patches."""
    over_time: bool
    """True if temporal blocks run."""


class LatteAdapter(Adapter):
    """The adapter of Latte. Spatial and temporal blocks alternate."""

    family = "LatteTransformer3DModel"
    row_arguments = ("encoder_hidden_states",)
    shared_arguments = ("enable_temporal_attentions",)
    guidance = "uncond first"

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.num_attention_heads * c.attention_head_dim
        self.sample_shape = (c.in_channels, c.video_length, c.sample_size, c.sample_size)
        self.out_channels = transformer.out_channels

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, C, F, H, W), t: (B,), y: prompt embeddings (B, S, D_text), `enable_temporal_attentions`.
        """
        model, patch = self.transformer, self.transformer.config.patch_size
        frames = x.shape[2]
        tokens = model.pos_embed(x.transpose(1, 2).flatten(0, 1))
        sizes = {"resolution": None, "aspect_ratio": None}
        modulation, cond = model.adaln_single(t, sizes, batch_size=len(x), hidden_dtype=tokens.dtype)
        text = model.caption_projection(y["encoder_hidden_states"])
        over_time = y["enable_temporal_attentions"]
        return _State(
            tokens.reshape(len(x), -1, self.width),
            cond,
            text[:, None].repeat(1, frames, 1, 1),
            modulation[:, None].repeat(1, frames, 1),
            modulation[:, None].repeat(1, tokens.shape[1], 1),
            grid=(frames, x.shape[-2] // patch, x.shape[-1] // patch),
            over_time=True if over_time is None else over_time,
        )

    def block(self, index: int, state: _State) -> State:
        """Run pair `index`."""
        videos, frames = len(state.tokens), state.grid[0]
        tokens = self.transformer.transformer_blocks[index](
            self._frames(state),
            None,  # attention_mask
            state.text.flatten(0, 1),
            None,  # encoder_attention_mask
            state.spatial.flatten(0, 1),
            None,  # cross_attention_kwargs
            None,  # class_labels
        )
        if state.over_time:
            tokens = self._over_time(index, _transposed(tokens, videos), state)
            tokens = _transposed(tokens, videos)
        return replace(state, tokens=tokens.reshape(videos, frames * tokens.shape[1], self.width))

    def _over_time(self, index: int, tokens: Tensor, state: _State) -> Tensor:
        """Run the temporal block of the pair.  tokens: (B * N, F, D) -> the same shape."""
        if index == 0 and state.grid[0] > 1:
            tokens = tokens + self.transformer.temp_pos_embed.to(tokens.dtype)
        return self.transformer.temporal_transformer_blocks[index](
            tokens,
            None,  # attention_mask
            None,  # encoder_hidden_states
            None,  # encoder_attention_mask
            state.temporal.flatten(0, 1),
            None,  # cross_attention_kwargs
            None,  # class_labels
        )

    def _frames(self, state: _State) -> Tensor:
        """Return the tokens with one frame per row: (B * F, N, D)."""
        return state.tokens.reshape(len(state.tokens) * state.grid[0], -1, self.width)

    def block_modules(self) -> list[nn.Module]:
        """Return spatial and temporal blocks in turn."""
        pairs = zip(self.transformer.transformer_blocks, self.transformer.temporal_transformer_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, C_out, F, H, W)."""
        model, frames = self.transformer, state.grid[0]
        cond = state.cond.repeat_interleave(frames, dim=0)
        shift, scale = (model.scale_shift_table[None] + cond[:, None]).chunk(2, dim=1)
        patches = model.proj_out(model.norm_out(self._frames(state)) * (1 + scale) + shift)
        return self.unpatchify(patches.reshape(len(state.tokens), -1, patches.shape[-1]), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        model = self.transformer
        return TableHead(model.norm_out, model.scale_shift_table, model.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to frames.  (B, F * N, patch * patch * C_out) -> (B, C_out, F, H, W)."""
        frames, rows, columns = state.grid
        single = patches.reshape(len(patches) * frames, -1, patches.shape[-1])
        pictures = join_patches(single, rows, columns, self.transformer.config.patch_size)
        return pictures.reshape(len(patches), frames, *pictures.shape[1:]).transpose(1, 2)


def _transposed(tokens: Tensor, videos: int) -> Tensor:
    """Swap frames and tokens: (B * F, N, D) -> (B * N, F, D), and the reverse."""
    grid = tokens.reshape(videos, -1, *tokens.shape[1:])
    return grid.transpose(1, 2).flatten(0, 1)
