"""diffusers' `QwenImageTransformer2DModel`: Qwen-Image and Qwen-Image-Edit (Wu et al. 2025, arXiv:2508.02324).

Joint blocks run on picture and text side by side. The prediction is a velocity. Latents are packed, 2 x 2 of them a
token: (B, N, C). Edit pipelines append the tokens of reference images: (B, N + R, C). The prediction covers the
picture's N tokens; the transformer's own forward also returns R tokens, which the pipelines drop. The layered model
(`use_layer3d_rope`) has a picture of several layers, and one reference image.

The step is read from `timestep`, one per row: the scheduler's timestep divided by 1000. True guidance (`true_cfg_scale`
above 1 and a negative prompt) makes two calls at every step on the same latents tensor: first the conditional call,
then the unconditional call. Their texts differ in length, so `read` pads texts, and `embed` cuts them again.
"""

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dyndit.errors import InputError
from dyndit.models.base import PerRow, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ContinuousHead, in_order
from dyndit.process import RectifiedFlow

TEXT, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
_PADDED_TO = 1024
"""Tokens of a padded text, or a multiple of it: the longest prompt that the pipelines take."""


@dataclass(frozen=True)
class _State(State):
    text: Tensor
    mask: Tensor | None
    """(B, S): True for tokens that are no padding; None if no row is padded."""
    still: Tensor | None
    """(B, D): conditioning of the reference images' tokens, if they have one of their own."""
    residuals: PerRow | None
    rotary: tuple[Tensor, Tensor]
    """Positions of the picture and of the text, the same for all rows."""
    first: int
    """Number of tokens of the first image: the picture, or its first layer."""
    size: int
    """N: number of the picture's tokens."""

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the picture's tokens, (B, N, D), and the conditioning."""
        return self.tokens[:, : self.size], self.cond


class QwenImageAdapter(Adapter):
    """The adapter of Qwen-Image: picture and text tokens attend to each other in every block."""

    family = "QwenImageTransformer2DModel"
    row_arguments = (TEXT, MASK, "additional_t_cond", "controlnet_block_samples")
    shared_arguments = ("img_shapes",)
    guidance = "calls"
    timestep_scale = 1000.0
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, transformer.inner_dim
        self.sample_shape = (c.in_channels,)  # the model has no picture size: each call brings it
        self.out_channels = transformer.proj_out.out_features

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """Pad the texts, so that rows of several calls fit together. Rows share the shapes of their images.

        Raises:
            InputError: rows with images of several sizes, for which the model has one set of positions.
        """
        shapes = [list(row) if isinstance(row, list) else [row] for row in call["img_shapes"]]
        if any(row != shapes[0] for row in shapes):
            raise InputError(f"{self.family}: called with img_shapes of several sizes; expected one size in a batch")
        y = super()._condition(call | {"img_shapes": [list(shape) for shape in shapes[0]]})
        text, mask = y[TEXT], y[MASK]
        rows, length = text.shape[:2]
        more = -length % _PADDED_TO
        kept = text.new_ones(rows, length, dtype=torch.bool) if mask is None else mask.bool()
        facts = {"text_length": length, "text_is_masked": mask is not None}
        return replace(
            y,
            rows=dict(y.rows)
            | {TEXT: pad(text, (0, 0, 0, more)), MASK: pad(kept, (0, more))}
            | {name: torch.full((rows,), value, device=text.device) for name, value in facts.items()},
        )

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Embed.  x: (B, N + R, C), t: (B,) in 0..1, y: padded prompt, its mask and length, shapes of images."""
        model, shapes = self.transformer, [tuple(shape) for shape in y["img_shapes"]]
        lengths = y["text_length"].tolist()
        length = max(lengths)
        masked = min(lengths) < length or bool(y["text_is_masked"].any())
        tokens, text = model.img_in(x), model.txt_in(model.txt_norm(y[TEXT][:, :length].contiguous()))
        times = t.to(tokens.dtype)
        times = torch.cat([times, times * 0]) if model.zero_cond_t else times
        cond = model.time_text_embed(times, tokens, y["additional_t_cond"])
        cond, still = cond.chunk(2) if model.zero_cond_t else (cond, None)
        return _State(
            tokens,
            cond,
            text,
            y[MASK][:, :length].contiguous() if masked else None,
            still,
            in_order(y, "controlnet_block_samples"),
            model.pos_embed([shapes], max_txt_seq_len=length, device=x.device),
            first=prod(shapes[0]),
            size=sum(map(prod, shapes[:-1] if model.config.use_layer3d_rope else shapes[:1])),
        )

    def block(self, index: int, state: _State) -> State:
        """Run block `index`, then add a ControlNet's residual."""
        cond, index_of = state.cond, None
        if state.still is not None:
            cond, index_of = torch.cat([state.cond, state.still]), _is_after(state.first, state.tokens)
        text, tokens = self.transformer.transformer_blocks[index](
            hidden_states=state.tokens,
            encoder_hidden_states=state.text,
            encoder_hidden_states_mask=state.mask,
            temb=cond,
            image_rotary_emb=state.rotary,
            joint_attention_kwargs=None,
            modulate_index=index_of,
        )
        if state.residuals is not None:
            samples = state.residuals.values
            tokens = tokens + samples[index // ceil(self.num_blocks / len(samples))]
        return replace(state, tokens=tokens, text=text)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

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


def _is_after(first: int, tokens: Tensor) -> Tensor:
    """Return 0 for tokens of the first image and 1 for tokens of the images after it.  -> (B, N + R), int32."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (places >= first).int().expand(len(tokens), -1)
