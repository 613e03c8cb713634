"""Compare two sets of pictures: `evaluate` returns named numbers.

Features are computed here once per set. torch-fidelity computes the Inception score from them. This package computes
the rest (`dyndit.stats`, infinity.py, kid.py, manifold.py, memorisation.py, paired.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.infinity import NUM_SIZES, distance_at_infinity
from dyndit.analysis.metrics.kid import kernel_distance
from dyndit.analysis.metrics.manifold import NEIGHBOURS, share_within
from dyndit.analysis.metrics.memorisation import check_memorisation
from dyndit.analysis.metrics.metric import Comparison, Figures, metric, metrics_by_name
from dyndit.analysis.metrics.paired import Lpips, check_same_seeds, paired_sets
from dyndit.analysis.metrics.sets import PictureSet, read_set
from dyndit.analysis.metrics.statistics import NOTHING_TOLD, Statistics, Told
from dyndit.errors import InputError, did_you_mean
from dyndit.pictures.resize import Resize
from dyndit.progress import progress_bar, tracked
from dyndit.sampling.store import problem_of
from dyndit.stats import frechet_distance

DEFAULT_METRICS = ("fd", "kid", "is", "prc")
NUM_SPLITS = 10  # parts of a set for the Inception score
PAIRED = "paired_"  # prefix of figures that judge no model


@metric("fd")
def _fd(c: Comparison) -> Figures:
    return {"fd": frechet_distance(c.samples.moments(), c.reference.moments())}


@metric("sfid")
def _sfid(c: Comparison) -> Figures:
    return {"sfid": frechet_distance(c.samples.moments("spatial"), c.reference.moments("spatial"))}


@metric("fd-infinity")
def _fd_infinity(c: Comparison) -> Figures:
    return {"fd_infinity": distance_at_infinity(c.samples.features, c.reference.moments())}


@metric("kid")
def _kid(c: Comparison) -> Figures:
    found = kernel_distance(c.samples.features, c.reference.features)
    return {"kid": found.mean, "kid_low": found.low, "kid_high": found.high}


@metric("is")
def _inception_score(c: Comparison) -> Figures:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # slow to import

    logits = c.samples.logits
    return {"is": isc_features_to_metric(logits, splits=min(NUM_SPLITS, len(logits)))[KEY_METRIC_ISC_MEAN]}


@metric("prc")
def _precision_recall(c: Comparison) -> Figures:
    fewest = min(len(c.samples.features), len(c.reference.features))
    if fewest < NEIGHBOURS + 2:
        raise InputError(f"--metrics prc: {fewest} pictures, expected at least {NEIGHBOURS + 2}")
    (samples, own), (reference, reach) = c.samples.members(), c.reference.members(c.members)
    return {
        "precision": share_within(samples, reference, reach),
        "recall": share_within(reference, samples, own),
    }


@metric("memorisation")
def _memorisation(c: Comparison) -> Figures:
    found = check_memorisation(c.samples.features, c.train.features, c.held_out.features)
    return {
        "memorised": found.share.mean,
        "memorised_low": found.share.low,
        "memorised_high": found.share.high,
        "nearest_sample": found.median_sample,
        "nearest_held_out": found.median_held_out,
    }


@metric("paired")
def _paired(c: Comparison) -> Figures:
    spreads = paired_sets(c.samples.given, c.full, c.lpips)
    named = {f"{PAIRED}{name}": spread for name, spread in spreads.items()}
    return {k: v for name, s in named.items() for k, v in ((f"{name}_median", s.median), (f"{name}_worst", s.worst))}


def evaluate(
    samples: Path | Tensor,
    reference: Path | Tensor,
    extractor: Extractor,
    metrics: Sequence[str] = DEFAULT_METRICS,
    force: bool = False,
    *,
    train: Path | Tensor | None = None,
    held_out: Path | Tensor | None = None,
    full: Path | Tensor | None = None,
    lpips_weights: Path | None = None,
    cache: Path | None = None,
    resize: Resize | None = None,
    skip_damaged: bool = False,
    told: Told = NOTHING_TOLD,
) -> Figures:
    """Compare samples with a reference on the extractor's features. Sets: paths (`open_source`) or uint8 (N, C, H, W).

    Sets of clips are uint8 (N, C, T, H, W); "paired" compares their frames.

    Returns "metric" (FID for Inception, else FD-<extractor>), "extractor", "num_samples", "num_reference" (None if the
    statistics do not say it), "forced", and for each metric

    | metric | figures |
    |---|---|
    | fd | fd |
    | kid | kid, kid_low, kid_high: 95% interval over disjoint blocks |
    | is | is: exp of the mean KL over the classifier's own classes, 10 splits; left out by default if it has none |
    | prc | precision, recall (Kynkäänniemi et al. 2019, k = 3), on these features rather than VGG's |
    | sfid | sfid: the Fréchet distance on spatial features (Nash et al. 2021) |
    | memorisation | memorised, memorised_low, memorised_high, nearest_sample, nearest_held_out; see memorisation.py |
    | fd-infinity | fd_infinity: extrapolated to infinitely many samples |
    | paired | paired_psnr_median, paired_psnr_worst, ... ssim, with weights lpips; judges no model, see paired.py |

    train: training pictures, if not the reference. held_out: real pictures not trained on, for memorisation. full: the
    full model's pictures of the same seeds, for paired. cache: folder to keep features in. resize: crop and resize all
    sets that lie on disk; added to the figures. skip_damaged: leave damaged pictures out. told: what is known of a
    reference of statistics; its provenance is added to the figures, and "skipped" if any set skipped anything.

    Beyond rounding no figure depends on batches or on the order of pictures; only paired pairs pictures by position.
    Compare fd at equal N only: a Gaussian of 256 features scores 37 against itself at N = 500, 3.7 at 5,000.
    Raises InputError: no more pictures than features, or an unfinished folder of `dyndit sample`, unless `force` is set
    (which sets "forced"). An unknown metric, a missing set, or pictures that do not fit.
    """
    if tuple(metrics) == DEFAULT_METRICS and not extractor.has_classes:
        metrics = tuple(name for name in metrics if name != "is")
    _check_names(metrics, extractor, held_out, full)
    sources = {"samples": samples, "reference": reference, "train": train, "held_out": held_out, "full": full}
    unfinished = [problem for source in sources.values() if (problem := problem_of(source))]
    if unfinished and not force:
        raise InputError(f"{unfinished[0]} (--force takes it as it is)")
    options = {"resize": resize, "skip_damaged": skip_damaged}
    sets = {name: read_set(source, name, **options) for name, source in sources.items() if source is not None}
    sets["reference"] = _with(told, sets["reference"])
    _check_pictures(sets)
    if "paired" in metrics and not (isinstance(samples, Tensor) or isinstance(full, Tensor)):
        check_same_seeds(samples, full)
    forced = _too_few(sets, extractor, metrics, force) or bool(unfinished)
    measured = {
        name: Measured(s, extractor, "sfid" in metrics and name in ("samples", "reference"), cache)
        for name, s in sets.items()
        if name != "full"
    }
    for name, part in measured.items():
        with progress_bar(f"reading the {name.replace('_', ' ')} set"):
            part.check()
    lpips = None if lpips_weights is None or "paired" not in metrics else Lpips.load(lpips_weights)
    comparison = Comparison(**({"train": measured["reference"]} | measured), full=sets.get("full"), lpips=lpips)
    result: Figures = {
        "metric": extractor.metric_name,
        "extractor": extractor.name,
        "num_samples": comparison.samples.num,
        "num_reference": comparison.reference.num,
        "forced": forced,
    }
    for name in tracked(metrics, "computing metrics", unit="metrics"):
        result |= metrics_by_name()[name](comparison)
    return result | _origins(sets, comparison.reference.statistics, resize)


def score(pictures: Tensor, reference: Measured, metrics: Sequence[str] = ("fd",), members: int = 0) -> Figures:
    """Compute figures of `evaluate` for pictures, uint8 (N, C, H, W), on a measured reference.

    metrics: any that need no other set: fd, kid, is, prc, sfid, fd-infinity. The number of pictures is not checked.
    members: pictures of the reference that precision and recall take; 0: all.
    Raises InputError as `evaluate`.
    """
    samples = Measured(read_set(pictures, "samples"), reference.extractor, reference.spatial)
    comparison = Comparison(samples, reference, reference, members=members)
    return {key: value for name in metrics for key, value in metrics_by_name()[name](comparison).items()}


def reference_statistics(
    reference: Path | Tensor,
    extractor: Extractor,
    spatial: bool = False,
    cache: Path | None = None,
    resize: Resize | None = None,
    skip_damaged: bool = False,
) -> Statistics:
    """Return moments that stand for the reference later, for `sets.save_statistics`. Raises InputError."""
    given = read_set(reference, "reference", resize, skip_damaged=skip_damaged)
    return Measured(given, extractor, spatial, cache).as_statistics()


def _with(told: Told, reference: PictureSet) -> PictureSet:
    """Add what the user says of a reference of statistics. Raises InputError: it holds pictures, or says otherwise."""
    given = [name for name, value in vars(told).items() if value]
    if not given:
        return reference
    if reference.statistics is None:
        flag = "count" if given[0] == "num" else given[0]
        raise InputError(f"--reference-{flag}: {reference.name} holds pictures, expected statistics with it")
    return replace(reference, statistics=reference.statistics.told(told, reference.name))


def _origins(sets: Mapping[str, PictureSet], statistics: Statistics | None, resize: Resize | None) -> Figures:
    """Return figures about where the numbers come from, as far as there is something to say."""
    accounts = {name: s.account for name, s in sets.items()}
    skipped = {name: account for name, account in accounts.items() if account.get("skipped")}
    found: Figures = {} if resize is None else {"resize": str(resize)}
    if statistics is not None:
        found["reference"] = statistics.provenance
    return found | ({"skipped": skipped} if skipped else {})


def _check_names(metrics: Sequence[str], extractor: Extractor, held_out: object, full: object) -> None:
    for name in metrics:
        if name not in (known := metrics_by_name()):
            raise InputError(f"--metrics: '{name}', expected some of {', '.join(known)}{did_you_mean(name, known)}")
    if "is" in metrics and not extractor.has_classes:
        raise InputError(f"--metrics is: {extractor.name} knows no classes; expected another extractor")
    if "sfid" in metrics and not extractor.spatial_layer:
        raise InputError(f"--metrics sfid: {extractor.name} has no spatial features; expected another extractor")
    if "memorisation" in metrics and held_out is None:
        raise InputError("--held-out: missing, expected real pictures not trained on, for memorisation")
    if "paired" in metrics and full is None:
        raise InputError("--full: missing, expected the full model's pictures of the same seeds, for paired")


def _check_pictures(sets: Mapping[str, PictureSet]) -> None:
    """Refuse statistics if pictures are needed, and pictures of another size than the samples."""
    for name in ("samples", "full"):
        if name in sets and sets[name].source is None:
            raise InputError(f"{sets[name].name}: holds statistics, expected the pictures of the {name}")
    sizes = {k: "x".join(map(str, s.size)) for k, s in sets.items() if s.source is not None}
    for name, size in sizes.items():
        if size != sizes["samples"]:
            remedy = "--resize-and-crop SIZE brings pictures on disk to one size"
            raise InputError(f"samples: {sizes['samples']} pixels, expected {size} as in the {name} set; {remedy}")


def _too_few(sets: Mapping[str, PictureSet], extractor: Extractor, metrics: Sequence[str], force: bool) -> bool:
    """Tell if a Fréchet distance is asked of too few pictures. Raises InputError, unless force.

    The features of one picture tell the sizes, so that a refusal comes before hours of work.
    """
    asked = [("fd", "features", 1), ("sfid", "spatial", 1), ("fd-infinity", "features", NUM_SIZES)]
    asked = [row for row in asked if row[0] in metrics]
    one = extractor.outputs(next(sets["samples"].batches(1)), spatial="sfid" in metrics) if asked else {}
    found = False
    for _, output, times in asked:
        dims = one[output].shape[1]
        for name, factor in (("samples", times), ("reference", 1)):
            num = _num_for(sets[name], extractor, output, dims)
            if num is None or num > factor * dims:
                continue
            if not force:
                least = f"{'' if factor == 1 else f'{factor} times '}the {dims}"
                kind = "features" if output == "features" else "spatial features"
                expected = f"expected more than {least} {kind} of {extractor.name} (--force computes it all the same)"
                raise InputError(f"{name}: {num} pictures, {expected}")
            found = True
    return found


def _num_for(given: PictureSet, extractor: Extractor, output: str, dims: int) -> int | None:
    """Return the number of pictures behind a set's moments; None if unknown. Raises InputError: moments do not fit."""
    measured = Measured(given, extractor)
    if measured.statistics is not None and (found := len(measured.moments(output).mean)) != dims:
        raise InputError(f"{given.name}: statistics of {found} {output}, expected {dims} as {extractor.name} has")
    return measured.num
