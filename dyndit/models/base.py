"""What every backbone is: a transformer cut into embed, blocks and head.

Shape legend, used in every docstring of the package:

    B  pictures in the batch        C      channels of a picture (or latent)
    N  tokens of a picture          C_out  channels of a prediction: C, or 2C with a learned variance
    D  width of the backbone           L      number of blocks
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from dyndit.models.conditions import Condition, Conditioning, ConditionType
from dyndit.models.identity import identity_of, tensors_hash
from dyndit.process import DDPM, Process


@dataclass(frozen=True)
class Inputs:
    """What a model is called with: x: (B, ...), t: (B,), y: labels (B,) or a `Conditioning` of B rows."""

    x: Tensor
    t: Tensor
    y: Condition

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, start: int, stop: int | None) -> Self:
        """Return rows `start:stop` of the batch."""
        rows = slice(start, stop)
        y = self.y.select(rows) if isinstance(self.y, Conditioning) else self.y[rows]
        return replace(self, x=self.x[rows], t=self.t[rows], y=y)

    def to(self, like: Tensor) -> Self:
        """The same call on the device of `like`, x in its precision."""
        return replace(self, x=self.x.to(like), t=self.t.to(like.device), y=self.y.to(like.device))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One batch of several; what is shared is the first's."""
        if len(parts) == 1:
            return parts[0]
        conditions = [part.y for part in parts]
        y = Conditioning.joined(conditions) if isinstance(conditions[0], Conditioning) else torch.cat(conditions)
        return cls(torch.cat([part.x for part in parts]), torch.cat([part.t for part in parts]), y)


@dataclass(frozen=True)
class State:
    """What a block hands to the next. Every tensor has the batch first; what is no tensor serves all rows.

    tokens: (B, N, D), cond: (B, D) the conditioning that an exit head is modulated by (of the class-conditional DiT:
    the summed timestep and label embedding). Families with more streams subclass this with further fields.
    """

    tokens: Tensor
    cond: Tensor

    def rows(self, start: int, stop: int | None) -> Self:
        """Return the state of rows `start:stop` of the batch."""
        if start == 0 and stop in (None, len(self.tokens)):
            return self
        return self._picked(slice(start, stop))

    def take(self, indices: Tensor) -> Self:
        """Return the state of these rows of the batch.  indices: (R,), integers."""
        return self._picked(indices)

    def _picked(self, rows: slice | Tensor) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v[rows] for name, v in values.items() if isinstance(v, Tensor)})


class BackboneConfig(Protocol):
    """The architecture of a backbone as plain data: a dataclass that can build it."""

    num_blocks: int

    def build(self) -> "Backbone":
        """A freshly initialised backbone."""


class Backbone(nn.Module):
    """A transformer that can be run block by block.

    A family defines `embed`, `block`, `head` and `new_exit_head`; nothing else in the package knows its inside.
    `head(block(L - 1, ... block(0, embed(x, t, y))))` is the model's prediction, bit for bit.
    """

    family: ClassVar[str]
    """Name under which `config.json` records the class; families in this package are found by it."""

    num_blocks: int
    width: int
    """D, the width of `State.cond` and `State.tokens`."""
    sample_shape: tuple[int, ...]
    """Shape of one picture or latent, (C, H, W), or of one video, (C, T, H, W)."""
    out_channels: int
    """C_out: C, or 2C with a learned variance."""
    condition: ConditionType
    """What the model is conditioned on."""
    usual_process: Process = DDPM()
    """The process of weights of this family, unless it is known to be another."""

    @property
    def in_channels(self) -> int:
        """C."""
        return self.sample_shape[0]

    def embed(self, x: Tensor, t: Tensor, y: Condition) -> State:
        """x: (B, C, H, W), t: (B,), y: (B,) or a `Conditioning` -> the state before block 0."""
        raise NotImplementedError

    def block(self, index: int, state: State) -> State:
        """Run block `index` (0-based)."""
        raise NotImplementedError

    def block_modules(self) -> list[nn.Module]:
        """The modules that `block` calls, from the first to the last: what is worth compiling."""
        raise NotImplementedError

    def head(self, state: State) -> Tensor:
        """The model's own final layer -> (B, C_out, H, W)."""
        raise NotImplementedError

    def new_exit_head(self) -> nn.Module:
        """A trainable copy of the final layer: (tokens, cond) -> patches that `unpatchify` takes."""
        raise NotImplementedError

    def unpatchify(self, patches: Tensor, state: State) -> Tensor:
        """(B, N, patch * patch * C_out) -> (B, C_out, H, W), the size that `state` was embedded from."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The weights by which the backbone is known: the same, whichever library's modules hold them."""
        return self.state_dict()

    def unseen(self) -> dict[str, object]:
        """What changes a prediction and shows in no tensor's name, shape or value (heads, epsilons, frequencies)."""
        return {}

    def identity(self, tensors: Mapping[str, Tensor] | None = None, process: Process | None = None) -> str:
        """Name this backbone's weights; exits, plans and tables are bound to the name.

        tensors: the weights as a file will hold them, instead of `tensors()`. process: the model's; a process that is
        not the family's usual one is part of the name.
        """
        return identity_of(self.tensors() if tensors is None else tensors, self._unseen_text(process))

    def checksum(self, tensors: Mapping[str, Tensor] | None = None, process: Process | None = None) -> str:
        """Return an exact checksum of the weights, for files. Arguments as of `identity`."""
        return tensors_hash(self.tensors() if tensors is None else tensors, self._unseen_text(process))

    def _unseen_text(self, process: Process | None) -> str:
        other = {} if process in (None, self.usual_process) else {"process": process.config()}
        return json.dumps(self.unseen() | other, sort_keys=True)

    def config(self) -> dict[str, object]:
        """Plain data from which `from_config` builds the same architecture."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Build from what `config()` returned."""
        raise NotImplementedError

    def example(self, rows: int, generator: torch.Generator | None = None) -> Inputs:
        """A random call of so many rows, on the CPU in single precision: for tests and for timing."""
        x = torch.randn((rows, *self.sample_shape), generator=generator)
        t = torch.randint(1000, (rows,), generator=generator)
        return Inputs(x, t, self.condition.example(rows, generator))

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""
        state = self.embed(x, t, y)
        for index in range(self.num_blocks):
            state = self.block(index, state)
        return self.head(state)
