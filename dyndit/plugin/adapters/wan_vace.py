"""diffusers' `WanVACETransformer3DModel`: Wan with VACE's control (Jiang et al. 2025, arXiv:2503.07598).

Control blocks run beside some of Wan's own blocks. Each adds a hint to the tokens after its block. The adapter runs a
control block with its block, so that an exit leaves out later control blocks too. Depth counts Wan's own blocks.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from dyndit.models.base import State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.wan import IMAGE, TEXT, WanAdapter, WanState


@dataclass(frozen=True)
class _State(WanState):
    control: Tensor
    """(B, N, D): tokens of the control video."""
    strengths: tuple[Tensor, ...]
    """A factor for the hint of each control block, the same for all rows."""


class WanVACEAdapter(WanAdapter):
    """The adapter of Wan with control blocks."""

    family = "WanVACETransformer3DModel"
    row_arguments = (TEXT, IMAGE, "control_hidden_states")
    shared_arguments = ("control_hidden_states_scale",)

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """See `WanAdapter`.  y also has the control video (B, C_control, F, H, W) and a strength per control block."""
        state, video = super().embed(x, t, y), y["control_hidden_states"]
        # Unlike Wan's, the forward leaves tokens as the patch embedding lays them out: half precision shows it.
        tokens = state.tokens.transpose(1, 2).contiguous().transpose(1, 2)
        control = self.transformer.vace_patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
        control = pad(control, (0, 0, 0, tokens.shape[1] - control.shape[1]))
        strengths = y["control_hidden_states_scale"]
        strengths = video.new_ones(len(self.transformer.vace_blocks)) if strengths is None else strengths
        known: dict[str, Any] = {**vars(state), "tokens": tokens}
        return _State(**known, control=control, strengths=strengths.unbind())

    def block(self, index: int, state: Any) -> State:
        """Run block `index` and, if one belongs to it, its control block."""
        layers = sorted(self.transformer.config.vace_layers)
        if index not in layers:
            return super().block(index, state)
        number = layers.index(index)
        hint, control = self.transformer.vace_blocks[number](
            state.tokens, state.text, state.control, state.modulation, state.rotary
        )
        state = super().block(index, replace(state, control=control))
        return replace(state, tokens=state.tokens + hint * state.strengths[number])

    def block_modules(self) -> list[nn.Module]:
        """Return the control blocks, then the blocks."""
        return [*self.transformer.vace_blocks, *self.transformer.blocks]

    def block_kinds(self) -> tuple[bool, ...]:
        """Tell which blocks have a control block."""
        return tuple(index in self.transformer.config.vace_layers for index in range(self.num_blocks))
