"""Adapters over diffusers transformers. A new family: one file here, found by itself.

Each cuts a transformer of diffusers into embed, blocks and head without changing it, so that exits, plans and
everything built on them work on it in place.
"""

import importlib
import pkgutil
from functools import cache

from torch import Tensor, nn

from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plugin.adapters.base import Adapter

__all__ = ["Adapter", "adapt", "adapters", "collect_exits"]


@cache
def adapters() -> dict[str, type[Adapter]]:
    """Every adapter of this package, by the name of the diffusers class it serves."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {adapter.family: adapter for adapter in Adapter.__subclasses__()}


def adapt(transformer: nn.Module) -> Adapter:
    """The adapter over this very transformer: same modules, nothing copied.

    Raises:
        InputError: no adapter serves its class.
    """
    known = adapters()
    for base in type(transformer).__mro__:
        if base.__name__ in known:
            return known[base.__name__](transformer)
    raise InputError(f"transformer {type(transformer).__name__}: expected one of {', '.join(sorted(known))}")


def collect_exits(
    transformer: nn.Module, exits: Exits | ExitConfig | None = None, /, *args: object, **kwargs: object
) -> dict[int, Tensor]:
    """Predictions at every exit and at full depth, in one pass over the blocks.

    exits: trained ones; or where to stand untrained ones, copies of the model's own head; None puts one at every
    default layer (`exits.default_layers`). Whatever follows is what the transformer's own forward takes.

    -> {depth: prediction}, rising, the last L; each of the shape that the transformer predicts: (B, C_out, H, W) of
    pictures, (B, N, C_out) of Flux's packed tokens, (B, C_out, F, H, W) of videos. The one at L is the transformer's
    own, bit for bit. Gradients flow as the caller has them: call under `torch.no_grad()` where none are wanted.

    Raises:
        InputError: no adapter serves the transformer's class, or the call uses an argument that its adapter refuses.
    """
    adapter = adapt(transformer)
    inputs = adapter.read(*args, **kwargs)
    if not isinstance(exits, Exits):
        exits = Exits(adapter, exits or ExitConfig())
    return DynamicDepth(adapter, exits).every_exit(inputs.x, inputs.t, inputs.y)
