"""Measure the shift table."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndit import bounds, seals
from dyndit.calibration.extractor import FeatureExtractor
from dyndit.calibration.samplers import CALIBRATION_SEED, OwnSampler, Sampler, ToPictures, batches_of
from dyndit.errors import CheckpointError, InputError
from dyndit.files import read_safetensors, remove, write_safetensors
from dyndit.locks import locked
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import same
from dyndit.pictures import as_rgb
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Guide, Held, NoGuide, OwnExit, Step, Unconditional
from dyndit.plans.table import ShiftTable
from dyndit.progress import progress_bar
from dyndit.sampling.loop import to_uint8
from dyndit.sampling.solvers import AnySolver
from dyndit.stats import Moments, moments

MAX_FEATURES, NUM_COMPONENTS = 256, 64
TITLE = "measuring distribution shifts"

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationSettings:
    """Set up a table's measurement: `dyndit.CalibrationSettings(num_pictures=128, num_bands=5)` is a quick one.

    num_pictures: seeds to measure on. num_depths: conditional depths of the default choices, at most.
    num_bands: bands of steps that are replaced together. Each costs one continuation at full depth per choice.
    batch_size: pictures at a time.
    choices: the steps to measure, as `Step`s or their text ("8|e4"). Empty: `default_choices` on `num_depths` depths.
    held: add default choices that hold the guidance of earlier steps ("8|held").
    own_guides: add default choices that are guided by the branch's own exits ("8|e4").
    forecast_ages: measure forecasts ("4+") at ages 1 to this number of steps since full depth. Forecasts need one band
    per step. 0: no forecasts.
    seed: of dyndit's own sampling. In a pipeline the caller's function draws the noise.
    """

    num_pictures: int = 512
    num_bands: int = 10
    batch_size: int = 128
    seed: int = CALIBRATION_SEED
    choices: tuple[Step | str, ...] = ()
    num_depths: int = 8
    held: bool = False
    own_guides: bool = False
    forecast_ages: int = 0

    def __post_init__(self) -> None:
        bounds.check(**vars(self))
        object.__setattr__(self, "choices", self.steps)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Return the choices as steps."""
        return tuple(Step.parse(choice) if isinstance(choice, str) else choice for choice in self.choices)


def default_choices(
    depths: Sequence[int], guided: bool, num_depths: int = 8, *, held: bool = False, own_guides: bool = False
) -> tuple[Step, ...]:
    """Return the choices to measure: conditional depths on a thinned grid, each with several guides.

    Guides are an unconditional pass at the same depth, a pass at about half the depth, and no guide. held: also the
    guidance of earlier steps. own_guides: also the branch's own exits at about three quarters and half of the depth.
    A shallower exit guides more strongly. The full step is omitted.
    """
    full = depths[-1]
    grid = _thinned(depths, num_depths)
    if not guided:
        return tuple(Step(depth) for depth in grid if depth != full)
    choices: list[Step] = []
    for depth in grid:
        half = max((d for d in grid if 2 * d <= depth), default=0)
        guides: list[Guide] = [Unconditional(depth), Unconditional(half) if half else NoGuide(), NoGuide()]
        guides += [Held()] if held else []
        if own_guides:
            below = [max((d for d in depths if d <= share * depth), default=0) for share in (0.75, 0.5)]
            guides += [OwnExit(guide) for guide in below if 0 < guide < depth]
        choices += [Step(depth, guide) for guide in dict.fromkeys(guides)]
    return tuple(choice for choice in choices if choice != Step(full, Unconditional(full)))


def forecast_choices(depths: Sequence[int], guided: bool, num_depths: int = 8) -> tuple[Step, ...]:
    """Return the forecasts to measure: exits up to half of L, without guidance and with held guidance."""
    shallow = [d for d in _thinned(depths, num_depths) if 2 * d <= depths[-1]]
    guides = (NoGuide(), Held()) if guided else (NoGuide(),)
    return tuple(Step(depth, guide, forecast=True) for depth in shallow for guide in guides)


def _thinned(depths: Sequence[int], num: int) -> list[int]:
    """Return at most `num` depths, evenly spread, with the shallowest depth and L."""
    if len(depths) <= num:
        return list(depths)
    picks = torch.linspace(0, len(depths) - 1, num).round().long().tolist()
    return [depths[i] for i in sorted(set(picks))]


def measure_table(
    sampler: Sampler,
    extractor: FeatureExtractor,
    reference: Moments,
    *,
    settings: CalibrationSettings | None = None,
    cost: CostModel | None = None,
    partial: Path | None = None,
    on_progress: OnProgress | None = None,
    on_measured: Callable[[float], None] | None = None,
) -> ShiftTable:
    """Measure the paired-seed distribution shifts of every (band, choice) of a sampler.

    The file `partial` keeps sums over batches; an interrupted measurement resumes from it. on_progress(done, all)
    counts batches of pictures with a band replaced. on_measured(seconds) is told, at the end, how long it took, with
    the batches before an interruption.

    Raises InputError: fewer pictures than features, too many features, or forecasts with fewer bands than steps.
    """
    settings = settings or CalibrationSettings()
    if settings.num_pictures <= len(reference.mean) or len(reference.mean) > MAX_FEATURES:
        raise InputError(
            f"--num-pictures {settings.num_pictures}: {extractor.name} has {len(reference.mean)} features; expected "
            f"more pictures than features, and at most {MAX_FEATURES} features (see `reduced`)"
        )
    full, n = sampler.full, settings.num_pictures
    choices, ages = _entries(sampler, settings)
    bands = _bands(full, settings)
    batches = batches_of(range(n), settings.batch_size)
    sizes = [settings.batch_size, sampler.seed, n]
    of_plan = [full.solver, full.timesteps, list(map(str, choices)), ages, bands, full.cfg_scale]
    made_with = [sampler.identity.backbone, sampler.identity.exits, extractor.fingerprint]
    key = json.dumps([*of_plan, sampler.setting, *sizes, *made_with])
    sums, done, before = _restore(partial, key)
    began = time.monotonic()
    total, each = len(batches) * len(bands) * len(choices), len(bands) * len(choices)
    with progress_bar(TITLE, unit="draws") as advance:
        advance(done * each, total)
        for number, indices in enumerate(batches[done:], done):
            drawn = sampler.replaced(indices, bands, choices, ages)
            features = (extractor.features(as_rgb(pictures)) for pictures in drawn)
            base = next(features)
            changes = []
            for f in features:
                changes.append(((f - base).sum(0), f.T @ f - base.T @ base))
                advance(number * each + len(changes), total)
                if on_progress is not None:
                    on_progress(number * each + len(changes), total)
            fresh = {
                "base.mean": base.sum(0),
                "base.second": base.T @ base,
                "mean": torch.stack([mean for mean, _ in changes]),
                "second": torch.stack([second for _, second in changes]),
            }
            sums = {name: fresh[name] + sums[name] if sums else fresh[name] for name in fresh}
            if partial is not None:
                seconds = before + time.monotonic() - began
                progress = {"key": key, "done": str(number + 1), "seconds": str(seconds)}
                write_safetensors(partial, sums, progress | {seals.SEAL: seals.tensors_checksum(sums, progress)})
    mean, second = (sums[name].unflatten(0, (len(bands), len(choices))) / n for name in ("mean", "second"))
    table = ShiftTable(
        edges=_edges(full, bands),
        choices=choices,
        ages=ages,
        mean=mean,
        second=second,
        base=Moments(sums["base.mean"] / n, sums["base.second"] / n, n),
        reference=reference,
        cost=sampler.cost(max(1, settings.batch_size // 2)) if cost is None else cost,
        num_blocks=full.num_blocks,
        solver=full.solver,
        num_steps=full.num_steps,
        cfg_scale=full.cfg_scale,
        seed=sampler.seed,
        num_pictures=n,
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        backbone=sampler.identity.backbone,
        exits=sampler.identity.exits,
        projection=extractor.projection,
    )
    if on_measured is not None:
        on_measured(before + time.monotonic() - began)
    return table


def part_of(table: ShiftTable, sampler: Sampler, settings: CalibrationSettings) -> ShiftTable | None:
    """Take the result of `measure_table` from a table that already holds it; None if this table does not."""
    full = sampler.full
    identity = sampler.identity
    if not (same(table.backbone, identity.backbone) and same(table.exits, identity.exits)):
        return None
    mine = (full.solver, full.num_steps, full.cfg_scale, sampler.seed)
    mine += (settings.num_pictures, _edges(full, _bands(full, settings)))
    theirs = (table.solver, table.num_steps, table.cfg_scale, table.seed)
    theirs += (table.num_pictures, table.edges)
    return table.part(*_entries(sampler, settings)) if mine == theirs else None


def _bands(full: DepthPlan, settings: CalibrationSettings) -> list[list[int]]:
    """Return the steps of each band."""
    steps = torch.arange(full.num_steps)
    return [band.tolist() for band in steps.tensor_split(min(settings.num_bands, full.num_steps))]


def _edges(full: DepthPlan, bands: list[list[int]]) -> tuple[float, ...]:
    """Return the edges of the bands, see `ShiftTable`."""
    return (*(float(full.timesteps[band[0]]) for band in bands), 0.0)


def _entries(sampler: Sampler, settings: CalibrationSettings) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """Return the choices to measure, each forecast once per age, and the ages (empty without forecasts)."""
    guided = sampler.full.cfg_scale != 1
    choices = settings.steps or default_choices(
        sampler.depths, guided, settings.num_depths, held=settings.held, own_guides=settings.own_guides
    )
    if not settings.forecast_ages:
        if bad := [choice for choice in choices if choice.forecast]:
            raise InputError(f"choices: {bad[0]} forecasts; expected forecast_ages of at least 1")
        return choices, ()
    if settings.num_bands < sampler.full.num_steps:
        raise InputError(
            f"--num-bands {settings.num_bands}: forecasts are measured step by step; expected at least the "
            f"{sampler.full.num_steps} steps"
        )
    given = tuple(choice for choice in choices if choice.forecast)
    forecasts = given or forecast_choices(sampler.depths, guided, settings.num_depths)
    plain = tuple(choice for choice in choices if not choice.forecast)
    aged = [(choice, age) for choice in forecasts for age in range(1, settings.forecast_ages + 1)]
    return plain + tuple(choice for choice, _ in aged), (0,) * len(plain) + tuple(age for _, age in aged)


def measure_table_into(
    path: Path, sampler: Sampler, extractor: FeatureExtractor, reference: Moments, **options: Any
) -> ShiftTable:
    """Run `measure_table` resumably and save the table in the file `path`."""
    partial = path.with_suffix(".partial")
    with locked(path.parent):
        measure_table(sampler, extractor, reference, partial=partial, **options).save(path)
        remove(partial)
    return ShiftTable.load(path)  # rounded as in the file, so that a resumed run gives the same results


@bounds.checked
def measure_shifts(
    model: DynamicDepth,
    extractor: FeatureExtractor,
    reference: Moments,
    *,
    solver: AnySolver | None = None,
    num_steps: int = 10,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    settings: CalibrationSettings | None = None,
    to_pictures: ToPictures = to_uint8,
    into: Path | None = None,
    **options: Any,
) -> ShiftTable:
    """Run `measure_table` with dyndit's own sampling.

    Each batch of seeds runs the full trajectory once. At each band's first step the trajectory forks. The fork runs
    the band with the choice, then full depth. into: a file for the table; a partial file beside it lets an interrupted
    measurement resume. options: see `measure_table`.
    """
    settings = settings or CalibrationSettings()
    solver = solver or model.process.usual_solver
    sampler = OwnSampler(model, solver, num_steps, cfg_scale, guided_channels, to_pictures, settings.seed)
    measure = measure_table if into is None else functools.partial(measure_table_into, into)
    return measure(sampler, extractor, reference, settings=settings, **options)


def reduced(extractor: FeatureExtractor, pictures: Tensor) -> tuple[FeatureExtractor, Moments]:
    """Reduce an extractor to few features, and return the moments of these real pictures (N, C, H, W) uint8.

    Above `MAX_FEATURES` features, keep the `NUM_COMPONENTS` leading principal components of the pictures' features. A
    table holds a matrix per entry, and the search diagonalises thousands of matrices.
    """
    return of_few_features(extractor, extractor.features(as_rgb(pictures)))


def of_few_features(extractor: FeatureExtractor, features: Tensor) -> tuple[FeatureExtractor, Moments]:
    """Do the same as `reduced`, from the pictures' features (N, D).

    Of joined extractors each keeps its share of the components, at least one, scaled to a total variance of one.
    """
    parts = getattr(extractor, "parts", ())
    if parts:
        kept = max(1, NUM_COMPONENTS // len(parts))
        blocks = [(part, _leading(part, kept)) for part in features.split(parts, dim=1)]
        projection = torch.block_diag(*(leading / (part @ leading).var(dim=0).sum().sqrt() for part, leading in blocks))
    elif features.shape[1] > MAX_FEATURES:
        projection = _leading(features, NUM_COMPONENTS)
    else:
        return extractor, moments(features)
    return extractor.projected(projection), moments(features @ projection)


def _leading(features: Tensor, num: int) -> Tensor:
    """Return the `num` leading directions, or all if there are fewer.  features: (N, D) -> (D, d)."""
    _, vectors = torch.linalg.eigh(torch.cov(features.T))
    return vectors[:, -num:]


def _restore(partial: Path | None, key: str) -> tuple[dict[str, Tensor], int, float]:
    """Read the sums, batches and seconds of an interrupted measurement of the same table; else return ({}, 0, 0)."""
    nothing: tuple[dict[str, Tensor], int, float] = {}, 0, 0.0
    if partial is None or not partial.exists():
        return nothing
    try:
        sums, metadata = read_safetensors(partial)
        mine = metadata["key"] == key and metadata[seals.SEAL] == seals.tensors_checksum(sums, metadata)
        return (sums, int(metadata["done"]), float(metadata.get("seconds", 0))) if mine else nothing
    except (CheckpointError, KeyError, ValueError):
        return nothing
