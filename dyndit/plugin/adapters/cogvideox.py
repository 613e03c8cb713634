"""diffusers' `CogVideoXTransformer3DModel`: CogVideoX 1.0 and 1.5, video (Yang et al. 2024, arXiv:2408.06072).

Blocks run on video and text side by side. Latents have the frames before the channels: (B, F, C, H, W). Image-to-video
and control models take the picture or the control video as further channels.

`timestep` tells the step; the pipelines pass the scheduler's timestep, one per row. A guided call (`guidance_scale`
above 1) stacks [unconditional; conditional]: the same latents twice, the embedded negative prompt first.
"""

from dataclasses import dataclass, replace
from typing import Any

from diffusers.models.normalization import AdaLayerNorm
from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, linear_copy


@dataclass(frozen=True)
class _State(State):
    text: Tensor
    """(B, S, D)"""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines of the video's positions: (N, D_head), the same for all rows; None: positions are in tokens."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches."""


class CogVideoXAdapter(Adapter):
    """The adapter of CogVideoX: video and text tokens attend to each other in every block."""

    family = "CogVideoXTransformer3DModel"
    row_arguments = ("encoder_hidden_states",)
    shared_arguments = ("ofs", "image_rotary_emb")
    guidance = "uncond first"

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, c.num_attention_heads * c.attention_head_dim
        self.out_channels = c.out_channels
        frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
        self.sample_shape = (c.in_channels, frames, c.sample_height, c.sample_width)

    @property
    def cond_width(self) -> int:
        """Return the width of the timestep's embedding."""
        return self.transformer.config.time_embed_dim

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """Return the conditioning, with the pair of rotary tensors as two entries."""
        condition = super()._condition(call)
        shared = dict(condition.shared)
        if (rotary := shared.pop("image_rotary_emb", None)) is not None:
            shared |= {"rotary_cos": rotary[0], "rotary_sin": rotary[1]}
        return replace(condition, shared=shared)

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Return the state before block 0.

        x: (B, F, C, H, W), t: (B,), y: prompt embeddings (B, S, D_text); `ofs`, (1,), if the model embeds it; cosines
        and sines (N, D_head).
        """
        model, config, text = self.transformer, self.transformer.config, y["encoder_hidden_states"]
        cond = model.time_embedding(model.time_proj(t).to(x.dtype))
        if model.ofs_embedding is not None:
            cond = cond + model.ofs_embedding(model.ofs_proj(y["ofs"]).to(x.dtype))
        joint = model.embedding_dropout(model.patch_embed(text, x))
        length = text.shape[1]
        rotary = None if y["rotary_cos"] is None else (y["rotary_cos"], y["rotary_sin"])
        patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        grid = (x.shape[1] // patch[0], x.shape[3] // patch[1], x.shape[4] // patch[2])
        return _State(joint[:, length:], cond, joint[:, :length], rotary, grid)

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        tokens, text = self.transformer.transformer_blocks[index](
            hidden_states=state.tokens,
            encoder_hidden_states=state.text,
            temb=state.cond,
            image_rotary_emb=state.rotary,
            attention_kwargs=None,
        )
        return replace(state, tokens=tokens, text=text)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, F, C_out, H, W)."""
        model = self.transformer
        tokens = model.norm_out(model.norm_final(state.tokens), temb=state.cond)
        return self.unpatchify(model.proj_out(tokens), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        model = self.transformer
        return _Head(model.norm_final, model.norm_out, model.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to a video.  (B, N, C_out * patch volume) -> (B, F, C_out, H, W)."""
        config, (frames, rows, columns) = self.transformer.config, state.grid
        deep, patch = config.patch_size_t or 1, config.patch_size
        volumes = patches.reshape(len(patches), frames, rows, columns, -1, deep, patch, patch)
        video = volumes.permute(0, 1, 5, 4, 2, 6, 3, 7)
        return video.reshape(len(patches), frames * deep, -1, rows * patch, columns * patch)


class _Head(nn.Module):
    """A norm, a norm modulated by the conditioning, then a linear map. The head starts as a copy of the model's own."""

    def __init__(self, norm_final: nn.LayerNorm, norm_out: AdaLayerNorm, proj_out: nn.Linear) -> None:
        super().__init__()
        inner = norm_out.norm
        self.norm_final = nn.LayerNorm(list(norm_final.normalized_shape), norm_final.eps, norm_final.elementwise_affine)
        self.norm_out = AdaLayerNorm(
            norm_out.linear.in_features,
            output_dim=norm_out.linear.out_features,
            norm_elementwise_affine=inner.elementwise_affine,
            norm_eps=inner.eps,
            chunk_dim=1,
        )
        self.norm_final.load_state_dict(norm_final.state_dict())
        self.norm_out.load_state_dict(norm_out.state_dict())
        self.proj_out = linear_copy(proj_out)
        self.to(proj_out.weight)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D_cond) -> (B, N, C_out * patch volume)."""
        return self.proj_out(self.norm_out(self.norm_final(tokens), temb=cond))
