"""diffusers' `Lumina2Transformer2DModel`: Lumina-Image 2.0 (Qin et al. 2025, arXiv:2503.21758).

Blocks run on text and picture as one sequence, text first. Refiners of the text and of the latents run before; they
belong to `embed`. Rows of a batch have texts of different length, so the picture begins at another token in each row.

Time runs backwards: `timestep` is 0 at the noise and 1 at the picture, one per row. The pipeline passes 1 minus the
scheduler's timestep divided by 1000, and negates the prediction. A guided step (`guidance_scale` above 1) makes two
calls on the same latents tensor: first the conditional call, then the unconditional call.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ScaleHead, join_patches
from dyndit.process import RectifiedFlow


@dataclass(frozen=True)
class _State(State):
    """tokens: (B, S + N, D): the text of the row, its picture, then padding up to the longest row."""

    rotary: Tensor
    mask: Tensor | None
    """(B, S + N): True for tokens that are no padding; None if no row is padded."""
    picture: Tensor
    """(B, N): positions of the picture's tokens."""
    grid: tuple[int, int]
    """Rows and columns of patches."""

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the picture's tokens, (B, N, D), and the conditioning."""
        return _at(self.picture, self.tokens), self.cond


class Lumina2Adapter(Adapter):
    """The adapter of Lumina 2. Depth counts the joint blocks."""

    family = "Lumina2Transformer2DModel"
    row_arguments = ("encoder_hidden_states", "encoder_attention_mask")
    guidance = "calls"
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.hidden_size
        self.sample_shape, self.out_channels = (c.in_channels, c.sample_size, c.sample_size), transformer.out_channels

    @property
    def cond_width(self) -> int:
        """See `Backbone`."""
        return self.transformer.norm_out.linear_1.in_features

    def scheduler_timestep(self, t: float) -> float:
        """See `Adapter`. Time runs backwards."""
        return 1000 * (1 - t)

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Embed.  x: (B, C, H, W), t: (B,) in 0..1, y: prompt embeddings (B, S, D_text), their mask (B, S)."""
        model, patch, mask = self.transformer, self.transformer.config.patch_size, y["encoder_attention_mask"]
        cond, text = model.time_caption_embed(x, t, y["encoder_hidden_states"])
        picture, text_rotary, picture_rotary, rotary, starts, stops = model.rope_embedder(x, mask)
        picture = model.x_embedder(picture)
        for layer in model.context_refiner:
            text = layer(text, mask, text_rotary)
        for layer in model.noise_refiner:
            picture = layer(picture, None, picture_rotary, cond)
        tokens = picture.new_zeros(len(x), max(stops), self.width)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            tokens[row, :start], tokens[row, start:stop] = text[row, :start], picture[row]
        positions, first = torch.arange(max(stops), device=x.device), torch.tensor(starts, device=x.device)[:, None]
        return _State(
            tokens,
            cond,
            rotary,
            positions < torch.tensor(stops, device=x.device)[:, None] if len(set(stops)) > 1 else None,
            first + positions[: picture.shape[1]],
            grid=(x.shape[-2] // patch, x.shape[-1] // patch),
        )

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        return replace(state, tokens=self.transformer.layers[index](state.tokens, state.mask, state.rotary, state.cond))

    def block_modules(self) -> list[nn.Module]:
        """Return the joint blocks."""
        return list(self.transformer.layers)

    def head(self, state: _State) -> Tensor:
        """Predict from the state after the last block.  -> (B, C_out, H, W)."""
        patches = self.transformer.norm_out(state.tokens, state.cond)
        return self.unpatchify(_at(state.picture, patches), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        norm_out = self.transformer.norm_out
        return ScaleHead(norm_out.norm, norm_out.linear_1, norm_out.linear_2)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        return join_patches(patches, *state.grid, self.transformer.config.patch_size)


def _at(positions: Tensor, values: Tensor) -> Tensor:
    """Take each row's values at its positions.  positions: (B, N), values: (B, S, D) -> (B, N, D)."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))
