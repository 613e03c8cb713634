"""Load and save models on disk and on the hub. The content tells the format.

| format | read and written by |
|---|---|
| native folder: config, backbone, exits, and beside them plans, shift table, manifest | `native.py` |
| published DiT `.pt`, and SiT's | `official.py` |
| diffusers `DiTTransformer2DModel` or `SD3Transformer2DModel` folder | `diffusers_folder.py` |
| pipeline folder (`DiTPipeline`, `DynDiTPipeline`): one of the above in `transformer/` | |
| `org/name` or `org/name@revision`: one of the folders, on the hub | `hub.py` |

Only tensors, plain data and an `argparse.Namespace` are unpickled. Missing and extra tensors are refused.
"""

import importlib.resources
import tempfile
from dataclasses import replace
from pathlib import Path

from dyndit import files
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dit import CARDS, ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import DDPM, RectifiedFlow, processes
from dyndit.runtime import chosen_device, chosen_dtype
from dyndit.storage import card as model_card
from dyndit.storage import diffusers_folder, hub, native, official
from dyndit.storage.names import PROCESS
from dyndit.storage.native import CONFIG, EXITS, PLANS, TABLE, WEIGHTS
from dyndit.storage.reading import AskedProcess, Loaded, load_strictly, process_of
from dyndit.storage.sd3_layout import SD3Layout

PIPELINE, TRANSFORMER = "model_index.json", "transformer"
"""File that marks a pipeline's folder of diffusers, and the subfolder of its denoiser."""

_UPLOADED = (CONFIG, WEIGHTS, EXITS, TABLE, PLANS, "README.md", "plans.png", "runs.csv", "manifest.json")

save, save_exits, load_exits = native.write, native.write_exits, native.read_exits
"""Write a native folder; write and read the exits alone."""


def load(
    path_or_hub_id: str | Path,
    *,
    num_heads: int | None = None,
    revision: str | None = None,
    process: AskedProcess = None,
    device: str = "auto",
    dtype: str = "own",
) -> DynamicDepth:
    """Load a model in eval mode, with its exits if it has exits.

    path_or_hub_id: a path, "digits" (ships with the package), or a hub id. An existing path wins over a hub id.
    num_heads: attention heads of a `.pt` that does not tell them. revision: branch, tag or commit of a hub id.
    process: the process that the weights were trained for, or its name ("ddpm", "flow"), if the file does not say it. A
    file that says another is refused. device: "auto" is a GPU if there is one. dtype: "own" keeps the weights'
    precision; "auto" is bfloat16 on a GPU that computes in it.

    Raises:
        CheckpointError: missing, damaged, edited or foreign, or of another process.
        InputError: the number of heads is unknown or contradicted.
    """
    return inspect(
        path_or_hub_id, num_heads=num_heads, revision=revision, process=process, device=device, dtype=dtype
    ).model


def inspect(
    path_or_hub_id: str | Path,
    *,
    num_heads: int | None = None,
    revision: str | None = None,
    process: AskedProcess = None,
    device: str = "auto",
    dtype: str = "own",
) -> Loaded:
    """Load as `load` does. Return also notes on inferred settings, and the folder of the plans and the table."""
    text, path = str(path_or_hub_id), Path(path_or_hub_id)
    wanted = None if path.exists() or text == "digits" else hub.parse(text, revision)
    if revision is not None and wanted is None:
        raise InputError(f"--revision {revision}: {text} is no hub id; expected org/name with it")
    if isinstance(process, str) and process not in processes():
        raise InputError(f"--process {process}: expected one of {', '.join(processes())}")
    if path.is_dir():
        loaded = _read_folder(path, process)
    elif path.exists():
        loaded = official.read(path, num_heads, process)
    elif text == "digits":
        loaded = Loaded(_packaged_digits(process))
    elif wanted is not None:
        folder, notes = hub.fetch(wanted)
        loaded = _read_folder(folder, process)
        loaded = replace(loaded, notes=(*notes, *loaded.notes))
    else:
        raise CheckpointError(
            f"{text}: no such file or folder; expected a model folder, a DiT .pt, 'digits' or a hub id (org/name)"
        )
    found = loaded.model.backbone.config().get("num_heads")
    if num_heads is not None and num_heads != found:
        raise InputError(f"--num-heads {num_heads}: {text} records {found}")
    device = chosen_device(device)
    return replace(loaded, model=loaded.model.to(device, chosen_dtype(dtype, device)))


def push(folder: Path, repo_id: str, **options: object) -> str:
    """Upload a native folder with its plans and table -> the address of the commit.

    options: private, token, revision, commit_message, create_pr, as in `huggingface_hub.HfApi`.

    Raises CheckpointError: the folder is damaged, plans or table do not fit the model, or the hub refuses.
    """
    loaded = native.read(Path(folder))
    native.companions(Path(folder), loaded.model)
    return hub.upload(Path(folder), repo_id, _UPLOADED, **options)


def push_model(
    model: DynamicDepth, repo_id: str, *, folder: Path | None = None, license: str | None = None, **options: object
) -> str:
    """Upload a model with its card, and the plans and table of `folder` -> the address of the commit.

    Raises CheckpointError: plans or table do not fit the model, or the hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        save(model, out)
        if folder is not None:
            copy_companions(Path(folder), model, out)
        model_card.write(model, out, license=license)
        return hub.upload(out, repo_id, _UPLOADED, **options)


def copy_companions(source: Path, model: DynamicDepth, target: Path) -> tuple[str, ...]:
    """Copy a model's companions (plans, table, measured runs, a card of the owner) -> the names copied.

    Raises CheckpointError: plans or table do not fit the model.
    """
    found = [*native.companions(source, model)]
    found += [path for path in (source / "runs.csv", source / "exit-errors.csv") if path.is_file()]
    if model_card.is_foreign(source):
        found.append(source / model_card.CARD)
    for path in found:
        files.copy(path, target / path.name)
    return tuple(path.name for path in found)


def _read_folder(folder: Path, process: AskedProcess) -> Loaded:
    """Read a folder. Its files tell the format."""
    if (folder / PIPELINE).exists():
        return _read_pipeline(folder, process)
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{folder}: holds no {CONFIG}; expected the folder of a model or of a pipeline")
    config = files.read_json(path)
    # diffusers writes the class's name into every config.json; any other config is native or refused.
    return diffusers_folder.read(folder, process) if "_class_name" in config else native.read(folder, process)


def _read_pipeline(folder: Path, process: AskedProcess) -> Loaded:
    """Read the denoiser of a pipeline's folder. A pipeline with a VAE makes latents.

    The time shift of a rectified flow is the pipeline's scheduler's, if the denoiser records no process of its own.
    """
    index, transformer = files.read_json(folder / PIPELINE), folder / TRANSFORMER
    if not transformer.is_dir():
        found = index.get("_class_name")
        raise CheckpointError(
            f"{folder}: a {found!r:.60} without {TRANSFORMER}/; expected a DiTPipeline or DynDiTPipeline"
        )
    raw = files.read_json(transformer / CONFIG)
    if "_class_name" not in raw:
        return native.read(transformer, process)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if process is None and PROCESS not in raw and SD3Layout().serves(raw) and scheduler.exists():
        process = _flow_of(scheduler)
    vae = index.get("vae")
    latents = isinstance(vae, list) and any(vae)
    return diffusers_folder.read(transformer, process, pixel_space=False if latents else None)


def _flow_of(path: Path) -> RectifiedFlow | None:
    """Return the rectified flow that a flow-matching scheduler's config steps; None for any other scheduler."""
    config = files.read_json(path)
    if not str(config.get("_class_name")).startswith("FlowMatch") or config.get("use_dynamic_shifting"):
        return None
    try:
        return RectifiedFlow(time_shift=config.get("shift", 1.0))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _packaged_digits(process: AskedProcess) -> DynamicDepth:
    """Load the backbone that `recipes/digits.py` trained and the package ships."""
    asset = importlib.resources.files("dyndit.assets") / "digits.safetensors"
    with importlib.resources.as_file(asset) as path:
        tensors, _ = files.read_safetensors(path)
        backbone = ClassConditionalDiT(CARDS["digits"])
        load_strictly(backbone, tensors, path)
    return DynamicDepth(backbone, process=process_of(DDPM().config(), process, path)[0]).eval()
