"""diffusers' `WanTransformer3DModel`: Wan 2.1 and 2.2, video (Wan Team 2025, arXiv:2503.20314).

The prediction is a velocity. Image-to-video models take the picture as further channels of the latents; those of Wan
2.1 attend to its features too.

`timestep` tells the step: the scheduler's timestep, one per row. With `expand_timesteps` (the 5B model of Wan 2.2)
every token has one; the largest is the step's, because tokens of a given frame have 0. A guided call (`guidance_scale`
above 1) makes two calls at every step on the same latents tensor: first the conditional call, then the unconditional
call. Wan 2.2's larger models are two such transformers, an expert for high noise and an expert for low noise
(`dyndit.plugin.experts`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, TableHead, shift_and_scale
from dyndit.process import RectifiedFlow

TEXT, IMAGE, TIMES = "encoder_hidden_states", "encoder_hidden_states_image", "timestep_per_token"


@dataclass(frozen=True)
class WanState(State):
    """The state between two blocks of Wan."""

    text: Tensor
    """(B, S, D): features of given pictures, then of the prompt."""
    modulation: Tensor
    """(B, 6, D) or (B, N, 6, D): modulation of all blocks; each block adds its own table."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the positions: (1, N, 1, D_head), the same for all rows."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches."""


class WanAdapter(Adapter):
    """The adapter of Wan. All blocks share one modulation and attend to the text."""

    family = "WanTransformer3DModel"
    row_arguments = (TEXT, IMAGE)
    guidance = "calls"
    timestep_per_token = True
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.num_attention_heads * c.attention_head_dim
        self.out_channels = c.out_channels or c.in_channels
        self.sample_shape = (c.in_channels,)  # the model has no size: each call brings its own

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """Return the conditioning; a first and a last picture (two rows of features each) make one row."""
        condition = super()._condition(call)
        rows = dict(condition.rows)
        times, batch = call["timestep"], len(call["hidden_states"])
        if isinstance(times, Tensor) and times.ndim == 2:
            rows[TIMES] = times
        if IMAGE in rows and self._takes_two_pictures:
            rows[IMAGE] = rows[IMAGE].reshape(batch, -1, rows[IMAGE].shape[-1])
        return replace(condition, rows=rows)

    @property
    def _takes_two_pictures(self) -> bool:
        embedder = self.transformer.condition_embedder.image_embedder
        return embedder is not None and embedder.pos_embed is not None

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, C, F, H, W), t: (B,), y: prompt embeddings (B, S, D_text), and, where the call has them, features of
        pictures (B, S_image, D_image) and a timestep per token (B, N).
        """
        model, times, image = self.transformer, y[TIMES], y[IMAGE]
        tokens = model.patch_embedding(x)
        grid = tuple(tokens.shape[2:])
        if image is not None and self._takes_two_pictures:
            image = image.reshape(2 * len(x), -1, image.shape[-1])
        cond, modulation, text, image = model.condition_embedder(
            t if times is None else times.flatten(),
            y[TEXT],
            image,
            timestep_seq_len=None if times is None else times.shape[1],
        )
        return WanState(
            tokens.flatten(2).transpose(1, 2).contiguous(),
            cond,
            text if image is None else torch.cat([image, text], dim=1),
            modulation.unflatten(-1, (6, -1)),
            model.rope(x),
            grid,
        )

    def block(self, index: int, state: WanState) -> State:
        """Run block `index`."""
        block = self.transformer.blocks[index]
        return replace(state, tokens=block(state.tokens, state.text, state.modulation, state.rotary))

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.blocks)

    def head(self, state: WanState) -> Tensor:
        """Run the model's own final layer -> (B, C_out, F, H, W)."""
        model = self.transformer
        shift, scale = shift_and_scale(model.scale_shift_table[0], state.cond)
        return self.unpatchify(model.proj_out(_modulated(model.norm_out, state.tokens, shift, scale)), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        model = self.transformer
        return _Head(model.norm_out, model.scale_shift_table[0], model.proj_out)

    def unpatchify(self, patches: Tensor, state: WanState) -> Tensor:
        """Join patches to a video.  (B, N, patch volume * C_out) -> (B, C_out, F, H, W)."""
        patch = self.transformer.config.patch_size
        frames, rows, columns = (size * step for size, step in zip(state.grid, patch, strict=True))
        volumes = patches.reshape(len(patches), *state.grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return volumes.reshape(len(patches), -1, frames, rows, columns)


class _Head(TableHead):
    """A table head whose norm and modulation run in single precision."""

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """See `TableHead`."""
        shift, scale = shift_and_scale(self.scale_shift_table, cond)
        return self.proj_out(_modulated(self.norm_out, tokens, shift, scale))


def _modulated(norm: nn.LayerNorm, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise in single precision, then scale and shift.  (B, N, D) -> the same."""
    return (norm(tokens.float()) * (1 + scale) + shift).type_as(tokens)
