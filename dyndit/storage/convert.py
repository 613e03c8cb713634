"""Convert a model from one format to another, and measure how far it drifts if it is loaded plainly."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dyndit import files, manifest
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.layers import position_features
from dyndit.process import DDPM
from dyndit.storage import card as model_card
from dyndit.storage import diffusers_folder, official
from dyndit.storage import load as checkpoints
from dyndit.storage.names import match_frequencies, own_positions
from dyndit.storage.native import plans_in
from dyndit.storage.reading import AskedProcess

Format = Literal["native", "official", "diffusers"]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""

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
def predictions(predict: Predict, config: DiTConfig, batch: int = 2) -> Tensor:
    """Predict from the same seeded noise at each of `TIMESTEPS` -> (timesteps, batch, C_out, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, *config.size, generator=generator)
    y = torch.arange(batch) % config.num_classes
    return torch.stack([predict(x, torch.full((batch,), t), y) for t in TIMESTEPS])


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
    loaded = checkpoints.inspect(source, num_heads=num_heads, revision=revision, process=process)
    model, folder = loaded.model, loaded.folder
    if to == "official":
        official.write(model, target)
        return (*loaded.notes, *_left_behind(model, folder), _as_published(model))
    # Call this before writing: it refuses models that the class cannot express.
    notes = _in_diffusers(model) if to == "diffusers" else ()
    with files.written_whole(target, folder=True) as partial:
        if to == "native":
            checkpoints.save(model, partial)
        else:
            diffusers_folder.write(model, partial)
        carried = () if folder is None else checkpoints.copy_companions(folder, model, partial)
        if to == "native":
            settings = {"verb": "convert", "source": str(source), "model": model.identity.backbone}
            files.write_json(partial / manifest.MANIFEST, manifest.describe(settings))
            license = None if folder is None else model_card.license_of(folder)
            wanted = card_extras is not None and not model_card.is_foreign(partial)
            model_card.write(model, partial, license=license, extras=card_extras(partial) if wanted else None)
    if model.exits is not None:
        carried = (checkpoints.EXITS, *carried)
    return (*loaded.notes, *((f"beside the backbone: {', '.join(carried)}",) if carried else ()), *notes)


def _left_behind(model: DynamicDepth, folder: Path | None) -> tuple[str, ...]:
    left = [f"exits after {len(model.exits.layers)} layers"] if model.exits is not None else []
    if folder is not None:
        left += [path.name for path in (*plans_in(folder), folder / checkpoints.TABLE) if path.exists()]
    return (f"left behind: {', '.join(left)}; an official .pt has no place for them",) if left else ()


def _in_diffusers(model: DynamicDepth) -> tuple[str, ...]:
    """Measure how a plainly loaded folder differs from the model, on the diffusers class itself."""
    transformer, config = diffusers_folder.to_diffusers(model), DiTConfig(**model.backbone.config())

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return transformer(x, t, y, return_dict=False)[0]

    matched = predictions(predict, config)
    note = f"in diffusers, with matched frequencies: {drift(predictions(model, config), matched)}"
    causes = ["timestep frequencies"] if config.frequency_shift != 1 else []
    if own_positions(model.backbone.state_dict()) is not None:
        causes.append("unrounded positions")
    if not causes:
        return (f"{note}; loaded plainly it is the same: nothing is unmatched",)
    match_frequencies(transformer, 1)
    transformer.pos_embed.pos_embed.copy_(position_features(*config.grid, config.width)[None])
    found = drift(matched, predictions(predict, config))
    call = f"; call dyndit.storage.names.match_frequencies(transformer, {config.frequency_shift}) after loading"
    return (note, f"loaded plainly ({' and '.join(causes)} of diffusers, not of this model): {found}{call}")


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
    theirs = ClassConditionalDiT(published).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    causes = ", ".join(f"{name} {getattr(published, name):g}, not {getattr(config, name):g}" for name in others)
    found = drift(predictions(model, config), predictions(theirs, config))
    return f"loaded plainly (the published code has {causes}): {found}; dyndit.load honours what args record"
