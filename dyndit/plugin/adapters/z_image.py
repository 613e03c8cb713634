"""diffusers' `ZImageTransformer2DModel`: Z-Image (Alibaba 2025, arXiv:2511.22699).

Blocks run on picture and text as one sequence, picture first. Refiners of the latents and of the text run before; they
belong to `embed`. The transformer takes and returns a list with a tensor (C, F, H, W) per row, and a list of texts of
any length. `read` stacks the latents and pads the texts; `embed` cuts the texts again.

Time runs backwards: `t` is 0 at the noise and 1 at the picture, one per row. The pipelines pass 1 minus the scheduler's
timestep divided by 1000, and negate the prediction. A guided call (`guidance_scale` above 0) stacks [conditional;
unconditional]: the same latents twice. The pipelines' scale s is 1 + s elsewhere: 0 is no guidance. Reference images
(`siglip_feats`, `image_noise_mask`, nested lists of latents) are refused.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dyndit.errors import InputError
from dyndit.models.base import Inputs, PerRow, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, ScaleHead
from dyndit.process import RectifiedFlow

_PATCH, _FRAMES = 2, 1
"""Sizes of a patch. A call with others is refused."""
_PADDED_TO = 512
"""Tokens of a padded text, or a multiple of it: the longest prompt that the pipelines take."""
_CONTROL = "controlnet_block_samples"


@dataclass(frozen=True)
class _State(State):
    """tokens: (B, N + S, D): the row's picture, its text, then padding up to the longest row."""

    rotary: Tensor
    mask: Tensor | None
    """(B, N + S): True for tokens that are no padding; None if no row is padded."""
    residuals: PerRow | None
    after: tuple[int, ...]
    """Blocks that a residual is added after."""
    size: tuple[int, int, int]
    """Frames, height and width of the latents."""

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the picture's tokens, (B, N, D), and the conditioning."""
        frames, height, width = self.size
        return self.tokens[:, : (frames // _FRAMES) * (height // _PATCH) * (width // _PATCH)], self.cond


class ZImageAdapter(Adapter):
    """The adapter of Z-Image. Depth counts the joint blocks."""

    family = "ZImageTransformer2DModel"
    latents_arguments, timestep_argument = ("x",), "t"
    row_arguments = ("cap_feats", _CONTROL)
    guidance = "cond first"
    usual_process = RectifiedFlow()

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.n_layers, transformer.dim
        self.sample_shape = (c.in_channels,)  # the model has no picture size
        self.out_channels = transformer.out_channels

    @property
    def cond_width(self) -> int:
        """See `Backbone`."""
        return self._final.adaLN_modulation[1].in_features

    @property
    def _final(self) -> Any:
        """Return the final layer."""
        return self.transformer.all_final_layer[f"{_PATCH}-{_FRAMES}"]

    def scheduler_timestep(self, t: float) -> float:
        """See `Adapter`. Time runs backwards."""
        return 1000 * (1 - t)

    def _latents(self, call: dict[str, Any]) -> Tensor:
        """Stack the rows.  -> (B, C, F, H, W).

        Raises:
            InputError: rows with several images, or of several sizes.
        """
        value = call["x"]
        if any(isinstance(row, list) or row.shape != value[0].shape for row in value):
            raise InputError(f"{self.family}: called with x of several images or sizes; expected one size in a batch")
        return value if isinstance(value, Tensor) else torch.stack(list(value))

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """Pad the texts, so that rows of several lengths fit together.  -> texts (B, P, D_text), lengths (B,)."""
        texts = call["cap_feats"]
        lengths = [len(text) for text in texts]
        padded = -(-max(lengths) // _PADDED_TO) * _PADDED_TO
        rows = {
            "cap_feats": torch.stack([pad(text, (0, 0, 0, padded - len(text))) for text in texts]),
            "cap_length": torch.tensor(lengths, device=texts[0].device),
        }
        control = call.get(_CONTROL) or {}
        return Conditioning(rows | {f"{_CONTROL}.{block}": sample for block, sample in control.items()})

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Embed.  x: (B, C, F, H, W), t: (B,) in 0..1, y: padded texts and their lengths."""
        model = self.transformer
        cond = model.t_embedder(t * model.t_scale).type_as(x)
        texts = [text[:length] for text, length in zip(y["cap_feats"], y["cap_length"].tolist(), strict=True)]
        pictures, texts, sizes, picture_ids, text_ids, picture_pads, text_pads = model.patchify_and_embed(
            list(x), texts, _PATCH, _FRAMES
        )
        counts, lengths = [len(picture) for picture in pictures], [len(text) for text in texts]
        picture = model.all_x_embedder[f"{_PATCH}-{_FRAMES}"](torch.cat(pictures)).split(counts)
        picture, picture_rotary, mask, _, _ = model._prepare_sequence(
            list(picture), picture_ids, picture_pads, model.x_pad_token, None, x.device
        )
        for layer in model.noise_refiner:
            picture = layer(picture, mask, picture_rotary, cond)
        text = model.cap_embedder(torch.cat(texts)).split(lengths)
        text, text_rotary, mask, _, _ = model._prepare_sequence(
            list(text), text_ids, text_pads, model.cap_pad_token, None, x.device
        )
        for layer in model.context_refiner:
            text = layer(text, mask, text_rotary)
        sequence = (picture, picture_rotary, counts, None, text, text_rotary, lengths, None)
        tokens, rotary, mask, _ = model._build_unified_sequence(*sequence, None, None, None, None, False, x.device)
        prefix = f"{_CONTROL}."
        control = {int(key.removeprefix(prefix)): value for key, value in y.rows.items() if key.startswith(prefix)}
        residuals = PerRow(tuple(control.values())) if control else None
        return _State(tokens, cond, rotary, mask, residuals, after=tuple(control), size=tuple(sizes[0]))

    def block(self, index: int, state: _State) -> State:
        """Run block `index`, then add a ControlNet's residual."""
        tokens = self.transformer.layers[index](state.tokens, state.mask, state.rotary, state.cond)
        if state.residuals is not None and index in state.after:
            tokens = tokens + state.residuals.values[state.after.index(index)]
        return replace(state, tokens=tokens)

    def block_modules(self) -> list[nn.Module]:
        """Return the joint blocks."""
        return list(self.transformer.layers)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, C, F, H, W)."""
        return self.unpatchify(self._final(state.tokens, c=state.cond), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the final layer."""
        return ScaleHead(self._final.norm_final, self._final.adaLN_modulation[1], self._final.linear)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join the picture's patches.  (B, N or N + S, patch * patch * C) -> (B, C, F, H, W)."""
        sizes = [state.size] * len(patches)
        return torch.stack(self.transformer.unpatchify(list(patches.unbind(0)), sizes, _PATCH, _FRAMES))

    def output(self, prediction: Any, inputs: Inputs, return_dict: bool) -> Any:
        """Return a list with a prediction per row, as the transformer's forward does."""
        return super().output(list(prediction.unbind(0)), inputs, return_dict)
