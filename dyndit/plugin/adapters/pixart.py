"""diffusers' `PixArtTransformer2DModel`: PixArt-alpha (Chen et al. 2023, arXiv:2310.00426) and PixArt-Sigma (Chen et
al. 2024, arXiv:2403.04692).

`timestep` tells the step; the pipelines pass the scheduler's timestep, one per row. A guided call (`guidance_scale`
above 1) stacks [unconditional; conditional]: the same latents twice, the embedded negative prompt first. The prompts'
masks stand in `encoder_attention_mask`. The 1024-pixel alpha model also gets resolution and aspect ratio, one row per
picture, in `added_cond_kwargs`.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, TableHead, attention_bias, join_patches


@dataclass(frozen=True)
class _State(State):
    modulation: Tensor
    """(B, 6 D): modulation of all blocks; each block adds its own table."""
    text: Tensor
    text_bias: Tensor | None
    token_bias: Tensor | None
    grid: tuple[int, int]
    """Rows and columns of patches."""


class PixArtAdapter(Adapter):
    """The adapter of PixArt. All blocks share one modulation and attend to the text."""

    family = "PixArtTransformer2DModel"
    row_arguments = ("encoder_hidden_states", "encoder_attention_mask", "attention_mask", "added_cond_kwargs")
    guidance = "uncond first"

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, transformer.inner_dim
        self.sample_shape, self.out_channels = (c.in_channels, c.sample_size, c.sample_size), transformer.out_channels

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, C, H, W), t: (B,), y: prompt embeddings (B, S, D_text), their mask (B, S).
        """
        model, patch = self.transformer, self.transformer.config.patch_size
        tokens, text = model.pos_embed(x), y["encoder_hidden_states"]
        sizes = {"resolution": y["resolution"], "aspect_ratio": y["aspect_ratio"]}
        modulation, cond = model.adaln_single(t, sizes, batch_size=len(x), hidden_dtype=tokens.dtype)
        if model.caption_projection is not None:
            text = model.caption_projection(text)
        biases = [attention_bias(y[name], x.dtype) for name in ("encoder_attention_mask", "attention_mask")]
        return _State(tokens, cond, modulation, text, *biases, grid=(x.shape[-2] // patch, x.shape[-1] // patch))

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        tokens = self.transformer.transformer_blocks[index](
            state.tokens,
            attention_mask=state.token_bias,
            encoder_hidden_states=state.text,
            encoder_attention_mask=state.text_bias,
            timestep=state.modulation,
            cross_attention_kwargs=None,
            class_labels=None,
        )
        return replace(state, tokens=tokens)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, C_out, H, W)."""
        model = self.transformer
        shift, scale = (model.scale_shift_table[None] + state.cond[:, None]).chunk(2, dim=1)
        return self.unpatchify(model.proj_out(model.norm_out(state.tokens) * (1 + scale) + shift), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        model = self.transformer
        return TableHead(model.norm_out, model.scale_shift_table, model.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        return join_patches(patches, *state.grid, self.transformer.config.patch_size)
