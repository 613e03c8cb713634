"""The layout of a transformer class of diffusers: its config.json and its tensors, and their native form.

A family says its layout in a file of its own (`dit_layout.py`, `sd3_layout.py`) and has an entry in
`diffusers_folder.LAYOUTS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dyndit.errors import CheckpointError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage.names import PROCESS as PROCESS

PIXEL_SPACE = "_dyndit_pixel_space"
"""Name in config.json that tells whether a model makes pixels. diffusers ignores names that begin with `_dyndit_`."""
_LARGEST = 1 << 20
"""Largest value of any size. It refuses an edited file before it fills the memory."""


class Layout(Protocol):
    """A transformer class of diffusers, as the folder of a native family."""

    name: str
    """Name of the class."""
    family: Any
    """The native family that holds its weights."""
    private: Any
    """Names in config.json that diffusers ignores and our metadata seals."""
    companion: str
    """File beside the weights for tensors that the class lacks, under native names; "" if there are none."""
    matched: str
    """What `module` matches beyond a plain load, for messages; "" if there is nothing to match."""

    def serves(self, raw: Mapping[str, Any]) -> bool:
        """Tell whether a config.json is of the class."""
        ...

    def config(self, model: DynamicDepth) -> dict[str, Any]:
        """Return the config.json of a model: the class's arguments, and the private names.

        Raises InputError: the class cannot express the model.
        """
        ...

    def native(
        self, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the native architecture, and the tensors under native names.

        Raises:
            CheckpointError: the config is impossible, or the weights do not fit it.
        """
        ...

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return a native state dict under the class's names, and the tensors of the companion file."""
        ...

    def notes(self, raw: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """Return notes on inferred settings, a line each."""
        ...

    def module(self, model: DynamicDepth, config: Mapping[str, Any]) -> Any:
        """Convert to the class in memory."""
        ...

    def recorded(self, transformer: Any) -> dict[str, Any]:
        """Return the config of a transformer in memory, with the private names.

        Raises:
            CheckpointError: it runs otherwise than its config records.
        """
        ...

    def call(self, transformer: Any, model: DynamicDepth, inputs: Inputs) -> Tensor:
        """Predict with the class, from the native model's inputs."""
        ...

    def loaded_plainly(self, model: DynamicDepth, transformer: Any) -> tuple[tuple[str, ...], str]:
        """Turn a transformer of `module` into what a plain load gives -> the causes of a difference, and its remedy."""
        ...


def private(raw: Mapping[str, Any], name: str, kind: type, default: object, path: Path) -> Any:
    """Return the checked value of a private name. Files that diffusers wrote give the default."""
    value = raw.get(name, default)
    if type(value) is not kind:
        raise CheckpointError(f"{path}: {name} is {value!r:.40}, expected {kind.__name__}")
    return value


def checked_sizes(raw: Mapping[str, Any], defaults: Mapping[str, int], path: Path) -> dict[str, int]:
    """Return the sizes of a config.json, by the class's defaults where it leaves one out."""
    sizes = {name: raw.get(name, default) for name, default in defaults.items()}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise CheckpointError(f"{path}: {name} is {value!r:.40}, expected an integer of at least 1")
    return sizes
