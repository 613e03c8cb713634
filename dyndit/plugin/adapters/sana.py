"""diffusers' `SanaTransformer2DModel`: Sana (Xie et al. 2024, arXiv:2410.10629) and Sana-Sprint (Chen et al. 2025,
arXiv:2503.09641).

`timestep` tells the step; the pipelines pass the scheduler's timestep times `config.timestep_scale`, one per row. A
guided call (`guidance_scale` above 1) stacks [unconditional; conditional]: the same latents twice, the embedded
negative prompt first. The prediction is a velocity.

Sprint's guidance is an input (`guidance`), no second branch. Its scheduler counts angles a of a circle, 0 to pi/2; the
forward gets sin a / (sin a + cos a).
"""

from dataclasses import dataclass, replace
from math import atan2
from typing import Any

from torch import Tensor, nn

from dyndit.models.base import PerRow, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, TableHead, attention_bias, in_order, join_patches
from dyndit.process import RectifiedFlow


@dataclass(frozen=True)
class _State(State):
    modulation: Tensor
    """(B, 6 D): modulation of all blocks; each block adds its own table."""
    text: Tensor
    text_bias: Tensor | None
    token_bias: Tensor | None
    residuals: PerRow | None
    """Residual i is added after block i + 1."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


class SanaAdapter(Adapter):
    """The adapter of Sana. Blocks of linear attention share one modulation and attend to the text."""

    family = "SanaTransformer2DModel"
    row_arguments = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "attention_mask",
        "guidance",
        "controlnet_block_samples",
    )
    guidance = "uncond first"
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.num_attention_heads * c.attention_head_dim
        self.out_channels = c.out_channels or c.in_channels
        self.sample_shape = (c.in_channels, c.sample_size, c.sample_size)
        self.timestep_scale = 1 / c.timestep_scale

    def scheduler_timestep(self, t: float) -> float:
        """See `Adapter`. Sprint's scheduler counts angles."""
        return atan2(t, 1 - t) if self.transformer.config.guidance_embeds else t * self.timestep_scale

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, C, H, W), t: (B,), y: prompt embeddings (B, S, D_text), their mask (B, S).
        """
        model, patch = self.transformer, self.transformer.config.patch_size
        tokens = model.patch_embed(x)
        scale = {"batch_size": len(x)} if y["guidance"] is None else {"guidance": y["guidance"]}
        modulation, cond = model.time_embed(t, **scale, hidden_dtype=tokens.dtype)
        text = model.caption_projection(y["encoder_hidden_states"]).view(len(x), -1, self.width)
        biases = [attention_bias(y[name], x.dtype) for name in ("encoder_attention_mask", "attention_mask")]
        return _State(
            tokens,
            cond,
            modulation,
            model.caption_norm(text),
            biases[0],
            biases[1],
            in_order(y, "controlnet_block_samples"),
            grid=(x.shape[-2] // patch, x.shape[-1] // patch),
        )

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        tokens = self.transformer.transformer_blocks[index](
            state.tokens, state.token_bias, state.text, state.text_bias, state.modulation, *state.grid
        )
        if state.residuals is not None and 0 < index <= len(state.residuals.values):
            tokens = tokens + state.residuals.values[index - 1]
        return replace(state, tokens=tokens)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, C_out, H, W)."""
        model = self.transformer
        patches = model.proj_out(model.norm_out(state.tokens, state.cond, model.scale_shift_table))
        return self.unpatchify(patches, state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        model = self.transformer
        return TableHead(model.norm_out.norm, model.scale_shift_table, model.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        return join_patches(patches, *state.grid, self.transformer.config.patch_size)
