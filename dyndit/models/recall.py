"""Forecast full depth from what a full-depth step left: learned, where `forecasts` extrapolates.

A full-depth step leaves the tokens after block d, and those after the last block. At a later step d blocks run. The
recall head of depth d changes the last block's tokens by what an MLP makes of all three, then predicts as the model's
final layer does:

    h_L(now) ~ h_L(then) + MLP(h_d(now), h_d(then), h_L(then))

The condition modulates the MLP, and so do the log-SNR now and its rise since then. It starts with h_L(then) alone.
TaylorSeer (arXiv:2503.06923) extrapolates such tokens by Taylor's formula; FastCache (arXiv:2505.20353) learns a linear
map of the tokens that it skips.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndit.models.base import Backbone
from dyndit.models.forecasts import NUM_TERMS
from dyndit.models.layers import modulate, zero_linear

RATIO = 2
"""Width of the MLP in multiples of D, unless told."""


@dataclass(frozen=True)
class Left:
    """What the last full-depth step left.  tokens: (B, N, D) of the conditional branch, by depth, the last L."""

    timestep: float
    tokens: Mapping[int, Tensor]


class RecallHead(nn.Module):
    """The head of learned forecasts at one depth."""

    def __init__(self, backbone: Backbone, ratio: int = RATIO) -> None:
        super().__init__()
        self.final = backbone.new_exit_head()
        width, cond, hidden = backbone.width, backbone.cond_width, ratio * backbone.width
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.since = nn.Sequential(nn.Linear(NUM_TERMS, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, 2 * hidden))
        self.fc1, self.act, self.fc2 = nn.Linear(3 * width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        for last in (self.since[-1], self.adaLN_modulation[-1], self.fc2):
            zero_linear(last)
        self.to(next(self.final.parameters()))

    def forward(self, now: Tensor, cond: Tensor, then: Tensor, last: Tensor, when: Tensor) -> Tensor:
        """Predict patches.

        now, then: tokens after d blocks, (B, N, D); last: after the last block, of the same step as `then`. cond: see
        `State`. when: `forecasts.basis` of both steps, (NUM_TERMS,) or (B, NUM_TERMS). -> (B, N, patch * patch * C_out)
        """
        moved = self.since(when.to(cond))
        cond = cond + (moved[:, None] if moved.ndim < cond.ndim and moved.ndim == 2 else moved)
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        seen = torch.cat([self.norm(tokens) for tokens in (now, then, last)], dim=-1)
        return self.final(last + self.fc2(self.act(modulate(self.fc1(seen), shift, scale))), cond)
