"""Measure the shift table."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor, as_rgb
from dyndit.analysis.metrics.fidelity import Moments, moments
from dyndit.calibration.drawing import CALIBRATION_SEED, Drawing, NativeDrawing, ToPictures, batches_of
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import REUSED, DepthPlan, forecast, own_exit
from dyndit.plans.table import Pair, ShiftTable
from dyndit.sampling.loop import to_uint8
from dyndit.sampling.solvers import AnySolver

MAX_FEATURES, NUM_COMPONENTS = 256, 64


OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationSettings:
    """What the table is measured on.

    num_bands: bands of steps that are replaced together; each costs one continuation at full depth per pair.
    pairs: (conditional, unconditional) depths to measure; empty means `default_pairs` on `num_depths` depths.
    reuse: whether those have pairs that reuse the guidance of earlier steps (`plan.REUSED`).
    own_guides: whether those have pairs that are guided by the branch's own exits (`plan.own_exit`).
    forecast_ages: how many steps ago full depth may have been where an exit's gap to it is forecast (`plan.forecast`);
    those pairs are measured at each age from 1 on, and want a band for each step. 0: no forecasts.
    seed: of our own sampling; a pipeline's noise is the business of who calls it.
    """

    num_pictures: int = 512
    num_bands: int = 10
    batch_size: int = 128
    seed: int = CALIBRATION_SEED
    pairs: tuple[Pair, ...] = ()
    num_depths: int = 8
    reuse: bool = False
    own_guides: bool = False
    forecast_ages: int = 0


def default_pairs(
    depths: Sequence[int], guided: bool, num_depths: int = 8, *, reuse: bool = False, own_guides: bool = False
) -> tuple[Pair, ...]:
    """Pairs worth measuring: a thinned grid of conditional depths; unconditional ones equal, about half, or none.

    reuse: for each conditional depth also guidance reused from earlier steps. own_guides: also guidance by its own exit
    at about three quarters and half of it: the shallower the guide, the stronger it guides.
    """
    full = depths[-1]
    grid = _thinned(depths, num_depths)
    if not guided:
        return tuple((d, 0) for d in grid if d != full)
    pairs: list[Pair] = []
    for depth in grid:
        half = max((d for d in grid if 2 * d <= depth), default=0)
        others = [REUSED] if reuse else []
        if own_guides:
            below = [max((d for d in depths if d <= share * depth), default=0) for share in (0.75, 0.5)]
            others += [own_exit(guide) for guide in below if 0 < guide < depth]
        pairs += [(depth, uncond) for uncond in dict.fromkeys((depth, half, 0, *others))]
    return tuple(pair for pair in pairs if pair != (full, full))


def forecast_pairs(depths: Sequence[int], guided: bool, num_depths: int = 8) -> tuple[Pair, ...]:
    """Pairs worth measuring that forecast: exits up to half of L, without guidance and with that of earlier steps."""
    shallow = [d for d in _thinned(depths, num_depths) if 2 * d <= depths[-1]]
    return tuple((forecast(d), uncond) for d in shallow for uncond in ((0, REUSED) if guided else (0,)))


def _thinned(depths: Sequence[int], num: int) -> list[int]:
    """At most `num` depths, evenly spread; the shallowest and L stay."""
    if len(depths) <= num:
        return list(depths)
    picks = torch.linspace(0, len(depths) - 1, num).round().long().tolist()
    return [depths[i] for i in sorted(set(picks))]


def measure_table(
    drawing: Drawing,
    extractor: Extractor,
    reference: Moments,
    *,
    settings: CalibrationSettings | None = None,
    cost: CostModel | None = None,
    partial: Path | None = None,
    on_progress: OnProgress | None = None,
) -> ShiftTable:
    """Measure the paired-seed distribution shifts of every (band, pair) of a drawing.

    Sums over batches are kept in `partial`, from which an interrupted measurement goes on. on_progress(done, all)
    counts batches of pictures with a band replaced.

    Raises:
        InputError: fewer pictures than features, or too many features; or forecasts with fewer bands than steps.
    """
    settings = settings or CalibrationSettings()
    if settings.num_pictures <= len(reference.mean) or len(reference.mean) > MAX_FEATURES:
        raise InputError(
            f"--num-pictures {settings.num_pictures}: {extractor.name} has {len(reference.mean)} features; expected "
            f"more pictures than features, and at most {MAX_FEATURES} features (see `reduced`)"
        )
    full, n = drawing.full, settings.num_pictures
    pairs, ages = _entries(drawing, settings)
    bands = _bands(full, settings)
    batches = batches_of(range(n), settings.batch_size)
    sizes = [settings.batch_size, drawing.seed, n]
    key = json.dumps([full.solver, full.timesteps, pairs, bands, full.cfg_scale, drawing.setting, *sizes])
    key += drawing.trunk + drawing.exits + extractor.fingerprint + (json.dumps(ages) if ages else "")
    sums, done = _restore(partial, key)
    total = len(batches) * len(bands) * len(pairs)
    for number, indices in enumerate(batches):
        if number < done:
            continue
        drawn = drawing.replaced(indices, bands, pairs, ages)
        features = (extractor.features(as_rgb(pictures)) for pictures in drawn)
        base = next(features)
        changes = []
        for f in features:
            changes.append(((f - base).sum(0), f.T @ f - base.T @ base))
            if on_progress is not None:
                on_progress(number * len(bands) * len(pairs) + len(changes), total)
        fresh = {
            "base.mean": base.sum(0),
            "base.second": base.T @ base,
            "mean": torch.stack([mean for mean, _ in changes]),
            "second": torch.stack([second for _, second in changes]),
        }
        sums = {name: fresh[name] + sums[name] if sums else fresh[name] for name in fresh}
        if partial is not None:
            save_file(sums, partial, metadata={"key": key, "done": str(number + 1)})
    mean, second = (sums[name].unflatten(0, (len(bands), len(pairs))) / n for name in ("mean", "second"))
    return ShiftTable(
        edges=_edges(full, bands),
        pairs=pairs,
        ages=ages,
        mean=mean,
        second=second,
        base=Moments(sums["base.mean"] / n, sums["base.second"] / n, n),
        reference=reference,
        cost=drawing.cost(max(1, settings.batch_size // 2)) if cost is None else cost,
        num_blocks=full.num_blocks,
        solver=full.solver,
        num_steps=full.num_steps,
        cfg_scale=full.cfg_scale,
        seed=drawing.seed,
        num_pictures=n,
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        trunk=drawing.trunk,
        exits=drawing.exits,
        projection=extractor.projection,
    )


def part_of(table: ShiftTable, drawing: Drawing, settings: CalibrationSettings) -> ShiftTable | None:
    """What `measure_table` would measure, taken from a table that holds it already; None where this one does not."""
    full = drawing.full
    mine = (full.solver, full.num_steps, full.cfg_scale, drawing.trunk, drawing.exits, drawing.seed)
    mine += (settings.num_pictures, _edges(full, _bands(full, settings)))
    theirs = (table.solver, table.num_steps, table.cfg_scale, table.trunk, table.exits, table.seed)
    theirs += (table.num_pictures, table.edges)
    return table.part(*_entries(drawing, settings)) if mine == theirs else None


def _bands(full: DepthPlan, settings: CalibrationSettings) -> list[list[int]]:
    """The steps of each band."""
    return [
        band.tolist() for band in torch.arange(full.num_steps).tensor_split(min(settings.num_bands, full.num_steps))
    ]


def _edges(full: DepthPlan, bands: list[list[int]]) -> tuple[float, ...]:
    """As of `ShiftTable`."""
    return (*(float(full.timesteps[band[0]]) for band in bands), 0.0)


def _entries(drawing: Drawing, settings: CalibrationSettings) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
    """The pairs to measure, those that forecast at every age, and the ages; none where nothing is forecast."""
    pairs = settings.pairs or default_pairs(
        drawing.depths,
        drawing.full.cfg_scale != 1,
        settings.num_depths,
        reuse=settings.reuse,
        own_guides=settings.own_guides,
    )
    if not settings.forecast_ages:
        if bad := [pair for pair in pairs if pair[0] < 0]:
            raise InputError(f"pairs: {bad[0]} forecasts; expected forecast_ages of at least 1")
        return pairs, ()
    if settings.num_bands < drawing.full.num_steps:
        raise InputError(
            f"--num-bands {settings.num_bands}: forecasts are measured step by step; expected at least the "
            f"{drawing.full.num_steps} steps"
        )
    given = tuple(pair for pair in pairs if pair[0] < 0)
    forecasts = given or forecast_pairs(drawing.depths, drawing.full.cfg_scale != 1, settings.num_depths)
    plain = tuple(pair for pair in pairs if pair[0] > 0)
    aged = [(pair, age) for pair in forecasts for age in range(1, settings.forecast_ages + 1)]
    return plain + tuple(pair for pair, _ in aged), (0,) * len(plain) + tuple(age for _, age in aged)


def measure_table_into(
    path: Path, drawing: Drawing, extractor: Extractor, reference: Moments, **options: object
) -> ShiftTable:
    """`measure_table`, resumable, with its table in the file `path` at the end."""
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(measure_table(drawing, extractor, reference, partial=partial, **options), path)
    partial.unlink(missing_ok=True)
    return ShiftTable.load(path)  # rounded as in the file: what is made of it is the same when a run goes on


def save_whole(table: ShiftTable, path: Path) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    table.save(temporary)
    temporary.replace(path)


def measure_shifts(
    model: DynamicDepth,
    extractor: Extractor,
    reference: Moments,
    *,
    solver: AnySolver | None = None,
    num_steps: int = 10,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    settings: CalibrationSettings | None = None,
    to_pictures: ToPictures = to_uint8,
    into: Path | None = None,
    **options: object,
) -> ShiftTable:
    """`measure_table` of our own sampling.

    For each batch of seeds the full trajectory is run once; at each band's first step it forks, the band is run at
    the pair's depths, the rest at full depth. into: a file for the table, beside which an interrupted measurement goes
    on. options: as of `measure_table`.
    """
    settings = settings or CalibrationSettings()
    solver = solver or model.process.usual_solver
    drawing = NativeDrawing(model, solver, num_steps, cfg_scale, guided_channels, to_pictures, settings.seed)
    measure = measure_table if into is None else functools.partial(measure_table_into, into)
    return measure(drawing, extractor, reference, settings=settings, **options)


def reduced(extractor: Extractor, pictures: Tensor) -> tuple[Extractor, Moments]:
    """An extractor that a table can be measured with, and the moments of these real pictures (N, C, H, W) uint8.

    Of more than `MAX_FEATURES` features the `NUM_COMPONENTS` leading principal components of the pictures' are kept:
    a table holds a matrix per entry, and the search diagonalises thousands of them.
    """
    features = extractor.features(as_rgb(pictures))
    if features.shape[1] > MAX_FEATURES:
        _, vectors = torch.linalg.eigh(torch.cov(features.T))
        extractor = extractor.projected(vectors[:, -NUM_COMPONENTS:])
        features = features @ extractor.projection
    return extractor, moments(features)


def _restore(partial: Path | None, key: str) -> tuple[dict[str, Tensor], int]:
    """Sums and number of batches of an interrupted measurement of the very same table, or nothing."""
    if partial is None or not partial.exists():
        return {}, 0
    try:
        with safe_open(partial, "pt") as file:
            metadata = file.metadata() or {}
        return (load_file(partial), int(metadata["done"])) if metadata.get("key") == key else ({}, 0)
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}, 0
