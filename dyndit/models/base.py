"""The backbone: a transformer cut into embed, blocks and head.

Shape legend, used in every docstring of the package:

    B  pictures in the batch        C      channels of a picture (or latent)
    N  tokens of a picture          C_out  channels of a prediction: C, or 2C with a learned variance
    D  width of the backbone           L      number of blocks
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from dyndit.errors import InputError
from dyndit.models.conditions import Condition, Conditioning, ConditionType
from dyndit.models.identity import identity_of, tensors_hash
from dyndit.process import DDPM, Process


@dataclass(frozen=True)
class Inputs:
    """The arguments of a model call.  x: (B, ...), t: (B,), y: labels (B,) or a `Conditioning` of B rows."""

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
        """Move the inputs to the device of `like`, and x to its precision."""
        return replace(self, x=self.x.to(like), t=self.t.to(like.device), y=self.y.to(like.device))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Join several batches into one. Entries that all rows share are taken from the first batch."""
        if len(parts) == 1:
            return parts[0]
        conditions: list[Any] = [part.y for part in parts]
        y = Conditioning.joined(conditions) if isinstance(conditions[0], Conditioning) else torch.cat(conditions)
        return cls(torch.cat([part.x for part in parts]), torch.cat([part.t for part in parts]), y)


@dataclass(frozen=True)
class PerRow:
    """Several tensors in one field of a state, each with the batch first. Example: the residuals of a ControlNet."""

    values: tuple[Tensor, ...]

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Return the tensors of these rows of the batch."""
        return replace(self, values=tuple(value[rows] for value in self.values))


@dataclass(frozen=True)
class State:
    """The state between two blocks: `dyndit.State(tokens, cond)`.

    A `Tensor` or `PerRow` has the batch first; other fields serve all rows.

    tokens: (B, N, D), cond: (B, D) modulates the exit heads; (B, N, D) in a call with a timestep per token. The
    class-conditional DiT sums the timestep and label embeddings into it. Families with more streams subclass this with
    further fields.
    """

    tokens: Tensor
    cond: Tensor

    def rows(self, start: int, stop: int | None) -> Self:
        """Return the state of rows `start:stop` of the batch."""
        if start == 0 and stop in (None, len(self.tokens)):
            return self
        return self.take(slice(start, stop))

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the tokens and the conditioning that an exit head takes. Families of several streams join them."""
        return self.tokens, self.cond

    def take(self, rows: slice | Tensor) -> Self:
        """Return the state of these rows of the batch.  rows: a slice, or integers (R,)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v[rows] for name, v in values.items() if isinstance(v, Tensor | PerRow)})


class BackboneConfig(Protocol):
    """The architecture of a backbone as plain data: a dataclass that can build the backbone."""

    @property
    def num_blocks(self) -> int:
        """Return L, the number of blocks."""
        ...

    @property
    def learn_variance(self) -> bool:
        """Tell if the backbone predicts a variance beside the process's target."""
        ...

    def build(self) -> "Backbone":
        """Return a freshly initialised backbone."""
        ...


@dataclass(frozen=True)
class Architecture:
    """The architecture of a backbone without a config class of its own: its class, and the class's arguments.

    Example: `Train(MyDiT.architecture(num_blocks=12), fit)`.
    """

    backbone: type["Backbone"]
    settings: Mapping[str, Any]

    def changed(self, **changes: Any) -> Self:
        """Return the architecture with other arguments. Raises InputError: the class does not take them."""
        other = replace(self, settings={**self.settings, **changes})
        try:
            _ = other.outline
        except TypeError as error:
            raise InputError(f"{other!r}: {error}; expected arguments that {self.backbone.__name__} takes") from error
        return other

    @cached_property
    def outline(self) -> "Backbone":
        """The backbone without weights: it shows the shape and condition that it takes."""
        return outlined(self.backbone, self.settings)

    @property
    def num_blocks(self) -> int:
        """Return L, the number of blocks."""
        return self.outline.num_blocks

    @property
    def learn_variance(self) -> bool:
        """Tell if the backbone predicts a variance."""
        return self.outline.out_channels > self.outline.in_channels

    def build(self) -> "Backbone":
        """Return a freshly initialised backbone."""
        return self.backbone.from_config(dict(self.settings))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{self.backbone.__name__}({settings})"


class Backbone(nn.Module):
    """A transformer that can be run block by block. To make your own model dynamic, subclass it.

    A subclass sets the attributes below, and defines `embed`, `block`, `head`, `new_exit_head` and `unpatchify`; the
    rest of the package calls only these. `head(block(L - 1, ... block(0, embed(x, t, y))))` is the model's prediction,
    bit for bit. `dyndit.DynamicDepth(backbone)` checks the subclass on one call of two rows. `config` and
    `dyndit.register` let it be saved and loaded. docs/how-to/my-own-model.md wraps a whole model:

        class MyDiT(dyndit.Backbone):
            usual_process = dyndit.DDPM()

            def __init__(self, num_blocks=12):
                super().__init__()
                self.net = Net(num_blocks)
                self.num_blocks, self.width = num_blocks, self.net.width
                self.sample_shape, self.out_channels = (3, 32, 32), 3
                self.condition = dyndit.ClassLabels(10)

            def embed(self, x, t, y):
                return dyndit.State(self.net.patches(x), self.net.condition(t, y))
            ...
    """

    family: ClassVar[str]
    """Name of the class in `config.json`. `families()` finds the class by it; `dyndit.register` sets it."""
    foreign: ClassVar[bool] = False
    """True if the modules belong to another library, which saves them."""

    num_blocks: int
    width: int
    """D, the width of `State.tokens`, and of `State.cond` unless `cond_width` differs."""
    sample_shape: tuple[int, ...]
    """Shape of one picture or latent, (C, H, W), or of one video, (C, T, H, W)."""
    out_channels: int
    """C_out: C, or 2C with a learned variance."""
    condition: ConditionType
    """The kind of condition, for example `ClassLabels`."""
    gradient_checkpointing: bool = False
    """Hold fewer activations in training, and compute them again. A family that can, does so in `block`."""
    usual_process: Process = DDPM()
    """The process that weights of this family follow unless they name another one: `dyndit.DDPM()` for noise
    prediction, `dyndit.RectifiedFlow()` for velocity. Timesteps rise from 0, the picture, to 1000, the noise."""

    @property
    def cond_width(self) -> int:
        """Return the width of `State.cond`."""
        return self.width

    @property
    def in_channels(self) -> int:
        """Return the number of input channels."""
        return self.sample_shape[0]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Tell if the backbone takes inputs of this shape, (C, ...). By default it takes `sample_shape` alone."""
        return tuple(shape) == tuple(self.sample_shape)

    def embed(self, x: Tensor, t: Tensor, y: Any) -> State:
        """Return the state before block 0.  x: (B, C, H, W), t: (B,), y: (B,) or a `Conditioning`.

        A subclass says which kind of condition it takes: `y: Tensor` for labels.
        """
        raise NotImplementedError

    def block(self, index: int, state: Any) -> State:
        """Run block `index` (0-based).  state: the family's own subclass of `State`, here and below."""
        raise NotImplementedError

    def block_modules(self) -> list[nn.Module]:
        """Return the modules that `block` calls, from first to last. `compile_parts` compiles them.

        By default they are the one `nn.ModuleList` that holds `num_blocks` modules.
        """
        lists = [part for part in self.modules() if isinstance(part, nn.ModuleList) and len(part) == self.num_blocks]
        if len(lists) != 1:
            found = f"{type(self).__name__}: holds {len(lists)} nn.ModuleLists of {self.num_blocks} modules"
            raise InputError(f"{found}; expected a method block_modules() that returns the blocks")
        return list(lists[0])

    def block_kinds(self) -> tuple[Hashable, ...]:
        """Return the kind of each block: blocks of one kind take the same time. By default shapes of weights tell."""
        try:
            modules = self.block_modules()
        except InputError:
            modules = []
        if len(modules) != self.num_blocks:
            return ("",) * self.num_blocks
        return tuple((type(m).__name__, *(tuple(p.shape) for p in m.parameters())) for m in modules)

    def head(self, state: Any) -> Tensor:
        """Run the model's own final layer -> (B, C_out, H, W)."""
        raise NotImplementedError

    def new_exit_head(self) -> nn.Module:
        """Return a trainable copy of the final layer: (tokens, cond) -> patches that `unpatchify` takes."""
        raise NotImplementedError

    def unpatchify(self, patches: Tensor, state: Any) -> Tensor:
        """Join patches to pictures of the input size of `state`.  (B, N, patch * patch * C_out) -> (B, C_out, H, W)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that identify the backbone. They do not depend on the library whose modules hold them."""
        return self.state_dict()

    def unseen(self) -> dict[str, Any]:
        """Return settings that change a prediction but no tensor, for example the number of heads or an epsilon."""
        return {}

    def identity(self, tensors: Mapping[str, Tensor] | None = None, process: Process | None = None) -> str:
        """Name this backbone's weights; exits, plans and tables are bound to the name.

        tensors: the weights as a file will hold them (default: `tensors()`). process: the model's process. A process
        other than `usual_process` changes the name.
        """
        return identity_of(self.tensors() if tensors is None else tensors, self.unseen_text(process))

    def checksum(self, tensors: Mapping[str, Tensor] | None = None, process: Process | None = None) -> str:
        """Return an exact checksum of the weights, for files. See `identity` for the arguments."""
        return tensors_hash(self.tensors() if tensors is None else tensors, self.unseen_text(process))

    def unseen_text(self, process: Process | None) -> str:
        """Write `unseen` and a process other than the usual one as text, for hashes."""
        other = {} if process in (None, self.usual_process) else {"process": process.config()}
        return json.dumps(self.unseen() | other, sort_keys=True)

    def config(self) -> dict[str, Any]:
        """Return plain data from which `from_config` builds the same architecture: the arguments of the class.

        Raises NotImplementedError: the class defines no `config`, so it cannot be saved, copied or trained anew.
        """
        name = type(self).__name__
        expected = f"a method that returns the arguments of {name}() as a dict"
        raise NotImplementedError(f"{name}: has no config(); expected {expected}")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build the backbone from the data that `config()` returned. By default they are the class's arguments."""
        if cls.config is Backbone.config:
            raise NotImplementedError(f"{cls.__name__}: has no config(); expected one beside from_config")
        return cls(**config)

    @classmethod
    def architecture(cls, **settings: Any) -> Architecture:
        """Return the architecture with these arguments, for recipes that train it: `MyDiT.architecture(width=64)`."""
        return Architecture(cls, settings)

    def example(self, rows: int, generator: torch.Generator | None = None) -> Inputs:
        """Draw random inputs of `rows` rows, on the CPU in single precision, for tests and timing."""
        x = torch.randn((rows, *self.sample_shape), generator=generator)
        t = torch.randint(1000, (rows,), generator=generator)
        return Inputs(x, t, self.condition.example(rows, generator))

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """Predict at full depth.  x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""
        state = self.embed(x, t, y)
        for index in range(self.num_blocks):
            state = self.block(index, state)
        return self.head(state)


def outlined(kind: type[Backbone], settings: Mapping[str, Any]) -> Backbone:
    """Build a backbone without weights, on the meta device: shapes alone, whatever sizes are asked for.

    A class of a user's own whose constructor needs values is built with them.
    """
    try:
        with torch.device("meta"):
            return kind.from_config(dict(settings))
    except (RuntimeError, NotImplementedError):  # for example `.item()` of a tensor without values
        if kind.__module__.startswith("dyndit."):
            raise
        return kind.from_config(dict(settings))
