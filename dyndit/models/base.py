"""What every backbone is: a transformer cut into embed, blocks and head.

Shape legend, used in every docstring of the package:

    B  pictures in the batch        C      channels of a picture (or latent)
    N  tokens of a picture          C_out  channels of a prediction: C, or 2C with a learned variance
    D  width of the trunk           L      number of blocks
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dyndit.process import DDPM, Process


@dataclass(frozen=True)
class Conditioning:
    """What a family that takes more than labels is conditioned on, by the names of its own `forward`.

    rows: tensors with the batch first (prompt embeddings, their masks); shared: what serves every row alike
    (positions, flags). None is no entry.
    """

    rows: Mapping[str, Tensor]
    shared: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> object:
        """The entry of that name, of either kind; None where there is none."""
        return self.rows[name] if name in self.rows else self.shared.get(name)


Condition = Tensor | Conditioning
"""Labels (B,), or a `Conditioning`."""


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
        y = self.y
        if isinstance(y, Conditioning):
            y = replace(y, rows={name: value[start:stop] for name, value in y.rows.items()})
        else:
            y = y[start:stop]
        return replace(self, x=self.x[start:stop], t=self.t[start:stop], y=y)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One batch of several; what is shared is the first's."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0].y
        if isinstance(first, Conditioning):
            rows = {name: torch.cat([part.y.rows[name] for part in parts]) for name in first.rows}
            y: Condition = replace(first, rows=rows)
        else:
            y = torch.cat([part.y for part in parts])
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


class Backbone(nn.Module):
    """A trunk that can be run block by block.

    A family defines `embed`, `block`, `head` and `new_exit_head`; nothing else in the package knows its inside.
    `head(block(L - 1, ... block(0, embed(x, t, y))))` is the model's prediction, bit for bit.
    """

    family: ClassVar[str]
    """Name under which `config.json` records the class."""
    usual_process: Process = DDPM()
    """The process of weights of this family, unless it is known to be another."""

    num_blocks: int
    width: int
    """D, the width of `State.cond` and `State.tokens`."""
    num_classes: int
    null_class: int | None
    """The label of the unconditional branch; None where the model was trained without one."""
    in_channels: int
    out_channels: int
    image_size: int

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
        """The weights by which the trunk is known: the same, whichever library's modules hold them."""
        return self.state_dict()

    def unseen(self) -> dict[str, object]:
        """What changes a prediction and shows in no tensor's name, shape or value (heads, epsilons, frequencies)."""
        return {}

    def identity(self, tensors: Mapping[str, Tensor] | None = None, process: Process | None = None) -> str:
        """A hash that tells this trunk from any other; exits, plans and tables are bound to it.

        tensors: as `tensors()`, where they are other than the module's (rounded to half precision, say). process: the
        model's; one that is not the family's usual one is hashed too.
        """
        unseen = self.unseen()
        if process not in (None, self.usual_process):
            unseen = unseen | {"process": process.config()}
        return tensors_hash(self.tensors() if tensors is None else tensors, json.dumps(unseen, sort_keys=True))

    def config(self) -> dict[str, object]:
        """Plain data from which `from_config` builds the same architecture."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Build from what `config()` returned."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""
        state = self.embed(x, t, y)
        for index in range(self.num_blocks):
            state = self.block(index, state)
        return self.head(state)


def tensors_hash(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """SHA-256 over names, shapes and values, and `more`: a flipped bit or a foreign file is told apart.

    Values are hashed as float32: a trunk saved in half precision and loaded in single keeps its hash.
    """
    digest = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
