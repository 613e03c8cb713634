"""What every backbone is: a transformer cut into embed, blocks and head.

Shape legend, used in every docstring of the package:

    B  pictures in the batch        C      channels of a picture (or latent)
    N  tokens of a picture          C_out  channels of a prediction: C, or 2C with a learned variance
    D  width of the trunk           L      number of blocks
"""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class State:
    """What a block hands to the next. Every field is a tensor with the batch first.

    tokens: (B, N, D), cond: (B, D) the summed timestep and label embedding. Families with more streams subclass
    this with further tensor fields.
    """

    tokens: Tensor
    cond: Tensor

    def rows(self, start: int, stop: int | None) -> Self:
        """Return the state of rows `start:stop` of the batch."""
        if start == 0 and stop in (None, len(self.tokens)):
            return self
        return replace(self, **{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})


class Backbone(nn.Module):
    """A trunk that can be run block by block.

    A family defines `embed`, `block`, `head` and `new_exit_head`; nothing else in the package knows its inside.
    `head(block(L - 1, ... block(0, embed(x, t, y))))` is the model's prediction, bit for bit.
    """

    family: ClassVar[str]
    """Name under which `config.json` records the class."""

    num_blocks: int
    width: int
    """D, the width of `State.cond` and `State.tokens`."""
    num_classes: int
    null_class: int | None
    """The label of the unconditional branch; None where the model was trained without one."""
    in_channels: int
    out_channels: int
    image_size: int

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> State:
        """x: (B, C, H, W), t: (B,), y: (B,) -> the state before block 0."""
        raise NotImplementedError

    def block(self, index: int, state: State) -> State:
        """Run block `index` (0-based)."""
        raise NotImplementedError

    def head(self, state: State) -> Tensor:
        """The model's own final layer -> (B, C_out, H, W)."""
        raise NotImplementedError

    def new_exit_head(self) -> nn.Module:
        """A trainable copy of the final layer: (tokens, cond) -> patches that `unpatchify` takes."""
        raise NotImplementedError

    def new_exit_block(self) -> nn.Module:
        """A light block, (tokens, cond) -> tokens, that starts as the identity."""
        raise NotImplementedError

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        raise NotImplementedError

    def config(self) -> dict[str, object]:
        """Plain data from which `from_config` builds the same architecture."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Build from what `config()` returned."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""
        state = self.embed(x, t, y)
        for index in range(self.num_blocks):
            state = self.block(index, state)
        return self.head(state)


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, so that a flipped bit or a foreign file is told apart.

    Values are hashed as float32: a trunk saved in half precision and loaded in single keeps its hash.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
