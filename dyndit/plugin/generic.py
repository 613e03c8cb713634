"""An adapter for a transformer that no file in `adapters/` knows, from a description of a few lines. Example: AuraFlow.

    adapter = BlockAdapter(
        pipe.transformer,
        blocks={
            "joint_transformer_blocks": ("encoder_hidden_states", "hidden_states"),
            "single_transformer_blocks": ("hidden_states",),
        },
        enter={"single_transformer_blocks": text_and_picture},
        head=("norm_out", "proj_out"),
        rows=("encoder_hidden_states",),
        timestep_scale=1000,
    )
    handle = dyndit.apply_dyndit(pipe, exits, plan, adapter=adapter)

The transformer's own forward embeds a call: it runs up to its first block. Blocks then run one by one, and the named
modules are the head. The first call is also run by the transformer's own forward: a description that does not predict
the same, bit for bit, is refused.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from operator import attrgetter
from typing import Any, Literal

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn

from dyndit.errors import InputError, first_line
from dyndit.models.base import Inputs, PerRow, State
from dyndit.models.conditions import Conditioning
from dyndit.plugin.adapters.base import Adapter, join_patches
from dyndit.process import Process, RectifiedFlow

Values = dict[str, Any]
"""Arguments of a block by name."""


@dataclass(frozen=True)
class _State(State):
    names: tuple[str, ...]
    """Names of the block arguments in `others`."""
    others: PerRow
    shared: Values
    """Block arguments that serve all rows."""
    shape: tuple[int, ...]
    """Shape of the latents of a row."""
    place: slice
    """The picture's tokens."""

    def for_head(self) -> tuple[Tensor, Tensor]:
        """Return the picture's tokens, (B, N, D), and the conditioning."""
        return self.tokens[:, self.place], self.cond


class BlockAdapter(Adapter):
    """A transformer described by the names of its parts. See the module's example.

    blocks: names of the block lists in the order they run. For each list, the values that a block returns, by the names
    of the blocks' own arguments. enter: for a list, a function (arguments of the blocks before, by name) -> arguments
    to change before the first block of the list. tokens, cond: the block arguments that the head takes.
    picture: the place of the picture's tokens in blocks that run on more tokens than the first block.
    head: names of what runs after the last block, in order: modules, which get the tokens, or tokens and `cond`; or a
    table (2, D) of shifts and scales, which `cond` is added to. unpatchify: (patches (B, N, P), shape of a row's
    latents) -> the prediction; by default patches are joined for latents (C, H, W), and left packed for others.
    latents, timestep, rows, shared: arguments of the forward. `rows` have the batch first, `shared` serve all rows. A
    call with other arguments is refused. guidance, timestep_scale: see `Adapter`. cond_width: the width of `cond`, if
    it is not the width of the tokens.

    Raises:
        InputError: the transformer has no part of a name, or the head holds no `nn.Linear`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        blocks: Mapping[str, Sequence[str]],
        head: Sequence[str],
        rows: Sequence[str] = (),
        shared: Sequence[str] = (),
        tokens: str = "hidden_states",
        cond: str = "temb",
        enter: Mapping[str, Callable[[Values], Values]] | None = None,
        picture: Literal["first", "last"] = "last",
        unpatchify: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None,
        latents: str = "hidden_states",
        timestep: str = "timestep",
        timestep_scale: float = 1.0,
        guidance: Literal["cond first", "uncond first", "calls"] = "uncond first",
        process: Process | None = None,
        cond_width: int | None = None,
    ) -> None:
        super().__init__(transformer)
        # What a class says of its family, the description says of this transformer alone.
        own: Any = self
        own.family, own.guidance = type(transformer).__name__, guidance
        own.latents_arguments, own.timestep_argument = (latents,), timestep
        own.row_arguments, own.shared_arguments = tuple(rows), tuple(shared)
        self.timestep_scale, self.usual_process = timestep_scale, process or RectifiedFlow()
        self._returned, self._head, self._enter = dict(blocks), tuple(head), dict(enter or {})
        self._tokens, self._cond, self._picture, self._joined = tokens, cond, picture, unpatchify or _joined
        try:
            self._lists = [(name, attrgetter(name)(transformer)) for name in blocks]
            pieces = [attrgetter(name)(transformer) for name in head]
        except AttributeError as error:
            raise InputError(f"{self.family}: {error}; expected the names of its block lists and head") from error
        self._places = [(name, place) for name, found in self._lists for place in range(len(found))]
        self.num_blocks = len(self._places)
        linear = [m for piece in pieces if isinstance(piece, nn.Module) for m in piece.modules()]
        linear = [module for module in linear if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(f"head {', '.join(head)}: holds no nn.Linear; expected the modules up to the patches")
        self.width, self.out_channels, self.sample_shape = linear[-1].in_features, linear[-1].out_features, ()
        self._cond_width = cond_width or self.width
        self._per_row: frozenset[str] | None = None
        self._is_checked = False

    @property
    def cond_width(self) -> int:
        """See `Backbone`."""
        return self._cond_width

    def read(self, *args: Any, **kwargs: Any) -> Inputs:
        """See `Adapter`. Check the description on the first call.

        Raises:
            InputError: an unknown argument, or the described parts do not predict what the transformer's forward does.
        """
        inputs = super().read(*args, **kwargs)
        if not self._is_checked:
            with torch.no_grad():
                found = type(self.transformer).forward(self.transformer, *args, **kwargs)
                self._check(inputs, found if isinstance(found, Tensor) else found[0])
            self._is_checked, self.sample_shape = True, tuple(inputs.x.shape[1:])
        return inputs

    def _check(self, inputs: Inputs, expected: Tensor) -> None:
        """Refuse a description that predicts something else, or nothing."""
        wanted = "every block list in order, what blocks return, and all that runs after the last block"
        try:
            mine = self(inputs.x, inputs.t, inputs.y)
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{self.family}: the described blocks fail ({reason}); expected {wanted}") from error
        if mine.shape != expected.shape or not torch.equal(mine, expected):
            raise InputError(
                f"{self.family}: the described blocks and head do not predict what its own forward does; expected "
                f"{wanted}"
            )

    def _latents(self, call: dict[str, Any]) -> Tensor:
        """See `Adapter`."""
        return call[self.latents_arguments[0]]

    def _condition(self, call: dict[str, Any]) -> Conditioning:
        """See `Adapter`. Rows are tensors here."""
        for name in self.row_arguments:
            if not isinstance(call.get(name), Tensor | None):
                raise InputError(f"{self.family}: called with {name} of {type(call[name]).__name__}; expected a tensor")
        return super()._condition(call)

    def embed(self, x: Tensor, t: Tensor, y: Conditioning) -> State:
        """Run the transformer's own forward up to its first block.  x: (B, ...), t: (B,), y: its other arguments."""
        values = self._first_arguments(Inputs(x, t, y))
        if self._per_row is None:
            self._per_row = self._find_rows(Inputs(x, t, y), values)
        rows = {name: values.pop(name) for name in self._per_row}
        return self._state(rows, values, tuple(x.shape[1:]), rows[self._tokens].shape[1])

    def _state(self, rows: Values, shared: Values, shape: tuple[int, ...], size: int) -> _State:
        tokens = rows[self._tokens]
        place = slice(0, size) if self._picture == "first" else slice(tokens.shape[1] - size, None)
        return _State(tokens, rows[self._cond], tuple(rows), PerRow(tuple(rows.values())), shared, shape, place)

    def _first_arguments(self, inputs: Inputs) -> Values:
        """Return the arguments of the first block, by name."""
        name, blocks = self._lists[0]
        call = {self.latents_arguments[0]: inputs.x, self.timestep_argument: inputs.t}
        first, blocks[0] = blocks[0], _Stop()
        try:
            given: Any = inputs.y
            type(self.transformer).forward(self.transformer, **call, **given.rows, **given.shared)
        except _ReachedError as reached:
            bound = inspect.signature(type(first).forward).bind(first, *reached.args[0], **reached.args[1])
            return dict(list(bound.arguments.items())[1:])
        finally:
            blocks[0] = first
        raise InputError(f"{self.family}: its forward does not run {name}; expected the list of blocks that runs first")

    def _find_rows(self, inputs: Inputs, values: Values) -> frozenset[str]:
        """Find the arguments of the first block that have the batch first: they double with it.

        Raises:
            InputError: rows inside another object, or the tokens or the conditioning are no such argument.
        """
        doubled = self._first_arguments(Inputs.joined([inputs, inputs]))
        found = frozenset(
            name for name, value in values.items() if isinstance(value, Tensor) and doubled[name].shape != value.shape
        )
        for name in values.keys() - found:
            if _shapes(values[name]) != _shapes(doubled[name]):
                raise InputError(f"{self.family}: block argument {name} holds rows in a {type(values[name]).__name__}")
        for name in {self._tokens, self._cond} - found:
            known = ", ".join(sorted(found))
            raise InputError(f"{self.family}: blocks get no {name} with the batch first; expected one of {known}")
        return found

    def block(self, index: int, state: _State) -> State:
        """Run block `index`. Values that it returns replace its arguments."""
        name, place = self._places[index]
        rows = dict(zip(state.names, state.others.values, strict=True))
        size = len(range(*state.place.indices(state.tokens.shape[1])))
        if place == 0 and name in self._enter:
            rows |= self._enter[name](rows | state.shared)
        block, values = dict(self._lists)[name][place], rows | state.shared
        known = inspect.signature(type(block).forward).parameters
        returned = block(**{name: value for name, value in values.items() if name in known})
        returned = returned if isinstance(returned, tuple) else (returned,)
        if len(returned) != len(self._returned[name]):
            expected = ", ".join(self._returned[name])
            raise InputError(f"{self.family}: a block of {name} returns {len(returned)} values; expected {expected}")
        rows |= dict(zip(self._returned[name], returned, strict=True))
        return self._state(rows, state.shared, state.shape, size)

    def block_modules(self) -> list[nn.Module]:
        """Return the blocks."""
        return [block for _, blocks in self._lists for block in blocks]

    def head(self, state: _State) -> Tensor:
        """Run the named head -> the prediction."""
        pieces = [attrgetter(name)(self.transformer) for name in self._head]
        return self.unpatchify(_run_head(pieces, *state.for_head()), state)

    def new_exit_head(self) -> nn.Module:
        """Return a copy of the named head."""
        return _Head([attrgetter(name)(self.transformer) for name in self._head])

    def unpatchify(self, patches: Tensor, state: _State) -> Tensor:
        """Make the prediction of patches.  (B, N, P) -> the shape that the forward returns."""
        return self._joined(patches, state.shape)

    def output(self, prediction: Any, inputs: Inputs, return_dict: bool) -> Any:
        """Wrap the prediction. A forward without `return_dict` returns the tensor itself."""
        plain = "return_dict" not in self._signature.parameters
        return prediction if plain else super().output(prediction, inputs, return_dict)

    def unseen(self) -> dict[str, Any]:
        """Return the configuration, if the transformer keeps one."""
        return super().unseen() if isinstance(self.transformer, ConfigMixin) else {"class": self.family}


class _ReachedError(Exception):
    """The forward reached its first block. args: the block's positional and named arguments."""


class _Stop(nn.Module):
    """Stand in for the first block and end the forward there."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise the arguments."""
        raise _ReachedError(args, kwargs)


class _Head(nn.Module):
    """A trainable copy of the named head."""

    def __init__(self, pieces: Sequence[nn.Module | Tensor]) -> None:
        super().__init__()
        self.num_pieces = len(pieces)
        for index, piece in enumerate(pieces):
            is_module = isinstance(piece, nn.Module)
            mine = copy.deepcopy(piece) if is_module else nn.Parameter(piece.detach().clone())
            setattr(self, f"piece_{index}", mine.requires_grad_(True))

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D) -> (B, N, P)."""
        return _run_head([getattr(self, f"piece_{index}") for index in range(self.num_pieces)], tokens, cond)


def _run_head(pieces: Sequence[nn.Module | Tensor], tokens: Tensor, cond: Tensor) -> Tensor:
    """Run the parts of a head in order.  tokens: (B, N, D), cond: (B, D) -> (B, N, P)."""
    for piece in pieces:
        if isinstance(piece, Tensor):
            shift, scale = (piece[None] + cond[:, None]).chunk(2, dim=1)
            tokens = tokens * (1 + scale) + shift
        else:
            tokens = piece(tokens, cond) if _takes_two(piece) else piece(tokens)
    return tokens


def _takes_two(module: nn.Module) -> bool:
    """Return True if a module's forward needs two arguments."""
    needed = [p for p in inspect.signature(type(module).forward).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD]) > 2  # with `self`


def _joined(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Join patches for latents (C, H, W); packed latents stay packed."""
    if len(shape) != 3:
        return patches
    height, width = shape[1:]
    patch = isqrt(height * width // patches.shape[1])
    return join_patches(patches, height // patch, width // patch, patch)


def _shapes(value: object) -> object:
    """Return the shapes of all tensors inside a value."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {name: _shapes(entry) for name, entry in value.items()}
    return [_shapes(entry) for entry in value] if isinstance(value, list | tuple) else None
