"""Convert a model from one format to another, and measure how far it drifts if it is loaded plainly."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dyndit import files, manifest
from dyndit.models.base import Inputs
from dyndit.models.conditions import ClassLabels
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import DDPM
from dyndit.progress import progress_bar
from dyndit.storage import card as model_card
from dyndit.storage import diffusers_folder, hub, official
from dyndit.storage import load as checkpoints
from dyndit.storage.autoencoder import find, open_autoencoder
from dyndit.storage.native import plans_in
from dyndit.storage.reading import AskedProcess, Loaded

Format = Literal["native", "official", "diffusers"]
Predict = Callable[[Inputs], Tensor]
"""Inputs of B rows -> (B, C_out, H, W)."""

TIMESTEPS = (20, 250, 500, 750, 980)
"""Timesteps to measure drift at."""


@dataclass(frozen=True)
class Drift:
    """Difference of two models' predictions: the largest one, and its RMS relative to the RMS of the first model's."""

    largest: float
    relative_rms: float

    def __str__(self) -> str:
        return f"predictions differ by up to {self.largest:.2g}, relative RMS {self.relative_rms:.2g}"


@torch.inference_mode()
def predictions(predict: Predict, model: DynamicDepth, batch: int = 2) -> Tensor:
    """Predict from the same seeded inputs of `model` at each of `TIMESTEPS` -> (timesteps, batch, C_out, H, W).

    Class labels are 0, 1, ...; other conditions are examples.
    """
    condition, inputs = model.backbone.condition, model.backbone.example(batch, torch.Generator().manual_seed(0))
    if isinstance(condition, ClassLabels):
        inputs = replace(inputs, y=condition.of(condition.in_turn(batch)))
    return torch.stack([predict(replace(inputs, t=torch.full((batch,), t))) for t in TIMESTEPS])


def drift(reference: Tensor, other: Tensor) -> Drift:
    """Measure how far `other` is from `reference`."""
    difference = (other - reference).double()
    size = reference.double().square().mean().sqrt().clamp(min=1e-300)
    return Drift(difference.abs().max().item(), (difference.square().mean().sqrt() / size).item())


def convert(
    source: str | Path,
    target: Path,
    to: Format,
    *,
    num_heads: int | None = None,
    revision: str | None = None,
    process: AskedProcess = None,
    weights: str | None = None,
    num_classes: int | None = None,
    card_extras: Callable[[Path], model_card.CardExtras] | None = None,
) -> tuple[str, ...]:
    """Read a model and write it in another format, whole or not at all -> notes about it, a line each.

    Exits, plans and the shift table are copied into folders; an official `.pt` cannot hold them. card_extras: makes
    the extras of a native folder's card from the folder, for example `dyndit.analysis.report.card.card_extras`.

    Raises:
        InputError: the target exists already, or the format cannot express the model.
        CheckpointError: the source is missing, damaged or foreign.
    """
    files.check_free(target, folder=to != "official")
    told: dict[str, Any] = {"num_heads": num_heads, "process": process, "weights": weights, "num_classes": num_classes}
    origin = source if Path(source).exists() else hub.parse(str(source), revision) or source
    loaded = _with_autoencoder(checkpoints.inspect(source, revision=revision, **told), str(origin))
    model, folder = loaded.model, loaded.folder
    files.sweep(target.parent, ours=False)
    if to == "official":
        with progress_bar(f"writing {target}"):
            official.write(model, target)
            return (*loaded.notes, *_left_behind(model, folder), _as_published(model))
    # Call this before writing: it refuses models that the class cannot express.
    notes = _in_diffusers(model) if to == "diffusers" else ()
    with progress_bar(f"writing {target}"), files.written_whole(target, folder=True) as partial:
        if to == "native":
            checkpoints.save(model, partial)
        else:
            diffusers_folder.write(model, partial)
        carried = () if folder is None else checkpoints.copy_companions(folder, model, partial)
        if to == "native":
            settings = {"verb": "convert", "source": str(source), "model": model.identity.backbone}
            files.write_json(partial / manifest.MANIFEST, manifest.describe(settings))
            license = None if folder is None else model_card.license_of(folder)
            wanted = None if model_card.is_foreign(partial) else card_extras
            model_card.write(model, partial, license=license, extras=None if wanted is None else wanted(partial))
    if model.exits is not None:
        carried = (checkpoints.EXITS, *carried)
    return (*loaded.notes, *((f"beside the backbone: {', '.join(carried)}",) if carried else ()), *notes)


def _with_autoencoder(loaded: Loaded, source: str) -> Loaded:
    """Record a pipeline's own autoencoder in its model, and say so."""
    model = loaded.model
    if model.pixel_space or model.autoencoder is not None or find(source, optional=True)[0] is None:
        return loaded
    open_autoencoder(None, model, source)
    found = model.autoencoder
    assert found is not None  # `open_autoencoder` recorded it
    return replace(
        loaded, notes=(*loaded.notes, f"autoencoder: {found.kind} of hash {found.hash}, recorded; not copied")
    )


def _left_behind(model: DynamicDepth, folder: Path | None) -> tuple[str, ...]:
    left = [f"exits after {len(model.exits.layers)} layers"] if model.exits is not None else []
    if folder is not None:
        left += [path.name for path in (*plans_in(folder), folder / checkpoints.TABLE) if path.exists()]
    return (f"left behind: {', '.join(left)}; an official .pt has no place for them",) if left else ()


def _in_diffusers(model: DynamicDepth) -> tuple[str, ...]:
    """Measure how a plainly loaded folder differs from the model, on the diffusers class itself."""
    layout, transformer = diffusers_folder.layout_for(model), diffusers_folder.to_diffusers(model)

    def predict(inputs: Inputs) -> Tensor:
        return layout.call(transformer, model, inputs)

    matched = predictions(predict, model)
    note = f"in diffusers{layout.matched}: {drift(predictions(_own(model), model), matched)}"
    causes, remedy = layout.loaded_plainly(model, transformer)
    if not causes:
        return (f"{note}; loaded plainly it is the same: nothing is unmatched",)
    found = drift(matched, predictions(predict, model))
    return (note, f"loaded plainly ({' and '.join(causes)} of diffusers, not of this model): {found}; {remedy}")


def _own(model: DynamicDepth) -> Predict:
    return lambda inputs: model(inputs.x, inputs.t, inputs.y)


def _as_published(model: DynamicDepth) -> str:
    """Measure how the published code, which ignores our `args`, would run the written weights."""
    if model.process != DDPM():
        return (
            f"the published code would sample its {model.process} as {DDPM.name}; dyndit.load honours what args record"
        )
    config = DiTConfig(**model.backbone.config())
    published = official.as_published(config)
    others = [field.name for field in fields(config) if getattr(config, field.name) != getattr(published, field.name)]
    if not others:
        return "the published code runs it as it is: nothing is unmatched"
    theirs = DynamicDepth(ClassConditionalDiT(published).eval())
    theirs.backbone.load_state_dict(model.backbone.state_dict())
    causes = ", ".join(f"{name} {getattr(published, name):g}, not {getattr(config, name):g}" for name in others)
    found = drift(predictions(_own(model), model), predictions(_own(theirs), model))
    return f"loaded plainly (the published code has {causes}): {found}; dyndit.load honours what args record"
