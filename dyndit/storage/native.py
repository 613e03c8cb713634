"""Read and write the native folder: config, backbone, exits, and beside them plans, the shift table and a manifest.

The backbone's metadata repeats the config, so that edits are found. Hashes identify the backbone and the exits.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from dyndit import seals
from dyndit.errors import CheckpointError, InputError, PlanError, first_line
from dyndit.files import read_json, read_safetensors, write_json, write_safetensors
from dyndit.models.base import Backbone, outlined
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.identity import same, tensors_hash
from dyndit.models.registry import families, family_of, packaged, place_of
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.table import ShiftTable
from dyndit.process import Process
from dyndit.storage.reading import (
    AskedProcess,
    Loaded,
    autoencoder_record,
    built,
    check_finite,
    check_shapes,
    load_strictly,
    process_of,
)

MODEL_FORMAT, VERSION = "dyndit-model", 1
EXITS_FORMAT, EXITS_VERSION = "dyndit-exits", 2
CONFIG, WEIGHTS, EXITS = "config.json", "model.safetensors", "exits.safetensors"
TABLE, PLANS = "shift-table.safetensors", "plan-*.json"


def write(model: DynamicDepth, folder: Path, *, half: bool = False) -> None:
    """Write config, backbone, and exits if any. `half` stores the backbone in fp16.

    Raises InputError: see `check_savable`.
    """
    check_savable(model.backbone, folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.backbone.state_dict()
    check_finite(weights, folder / WEIGHTS)
    if half:
        weights = {name: t.half() for name, t in weights.items()}
    checksum = model.backbone.checksum(weights, model.process)
    config = {
        "format": MODEL_FORMAT,
        "version": VERSION,
        "family": model.backbone.family,
        "pixel_space": model.pixel_space,
        "process": model.process.config(),
        "trunk": checksum,
        "backbone": model.backbone.config(),
    }
    if type(model.backbone) not in packaged().values():
        config["class"] = place_of(type(model.backbone))
    if model.autoencoder is not None:
        config["autoencoder"] = asdict(model.autoencoder)
    write_safetensors(folder / WEIGHTS, weights, {"format": MODEL_FORMAT, "config": json.dumps(config)})
    write_json(folder / CONFIG, config)
    if model.exits is not None:
        write_exits(model.exits, folder / EXITS, model.backbone.identity(weights, model.process))


def check_savable(backbone: Backbone, folder: Path) -> None:
    """Refuse a backbone that no folder could give back.

    Raises InputError: it belongs to another library, is not registered, or its config builds another architecture.
    """
    kind, name = type(backbone), type(backbone).__name__
    if backbone.foreign:
        expected = "is saved by the library its transformer is from; expected a native backbone"
        raise InputError(f"{folder}: a {name} {expected}")
    if kind in packaged().values():
        return
    if kind not in families().values():
        raise InputError(f"{folder}: {name} is not registered; expected dyndit.register('my-name', {name}) before")
    try:
        config = backbone.config()
    except NotImplementedError as error:
        raise InputError(f"{folder}: {error}") from error
    try:
        twin = outlined(kind, json.loads(json.dumps(config)))
        check_shapes(twin, backbone.state_dict(), Path(f"{name}.from_config({name}.config())"))
    except Exception as error:  # the user's own code may raise anything
        told = str(error) if isinstance(error, InputError) else f"{type(error).__name__}, {first_line(error)}"
        raise InputError(f"{folder}: {name} is not built again from its config() {config!r:.100} ({told})") from error


def read(folder: Path, asked: AskedProcess = None) -> Loaded:
    """Read a native folder, with its exits if any.

    asked: the process to use, see `process_of`.

    Raises CheckpointError: damaged or edited, of another process, or with exits or plans of another backbone.
    """
    path = folder / CONFIG
    config = read_json(path)
    try:
        name, arguments = config["family"], config["backbone"]
        known = (config["format"], config["version"]) == (MODEL_FORMAT, VERSION)
        checksum, pixel_space = config["trunk"], config["pixel_space"]
    except (KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path}: not the config of a {MODEL_FORMAT} folder ({found})") from error
    if not known:
        raise CheckpointError(f"{path}: expected a {MODEL_FORMAT} config of version {VERSION}")
    try:
        family = family_of(name, config.get("class"))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    # Only the config tells the number of heads, the norm's epsilon and the timestep frequencies. Compare it
    # before building: an edited config may ask for any number of blocks.
    edited = f"{path}: edited; expected the config that {WEIGHTS} was saved with"
    if metadata.get("config") not in (None, json.dumps(config)):
        raise CheckpointError(edited)
    process, notes = process_of(config.get("process"), asked, path)
    backbone = built(family, arguments, path, tensors, folder / WEIGHTS)
    if (found := backbone.checksum(process=process)) != checksum:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged (checksum {found}, {CONFIG} records {checksum})")
    if metadata.get("config") is None:
        raise CheckpointError(edited)
    loaded = completed(folder, backbone, process, pixel_space, notes)
    loaded.model.autoencoder = autoencoder_record(config.get("autoencoder"), path)
    return loaded


def completed(folder: Path, backbone: Backbone, process: Process, pixel_space: bool, notes: tuple[str, ...]) -> Loaded:
    """Add the exits in a folder to its backbone. Raises CheckpointError: exits or plans of another backbone."""
    exits = read_exits(folder / EXITS, backbone, process=process) if (folder / EXITS).exists() else None
    model = DynamicDepth(backbone, exits, pixel_space=pixel_space, process=process).eval()
    for path, plan in plans_in(folder).items():
        model.check_identity(plan.backbone, "", origin=str(path), error=CheckpointError)
    if exits is not None and seals.SEAL not in read_metadata(folder / EXITS):
        notes = (*notes, f"{EXITS}: written before exits had a checksum; only its numbers are checked, not its layers")
    return Loaded(model, notes, folder)


def write_exits(exits: Exits, path: Path, backbone: str) -> None:
    """Write the exits to a file of their own, bound to the backbone of this identity."""
    tensors = exits.state_dict()
    check_finite(tensors, path)
    metadata = {
        "format": EXITS_FORMAT,
        "version": str(EXITS_VERSION),
        "backbone": backbone,
        "exits": tensors_hash(tensors),
        "config": json.dumps(exits.describe()),
    }
    metadata[seals.SEAL] = seals.tensors_checksum(tensors, metadata)
    write_safetensors(path, tensors, metadata)


def read_exits(path: Path, backbone: Backbone, *, check_identity: bool = True, process: Process | None = None) -> Exits:
    """Read an exits file. Without `check_identity`, compare only shapes with the backbone.

    process: the model's process, see `Backbone.identity`.

    Raises CheckpointError: missing, damaged, or of another backbone.
    """
    tensors, metadata = read_safetensors(path)
    if (metadata.get("format"), metadata.get("version")) != (EXITS_FORMAT, str(EXITS_VERSION)):
        raise CheckpointError(f"{path}: expected a {EXITS_FORMAT} file of version {EXITS_VERSION}")
    if metadata.keys() - {"format", "version", "backbone", "exits", "config"}:
        seals.check_tensors(path, tensors, metadata)
    made_for = metadata.get("backbone", "")
    if check_identity and not same(made_for, found := backbone.identity(process=process)):
        raise CheckpointError(f"{path}: exits of backbone {made_for}, but this backbone is {found}")
    if metadata.get("exits") != tensors_hash(tensors):
        raise CheckpointError(f"{path}: damaged (its tensors do not have the recorded hash)")
    try:
        config = json.loads(metadata["config"])
        recall, ratio = tuple(config.get("recall", ())), config.get("recall_ratio", ExitConfig.recall_ratio)
        exits = Exits(backbone, ExitConfig(tuple(config["layers"]), config["head"], recall, ratio))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = first_line(error)
        raise CheckpointError(f"{path}: damaged (no exits are described by its metadata: {found})") from error
    if "gains" in tensors:
        exits.gains = torch.nn.Parameter(torch.zeros_like(tensors["gains"]))
    load_strictly(exits, tensors, path)
    return exits.eval()


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file that was read before."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def plans_in(folder: Path) -> dict[Path, DepthPlan]:
    """Load the plans in a folder, by file. Raises CheckpointError: a plan cannot be read."""
    found = (path for path in sorted(folder.glob(PLANS)) if not path.name.endswith(".manifest.json"))  # of a figure
    try:
        return {path: DepthPlan.load(path) for path in found}
    except PlanError as error:
        raise CheckpointError(str(error)) from error


def companions(folder: Path, model: DynamicDepth) -> tuple[Path, ...]:
    """List the plans and the shift table in a folder, after checking that they fit the model.

    Raises CheckpointError: a file cannot be read, or is of another backbone or other exits.
    """
    plans = plans_in(folder)
    for path, plan in plans.items():
        try:
            bind(plan, model, origin=str(path))
        except PlanError as error:
            raise CheckpointError(str(error)) from error
    tables = [folder / TABLE] if (folder / TABLE).exists() else []
    for path in tables:
        table = ShiftTable.load(path)
        model.check_identity(table.backbone, table.exits, origin=str(path), error=CheckpointError)
    return (*plans, *tables)
