"""Read and write the folder of diffusers' `DiTTransformer2DModel`: `config.json` and `diffusion_pytorch_model.*`.

In: safetensors, whole or in shards, or a `.bin`, read as tensors alone; diffusers is not needed. Out: a folder that
plain `DiTTransformer2DModel.from_pretrained` loads. Settings that the class has no argument for stand in config.json
under names that begin with `_dyndit_`; diffusers ignores these names. The main one is the shift of the timestep
frequencies: 0 in the published code, while the class always starts with 1 (see `match_frequencies`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.files import read_json, read_safetensors, write_json, write_safetensors
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import names
from dyndit.storage.contents import sharded
from dyndit.storage.native import CONFIG, EXITS, completed, write_exits
from dyndit.storage.reading import AskedProcess, Loaded, built, process_of, read_pickled

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

CLASS = "DiTTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model"
PIXEL_SPACE, LABEL_DROPOUT = "_dyndit_pixel_space", "_dyndit_label_dropout"
PRIVATE = (names.FREQUENCY_SHIFT, PIXEL_SPACE, LABEL_DROPOUT, names.PROCESS)
CHECKSUM_KEY, CONFIG_KEY = "dyndit_trunk", "dyndit_config"
"""Metadata of weights that we write: the backbone's hash, and the private names' values."""

_NORM_EPS = 1e-6
"""Epsilon of the norms before attention and before the output. The class hard-codes it."""
_FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
"""Arguments of the class that have one value for every DiT."""
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
"""Defaults of the class, which a config.json may leave out."""
_LARGEST, _MOST_PATCHES = 1 << 20, 512
"""Largest value of any size, and most patches across. They refuse an edited file before it fills the memory."""


def read(folder: Path, asked: AskedProcess = None, pixel_space: bool | None = None) -> Loaded:
    """Read a transformer's folder, and its `exits.safetensors` if there is one.

    asked: the process to use, see `process_of`. pixel_space: used if the folder does not record it (default: pixels
    for 1 or 3 channels).

    Raises CheckpointError: damaged or edited, of another class or process, or with exits or plans of another backbone.
    """
    path = folder / CONFIG
    raw = read_json(path)
    tensors, metadata, name = _weights(folder)
    config, native = _renamed(raw, tensors, path)
    backbone = built(ClassConditionalDiT, asdict(config), path, native, folder / name)
    process, assumed = process_of(raw.get(names.PROCESS), asked, path)
    checksum = backbone.checksum(process=process)
    if metadata.get(CHECKSUM_KEY, checksum) != checksum or metadata.get(CONFIG_KEY, _sealed(raw)) != _sealed(raw):
        raise CheckpointError(
            f"{folder}: {CONFIG} edited, or {name} damaged (hash {checksum}, recorded {metadata.get(CHECKSUM_KEY)})"
        )
    if pixel_space is None:
        pixel_space = config.in_channels in (1, 3)
    pixel_space = _private(raw, PIXEL_SPACE, bool, pixel_space, path)
    shift = config.frequency_shift
    how = f"as {names.FREQUENCY_SHIFT} records" if names.FREQUENCY_SHIFT in raw else "diffusers' own"
    notes = (
        f"{folder.name}: {config.num_heads} attention heads, as {CONFIG} records",
        f"{folder.name}: timestep frequencies with shift {shift}, {how}; norm_eps {config.mlp_norm_eps:g} of the MLPs",
        *assumed,
    )
    return completed(folder, backbone, process, pixel_space, notes)


def write(model: DynamicDepth, folder: Path) -> None:
    """Write a transformer's folder, with exits.safetensors if the model has exits.

    Raises InputError: the diffusers class cannot express the model.
    """
    config, checksum = class_config(model), model.backbone.checksum(process=model.process)
    tensors = names.from_native(model.backbone.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", CHECKSUM_KEY: checksum, CONFIG_KEY: _sealed(config)}
    write_safetensors(folder / f"{WEIGHTS}.safetensors", tensors, metadata)
    write_json(folder / CONFIG, config)
    if model.exits is not None:
        write_exits(model.exits, folder / EXITS, model.identity.backbone)


def class_config(model: DynamicDepth) -> dict[str, object]:
    """Return the config.json of a model: the class's arguments, and the private names that diffusers ignores.

    Raises InputError: the class cannot express the model.
    """
    backbone = model.backbone
    if not isinstance(backbone, ClassConditionalDiT):
        raise InputError(f"{CLASS}: a class-conditional DiT alone, not a {type(backbone).__name__}")
    c = DiTConfig(**backbone.config())
    limits = {
        f"mlp_ratio {c.mlp_ratio:g}": int(c.width * c.mlp_ratio) == 4 * c.width,
        "a backbone without null class": c.label_dropout > 0,
        f"norm_eps {c.norm_eps:g}": c.norm_eps == _NORM_EPS,
        f"the time and velocity of {c.convention}": c.convention == "timesteps",
    }
    for found, fits in limits.items():
        if not fits:
            raise InputError(
                f"{CLASS} cannot hold {found}; expected mlp_ratio 4, a null class, norm_eps 1e-6, timesteps"
            )
    try:
        names.own_positions(backbone.state_dict())
    except CheckpointError as error:
        raise InputError(f"{CLASS}: {error}") from error
    import diffusers

    return {
        "_class_name": CLASS,
        "_diffusers_version": diffusers.__version__,
        names.FREQUENCY_SHIFT: c.frequency_shift,
        PIXEL_SPACE: model.pixel_space,
        LABEL_DROPOUT: c.label_dropout,
        names.PROCESS: model.process.config(),
        **_FIXED,
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.width // c.num_heads,
        "in_channels": c.in_channels,
        "out_channels": backbone.out_channels,
        "num_layers": c.num_blocks,
        "sample_size": c.image_size,
        "patch_size": c.patch_size,
        "num_embeds_ada_norm": c.num_classes,
        "norm_eps": c.mlp_norm_eps,
    }


def to_diffusers(model: DynamicDepth) -> "DiTTransformer2DModel":
    """Convert to diffusers' class in memory, with the model's own timestep frequencies. Exits are left out.

    Raises InputError: the class cannot express the model.
    """
    from diffusers import DiTTransformer2DModel

    config = class_config(model)
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    transformer = DiTTransformer2DModel(**arguments)
    tensors = names.from_native(model.backbone.state_dict())
    positions = tensors.pop(names.POSITIONS, None)
    transformer.load_state_dict(tensors)
    if positions is not None:
        transformer.pos_embed.pos_embed.copy_(positions)
    names.match_frequencies(transformer, config[names.FREQUENCY_SHIFT])
    transformer.register_to_config(**{name: config[name] for name in PRIVATE})
    reference = next(model.backbone.parameters())
    transformer = transformer.to(reference.device).eval()
    return transformer if reference.dtype == transformer.dtype else transformer.to(reference.dtype)


def from_diffusers(
    transformer: "DiTTransformer2DModel", pixel_space: bool | None = None, process: AskedProcess = None
) -> DynamicDepth:
    """Copy a transformer of diffusers to the native class, with its present timestep frequencies and without exits.

    pixel_space: True if it makes pixels (default: as its config records, else True for 1 or 3 channels). process: the
    process that it was trained for, or the process' name (default: as its config records, else DDPM).

    Raises CheckpointError: the transformer is no DiT, or its frequencies or process differ from its config.
    """
    where, shift = Path(CLASS), names.frequency_shift_of(transformer)
    recorded = transformer.config.get(names.FREQUENCY_SHIFT, shift)
    if recorded != shift:
        raise CheckpointError(
            f"{CLASS}: runs with frequency shift {shift}, but its config records {recorded}; expected "
            f"dyndit.storage.names.match_frequencies(transformer, {recorded}) after loading"
        )
    raw = dict(transformer.config) | {"_class_name": CLASS, names.FREQUENCY_SHIFT: shift}
    config, native = _renamed(raw, transformer.state_dict(), where)
    reference = next(transformer.parameters())
    if pixel_space is None:
        pixel_space = _private(raw, PIXEL_SPACE, bool, config.in_channels in (1, 3), where)
    backbone = built(ClassConditionalDiT, asdict(config), where, native, where).to(reference.device, reference.dtype)
    process, _ = process_of(raw.get(names.PROCESS), process, where)
    return DynamicDepth(backbone, pixel_space=pixel_space, process=process).eval()


def _sealed(config: Mapping[str, object]) -> str:
    return json.dumps({name: config[name] for name in PRIVATE if name in config})


def _renamed(
    raw: Mapping[str, object], tensors: Mapping[str, Tensor], path: Path
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Return the architecture in a config.json, and the tensors under native names. Refuse weights that do not fit."""
    config = _architecture(raw, path)
    try:
        if (found := names.num_blocks(tensors)) != config.num_blocks:
            raise CheckpointError(f"{path}: num_layers is {config.num_blocks}, but the weights hold {found} blocks")
        width = tensors["pos_embed.proj.weight"].shape[0]
        if width != config.width:
            raise CheckpointError(f"{path}: heads are {config.width} wide in all, but the weights are {width} wide")
        return config, names.to_native(tensors, config.image_size // config.patch_size)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the weights beside it are no {CLASS}'s ({first_line(error)})") from error


def _architecture(raw: Mapping[str, object], path: Path) -> DiTConfig:
    name = raw.get("_class_name")
    if name != CLASS and (name, raw.get("norm_type")) != ("Transformer2DModel", "ada_norm_zero"):  # in older diffusers
        raise CheckpointError(f"{path}: holds a {name!r:.60}, expected a {CLASS}")
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {raw[name]!r:.40}, expected {value!r}")
    sizes = {name: raw.get(name, default) for name, default in _DEFAULTS.items()}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise CheckpointError(f"{path}: {name} is {value!r:.40}, expected an integer of at least 1")
    channels = sizes["in_channels"]
    out = raw.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise CheckpointError(f"{path}: out_channels is {out!r:.40}, expected {channels} or {2 * channels}")
    if sizes["sample_size"] > _MOST_PATCHES * sizes["patch_size"]:
        raise CheckpointError(
            f"{path}: sample_size is {sizes['sample_size']}, expected at most {_MOST_PATCHES} patches"
        )
    shift = _private(raw, names.FREQUENCY_SHIFT, int, 1, path)
    norm_eps, dropout = raw.get("norm_eps", 1e-5), raw.get(LABEL_DROPOUT, 0.1)
    for name, value in (("norm_eps", norm_eps), (LABEL_DROPOUT, dropout)):
        if type(value) not in (int, float) or not 0 < value < 1:
            raise CheckpointError(f"{path}: {name} is {value!r:.40}, expected a number between 0 and 1")
    if shift not in (0, 1):
        raise CheckpointError(f"{path}: {names.FREQUENCY_SHIFT} is {shift}, expected 0 or 1")
    try:
        return DiTConfig(
            image_size=sizes["sample_size"],
            patch_size=sizes["patch_size"],
            in_channels=channels,
            width=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            num_blocks=sizes["num_layers"],
            num_heads=sizes["num_attention_heads"],
            mlp_ratio=4.0,
            num_classes=sizes["num_embeds_ada_norm"],
            label_dropout=dropout,
            learn_variance=out == 2 * channels,
            norm_eps=_NORM_EPS,
            mlp_norm_eps=norm_eps,
            frequency_shift=shift,
        )
    except InputError as error:
        raise CheckpointError(f"{path}: impossible architecture ({error})") from error


def _private(raw: Mapping[str, object], name: str, kind: type, default: object, path: Path) -> object:
    """Return the checked value of a private name. Files that diffusers wrote give the default."""
    value = raw.get(name, default)
    if type(value) is not kind:
        raise CheckpointError(f"{path}: {name} is {value!r:.40}, expected {kind.__name__}")
    return value


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
