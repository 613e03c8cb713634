"""The native folder: `config.json`, `model.safetensors`, `exits.safetensors`, and beside them plans, the shift table
and a manifest. The config is sealed in the trunk's metadata, the trunk and the exits are known by their hashes.
"""

import json
from pathlib import Path

import torch

from dyndit.errors import CheckpointError, InputError, PlanError
from dyndit.manifest import write_json
from dyndit.models import FAMILIES, Backbone, tensors_hash
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.process import Process
from dyndit.storage.reading import (
    AskedProcess,
    Loaded,
    built,
    first_line,
    load_strictly,
    process_of,
    read_json,
    read_safetensors,
    write_safetensors,
)

MODEL_FORMAT, EXITS_FORMAT, VERSION = "dyndit-model", "dyndit-exits", 1
CONFIG, TRUNK, EXITS = "config.json", "model.safetensors", "exits.safetensors"
TABLE, PLANS = "shift-table.safetensors", "plan-*.json"


def write(model: DynamicDepth, folder: Path, *, half: bool = False) -> None:
    """Write config, trunk, and exits where there are any. `half` stores the trunk in fp16.

    Raises:
        InputError: the trunk belongs to another library.
    """
    if type(model.backbone) not in FAMILIES.values():
        name = type(model.backbone).__name__
        raise InputError(f"{folder}: a {name} is saved by the library its transformer is from; expected a native trunk")
    folder.mkdir(parents=True, exist_ok=True)
    trunk = model.backbone.state_dict()
    if half:
        trunk = {name: t.half() for name, t in trunk.items()}
    trunk_hash = model.backbone.identity(trunk, model.process)
    config = {
        "format": MODEL_FORMAT,
        "version": VERSION,
        "family": model.backbone.family,
        "pixel_space": model.pixel_space,
        "process": model.process.config(),
        "trunk": trunk_hash,
        "backbone": model.backbone.config(),
    }
    write_safetensors(trunk, folder / TRUNK, {"format": MODEL_FORMAT, "config": json.dumps(config)})
    write_json(folder / CONFIG, config)
    if model.exits is not None:
        write_exits(model.exits, folder / EXITS, trunk_hash)


def read(folder: Path, asked: AskedProcess = None) -> Loaded:
    """Read a native folder, with its exits where there are any.

    asked: the process that the model is to have, as of `process_of`.

    Raises:
        CheckpointError: damaged or edited, of another process, or with exits or plans of another trunk.
    """
    path = folder / CONFIG
    config = read_json(path)
    try:
        family, arguments = FAMILIES[config["family"]], config["backbone"]
        known = (config["format"], config["version"]) == (MODEL_FORMAT, VERSION)
        trunk_hash, pixel_space = config["trunk"], config["pixel_space"]
    except (KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path}: not the config of a {MODEL_FORMAT} folder ({found})") from error
    if not known:
        raise CheckpointError(f"{path}: expected a {MODEL_FORMAT} config of version {VERSION}")
    tensors, metadata = read_safetensors(folder / TRUNK)
    # No tensor shows the number of heads, the norm's epsilon or the timestep frequencies: the file tells. Compared
    # before anything is built, since an edited config may ask for any number of blocks.
    edited = f"{path}: edited; expected the config that {TRUNK} was saved with"
    if metadata.get("config") not in (None, json.dumps(config)):
        raise CheckpointError(edited)
    process, notes = process_of(config.get("process"), asked, path)
    backbone = built(family, arguments, path)
    load_strictly(backbone, tensors, folder / TRUNK)
    if (found := backbone.identity(process=process)) != trunk_hash:
        raise CheckpointError(f"{folder / TRUNK}: damaged (hash {found}, {CONFIG} records {trunk_hash})")
    if metadata.get("config") is None:
        raise CheckpointError(edited)
    exits = None
    if (folder / EXITS).exists():
        exits = read_exits(folder / EXITS, backbone, trunk=found)
    check_plans(folder, found)
    model = DynamicDepth(backbone, exits, pixel_space=pixel_space, process=process)
    return Loaded(model.eval(), notes, folder)


def write_exits(exits: Exits, path: Path, trunk_hash: str) -> None:
    """Write the exits as a side-car bound to its trunk by hash."""
    tensors = exits.state_dict()
    metadata = {
        "format": EXITS_FORMAT,
        "version": str(VERSION),
        "trunk": trunk_hash,
        "exits": tensors_hash(tensors),
        "config": json.dumps(exits.describe()),
    }
    write_safetensors(tensors, path, metadata)


def read_exits(
    path: Path,
    backbone: Backbone,
    *,
    check_trunk: bool = True,
    trunk: str | None = None,
    process: Process | None = None,
) -> Exits:
    """Read a side-car. Without `check_trunk` the trunk is not hashed: shapes alone are compared.

    trunk: the backbone's identity, where it is known already. process: the model's, as of `Backbone.identity`.

    Raises:
        CheckpointError: missing, damaged, or of another trunk.
    """
    tensors, metadata = read_safetensors(path)
    if (metadata.get("format"), metadata.get("version")) != (EXITS_FORMAT, str(VERSION)):
        raise CheckpointError(f"{path}: expected a {EXITS_FORMAT} file of version {VERSION}")
    if check_trunk and metadata.get("trunk") != (trunk := trunk or backbone.identity(process=process)):
        dtype = next(backbone.parameters()).dtype
        rounded = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}, which rounds its weights"
        raise CheckpointError(f"{path}: exits of trunk {metadata.get('trunk')}, but this trunk is {trunk}{rounded}")
    if metadata.get("exits") != tensors_hash(tensors):
        raise CheckpointError(f"{path}: damaged (its tensors do not have the recorded hash)")
    try:
        config = json.loads(metadata["config"])
        exits = Exits(backbone, ExitConfig(tuple(config["layers"]), config["head"]))
    except (ValueError, KeyError, TypeError) as error:
        found = first_line(error)
        raise CheckpointError(f"{path}: damaged (no exits are described by its metadata: {found})") from error
    if "gains" in tensors:
        exits.gains = torch.nn.Parameter(torch.zeros_like(tensors["gains"]))
    load_strictly(exits, tensors, path)
    return exits.eval()


def plans_in(folder: Path) -> dict[Path, DepthPlan]:
    """The plans that lie in a folder, by file.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    try:
        return {path: DepthPlan.load(path) for path in sorted(folder.glob(PLANS))}
    except PlanError as error:
        raise CheckpointError(str(error)) from error


def check_plans(folder: Path, trunk: str) -> None:
    """Refuse a folder with plans of another trunk.

    Raises:
        CheckpointError: naming the file.
    """
    for path, plan in plans_in(folder).items():
        if plan.trunk and plan.trunk != trunk:
            raise CheckpointError(f"{path}: plan of trunk {plan.trunk}, but this trunk is {trunk}")


def companions(folder: Path, model: DynamicDepth) -> tuple[Path, ...]:
    """The plans and the shift table in a folder, all of which fit the model.

    Raises:
        CheckpointError: one of them cannot be read, or is of another trunk or other exits.
    """
    from dyndit.plans.table import ShiftTable

    trunk, exits = model.trunk_hash(), model.exits_hash()
    plans = plans_in(folder)
    for path, plan in plans.items():
        try:
            plan.check(depths=model.depths, trunk=trunk, exits=exits, origin=str(path))
        except PlanError as error:
            raise CheckpointError(str(error)) from error
    tables = [folder / TABLE] if (folder / TABLE).exists() else []
    for path in tables:
        table = ShiftTable.load(path)
        if (table.trunk, table.exits) != (trunk, exits):
            raise CheckpointError(f"{path}: measured on trunk {table.trunk}, exits {table.exits}, not on this model's")
    return (*plans, *tables)
