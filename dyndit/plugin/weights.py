"""A transformer's weights as they count in a call: its own, low-rank adapters (LoRA) on them, and changes since a look.

Adapters of PEFT put layers around the transformer's layers. An adapter counts if its layer is neither merged nor
disabled. A merged (fused) adapter counts through the weights that it changed.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dyndit.models.identity import plain

SAMPLES = 8


def own_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Return the transformer's own weights under their own names, whatever adapters lie on its layers."""
    tensors = transformer.state_dict()
    for layer, _ in _adapted_layers(transformer):
        inside, base = f"{layer}.", f"{layer}.base_layer."
        tensors = {
            name.replace(base, inside, 1): tensor
            for name, tensor in tensors.items()
            if name.startswith(base) or not name.startswith(inside)
        }
    return tensors


def added_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the adapters that count in a call; empty without any."""
    return {
        f"{name}.{key}": tensor
        for name, layer in _adapted_layers(transformer)
        for key, tensor in layer.state_dict().items()
        if not key.startswith("base_layer.") and set(key.split(".")) & set(_counting(layer))
    }


def added_scales(transformer: nn.Module) -> dict[str, dict[str, float]]:
    """Return the scale of each adapter that counts in a call, by layer; empty without any."""
    scales = {name: _counting(layer) for name, layer in _adapted_layers(transformer)}
    return {name: found for name, found in scales.items() if found}


def _counting(layer: Any) -> dict[str, float]:
    """Return the adapters of a layer that count in a call, with their scales."""
    if layer.merged or layer.disable_adapters:
        return {}
    scales = getattr(layer, "scaling", {})
    return {name: float(scales.get(name, 1.0)) for name in layer.active_adapters}


def _adapted_layers(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each layer that PEFT put around a layer of the transformer. Without PEFT imported there is none."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None:
        yield from ((name, m) for name, m in transformer.named_modules() if isinstance(m, peft.BaseTunerLayer))


@dataclass(frozen=True)
class Look:
    """A look at weights: names, shapes, a few values of each, torch's count of its changes, and adapters' scales.

    Two equal looks are taken for equal weights. Training, loading, fusing and writing in place change a look; writing
    single values through `.data` may not. Moving weights to another device does not change it.
    """

    versions: Mapping[str, int]
    values: Mapping[str, Tensor]
    scales: Mapping[str, Mapping[str, float]]

    @classmethod
    def at(cls, transformer: nn.Module, exits: nn.Module | None) -> Self:
        """Look. Each device is waited for once; weights that offloading has put away are left out."""
        tensors = _tensors(transformer, exits)
        by_device: dict[torch.device, list[str]] = {}
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                by_device.setdefault(tensor.device, []).append(name)
        values: dict[str, Tensor] = {}
        for names in by_device.values():
            picked = [_picked(tensors[name]) for name in names]
            parts = torch.cat(picked).cpu().split([len(part) for part in picked])
            values |= dict(zip(names, parts, strict=True))
        return cls(_versions(tensors), values, added_scales(transformer))

    def unchanged(self, earlier: Self) -> bool:
        """Return True if this look shows the weights of an earlier look."""
        if (self.versions.keys(), self.scales) != (earlier.versions.keys(), earlier.scales):
            return False
        both = self.values.keys() & earlier.values.keys()
        return all(
            self.versions[name] == earlier.versions[name] and torch.equal(self.values[name], earlier.values[name])
            for name in both
        )

    def glance(self, transformer: nn.Module, exits: nn.Module | None) -> bool:
        """Return True if no weight was written to since this look. It reads no value and waits for no device."""
        versions = _versions(_tensors(transformer, exits))
        seen = self.values.keys() & versions.keys()
        return (
            versions.keys() == self.versions.keys()
            and all(versions[name] == self.versions[name] for name in seen)
            and added_scales(transformer) == self.scales
        )


def _tensors(transformer: nn.Module, exits: nn.Module | None) -> dict[str, Tensor]:
    parts = {"transformer": transformer} | ({} if exits is None else {"exits": exits})
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _versions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: 0 if t.is_inference() or t.is_meta else t._version for name, t in tensors.items()}


def _picked(tensor: Tensor) -> Tensor:
    """Pick a few values of a tensor, evenly spread, float32."""
    flat = plain(tensor).flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float()
