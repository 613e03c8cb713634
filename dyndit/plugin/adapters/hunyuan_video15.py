"""diffusers' `HunyuanVideo15Transformer3DModel`: HunyuanVideo 1.5, video (Tencent 2025, arXiv:2511.18870).

Blocks run on video and text side by side. The text of a row is one sequence: features of a given picture, of the glyphs
quoted in the prompt, and of the prompt. Its valid tokens come first. The prediction is a velocity. A given first frame
and its mask are further channels of the latents.

`timestep` tells the step: the scheduler's timestep, one per row. The pipelines' guider makes one call per branch on the
same latents tensor: first the conditional call, then the unconditional call.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ContinuousHead
from dyndit.process import RectifiedFlow

PROMPT, GLYPHS, PICTURE = 0, 1, 2
"""Kinds of text, as the model's embedding of kinds numbers them."""


@dataclass(frozen=True)
class _State(State):
    text: Tensor
    """(B, S, D)"""
    mask: Tensor
    """(B, S): True for valid text tokens."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the video's positions: (N, D_head), the same for all rows."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches."""


class HunyuanVideo15Adapter(Adapter):
    """The adapter of HunyuanVideo 1.5: video and text tokens attend to each other in every block."""

    family = "HunyuanVideo15Transformer3DModel"
    row_arguments = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
        "timestep_r",
    )
    guidance = "calls"
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.num_attention_heads * c.attention_head_dim
        self.out_channels = c.out_channels or c.in_channels
        self.sample_shape = (c.in_channels,)  # the model has no size: each call brings its own

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, C, F, H, W), t: (B,), y: features and masks of prompt (B, S, D_text) and glyphs (B, S_2, D_2); features
        of a picture (B, S_3, D_3), all zero without one; `timestep_r` (B,) if the model embeds it.
        """
        model, config = self.transformer, self.transformer.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        text, mask = self._text(t, y)
        return _State(
            model.x_embedder(x),
            model.time_embed(t, timestep_r=y["timestep_r"]),
            text,
            mask,
            model.rope(x),
            grid=tuple(size // step for size, step in zip(x.shape[2:], patch, strict=True)),
        )

    def _text(self, t: Tensor, y: Conditioning) -> tuple[Tensor, Tensor]:
        """Join picture, glyphs and prompt, valid tokens first.  -> (B, S, D) and the mask (B, S)."""
        model = self.transformer
        prompt = model.context_embedder(y["encoder_hidden_states"], t, y["encoder_attention_mask"])
        glyphs = model.context_embedder_2(y["encoder_hidden_states_2"])
        picture = model.image_embedder(y["image_embeds"])
        has_picture = bool(torch.any(y["image_embeds"] != 0))
        picture = picture if has_picture else picture * 0.0
        of_picture = torch.full(picture.shape[:2], has_picture, device=picture.device)
        parts = (self._of_kind(picture, PICTURE), self._of_kind(glyphs, GLYPHS), self._of_kind(prompt, PROMPT))
        valid = (y["encoder_attention_mask_2"].bool(), y["encoder_attention_mask"].bool())
        text, mask = torch.cat(parts, dim=1), torch.cat([of_picture, *valid], dim=1)
        kept = torch.cat([torch.ones_like(of_picture), *valid], dim=1)  # a picture that is not valid is not cleared
        text = torch.where(kept[..., None], text, 0.0)
        order = torch.argsort(~mask, dim=1, stable=True)
        return text.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1)

    def _of_kind(self, tokens: Tensor, kind: int) -> Tensor:
        """Add the embedding of a kind of text."""
        return tokens + self.transformer.cond_type_embed(torch.tensor([kind], device=tokens.device))

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        block = self.transformer.transformer_blocks[index]
        tokens, text = block(state.tokens, state.text, state.cond, state.mask, state.rotary)
        return replace(state, tokens=tokens, text=text)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, C_out, F, H, W)."""
        model = self.transformer
        return self.unpatchify(model.proj_out(model.norm_out(state.tokens, state.cond)), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        return ContinuousHead(self.transformer.norm_out, self.transformer.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to a video.  (B, N, C_out * patch volume) -> (B, C_out, F, H, W)."""
        config = self.transformer.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        frames, rows, columns = (size * step for size, step in zip(state.grid, patch, strict=True))
        volumes = patches.reshape(len(patches), *state.grid, -1, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return volumes.reshape(len(patches), -1, frames, rows, columns)
