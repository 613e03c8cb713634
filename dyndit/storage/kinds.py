"""The kinds of paths that storage reads, for `dyndit inspect`: plans, tables, exits, autoencoders, caches, models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dyndit import files
from dyndit.errors import CheckpointError, InputError
from dyndit.manifest import MANIFEST
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans import plan as plans
from dyndit.plans import table as tables
from dyndit.progress import progress_bar
from dyndit.storage import contents, native
from dyndit.storage import load as checkpoints
from dyndit.storage.autoencoder import find
from dyndit.storage.inspect import Description, kind, recognised
from dyndit.storage.reading import Loaded
from dyndit.training.autoencoders import latent_space, load_autoencoder, record
from dyndit.training.latents import INDEX


def describe(path_or_hub_id: str | Path, **told: Any) -> Description:
    """Describe a path or a hub id: by the registered kinds, else as a model.

    told: num_heads, process, weights, num_classes and revision, as in `dyndit.load`.

    Raises InputError: there is no such path or id.
    """
    with progress_bar(f"looking at {path_or_hub_id}"):
        return _described(path_or_hub_id, told)


def _described(path_or_hub_id: str | Path, told: Mapping[str, Any]) -> Description:
    """See `describe`."""
    path = Path(path_or_hub_id)
    if path.exists() and (found := recognised(path)) is not None:
        return found
    try:
        loaded = checkpoints.inspect(path_or_hub_id, **told, device="cpu")
    except InputError as error:
        if not path.exists():
            raise
        return Description("nothing that loads as a model", _holdings(path), problem=str(error))
    return _model(loaded, path_or_hub_id)


def _model(loaded: Loaded, origin: str | Path) -> Description:
    model, folder = loaded.model, loaded.folder
    count = sum(p.numel() for p in model.backbone.parameters())
    taken = [f"backbone: {len(model.backbone.state_dict())} tensors, {count:,} parameters"]
    missing = []
    if model.exits is None:
        missing.append("exits: the model runs at full depth alone; `dyndit distill` trains some")
    else:
        taken.append(f"exits: {model.exits.config.head} heads after layers {', '.join(map(str, model.exits.layers))}")
    beside = [path.name for path in sorted(folder.glob(native.PLANS))] if folder is not None else []
    taken += [f"plan: {name}" for name in beside]
    if folder is not None and (folder / native.TABLE).exists():
        taken.append(f"shift table: {native.TABLE}")
    elif model.exits is not None:
        missing.append("shift table: `dyndit calibrate` measures one; --router needs none")
    if not model.pixel_space:
        own, source = find(origin, optional=True)
        if own is not None:
            taken.append(f"autoencoder, where pictures are made: {source or own}")
        else:
            missing.append("autoencoder: it makes latents; --vae names the folder or hub id of their autoencoder")
    notes = tuple(note for note in loaded.notes if ": ignored " not in note)
    return Description(loaded.kind, _facts(model), tuple(taken), loaded.ignored, tuple(missing), notes)


def _facts(model: DynamicDepth) -> dict[str, Any]:
    facts = {"family": model.backbone.family} | model.backbone.config() | {"process": str(model.process)}
    facts |= {"makes": "pixels in [-1, 1]" if model.pixel_space else "latents", "hash": model.identity.backbone}
    if model.autoencoder is not None:
        known = model.autoencoder
        facts["autoencoder"] = " ".join(part for part in (known.kind, known.hash, known.source) if part)
    return facts


def _holdings(path: Path) -> dict[str, Any]:
    """List what is in a folder, or the first names in a file of weights."""
    if path.is_dir():
        return {"holds": [entry.name for entry in sorted(path.iterdir())][:20]}
    try:
        data = contents.everything(path)
    except CheckpointError:
        return {"bytes": path.stat().st_size}
    named = {str(name): value for name, value in data.items()} if isinstance(data, Mapping) else {}
    shapes = {name: list(v.shape) for name, v in named.items() if isinstance(v, Tensor)}
    return {"holds": contents.summary(named), "first tensors": dict(list(shapes.items())[:3])}


@kind("depth plan")
def _plan(path: Path) -> Description | None:
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        if files.read_json(path).get("format") != plans.FORMAT:
            return None
    except CheckpointError as error:
        return Description("damaged JSON file", problem=str(error))
    plan = plans.DepthPlan.load(path)
    facts = {"router": plan.router, "solver": plan.solver, "steps": plan.num_steps, "guidance": plan.cfg_scale}
    facts |= {"blocks of its model": plan.num_blocks, "share of blocks": round(plan.share_of_blocks, 4)}
    facts |= {"budget": plan.budget, "backbone": plan.backbone or "any", "exits": plan.exits or "any"}
    return Description("depth plan", facts, (f"plan: {plan}",))


@kind("shift table")
def _table(path: Path) -> Description | None:
    if _metadata(path).get("format") != tables.FORMAT:
        return None
    table = tables.ShiftTable.load(path)
    facts = {"solver": table.solver, "steps": table.num_steps, "guidance": table.cfg_scale, "bands": len(table.mean)}
    facts |= {"choices": len(table.choices), "pictures": table.num_pictures, "extractor": table.extractor}
    return Description("shift table", facts | {"backbone": table.backbone or "any", "exits": table.exits or "any"})


@kind("exits")
def _exits(path: Path) -> Description | None:
    metadata = _metadata(path)
    if metadata.get("format") != native.EXITS_FORMAT:
        return None
    facts = {"backbone": metadata.get("backbone"), "config": metadata.get("config"), "hash": metadata.get("exits")}
    return Description("exits", facts, missing=("backbone: exits load beside the backbone they were trained on",))


@kind("autoencoder")
def _autoencoder(path: Path) -> Description | None:
    config = path / "config.json"
    if not config.is_file() or not str(files.read_json(config).get("_class_name")).startswith("Autoencoder"):
        return None
    vae = load_autoencoder(path)
    space = latent_space(vae)
    facts = {"class": space.kind, "latent channels": space.channels, "pixels a latent": space.pixels}
    facts |= {"shift": space.shift, "scale": space.scale, "hash": record(vae).hash}
    return Description("autoencoder of diffusers", facts, (f"weights: {len(vae.state_dict())} tensors",))


@kind("cache of latents")
def _latents(path: Path) -> Description | None:
    if not (path / INDEX).is_file():
        return None
    index = files.read_json(path / INDEX)
    if not isinstance(index.get("made_from"), dict) or not isinstance(index.get("sha256"), dict):
        raise CheckpointError(f"{path / INDEX}: damaged; expected made_from and sha256")
    lost = tuple(f"shard: {name}" for name in index["sha256"] if not (path / name).is_file())
    return Description("cache of latents", index["made_from"], (f"shards: {len(index['sha256'])}",), missing=lost)


@kind("run")
def _run(path: Path) -> Description | None:
    if not (path / MANIFEST).is_file() or (path / native.CONFIG).exists():
        return None
    found = files.read_json(path / MANIFEST)
    if not isinstance(settings := found.get("settings"), dict):
        return None
    missing = (
        () if found.get("complete", True) is True else ("pictures: the run is not complete; the same call goes on",)
    )
    return Description(f"run of dyndit {settings.get('verb', '')}".rstrip(), settings, missing=missing)


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; of any other path, none."""
    if not path.is_file() or path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}
