"""Run fewer attention heads and MLP channels at the noisier steps, and heal the model for that.

DyDiT (Zhao et al. 2024, arXiv:2410.03456) lets routers choose heads and groups of channels by timestep. Here a fixed
share of them runs in the noisier half of the noise levels, and all of them in the other half, from the same weights.
The weights that run are gathered, so products are smaller; masks would save nothing.

Importance is the mean square of a head's part of the attention's output, and of a channel's part of the MLP's output.
It is measured on noised pictures of the noisier half. Heads and channels are put in order of importance once, which
changes the function of the whole layer by rounding alone. The kept ones are then the first.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings
from dyndit.analysis.compare.peers.pruned import noised_inputs
from dyndit.errors import InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.models.layers import Mlp, linear_gelu
from dyndit.plans.plan import DepthPlan
from dyndit.process import Process
from dyndit.training.data import Pictures
from dyndit.training.lora import trainable_copy
from dyndit.training.match import Match

HALF = Process.num_timesteps // 2
"""Timesteps above this are noisier: half of all, and half of the steps of a solver that spaces them evenly."""


@dataclass(frozen=True)
class Width(PeerSettings):
    """share: of the heads and of the MLP's channels that run at the noisier steps; at least one of each."""

    name: ClassVar[str] = "width"
    switched_off: ClassVar = {"share": 1.0}
    """All heads and channels, nothing trained."""
    compared: ClassVar = ((0.5,), (0.75,))
    """Half and three quarters."""
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"width share {self.share:g}: expected above 0 and at most 1")

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Train the model of two widths, or load it. Raises InputError: no context, or an adapted backbone."""
        if self.share == 1:
            return DynamicDepth(model.backbone, pixel_space=model.pixel_space, process=model.process).eval()
        if context is None:
            raise InputError(f"peer {self.name}: needs a context to train in")

        def train(folder: Path) -> DynamicDepth:
            student = ByNoise(ranked(model, context.data), self.share)
            Match(context.fit).train(model, student, context.data, folder)
            return DynamicDepth(student.whole.eval(), pixel_space=model.pixel_space, process=model.process)

        made_of = f"{model.identity.backbone} {context.fit} {context.data.fingerprint}"
        trained = context.trained(f"{self.name}-{self.label}", made_of, train)
        return Narrowed(trained.to(next(model.parameters()).device), self)

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return None if blocks are narrow: they run, but not all of them."""
        return plan.share_of_blocks if self.share == 1 else None


class FewerHeads(nn.Module):
    """The first `num` heads of an attention. The weights of the others are not read."""

    def __init__(self, whole: Attention, num: int) -> None:
        super().__init__()
        self.whole, self.num = whole, num

    def forward(self, x: Tensor) -> Tensor:
        """Attend.  x: (B, N, D) -> (B, N, D)."""
        whole, size = self.whole, (self.num, self.whole.head_dim)

        def gathered(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (3, whole.num_heads, whole.head_dim))[:, : self.num].flatten(0, 2)

        qkv = F.linear(x, gathered(whole.qkv.weight), gathered(whole.qkv.bias))
        q, k, v = qkv.unflatten(2, (3, *size)).permute(2, 0, 3, 1, 4)
        if whole.fused_attn:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:  # timm's switch; a rival has to run what the other arms run
            attended = (q * whole.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        heads = attended.transpose(1, 2).flatten(2)
        return F.linear(heads, whole.proj.weight[:, : heads.shape[2]], whole.proj.bias)


class FewerChannels(nn.Module):
    """The first `num` channels of an MLP. The weights of the others are not read."""

    def __init__(self, whole: Mlp, num: int) -> None:
        super().__init__()
        self.whole, self.num = whole, num

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP.  x: (B, N, D) -> (B, N, D)."""
        first, second, num = self.whole.fc1, self.whole.fc2, self.num
        channels = linear_gelu(x, first.weight[:num], first.bias[:num])
        return F.linear(channels, second.weight[:, :num], second.bias)


class ByNoise(nn.Module):
    """A backbone as a function that is narrow on rows of the noisier half, and whole on the others."""

    def __init__(self, whole: ClassConditionalDiT, share: float) -> None:
        super().__init__()
        self.whole = whole
        self.narrow = (narrowed(whole, share),)  # a tuple hides it: its parameters are the whole one's

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict.  x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""
        noisier = t > HALF
        out = x.new_zeros(len(x), self.whole.out_channels, *x.shape[2:])
        for backbone, rows in ((self.narrow[0], noisier), (self.whole, ~noisier)):
            if rows.any():
                out[rows] = backbone(x[rows], t[rows], y[rows]).to(out.dtype)
        return out


class Narrowed(Peer):
    """Full depth that is narrow at the noisier steps."""

    settings: Width

    def __init__(self, model: DynamicDepth, settings: Width) -> None:
        super().__init__(model, settings)
        narrow = narrowed(model.backbone, settings.share)
        self.small = DynamicDepth(narrow, pixel_space=model.pixel_space, process=model.process).eval()

    def predict(self, step: StepInputs, memory: object) -> tuple[list[Tensor], object]:
        """Predict every branch at full depth, in the width of this step."""
        if step.timesteps[step.k] <= HALF:
            return super().predict(step, memory)
        depths = (self.num_blocks,) * len(step.labels)
        return self.small.branches(step.x_t, step.times, step.labels, depths), memory


def narrowed(backbone: ClassConditionalDiT, share: float) -> ClassConditionalDiT:
    """Return the backbone with this share of heads and channels, the first ones. It shares all parameters."""
    narrow = copy.deepcopy(backbone, {id(parameter): parameter for parameter in backbone.parameters()})
    for block in narrow.blocks:
        block.attn = FewerHeads(block.attn, max(1, round(share * block.attn.num_heads)))
        block.mlp = FewerChannels(block.mlp, max(1, round(share * block.mlp.fc1.out_features)))
    return narrow


def ranked(model: DynamicDepth, data: Pictures, *, num_pictures: int = 256, seed: int = 0) -> ClassConditionalDiT:
    """Copy the backbone, with heads and channels in order of importance, the most important first.

    Raises InputError: an adapter made the backbone.
    """
    if not isinstance(model.backbone, ClassConditionalDiT):
        raise InputError(f"width: backbone {type(model.backbone).__name__}; expected a ClassConditionalDiT")
    heads, channels = importance(model, data, num_pictures=num_pictures, seed=seed)
    backbone = trainable_copy(model.backbone)
    with torch.no_grad():
        for block, of_heads, of_channels in zip(backbone.blocks, heads, channels, strict=True):
            order, attn, mlp = of_heads.argsort(descending=True, stable=True), block.attn, block.mlp
            shape = (attn.num_heads, attn.head_dim)
            for rows in (attn.qkv.weight, attn.qkv.bias):
                rows.copy_(rows.unflatten(0, (3, *shape))[:, order].flatten(0, 2))
            attn.proj.weight.copy_(attn.proj.weight.unflatten(1, shape)[:, order].flatten(1, 2))
            order = of_channels.argsort(descending=True, stable=True)
            for rows in (mlp.fc1.weight, mlp.fc1.bias):
                rows.copy_(rows[order])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    return backbone


@torch.no_grad()
def importance(
    model: DynamicDepth, data: Pictures, *, num_pictures: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Measure the importance of every block's heads (H,) and channels (M,), see above."""
    inputs = noised_inputs(model, data, num_pictures=num_pictures, seed=seed, least=HALF)
    heads: list[Tensor] = []
    channels: list[Tensor] = []

    def of_heads(attn: Attention) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def seen(proj: nn.Module, given: tuple[Tensor]) -> None:
            shape = (attn.num_heads, attn.head_dim)
            parts = torch.einsum("bnhd,chd->bnhc", given[0].unflatten(2, shape), proj.weight.unflatten(1, shape))
            heads.append(parts.float().square().mean((0, 1, 3)))

        return seen

    def of_channels(second: nn.Module, given: tuple[Tensor]) -> None:
        channels.append(given[0].float().square().mean((0, 1)) * second.weight.float().square().mean(0))

    hooks = [block.attn.proj.register_forward_pre_hook(of_heads(block.attn)) for block in model.backbone.blocks]
    hooks += [block.mlp.fc2.register_forward_pre_hook(of_channels) for block in model.backbone.blocks]
    try:
        model.backbone(inputs.x, inputs.t, inputs.y)
    finally:
        for hook in hooks:
            hook.remove()
    return heads, channels
