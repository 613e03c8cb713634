"""`evaluate`: two sets of pictures in, named numbers out.

torch-fidelity computes what it does well, Inception score, precision and recall, from features that are computed here
once per set. Distances and intervals are this package's (`dyndit.stats`, infinity.py, kid.py, memorisation.py,
paired.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.infinity import NUM_SIZES, distance_at_infinity
from dyndit.analysis.metrics.kid import kernel_distance
from dyndit.analysis.metrics.memorisation import check_memorisation
from dyndit.analysis.metrics.metric import Comparison, Figures, metric, metrics_by_name
from dyndit.analysis.metrics.paired import Lpips, check_same_seeds, paired_distances
from dyndit.analysis.metrics.sets import PictureSet, Statistics, read_set
from dyndit.errors import InputError
from dyndit.sampling.store import problem_of
from dyndit.stats import frechet_distance

DEFAULT_METRICS = ("fd", "kid", "is", "prc")
NUM_SPLITS = 10  # of the Inception score
NEIGHBOURS = 3  # of precision and recall, as ADM
PAIRED = "paired_"  # prefix of figures that are no verdict


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
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs = c.samples.features, c.reference.features
    if min(len(ours), len(theirs)) < NEIGHBOURS + 2:
        raise InputError(f"--metrics prc: {min(len(ours), len(theirs))} pictures, expected at least {NEIGHBOURS + 2}")
    options = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "prc_batch_size": 2000, "verbose": False}
    found = prc_features_to_metric(ours, theirs, **options)
    return {"precision": found["precision"], "recall": found["recall"]}


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
    spreads = paired_distances(c.samples.given.pictures, c.full.pictures, c.lpips)
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
) -> Figures:
    """Compare samples with a reference, folders, .npz files or uint8 (N, C, H, W), on the extractor's features.

    Returns "metric" (FID for Inception, else FD-<extractor>), "extractor", "num_samples", "num_reference" (None for
    statistics that do not say), "forced", and for each metric

    | metric | figures |
    |---|---|
    | fd | fd |
    | kid | kid, kid_low, kid_high: 95% interval over disjoint blocks |
    | is | is: exp of the mean KL over the classifier's own classes, 10 splits |
    | prc | precision, recall (Kynkäänniemi et al. 2019, k = 3), on these features rather than VGG's |
    | sfid | sfid: the Fréchet distance on spatial features (Nash et al. 2021) |
    | memorisation | memorised, memorised_low, memorised_high, nearest_sample, nearest_held_out; see memorisation.py |
    | fd-infinity | fd_infinity: extrapolated to infinitely many samples |
    | paired | paired_psnr_median, paired_psnr_worst, ... ssim, with weights lpips; no verdict, see paired.py |

    train: training pictures, if not the reference. held_out: real pictures not trained on, for memorisation. full: the
    full model's pictures of the same seeds, for paired. cache: folder to keep features in.

    No figure depends on the order of pictures or on batches beyond rounding, but for paired, which pairs by position.
    Compare fd at equal N only: a Gaussian of 256 features scores 37 against itself at N = 500, 3.7 at 5,000. With as
    few pictures as features a Fréchet distance has no meaning, and an unfinished folder of `dyndit sample` is no set:
    InputError, unless `force`, which sets "forced". Raises InputError also for unknown metrics, sets that a metric
    lacks, and pictures that do not fit.
    """
    _check_names(metrics, held_out, full)
    sources = {"samples": samples, "reference": reference, "train": train, "held_out": held_out, "full": full}
    unfinished = [problem for source in sources.values() if (problem := problem_of(source))]
    if unfinished and not force:
        raise InputError(f"{unfinished[0]} (--force takes it as it is)")
    sets = {name: read_set(source, name) for name, source in sources.items() if source is not None}
    _check_pictures(sets)
    if "paired" in metrics and not (isinstance(samples, Tensor) or isinstance(full, Tensor)):
        check_same_seeds(samples, full)
    forced = _too_few(sets, extractor, metrics, force) or bool(unfinished)
    measured = {
        name: Measured(s, extractor, "sfid" in metrics and name in ("samples", "reference"), cache)
        for name, s in sets.items()
        if name != "full"
    }
    for part in measured.values():
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
    for name in metrics:
        result |= metrics_by_name()[name](comparison)
    return result


def score(pictures: Tensor, reference: Measured, metrics: Sequence[str] = ("fd",)) -> Figures:
    """The figures of `evaluate` for pictures, uint8 (N, C, H, W), on a reference that is measured already.

    metrics: those that need no other sets: fd, kid, is, prc, sfid, fd-infinity. Does not ask whether the pictures are
    enough; raises InputError otherwise as `evaluate`.
    """
    samples = Measured(read_set(pictures, "samples"), reference.extractor, reference.spatial)
    comparison = Comparison(samples, reference, reference)
    return {key: value for name in metrics for key, value in metrics_by_name()[name](comparison).items()}


def reference_statistics(
    reference: Path | Tensor, extractor: Extractor, spatial: bool = False, cache: Path | None = None
) -> Statistics:
    """What `sets.save_statistics` writes: moments that later stand for the reference. Raises InputError."""
    return Measured(read_set(reference, "reference"), extractor, spatial, cache).as_statistics()


def _check_names(metrics: Sequence[str], held_out: object, full: object) -> None:
    for name in metrics:
        if name not in (known := metrics_by_name()):
            raise InputError(f"--metrics: '{name}', expected some of {', '.join(known)}")
    if "memorisation" in metrics and held_out is None:
        raise InputError("--held-out: missing, expected real pictures not trained on, for memorisation")
    if "paired" in metrics and full is None:
        raise InputError("--full: missing, expected the full model's pictures of the same seeds, for paired")


def _check_pictures(sets: Mapping[str, PictureSet]) -> None:
    """Refuse statistics where pictures are needed, and pictures of another size than the samples."""
    for name in ("samples", "full"):
        if name in sets and sets[name].source is None:
            raise InputError(f"{sets[name].name}: holds statistics, expected the pictures of the {name}")
    sizes = {k: "{}x{}".format(*s.size) for k, s in sets.items() if s.source is not None}
    for name, size in sizes.items():
        if size != sizes["samples"]:
            raise InputError(f"samples: {sizes['samples']} pixels, expected {size} as in the {name} set")


def _too_few(sets: Mapping[str, PictureSet], extractor: Extractor, metrics: Sequence[str], force: bool) -> bool:
    """Whether a Fréchet distance is asked of too few pictures. Raises InputError, unless force.

    One picture tells the sizes, so that nothing is refused after hours of work.
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
                raise InputError(
                    f"{name}: {num} pictures, expected more than {'' if factor == 1 else f'{factor} times '}the {dims} "
                    f"{'' if output == 'features' else 'spatial '}features of {extractor.name} (--force computes it "
                    "all the same)"
                )
            found = True
    return found


def _num_for(given: PictureSet, extractor: Extractor, output: str, dims: int) -> int | None:
    """How many pictures stand behind a set's moments, None if unknown. Raises InputError: the moments do not fit."""
    measured = Measured(given, extractor)
    if measured.statistics is not None and (found := len(measured.moments(output).mean)) != dims:
        raise InputError(f"{given.name}: statistics of {found} {output}, expected {dims} as {extractor.name} has")
    return measured.num
