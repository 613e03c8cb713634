"""diffusers' `FluxTransformer2DModel`: FLUX.1 (Black Forest Labs 2024; a paper of the family is arXiv:2506.15742).

Double blocks run on picture and text side by side, single blocks on both as one sequence. Depth counts double blocks
first, then single blocks. The prediction is a velocity. Latents are packed, 2 x 2 of them a token: (B, N, C).

The step is read from `timestep`, one per row: the pipelines pass the scheduler's timestep divided by 1000, rounded to
the precision of the latents. `guidance_scale` is an input of the distilled models (`guidance`), no second branch. True
guidance (`true_cfg_scale` above 1 and a negative prompt) makes two calls at every step on the same latents tensor:
first the conditional call, then the unconditional call.

Kontext appends the tokens of a reference image, whose positions begin with another number: (B, N + R, C). The
prediction covers the picture's N tokens; the transformer's own forward also returns R tokens, which the pipelines drop.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from dyndit.models.base import PerRow, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ContinuousHead, first_image, in_order
from dyndit.process import RectifiedFlow


@dataclass(frozen=True)
class _State(State):
    text: Tensor
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the positions of text, then picture: (S + N, D_head), the same for all rows."""
    residuals: PerRow | None
    """Residuals of double blocks."""
    single_residuals: PerRow | None
    size: int
    """N: number of the picture's tokens."""

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the picture's tokens, (B, N, D), and the conditioning."""
        return self.tokens[:, : self.size], self.cond


class FluxAdapter(Adapter):
    """FLUX.1: double blocks, then single blocks."""

    family = "FluxTransformer2DModel"
    row_arguments = (
        "encoder_hidden_states",
        "pooled_projections",
        "guidance",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )
    shared_arguments = ("img_ids", "txt_ids")
    guidance = "calls"
    timestep_scale = 1000.0
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers + c.num_single_layers, transformer.inner_dim
        self.out_channels = transformer.out_channels
        self.sample_shape = (c.in_channels,)  # the model has no picture size: each call brings its positions

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Embed.  x: (B, N, C), t: (B,) in 0..1, y: prompt (B, S, D_text), pooled prompt (B, D_pooled), positions."""
        model = self.transformer
        tokens = model.x_embedder(x)
        scales = [v.to(tokens.dtype) * 1000 for v in (t, y["guidance"]) if v is not None]
        cond = model.time_text_embed(*scales, y["pooled_projections"])
        text = model.context_embedder(y["encoder_hidden_states"])
        # Older callers pass positions with a batch dimension, the same in every row.
        ids = [v[0] if v.ndim == 3 else v for v in (y["txt_ids"], y["img_ids"])]
        return _State(
            tokens,
            cond,
            text,
            model.pos_embed(torch.cat(ids)),
            in_order(y, "controlnet_block_samples"),
            in_order(y, "controlnet_single_block_samples"),
            size=first_image(ids[1]),
        )

    def block(self, index: int, state: _State) -> State:
        """Run block `index`, first the double blocks, then the single blocks; then add a ControlNet's residual."""
        blocks, residuals = self.transformer.transformer_blocks, state.residuals
        if index >= len(blocks):
            index -= len(blocks)
            blocks, residuals = self.transformer.single_transformer_blocks, state.single_residuals
        text, tokens = blocks[index](
            hidden_states=state.tokens,
            encoder_hidden_states=state.text,
            temb=state.cond,
            image_rotary_emb=state.rotary,
            joint_attention_kwargs=None,
        )
        if residuals is not None:
            tokens = tokens + residuals.values[index // ceil(len(blocks) / len(residuals.values))]
        return replace(state, tokens=tokens, text=text)

    def block_modules(self) -> list[nn.Module]:
        """Return the double blocks, then the single blocks."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def head(self, state: _State) -> Tensor:
        """Predict from the state after the last block.  -> (B, N, C_out)."""
        model = self.transformer
        return self.unpatchify(model.proj_out(model.norm_out(state.tokens, state.cond)), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        return ContinuousHead(self.transformer.norm_out, self.transformer.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Return the picture's patches: the model's predictions are packed too.  -> (B, N, C_out)."""
        return patches[:, : state.size]
