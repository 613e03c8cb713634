"""diffusers' `DiTTransformer2DModel` (Peebles and Xie 2022, arXiv:2212.09748).

`timestep` tells the step. A guided call of `DiTPipeline` stacks [conditional; unconditional]. Unconditional rows carry
the null label, which follows the last class.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu

from dyndit.errors import CheckpointError, InputError
from dyndit.models.base import Inputs, State
from dyndit.models.conditions import ClassLabels
from dyndit.models.layers import FinalLayer
from dyndit.plugin.adapters.base import Adapter, join_patches
from dyndit.plugin.weights import added_tensors, own_tensors
from dyndit.process import DDPM, from_config
from dyndit.storage.names import FREQUENCY_SHIFT, PROCESS, frequency_shift_of, to_native

PIPELINE_NULL = 1000
"""The null label of `DiTPipeline`, whatever the model."""


@dataclass(frozen=True)
class _State(State):
    t: Tensor
    y: Tensor
    side: int
    """Patches on a side: pictures are square."""


class DiTAdapter(Adapter):
    """The adapter of DiT. Each block takes the timestep and the label, and has its own copy of the embedder.

    Raises:
        CheckpointError: diffusers built the transformer with other timestep frequencies than its config records.
    """

    family = "DiTTransformer2DModel"
    row_arguments = ("class_labels",)
    guidance = "cond first"

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        c = transformer.config
        self.num_blocks, self.width = c.num_layers, transformer.inner_dim
        self.condition: ClassLabels = ClassLabels(c.num_embeds_ada_norm)
        self.sample_shape, self.out_channels = (c.in_channels, c.sample_size, c.sample_size), transformer.out_channels

        self.usual_process = from_config(c.get(PROCESS, DDPM().config()))
        found = frequency_shift_of(transformer)
        if (trained := c.get(FREQUENCY_SHIFT, found)) != found:
            raise CheckpointError(
                f"transformer: trained with timestep frequencies of shift {trained}, built by diffusers with {found}; "
                f"expected dyndit.storage.names.match_frequencies(transformer, {trained}) after loading"
            )

    def _condition(self, call: dict[str, Any]) -> Tensor:
        """Return the labels of a bound call.

        `DiTPipeline` uses 1000 as the null label of any model. With fewer classes than 1000 only the null label can be
        meant.

        Raises:
            InputError: the pictures are not square, or there are no labels.
        """
        height, width = call["hidden_states"].shape[-2:]
        if height != width:
            raise InputError(f"{self.family}: called with latents of {height} x {width}; expected a square")
        labels, null = call.get("class_labels"), self.condition.null_label
        if labels is None:
            raise InputError(f"{self.family}: called without class_labels")
        if null is not None and null < PIPELINE_NULL:
            labels = labels.masked_fill(labels == PIPELINE_NULL, null)
        return labels

    def is_guided(self, inputs: Inputs) -> bool:
        """Return True if all rows of the second half, and no row of the first, carry the null label."""
        labels: Any = inputs.y
        null = [label == self.condition.null_label for label in labels.tolist()]
        half = len(null) // 2
        return len(null) == 2 * half and not any(null[:half]) and all(null[half:])

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> State:
        """Return the state before block 0.  x: (B, C, H, W), t: (B,), y: (B,)."""
        tokens = self.transformer.pos_embed(x)
        cond = self.transformer.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=tokens.dtype)
        return _State(tokens, cond, t, y, x.shape[-1] // self.transformer.patch_size)

    def block(self, index: int, state: _State) -> State:
        """Run block `index`."""
        block = self.transformer.transformer_blocks[index]
        tokens = block(
            state.tokens,
            attention_mask=None,
            encoder_hidden_states=None,
            encoder_attention_mask=None,
            timestep=state.t,
            cross_attention_kwargs=None,
            class_labels=state.y,
        )
        return replace(state, tokens=tokens)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.transformer.transformer_blocks)

    def head(self, state: _State) -> Tensor:
        """Run the model's own final layer -> (B, C_out, H, W)."""
        model = self.transformer
        shift, scale = model.proj_out_1(silu(state.cond)).chunk(2, dim=1)
        tokens = model.norm_out(state.tokens) * (1 + scale[:, None]) + shift[:, None]
        return self.unpatchify(model.proj_out_2(tokens), state)

    def new_exit_head(self) -> nn.Module:
        """Return the native head under its native names, so that exits serve the model in both libraries."""
        model = self.transformer
        head = FinalLayer(self.width, model.proj_out_2.out_features, model.norm_out.eps)
        head.linear.load_state_dict(model.proj_out_2.state_dict())
        head.adaLN_modulation[1].load_state_dict(model.proj_out_1.state_dict())
        return head.to(model.proj_out_2.weight)

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Join patches to pictures.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        return join_patches(patches, state.side, state.side, self.transformer.patch_size)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights under their native names, so that the backbone has one identity in both libraries."""
        native = to_native(own_tensors(self.transformer), self.sample_shape[1] // self.transformer.patch_size)
        return native | added_tensors(self.transformer)

    def unseen(self) -> dict[str, Any]:
        """Return the same settings as the native class and its process, and the scales of low-rank adapters."""
        process = {} if self.usual_process == DDPM() else {"process": self.usual_process.config()}
        return (
            process
            | self._added()
            | {
                "num_heads": self.transformer.config.num_attention_heads,
                "norm_eps": self.transformer.norm_out.eps,
                "mlp_norm_eps": self.transformer.config.norm_eps,
                "frequency_shift": frequency_shift_of(self.transformer),
            }
        )
