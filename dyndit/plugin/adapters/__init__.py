"""Adapters over diffusers transformers. To add a family, add one file here; `adapters()` finds it.

Each adapter cuts a transformer of diffusers into embed, blocks and head without changing it. Exits and plans then work
on the transformer in place.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn

from dyndit.discovery import subclasses_in
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plugin.adapters.base import Adapter

__all__ = ["Adapter", "adapt", "adapters", "collect_exits"]


@cache
def adapters() -> dict[str, type[Adapter]]:
    """Return every adapter of this package, keyed by the name of its diffusers class."""
    return {adapter.family: adapter for adapter in subclasses_in(__name__, __path__, Adapter)}


def adapt(transformer: nn.Module, given: Adapter | None = None) -> Adapter:
    """Wrap this transformer in its adapter, or return the adapter given for it. Modules are shared, not copied.

    Raises:
        InputError: no adapter serves its class, or the given one serves another transformer.
    """
    if given is not None:
        if given.transformer is not transformer:
            raise InputError(f"adapter: describes another {given.family} than the one it is given for")
        return given
    known = adapters()
    for base in type(transformer).__mro__:
        if base.__name__ in known:
            return known[base.__name__](transformer)
    raise InputError(f"transformer {type(transformer).__name__}: expected one of {', '.join(sorted(known))}")


def collect_exits(
    transformer: nn.Module, exits: Exits | ExitConfig | None = None, /, *args: Any, **kwargs: Any
) -> dict[int, Tensor]:
    """Predict at every exit and at full depth, in one pass over the blocks.

    exits: trained exits; or a config for untrained exits, copies of the model's own head; None puts an exit at every
    default layer (`exits.default_layers`). args, kwargs: the arguments of the transformer's own forward.

    -> {depth: prediction}, rising, the last at L, in the transformer's own shape: (B, C_out, H, W) for pictures,
    (B, N, C_out) for Flux's packed tokens, (B, C_out, F, H, W) for videos. The prediction at L equals the transformer's
    own, bit for bit. Gradients are recorded; call under `torch.no_grad()` to avoid them.

    Raises:
        InputError: no adapter serves the transformer's class, or the call uses an argument that its adapter refuses.
    """
    adapter = adapt(transformer)
    inputs = adapter.read(*args, **kwargs)
    if not isinstance(exits, Exits):
        exits = Exits(adapter, exits or ExitConfig(head="adaln-linear"))
    return DynamicDepth(adapter, exits).every_exit(inputs.x, inputs.t, inputs.y)
