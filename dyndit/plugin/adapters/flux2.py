"""diffusers' `Flux2Transformer2DModel`: FLUX.2 and FLUX.2 Klein (Black Forest Labs 2025).

Double blocks run on picture and text side by side, single blocks on both as one sequence. Depth counts double blocks
first, then single blocks. The prediction is a velocity. Latents are packed: (B, N, C). Reference images are appended
as tokens at other times (the first number of `img_ids`): (B, N + R, C). The prediction covers the picture's N tokens;
the transformer's own forward also returns R tokens, which the pipelines drop.

The step is read from `timestep`, one per row: the scheduler's timestep divided by 1000. `guidance_scale` is an input
of FLUX.2 (`guidance`), no second branch. Klein's guided steps (`guidance_scale` above 1) make two calls on the same
latents tensor: first the conditional call, then the unconditional call. Keys and values kept for reference images
(`kv_cache`) are refused: after a shallow step the deeper blocks would have none.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from dyndit.models.base import Inputs, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ContinuousHead, first_image
from dyndit.process import RectifiedFlow


@dataclass(frozen=True)
class _State(State):
    """tokens: (B, N + R, D) in double blocks; (B, S + N + R, D), the text first, in single blocks."""

    text: Tensor | None
    """(B, S, D); None in single blocks."""
    double: Tensor
    """(B, 6 D): modulation of pictures in double blocks."""
    double_text: Tensor
    single: Tensor
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the positions of text, then pictures: (S + N + R, D_head), the same for all rows."""
    places: tuple[int, int]
    """S, the number of the text's tokens, and N, the number of the picture's tokens."""

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the picture's tokens, (B, N, D), and the conditioning."""
        length, size = self.places
        first = 0 if self.text is not None else length
        return self.tokens[:, first : first + size], self.cond


class Flux2Adapter(Adapter):
    """The adapter of FLUX.2: double blocks, then single blocks."""

    family = "Flux2Transformer2DModel"
    row_arguments = ("encoder_hidden_states", "guidance")
    shared_arguments = ("img_ids", "txt_ids")
    guidance = "calls"
    timestep_scale = 1000.0
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers + c.num_single_layers, transformer.inner_dim
        self.sample_shape = (c.in_channels,)  # the model has no picture size: each call brings its positions
        self.out_channels = transformer.proj_out.out_features

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """Keep the positions of one row: the model takes them for all rows."""
        ids = {name: call[name][0] if call[name].ndim == 3 else call[name] for name in self.shared_arguments}
        return super()._condition(call | ids)

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Embed.  x: (B, N + R, C), t: (B,) in 0..1, y: prompt (B, S, D_text), positions."""
        model = self.transformer
        guidance = None if y["guidance"] is None else y["guidance"].to(x.dtype) * 1000
        cond = model.time_guidance_embed(t.to(x.dtype) * 1000, guidance)
        pictures, text = (model.pos_embed(y[name]) for name in ("img_ids", "txt_ids"))
        return _State(
            model.x_embedder(x),
            cond,
            model.context_embedder(y["encoder_hidden_states"]),
            model.double_stream_modulation_img(cond),
            model.double_stream_modulation_txt(cond),
            model.single_stream_modulation(cond),
            (torch.cat([text[0], pictures[0]]), torch.cat([text[1], pictures[1]])),
            places=(len(y["txt_ids"]), first_image(y["img_ids"])),
        )

    def block(self, index: int, state: _State) -> State:
        """Run block `index`: first the double blocks, then the single blocks."""
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        if index < len(double):
            text, tokens = double[index](
                hidden_states=state.tokens,
                encoder_hidden_states=state.text,
                temb_mod_img=state.double,
                temb_mod_txt=state.double_text,
                image_rotary_emb=state.rotary,
                joint_attention_kwargs=None,
            )
            return replace(state, tokens=tokens, text=text)
        tokens = state.tokens if state.text is None else torch.cat([state.text, state.tokens], dim=1)
        tokens = single[index - len(double)](
            hidden_states=tokens,
            encoder_hidden_states=None,
            temb_mod=state.single,
            image_rotary_emb=state.rotary,
            joint_attention_kwargs=None,
        )
        return replace(state, tokens=tokens, text=None)

    def block_modules(self) -> list[nn.Module]:
        """Return the double blocks, then the single blocks."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def head(self, state: _State) -> Tensor:
        """Predict from the state after the last block.  -> (B, N, C_out)."""
        model = self.transformer
        pictures = state.tokens if state.text is not None else state.tokens[:, state.places[0] :]
        return self.unpatchify(model.proj_out(model.norm_out(pictures, state.cond)), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        return ContinuousHead(self.transformer.norm_out, self.transformer.proj_out)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Return the picture's patches: the model's predictions are packed too.  -> (B, N, C_out)."""
        return patches[:, : state.places[1]]

    def output(self, prediction: Tensor, inputs: Inputs, return_dict: bool) -> BaseOutput | tuple[Tensor, ...]:
        """See `Adapter`."""
        return Flux2Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)
