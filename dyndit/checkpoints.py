"""Models on disk.

Native: a folder with `config.json`, `model.safetensors`, `exits.safetensors` and, beside them, plans, the shift
table and a manifest. In: also the published DiT `.pt`, a raw state dict or a training checkpoint. A file is recognised
by its content, never unpickled beyond tensors and an `argparse.Namespace`, and loaded strictly.
"""

import argparse
import importlib.resources
import json
import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyndit.backbones import CARDS, FAMILIES, Backbone, ClassConditionalDiT, DiTConfig, tensors_hash
from dyndit.dynamic import DynamicDepth
from dyndit.errors import CheckpointError, InputError
from dyndit.exits import ExitConfig, Exits
from dyndit.manifest import write_json

MODEL_FORMAT, EXITS_FORMAT, VERSION = "dyndit-model", "dyndit-exits", 1
CONFIG, TRUNK, EXITS = "config.json", "model.safetensors", "exits.safetensors"
TABLE = "shift-table.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A model and what was found out on the way, a line each, for whoever asked."""

    model: DynamicDepth
    notes: tuple[str, ...] = ()


def load(path: str | Path, *, num_heads: int | None = None, device: str = "cpu") -> DynamicDepth:
    """Load a model in eval mode: "digits" (ships with the package), a native folder, or a published DiT `.pt`.

    Raises:
        CheckpointError: missing, damaged or foreign.
    """
    return inspect(path, num_heads=num_heads, device=device).model


def inspect(path: str | Path, *, num_heads: int | None = None, device: str = "cpu") -> Loaded:
    """`load`, with notes on what was inferred."""
    if str(path) == "digits" and not Path(path).exists():
        return Loaded(_packaged_digits().to(device))
    path = Path(path)
    if path.is_dir():
        return Loaded(_load_native(path).to(device))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; expected a model folder, a DiT .pt or 'digits'")
    loaded = _load_official(path, num_heads)
    return Loaded(loaded.model.to(device), loaded.notes)


def save(model: DynamicDepth, folder: Path, *, half: bool = False) -> None:
    """Write the native folder (config, trunk, exits where there are any). `half` stores the trunk in fp16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trunk = model.backbone.state_dict()
    if half:
        trunk = {name: t.half() for name, t in trunk.items()}
    trunk_hash = model.backbone.identity(trunk)
    config = {
        "format": MODEL_FORMAT,
        "version": VERSION,
        "family": model.backbone.family,
        "pixel_space": model.pixel_space,
        "trunk": trunk_hash,
        "backbone": model.backbone.config(),
    }
    _write(trunk, folder / TRUNK, {"format": MODEL_FORMAT, "config": json.dumps(config)})
    write_json(folder / CONFIG, config)
    if model.exits is not None:
        save_exits(model.exits, folder / EXITS, trunk_hash)


def save_exits(exits: Exits, path: Path, trunk_hash: str) -> None:
    """Write the exits as a side-car bound to its trunk by hash."""
    tensors = exits.state_dict()
    metadata = {
        "format": EXITS_FORMAT,
        "version": str(VERSION),
        "trunk": trunk_hash,
        "exits": tensors_hash(tensors),
        "config": json.dumps(exits.describe()),
    }
    _write(tensors, path, metadata)


def load_exits(path: Path, backbone: Backbone) -> Exits:
    """Read a side-car.

    Raises:
        CheckpointError: missing, damaged, or of another trunk.
    """
    tensors, metadata = _read(path)
    if (metadata.get("format"), metadata.get("version")) != (EXITS_FORMAT, str(VERSION)):
        raise CheckpointError(f"{path}: expected a {EXITS_FORMAT} file of version {VERSION}")
    trunk = backbone.identity()
    if metadata.get("trunk") != trunk:
        raise CheckpointError(f"{path}: exits of trunk {metadata.get('trunk')}, but this trunk is {trunk}")
    if metadata.get("exits") != tensors_hash(tensors):
        raise CheckpointError(f"{path}: damaged (its tensors do not have the recorded hash)")
    try:
        config = json.loads(metadata["config"])
        exits = Exits(backbone, ExitConfig(tuple(config["layers"]), config["head"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged (no exits are described by its metadata: {_line(error)})") from error
    _load_strictly(exits, tensors, path)
    return exits.eval()


def _load_native(folder: Path) -> DynamicDepth:
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{folder}: holds no {CONFIG}; expected a model folder written by dyndit")
    try:
        config = json.loads(path.read_text())
        family, arguments = FAMILIES[config["family"]], config["backbone"]
        known = (config["format"], config["version"]) == (MODEL_FORMAT, VERSION)
        trunk_hash, pixel_space = config["trunk"], config["pixel_space"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {_line(error)}"
        raise CheckpointError(f"{path}: not the config of a {MODEL_FORMAT} folder ({found})") from error
    if not known:
        raise CheckpointError(f"{path}: expected a {MODEL_FORMAT} config of version {VERSION}")
    try:
        backbone = family.from_config(arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: impossible architecture ({_line(error)})") from error
    tensors, metadata = _read(folder / TRUNK)
    _load_strictly(backbone, tensors, folder / TRUNK)
    if (found := backbone.identity()) != trunk_hash:
        raise CheckpointError(f"{folder / TRUNK}: damaged (hash {found}, {CONFIG} records {trunk_hash})")
    # No tensor shows the number of heads, the norm's epsilon or the timestep frequencies: the file tells.
    if metadata.get("config") != json.dumps(config):
        raise CheckpointError(f"{path}: edited; expected the config that {TRUNK} was saved with")
    exits = load_exits(folder / EXITS, backbone) if (folder / EXITS).exists() else None
    return DynamicDepth(backbone, exits, pixel_space=pixel_space).eval()


def _packaged_digits() -> DynamicDepth:
    """The trunk that `recipes/digits.py` made, from the package's own data."""
    asset = importlib.resources.files("dyndit.assets") / "digits.safetensors"
    with importlib.resources.as_file(asset) as path:
        tensors, _ = _read(path)
        backbone = ClassConditionalDiT(CARDS["digits"])
        _load_strictly(backbone, tensors, path)
    return DynamicDepth(backbone).eval()


def _load_official(path: Path, num_heads: int | None) -> Loaded:
    tensors, notes = _official_tensors(path)
    config, heads_note = _infer(tensors, path, num_heads)
    backbone = ClassConditionalDiT(config)
    _load_strictly(backbone, tensors, path)
    pixels = config.in_channels in (1, 3)
    return Loaded(DynamicDepth(backbone, pixel_space=pixels).eval(), (*notes, heads_note))


def _official_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes, run through an unpickler, raise anything
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        found = (
            f"holds {unsafe[1]}" if unsafe else f"damaged or of another kind, {type(error).__name__}: {_line(error)}"
        )
        raise CheckpointError(f"{path}: expected a PyTorch checkpoint of tensors alone ({found})") from error
    notes: tuple[str, ...] = ()
    if isinstance(data, dict):
        for key in ("ema", "model"):
            if isinstance(data.get(key), dict):
                data, notes = data[key], (f"{path.name}: training checkpoint, using '{key}'",)
                break
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path}: expected a state dict, or a checkpoint holding 'ema' or 'model'")
    return data, notes


def _infer(tensors: dict[str, Tensor], path: Path, num_heads: int | None) -> tuple[DiTConfig, str]:
    """The architecture that the shapes tell; the number of heads, which none shows, from the width."""
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        num_tokens = tensors["pos_embed"].shape[1]
        rows = tensors["final_layer.linear.weight"].shape[0]
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        num_labels = tensors["y_embedder.embedding_table.weight"].shape[0]
        num_blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    except KeyError as error:
        raise CheckpointError(f"{path}: no class-conditional DiT (missing {error})") from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no class-conditional DiT ({_line(error)})") from error
    if num_heads is None:
        by_width = {card.width: card.num_heads for card in CARDS.values()}
        num_heads = by_width.get(width) or (width // 64 if width % 64 == 0 else None)
        how = "of the card of this width" if width in by_width else "64 wide"
        if num_heads is None:
            raise InputError(f"{path}: width {width} tells no number of heads; expected --num-heads")
    else:
        how = "as given"
    if num_heads < 1 or width % num_heads:
        raise InputError(f"--num-heads {num_heads}: does not divide the width {width}")
    config = DiTConfig(
        image_size=isqrt(num_tokens) * patch,
        patch_size=patch,
        in_channels=channels,
        width=width,
        num_blocks=num_blocks,
        num_heads=num_heads,
        mlp_ratio=hidden / width,
        num_classes=num_labels - 1,
        learn_variance=rows == 2 * channels * patch**2,
    )
    return config, f"{path.name}: {num_heads} attention heads, {how}"


def _load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load, refusing missing, extra and reshaped tensors."""
    own = module.state_dict()
    for problem, names in (
        ("lacks", own.keys() - tensors.keys()),
        ("has extra", tensors.keys() - own.keys()),
    ):
        if names:
            first = min(names)
            raise CheckpointError(f"{path}: {problem} {len(names)} tensors, first {first}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: {name} has shape {found}, expected {expected}")
    module.load_state_dict({name: t.to(own[name].dtype) for name, t in tensors.items()})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable safetensors file ({_line(error)})") from error


def _line(error: Exception) -> str:
    """The first line of a foreign error's message, which may have many."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else "no message"


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(path)
