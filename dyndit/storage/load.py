"""Load and save models on disk and on the hub. The content tells the format.

| format | read and written by |
|---|---|
| native folder: config, backbone, exits, and beside them plans, shift table, manifest | `native.py` |
| published DiT's weights, in any of the dialects of its descendants (SiT, REPA, ...): a `.pt`, safetensors, an index of
  shards, or a folder that holds just one of them | `official.py`, `contents.py` |
| diffusers `DiTTransformer2DModel` or `SD3Transformer2DModel` folder | `diffusers_folder.py` |
| pipeline folder (`DiTPipeline`, `DynDiTPipeline`): one of the above in `transformer/` | |
| `org/name` or `org/name@revision`: one of the folders, on the hub | `hub.py` |

Only tensors, plain data and an `argparse.Namespace` are unpickled. Missing and extra tensors are refused.
"""

import importlib.resources
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from dyndit import files
from dyndit.errors import CheckpointError, InputError, expected_one_of, first_line
from dyndit.models import registry
from dyndit.models.dit import CARDS, ClassConditionalDiT, Convention
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import DDPM, Process, RectifiedFlow, processes
from dyndit.progress import progress_bar
from dyndit.runtime import chosen_device, chosen_dtype
from dyndit.storage import card as model_card
from dyndit.storage import contents, diffusers_folder, hub, native, official
from dyndit.storage.names import PROCESS
from dyndit.storage.native import CONFIG, EXITS, PLANS, TABLE, WEIGHTS
from dyndit.storage.reading import AskedProcess, Loaded, load_strictly, process_of

PIPELINE, TRANSFORMER = "model_index.json", "transformer"
"""File that marks a pipeline's folder of diffusers, and the subfolder of its denoiser."""

_UPLOADED = (CONFIG, WEIGHTS, EXITS, TABLE, PLANS, "README.md", "plans.png", "runs.csv", "manifest.json")

save, save_exits, load_exits, check_savable = native.write, native.write_exits, native.read_exits, native.check_savable
"""Write a native folder; write and read the exits alone; refuse a backbone that no folder could give back."""


def load(
    path_or_hub_id: str | Path,
    *,
    num_heads: int | None = None,
    revision: str | None = None,
    process: AskedProcess = None,
    weights: str | None = None,
    num_classes: int | None = None,
    device: str = "auto",
    dtype: str = "own",
    trust: str | Sequence[str] = (),
) -> DynamicDepth:
    """Load a model in eval mode, with its exits if it has exits.

        model = dyndit.load("my-dit.pt")                        # weights of the published code
        model = dyndit.load("runs/mine", device="cuda", dtype="bfloat16")
        model = dyndit.load("runs/my-own", trust="my_dit")      # a model of your own, which my_dit.py defines

    path_or_hub_id: a path, "digits" (ships with the package), or a hub id. An existing path wins over a hub id.
    num_heads: attention heads of a `.pt` that does not tell them.
    revision: branch, tag or commit of a hub id.
    process: the process that the weights were trained for, or its name ("ddpm", "flow"), if the file does not say it. A
    file that says another is refused. "flow:repa" also says the convention of time and velocity, see `DiTConfig`.
    weights: "ema", "model" or a key of a training checkpoint (default: ema).
    num_classes: classes, without the null class, if the file does not tell them.
    device: "auto" is a GPU if there is one; or "cpu", "cuda", "cuda:1".
    dtype: "own" keeps the weights' precision; "auto" is bfloat16 on a GPU that computes in it; or "float32", ....
    trust: modules to import first, names or Python files, that define the backbone of your own model. Nothing is
    imported because a file says so; a class that `dyndit.register` knows needs no trust.

    Raises:
        CheckpointError: missing, damaged, edited or foreign, or of another process.
        InputError: the number of heads is unknown or contradicted, or a trusted module cannot be imported.
    """
    told: dict[str, Any] = {"num_heads": num_heads, "process": process, "weights": weights, "num_classes": num_classes}
    return inspect(path_or_hub_id, revision=revision, device=device, dtype=dtype, trust=trust, **told).model


def inspect(
    path_or_hub_id: str | Path,
    *,
    num_heads: int | None = None,
    revision: str | None = None,
    process: AskedProcess = None,
    weights: str | None = None,
    num_classes: int | None = None,
    device: str = "auto",
    dtype: str = "own",
    trust: str | Sequence[str] = (),
) -> Loaded:
    """Load as `load` does. Return also notes on inferred settings, and the folder of the plans and the table."""
    registry.trust(*((trust,) if isinstance(trust, str) else trust))
    text, path = str(path_or_hub_id), Path(path_or_hub_id)
    wanted = None if path.exists() or text == "digits" else hub.parse(text, revision)
    if revision is not None and wanted is None:
        raise InputError(f"--revision {revision}: {text} is no hub id; expected org/name with it")
    convention: Any = None
    if isinstance(process, str):
        process, _, convention = process.partition(":")
        if process not in processes():
            raise InputError(f"--process {process}: {expected_one_of(process, processes())}")
        if convention and (process != RectifiedFlow.name or convention not in get_args(Convention)):
            expected = ", ".join(f"{RectifiedFlow.name}:{name}" for name in get_args(Convention))
            raise InputError(f"--process {process}:{convention}: expected one of {expected}")
    told = official.Told(num_heads, process, convention or None, weights, num_classes)
    with progress_bar(f"loading {text}"):
        return _inspected(path, text, wanted, told, device, dtype)


def _inspected(path: Path, text: str, wanted: hub.HubId | None, told: official.Told, device: str, dtype: str) -> Loaded:
    """Read a path, "digits" or a hub id, and move the model to the device."""
    process = told.process
    if path.is_dir():
        loaded = _read_folder(path, told)
    elif path.exists():
        loaded = _read_file(path, told)
    elif text == "digits":
        loaded = Loaded(_packaged_digits(process), kind="packaged model")
    elif wanted is not None:
        folder, notes = hub.fetch(wanted)
        loaded = _read_folder(folder, told)
        loaded = replace(loaded, notes=(*notes, *loaded.notes))
    else:
        raise CheckpointError(
            f"{text}: no such file or folder; expected a model folder, a DiT .pt, 'digits' or a hub id (org/name)"
        )
    _check_told(loaded, told, text)
    device = chosen_device(device)
    loaded.model.folder = loaded.folder
    return replace(loaded, model=loaded.model.to(device, chosen_dtype(dtype, device)))


def _check_told(loaded: Loaded, told: official.Told, text: str) -> None:
    """Refuse settings that a model contradicts. Formats that record everything have no choice of weights."""
    found = loaded.model.backbone.config()
    for name in ("num_heads", "num_classes", "convention"):
        flag, asked = f"--{name.replace('_', '-')}", getattr(told, name)
        if asked is not None and asked != found.get(name):
            raise InputError(f"{flag} {asked}: {text} records {found.get(name)}")
    if told.weights is not None and (loaded.folder is not None or text == "digits"):
        raise InputError(f"--weights {told.weights}: {text} holds one model; expected a training checkpoint with it")


def push(folder: Path, repo_id: str, **options: Any) -> str:
    """Upload a native folder with its plans and table -> the address of the commit.

    options: private, token, revision, commit_message, create_pr, as in `huggingface_hub.HfApi`.

    Raises CheckpointError: the folder is damaged, plans or table do not fit the model, or the hub refuses.
    """
    loaded = native.read(Path(folder))
    native.companions(Path(folder), loaded.model)
    return hub.upload(Path(folder), repo_id, _UPLOADED, **options)


def push_model(
    model: DynamicDepth, repo_id: str, *, folder: Path | None = None, license: str | None = None, **options: Any
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


def _read_file(path: Path, told: official.Told) -> Loaded:
    """Read a file of weights. Weights that lie beside the config of their folder are read as the folder."""
    config = path.parent / CONFIG
    if path.name.startswith((WEIGHTS, diffusers_folder.WEIGHTS)) and config.is_file():
        found = files.read_json(config)
        if "_class_name" in found or found.get("format") == native.MODEL_FORMAT:
            return _read_folder(path.parent, told)
    return official.read(path, told)


def _read_folder(folder: Path, told: official.Told) -> Loaded:
    """Read a folder. Its files tell the format."""
    if (folder / PIPELINE).exists():
        return _read_pipeline(folder, told)
    path = folder / CONFIG
    if not path.exists():
        return official.read(_only_weights(folder), told)
    config = files.read_json(path)
    # diffusers writes the class's name into every config.json; any other config is native or refused.
    if "_class_name" not in config:
        return replace(native.read(folder, told.process), kind="native folder")
    kind = f"diffusers folder of a {config['_class_name']!s:.60}"
    return replace(diffusers_folder.read(folder, told.process), kind=kind)


def _only_weights(folder: Path) -> Path:
    """Return the one file of weights in a folder without a config: an index of shards, or a file.

    Raises CheckpointError: there is no such file, or more than one, or the folder is of another framework.
    """
    for mark, remedy in _FOREIGN.items():
        if (folder / mark).exists():
            raise CheckpointError(f"{folder}: holds {mark}; {remedy}")
    indices = sorted(path for path in folder.iterdir() if contents.is_index(path))
    found = indices or sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder}: holds {len(found)} files of weights, first {found[0].name}; expected one")
    raise CheckpointError(f"{folder}: holds no {CONFIG}; expected the folder of a model or of a pipeline")


_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_FOREIGN = {
    ".metadata": "shards of torch.distributed.checkpoint, expected one file: torch.distributed.checkpoint.format_utils "
    "has dcp_to_torch_save",
    "latest": "shards of DeepSpeed, expected one file: the zero_to_fp32.py beside them writes it",
}


def _read_pipeline(folder: Path, told: official.Told) -> Loaded:
    """Read the denoiser of a pipeline's folder. A pipeline with a VAE makes latents.

    The process is the pipeline's scheduler's, with its time shift, if the denoiser records none.
    """
    index, transformer = files.read_json(folder / PIPELINE), folder / TRANSFORMER
    name = f"{index.get('_class_name')!s:.60}"
    if not transformer.is_dir():
        raise CheckpointError(f"{folder}: a {name!r} without {TRANSFORMER}/; expected a DiTPipeline or DynDiTPipeline")
    kind = f"pipeline folder of a {name}"
    raw = files.read_json(transformer / CONFIG)
    if "_class_name" not in raw:
        return replace(native.read(transformer, told.process), kind=kind)
    vae = index.get("vae")
    latents = isinstance(vae, list) and any(vae)
    process, notes = told.process, ()
    if process is None and PROCESS not in raw:
        process, notes = _scheduled(folder / "scheduler" / "scheduler_config.json")
    loaded = diffusers_folder.read(transformer, process, pixel_space=False if latents else None)
    return replace(loaded, kind=kind, notes=(*loaded.notes, *notes))


def _scheduled(path: Path) -> tuple[Process | None, tuple[str, ...]]:
    """Return the process that a pipeline's scheduler steps, and a note. No scheduler: None.

    Raises CheckpointError: it steps a process that this package does not have.
    """
    if not path.is_file():
        return None, ()
    config = files.read_json(path)
    predicts, name = config.get("prediction_type", "epsilon"), str(config.get("_class_name"))
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or predicts == "flow_prediction":
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift", 1.0))
        try:
            process = RectifiedFlow(time_shift=shift)
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from error
    else:
        expected: dict[str, Any] = {
            "prediction_type": "epsilon",
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
        }
        expected["trained_betas"] = None
        for setting, value in expected.items():
            if (found := config.get(setting, value)) != value:
                raise CheckpointError(f"{path}: {setting} {found!r:.40}; expected {value!r}, or --process")
        try:
            process = DDPM(
                *(float(config.get(f"beta_{end}", getattr(DDPM, f"beta_{end}"))) for end in ("start", "end"))
            )
        except (InputError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {first_line(error)}") from error
    return process, (f"{path.parent.parent.name}: process {process}, as its {name:.60} says; --process says another",)


def _packaged_digits(process: AskedProcess) -> DynamicDepth:
    """Load the backbone that `recipes/digits.py` trained and the package ships."""
    asset = importlib.resources.files("dyndit.assets") / "digits.safetensors"
    with importlib.resources.as_file(asset) as path:
        tensors, _ = files.read_safetensors(path)
        backbone = ClassConditionalDiT(CARDS["digits"])
        load_strictly(backbone, tensors, path)
    return DynamicDepth(backbone, process=process_of(DDPM().config(), process, path)[0]).eval()
