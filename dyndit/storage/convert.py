"""A model of any format the package reads, into any it writes; and how far it drifts where it is loaded plainly."""

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
from dyndit.storage.reading import AskedProcess

Format = Literal["native", "official", "diffusers"]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W)."""

TIMESTEPS = (20, 250, 500, 750, 980)
"""At which drift is measured."""


@dataclass(frozen=True)
class Drift:
    """How far two models' predictions are apart: the largest difference, and its RMS over that of the first."""

    largest: float
    relative_rms: float

    def __str__(self) -> str:
        return f"predictions differ by up to {self.largest:.2g}, relative RMS {self.relative_rms:.2g}"


@torch.inference_mode()
def predictions(predict: Predict, config: DiTConfig, batch: int = 2) -> Tensor:
    """Predictions of seeded noise, the same at each of `TIMESTEPS` -> (timesteps, batch, C_out, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, *config.size, generator=generator)
    y = torch.arange(batch) % config.num_classes
    return torch.stack([predict(x, torch.full((batch,), t), y) for t in TIMESTEPS])


def drift(reference: Tensor, other: Tensor) -> Drift:
    """How far `other` is from `reference`."""
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

    Exits, plans and the shift table go along into folders; an official `.pt` has no place for them. card_extras: makes
    what a native folder's card shows beyond its files' own words, from that folder
    (`dyndit.analysis.report.card.card_extras`).

    Raises:
        InputError: the target is there already, or the format cannot express the model.
        CheckpointError: the source is missing, damaged or foreign.
    """
    files.check_free(target, folder=to != "official")
    loaded = checkpoints.inspect(source, num_heads=num_heads, revision=revision, process=process)
    model, folder = loaded.model, loaded.folder
    if to == "official":
        official.write(model, target)
        return (*loaded.notes, *_left_behind(model, folder), _as_published(model))
    # Before anything is written: it refuses what the class cannot express.
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
        left += [
            path.name for path in (*sorted(folder.glob(checkpoints.PLANS)), folder / checkpoints.TABLE) if path.exists()
        ]
    return (f"left behind: {', '.join(left)}; an official .pt has no place for them",) if left else ()


def _in_diffusers(model: DynamicDepth) -> tuple[str, ...]:
    """How a plainly loaded folder compares with the model, measured on the class itself."""
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
    call = f"; call dyndit.match_frequencies(transformer, {config.frequency_shift}) after loading"
    return (note, f"loaded plainly ({' and '.join(causes)} of diffusers, not of this model): {found}{call}")


def _as_published(model: DynamicDepth) -> str:
    """How the published code would run the written weights, which knows nothing of our `args`."""
    if not isinstance(model.process, DDPM):
        return f"the published code would take its {model.process} for noise; dyndit.load honours what args record"
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
