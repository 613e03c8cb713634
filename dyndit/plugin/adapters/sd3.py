"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206).

Joint blocks run on picture and text side by side; the last block drops the text. The prediction is a velocity.

The step is read from `timestep`: the pipelines pass the scheduler's timestep, one per row. A guided call
(`guidance_scale` above 1) stacks [unconditional; conditional]: the same latents twice, the embedded negative prompt
first. Skip-layer guidance makes a third call with `skip_layers`, and this call is refused.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dyndit.models.base import PerRow, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ContinuousHead, in_order, join_patches
from dyndit.process import RectifiedFlow


@dataclass(frozen=True)
class _State(State):
    text: Tensor | None
    """(B, S, D); None after the last block."""
    residuals: PerRow | None
    grid: tuple[int, int]
    """Rows and columns of patches."""


class SD3Adapter(Adapter):
    """Stable Diffusion 3: picture and text tokens attend to each other in every block."""

    family = "SD3Transformer2DModel"
    row_arguments = ("encoder_hidden_states", "pooled_projections", "block_controlnet_hidden_states")
    guidance = "uncond first"
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, transformer.inner_dim
        self.sample_shape, self.out_channels = (c.in_channels, c.sample_size, c.sample_size), transformer.out_channels

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Embed.  x: (B, C, H, W), t: (B,), y: prompt embeddings (B, S, D_text), pooled prompt (B, D_pooled)."""
        model, patch = self.transformer, self.transformer.config.patch_size
        return _State(
            model.pos_embed(x).contiguous(),
            model.time_text_embed(t, y["pooled_projections"]),
            model.context_embedder(y["encoder_hidden_states"]),
            in_order(y, "block_controlnet_hidden_states"),
            grid=(x.shape[-2] // patch, x.shape[-1] // patch),
        )

    def block(self, index: int, state: _State) -> State:
        """Run block `index`, then add a ControlNet's residual."""
        block = self.transformer.transformer_blocks[index]
        text, tokens = block(
            hidden_states=state.tokens,
            encoder_hidden_states=state.text,
            temb=state.cond,
            joint_attention_kwargs=None,
        )
        if state.residuals is not None and not block.context_pre_only:
            samples = state.residuals.values
            tokens = tokens + samples[int(index / (self.num_blocks / len(samples)))]
        return replace(state, tokens=tokens, text=text)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Predict from the state after the last block.  -> (B, C_out, H, W)."""
        model = self.transformer
        return self.unpatchify(model.proj_out(model.norm_out(state.tokens, state.cond)), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        return ContinuousHead(self.transformer.norm_out, self.transformer.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        return join_patches(patches, *state.grid, self.transformer.config.patch_size)
