"""Read and write the folder of a transformer of diffusers: `config.json` and `diffusion_pytorch_model.*`.

In: safetensors, whole or in shards, or a `.bin`, read as tensors alone; diffusers is not needed. Out: a folder that
plain `from_pretrained` of the class loads. A family says its class in a `Layout`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndit.errors import CheckpointError, InputError
from dyndit.files import read_json, read_safetensors, write_json, write_safetensors
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage.contents import sharded
from dyndit.storage.dit_layout import DiTLayout
from dyndit.storage.layout import PIXEL_SPACE, PROCESS, Layout, private
from dyndit.storage.native import CONFIG, EXITS, completed, write_exits
from dyndit.storage.reading import AskedProcess, Loaded, built, process_of, read_pickled
from dyndit.storage.sd3_layout import SD3Layout

LAYOUTS: tuple[Layout, ...] = (DiTLayout(), SD3Layout())
"""Every class of diffusers that has a native family."""

WEIGHTS = "diffusion_pytorch_model"
CHECKSUM_KEY, CONFIG_KEY = "dyndit_trunk", "dyndit_config"
"""Metadata of weights that we write: the backbone's hash, and the private names' values."""


def read(folder: Path, asked: AskedProcess = None, pixel_space: bool | None = None) -> Loaded:
    """Read a transformer's folder, and its `exits.safetensors` if there is one.

    asked: the process to use, see `process_of`. pixel_space: used if the folder does not record it (default: pixels
    for 1 or 3 channels).

    Raises CheckpointError: damaged or edited, of another class or process, or with exits or plans of another backbone.
    """
    path = folder / CONFIG
    raw = read_json(path)
    layout = _layout_of(raw, path)
    tensors, metadata, name = _weights(folder)
    if layout.companion and (folder / layout.companion).exists():
        tensors = tensors | read_safetensors(folder / layout.companion)[0]
    config, native = layout.native(raw, tensors, path)
    backbone = built(layout.family, config, path, native, folder / name)
    process, assumed = process_of(raw.get(PROCESS), asked, path, backbone.usual_process)
    checksum = backbone.checksum(process=process)
    sealed = _sealed(layout, raw)
    if metadata.get(CHECKSUM_KEY, checksum) != checksum or metadata.get(CONFIG_KEY, sealed) != sealed:
        raise CheckpointError(
            f"{folder}: {CONFIG} edited, or {name} damaged (hash {checksum}, recorded {metadata.get(CHECKSUM_KEY)})"
        )
    usual = backbone.in_channels in (1, 3) if pixel_space is None else pixel_space
    pixels: bool = private(raw, PIXEL_SPACE, bool, usual, path)
    return completed(folder, backbone, process, pixels, (*layout.notes(raw, config, folder), *assumed))


def write(model: DynamicDepth, folder: Path) -> None:
    """Write a transformer's folder, with exits.safetensors if the model has exits.

    Raises InputError: the diffusers class cannot express the model.
    """
    layout = layout_for(model)
    config, checksum = layout.config(model), model.backbone.checksum(process=model.process)
    tensors, more = layout.split(model.backbone.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", CHECKSUM_KEY: checksum, CONFIG_KEY: _sealed(layout, config)}
    write_safetensors(folder / f"{WEIGHTS}.safetensors", tensors, metadata)
    if more:
        write_safetensors(folder / layout.companion, more)
    write_json(folder / CONFIG, config)
    if model.exits is not None:
        write_exits(model.exits, folder / EXITS, model.identity.backbone)


def to_diffusers(model: DynamicDepth) -> Any:
    """Convert to the family's class of diffusers in memory. Exits are left out.

    Raises InputError: the class cannot express the model.
    """
    layout = layout_for(model)
    config = layout.config(model)
    transformer = layout.module(model, config)
    transformer.register_to_config(**{name: config[name] for name in layout.private})
    reference = next(model.backbone.parameters())
    transformer = transformer.to(reference.device).eval()
    return transformer if reference.dtype == transformer.dtype else transformer.to(reference.dtype)


def from_diffusers(transformer: Any, pixel_space: bool | None = None, process: AskedProcess = None) -> DynamicDepth:
    """Copy a transformer of diffusers to its native class, without exits.

    pixel_space: True if it makes pixels (default: as its config records, else True for 1 or 3 channels). process: the
    process that it was trained for, or the process' name (default: as its config records, else the family's usual).

    Raises CheckpointError: no native family has its class, or it runs otherwise than its config records.
    """
    name = type(transformer).__name__
    where = Path(name)
    layout = _layout_of({"_class_name": name}, where)
    raw = layout.recorded(transformer)
    config, native = layout.native(raw, transformer.state_dict(), where)
    reference = next(transformer.parameters())
    backbone = built(layout.family, config, where, native, where).to(reference.device, reference.dtype)
    pixels = pixel_space
    if pixels is None:
        pixels = bool(private(raw, PIXEL_SPACE, bool, backbone.in_channels in (1, 3), where))
    process, _ = process_of(raw.get(PROCESS), process, where, backbone.usual_process)
    return DynamicDepth(backbone, pixel_space=pixels, process=process).eval()


def layout_for(model: DynamicDepth) -> Layout:
    """Return the layout of a model's family. Raises InputError: diffusers has no class for it."""
    kind = type(model.backbone)
    found = next((layout for layout in LAYOUTS if layout.family is kind), None)
    if found is None:
        names = ", ".join(layout.family.__name__ for layout in LAYOUTS)
        raise InputError(f"diffusers: has no class for a {kind.__name__}; expected one of {names}")
    return found


def _layout_of(raw: Mapping[str, Any], path: Path) -> Layout:
    found = next((layout for layout in LAYOUTS if layout.serves(raw)), None)
    if found is None:
        names = " or ".join(f"a {layout.name}" if layout is LAYOUTS[0] else layout.name for layout in LAYOUTS)
        raise CheckpointError(f"{path}: holds a {raw.get('_class_name')!r:.60}, expected {names}")
    return found


def _sealed(layout: Layout, config: Mapping[str, Any]) -> str:
    return json.dumps({name: config[name] for name in layout.private if name in config})


def _weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read tensors, metadata and the file's name. Prefer safetensors to pickles."""
    whole, index = f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json"
    pickled, pickled_index = f"{WEIGHTS}.bin", f"{WEIGHTS}.bin.index.json"
    if (folder / whole).exists():
        return *read_safetensors(folder / whole), whole
    if (folder / index).exists():
        return sharded(folder / index, lambda path: read_safetensors(path)[0]), {}, index
    if (folder / pickled).exists():
        return _pickled(folder / pickled), {}, pickled
    if (folder / pickled_index).exists():
        return sharded(folder / pickled_index, _pickled), {}, pickled_index
    raise CheckpointError(f"{folder}: holds no weights; expected {whole}, its shards with {index}, or {pickled}")


def _pickled(path: Path) -> dict[str, Tensor]:
    tensors = read_pickled(path)
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise CheckpointError(f"{path}: expected a state dict")
    if not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{path}: expected a state dict, with names for its tensors")
    return tensors
