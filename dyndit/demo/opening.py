"""Open what the page shows: a model with what lies beside it, a pipeline of diffusers, or the packaged digits."""

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from dyndit import files
from dyndit.analysis.compare.experiment import Inputs
from dyndit.analysis.compare.run import prepared
from dyndit.calibration.calibrate import table_for
from dyndit.demo.pipeline import PipelineStudio
from dyndit.demo.studio import ModelStudio, Studio
from dyndit.errors import InputError, first_line
from dyndit.plans.table import FILE, ShiftTable
from dyndit.plugin.pipeline import DynDiTPipeline
from dyndit.recipes.digits import quickstart
from dyndit.runtime import chosen_dtype
from dyndit.sampling.loop import to_uint8
from dyndit.storage import load as checkpoints
from dyndit.storage.autoencoder import differs, open_autoencoder
from dyndit.training.autoencoders import decode_latents


def open_digits(out: Path, device: str) -> Studio:
    """Open the packaged digits with the exits and the table of a quickstart. Make what is missing of both in `out`."""
    model = out / "model"
    if (model / FILE).is_file():  # of any run: what else it measured does not matter here
        studio = open_studio(str(model), device=device)
        studio.name = "digits"
        return studio
    with prepared(quickstart, out, Inputs(device=device)) as context:
        return ModelStudio(context.model, context.table, name="digits")


def open_studio(
    model: str,
    *,
    exits: Path | None = None,
    table: Path | None = None,
    vae: Path | None = None,
    process: str | None = None,
    shape: tuple[int, ...] = (),
    device: str = "cpu",
    dtype: str = "own",
) -> Studio:
    """Open a model's folder, file or hub id, or the folder of a pipeline of diffusers.

    exits: of a pipeline: `exits.safetensors` or its folder. table: a shift table or its folder (default: beside the
    exits or the model). shape: (height, width) of pictures, (frames, height, width) of clips.

    Raises:
        InputError: it cannot be opened, or a flag does not fit it.
    """
    index = Path(model) / checkpoints.PIPELINE
    if index.is_file() and files.read_json(index).get("_class_name") != DynDiTPipeline.__name__:
        for flag, given in (("--vae", vae), ("--process", process)):
            if given:
                raise InputError(f"{flag} {given}: {model} is a pipeline, which has its own; expected none")
        return _pipeline(Path(model), exits, table, shape, device, dtype)
    if exits is not None:
        raise InputError(f"--exits {exits}: {model} is no pipeline of diffusers; expected the exits in its folder")
    loaded = checkpoints.inspect(model, process=process, device=device, dtype=dtype)
    decoder: Any = None if loaded.model.pixel_space else open_autoencoder(vae, loaded.model, model)
    notes = loaded.notes
    if decoder is not None:
        decoder.to(device)
        notes += differs(decoder, loaded.model)
    known = _table(table, loaded.folder, Path(model) / "router")
    if known is not None:
        known = table_for(loaded.model, known, known.solver)
    to_pictures = to_uint8 if decoder is None else partial(decode_latents, decoder)
    made = ModelStudio(loaded.model, known, name=Path(model).name, to_pictures=to_pictures, shape=shape)
    made.notes = notes
    return made


def _pipeline(
    folder: Path, exits: Path | None, table: Path | None, shape: tuple[int, ...], device: str, dtype: str
) -> Studio:
    found = (folder / checkpoints.EXITS, folder / checkpoints.TRANSFORMER / checkpoints.EXITS)
    exits = next((path for path in found if path.is_file()), None) if exits is None else exits
    precision = chosen_dtype(dtype, device)
    try:
        options = {} if precision is None else {"torch_dtype": precision}
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
    except Exception as error:  # diffusers passes on OSError, ValueError, TypeError, SafetensorError
        raise InputError(f"{folder}: no pipeline that loads ({first_line(error)})") from error
    beside = None if exits is None else exits if exits.is_dir() else exits.parent
    return PipelineStudio(
        pipe.to(device), exits, _table(table, beside, folder), name=folder.resolve().name, shape=shape
    )


def _table(given: Path | None, *beside: Path | None) -> ShiftTable | None:
    """Load the given table, or the first that lies in one of these folders. There is none: None."""
    if given is not None:
        return ShiftTable.load(given / FILE if given.is_dir() else given)
    found = (folder / FILE for folder in beside if folder is not None)
    return next((ShiftTable.load(path) for path in found if path.is_file()), None)
