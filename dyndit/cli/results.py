"""Verbs that measure and show results: evaluate, report, compare, quickstart."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndit.cli import flags, trainings
from dyndit.cli.checks import print_checks
from dyndit.errors import InputError, expected_one_of
from dyndit.locks import locked

_PATIENCE = 10.0
"""Seconds that `evaluate` waits for another `evaluate` to add its row to the same run."""


@dataclass(frozen=True)
class MoreSets:
    """Sets that some metrics compare with besides the reference."""

    train: Path | None = None
    """Training pictures, for memorisation (default: the reference)."""
    held_out: Path | None = None
    """Real pictures that were not trained on, for memorisation."""
    full: Path | None = None
    """The full model's pictures of the same seeds, for paired."""
    lpips_weights: Path | None = None
    """VGG16 and LPIPS weights in one file: adds LPIPS to paired."""


@dataclass(frozen=True)
class AboutReference:
    """What is known of a reference of statistics that does not say it. The row and the report note what is unknown."""

    reference_extractor: str = ""
    """Name of the extractor that made the statistics."""
    reference_resize: str = ""
    """How their pictures came to their size."""
    reference_count: int | None = None
    """Number of their pictures."""
    reference_source: str = ""
    """What the pictures are, such as "ImageNet train"."""


def evaluate(
    samples: flags.Positional[Path | None] = None,
    /,
    reference: str = "",
    extractor: str = "inception",
    extractor_weights: Path | None = None,
    metrics: tuple[str, ...] = ("fd", "kid", "is", "prc"),
    more: flags.Unnamed[MoreSets] = MoreSets(),
    about: flags.Unnamed[AboutReference] = AboutReference(),
    resize_and_crop: int | None = None,
    resize_method: str = "adm",
    skip_damaged: bool = False,
    force: bool = False,
    save_reference: Path | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    self_check: Path | None = None,
    device: flags.Device = "auto",
    json_: flags.Json = False,
) -> None:
    """Compare a sample set with real pictures. A distance on other features than Inception's is never called FID.

    Features are computed once per set of pictures and kept, by content.

    Args:
        samples: Pictures: a folder (searched in depth), .zip, .tar (WebDataset), .npz, or a data set of Hugging Face.
        reference: The same of real pictures, statistics (of ADM, EDM, pytorch-fid, torch-fidelity), or one of
            {data_sets}.
        extractor: One of {extractors}.
        extractor_weights: Its weights, if they do not ship with the package.
        metrics: Any of {metrics}.
        more: Sets that some metrics compare with besides the reference.
        about: What is known of a reference of statistics.
        resize_and_crop: Crop the pictures on disk to a square, and resize them to this side.
        resize_method: How: adm (ADM's halving with a box filter, bicubic, centre crop), clean-fid (centre crop, bicubic
            on floats) or bicubic (as training does).
        skip_damaged: Leave damaged pictures out, counted and listed; otherwise the first is refused.
        force: Compute the distance even of fewer pictures than features, or of a set that `dyndit sample` has not
            finished; the figures are marked as forced.
        save_reference: An .npz for the reference's statistics, which can stand for it later (fd, sfid, fd-infinity).
        cache: Folder to keep features in (default: $DYNDIT_CACHE, else $XDG_CACHE_HOME/dyndit, else ~/.cache/dyndit).
        out: Folder of a run: the figures become a row of its runs.csv, for `dyndit report`. Samples that share a seed
            are one seed block.
        self_check: Only check Inception's weights in this file: their hash, and the distance of made pictures against
            torch-fidelity's; exit status 1 if it fails. With --reference, the folder of cifar-10-batches-py, also the
            FID that torch-fidelity's own test expects of CIFAR-10.
    """
    if self_check is not None:
        from dyndit.analysis.metrics.self_check import self_check as checks

        real = Path(reference) if reference else None
        print_checks(checks(self_check, _device(device), real), json_)
        return
    if samples is None or not reference:
        raise InputError("evaluate: expected SAMPLES and --reference, or --self-check WEIGHTS")
    from dyndit import files
    from dyndit.analysis import append_run, load_extractor, save_statistics
    from dyndit.analysis.metrics.quality import evaluate as compare
    from dyndit.analysis.metrics.quality import reference_statistics
    from dyndit.analysis.metrics.sets import read_set
    from dyndit.analysis.metrics.statistics import Told
    from dyndit.analysis.report import strips
    from dyndit.analysis.report.runs import RUNS, check_addable, holds, row_of_samples
    from dyndit.calibration.extractor import SEPARATOR
    from dyndit.pictures.check import cache_folder
    from dyndit.pictures.collection import said_of
    from dyndit.pictures.resize import Resize
    from dyndit.training.data import PACKAGED, open_data

    if out is not None:
        with locked(out, wait=_PATIENCE):  # refuse it before the work
            pass
    device = _device(device)
    resize = None if resize_and_crop is None else Resize(resize_and_crop, resize_method)
    told = Told(about.reference_extractor, about.reference_resize, about.reference_count, about.reference_source)
    real = open_data(reference).uint8() if reference in PACKAGED else Path(reference)
    kept = cache or cache_folder()
    if SEPARATOR in extractor:
        raise InputError(f"--extractor {extractor}: joined extractors are to calibrate by; expected a single one")
    network = load_extractor(extractor, extractor_weights, device)
    reading: dict[str, Any] = {"resize": resize, "skip_damaged": skip_damaged}
    figures = compare(samples, real, network, metrics, force, cache=kept, told=told, **reading, **vars(more))
    skipped: Any = figures.get("skipped", {})
    for account in skipped.values():
        flags.say(said_of(account))
    _print_figures(figures)
    if save_reference is not None:
        save_statistics(save_reference, reference_statistics(real, network, "sfid" in metrics, kept, **reading))
        print(f"statistics of the reference: {save_reference}")
    if out is not None:
        row = row_of_samples(samples, figures, run=out.name)
        with locked(out, wait=_PATIENCE):
            files.sweep(out)
            warnings = []
            if not holds(out / RUNS, row):  # a repeated evaluation of one set changes nothing
                warnings = check_addable(out / RUNS, row)
                shown = next(read_set(samples, "", **reading).batches(strips.MOST))
                strips.save(out, str(row["arm"]), int(str(row["seed"])), shown)
                append_run(out / RUNS, row)  # last: a row says that its pictures are there
        flags.say(f"warning: {warning}" for warning in warnings)
        print(f"row of {row['arm']}, seed {row['seed']}: {out / RUNS}")
    if json_:
        print(json.dumps(figures))


def _print_figures(figures: dict[str, Any]) -> None:
    """Print a line per figure of `evaluate`: intervals beside their figures, paired distances last."""
    ends = ("_low", "_high")
    apart = ("metric", "extractor", "skipped")
    shown = {k: v for k, v in figures.items() if k not in apart and not k.endswith(ends)}
    names = {"fd": figures["metric"], "fd_infinity": f"{figures['metric']}, N=inf", "sfid": f"s{figures['metric']}"}
    paired = {k: v for k, v in shown.items() if k.startswith("paired_")}
    for name, value in shown.items():
        if name in paired or (name == "forced" and not value):
            continue
        limits = [f"{figures[name + end]:.4g}" for end in ends if name + end in figures]
        between = f"  [{', '.join(limits)}]" if limits else ""
        text = f"{value:.5g}" if isinstance(value, float) else "unknown" if value is None else str(value)
        print(f"{names.get(name, name):>22}  {text}{between}")
    if paired:
        print("\nmoved from the full model's pictures of the same seeds (median, worst 5%); not a verdict:")
        for name in dict.fromkeys(k.rsplit("_", 1)[0] for k in paired):
            print(f"{name.removeprefix('paired_'):>22}  {paired[f'{name}_median']:.5g}, {paired[f'{name}_worst']:.5g}")


def _device(device: str) -> str:
    from dyndit.runtime import chosen_device

    return chosen_device(device)


def report(
    runs: flags.Positional[tuple[Path, ...]] = (),
    /,
    out: Path | None = None,
    margin: float = 0.05,
    verify: Path | None = None,
) -> None:
    """Write a report (Markdown, HTML, figures) from runs.csv files and print the tables; or check one.

    Args:
        runs: Folders of runs (or their runs.csv, or runs.parquet), or a folder of such folders.
        out: Folder for the report (default: beside the run, if there is one run).
        margin: Non-inferiority margin, as a share of full depth's Fréchet distance.
        verify: A report, or its folder: compute every printed number again from the raw rows, print a line per
            mismatch, and exit with status 1 if there is any.
    """
    from dyndit.analysis import write_report
    from dyndit.analysis.report.runs import is_sealed, runs_below
    from dyndit.analysis.report.terminal import show
    from dyndit.analysis.report.verify import verify as mismatches
    from dyndit.progress import progress_bar

    if verify is not None:
        if wrong := mismatches(verify):
            print("\n".join(wrong))
            raise SystemExit(1)
        print(f"{verify}: every number follows from the raw rows")
        return
    if not runs:
        raise InputError("report: expected folders of runs, or --verify REPORT")
    if out is None and len(runs) > 1:
        raise InputError(f"--out: missing; expected a folder for the report of {len(runs)} runs")
    first, files = next(iter(runs)), [file for path in runs for file in runs_below(path)]
    out = (first if first.is_dir() else first.parent) if out is None else out
    with progress_bar("writing the report"):
        write_report(files, out, margin=margin)
    for path in files:
        if not is_sealed(path):
            print(f"{path}: its rows have no checksum; they are taken as they are")
    show(files, margin)
    print(f"report: {out / 'report.html'}")


def quickstart(
    family: str = "digits",
    out: Path | None = None,
    device: flags.Device = "auto",
    dtype: trainings.Precision = "own",
    from_scratch: bool = False,
    json_: flags.Json = False,
) -> None:
    """Make a model of digits dynamic and measure what that saves: a few minutes on two CPU cores.

    Args:
        family: One of {families}. Only the first ships with its backbone; the others train theirs.
        out: Folder of the run; what is there and valid is not done again (default: runs/quickstart, or
            runs/quickstart-FAMILY).
        from_scratch: Train the backbone too, in place of the shipped backbone.
    """
    from dyndit.analysis.compare.experiment import Experiment
    from dyndit.cli.recipes import find, quickstarts

    if family not in (known := quickstarts()):
        raise InputError(f"--family {family}: {expected_one_of(family, known)}")
    recipe = known[family]
    out = out or Path("runs/quickstart" if family == "digits" else f"runs/quickstart-{family}")
    ships = bool(find(recipe, "quickstart", Experiment).model)
    from_scratch = from_scratch or not ships
    _compare(recipe, "quickstart", out, device=device, dtype=dtype, from_scratch=from_scratch, json_=json_)


def compare(
    recipe: flags.Positional[str] = "my_checkpoint",
    /,
    out: Path = Path("runs/compare"),
    model: str = "",
    process: str = "",
    num_heads: flags.NumHeads = None,
    weights: flags.Weights = None,
    data: str = "",
    extractor: str = "",
    extractor_weights: Path | None = None,
    num_images: int | None = None,
    vae: flags.Vae = None,
    device: flags.Device = "auto",
    dtype: trainings.Precision = "own",
    from_scratch: bool = False,
    json_: flags.Json = False,
) -> None:
    """Run a whole comparison: exits, plans, every arm, the report. Resumable.

    Args:
        recipe: A recipe's name, such as digits_frontier, or a Python file that defines `experiment` (default: the one
            for your own checkpoint: `dyndit compare --model my-dit.pt --data pictures/`). Recipes: {recipes}.
        out: Folder of the run; what is there and valid is not done again.
        model: A model in place of the recipe's. A folder's exits and shift table are taken as they are; a model
            without exits gets some, distilled on the pictures.
        process: Process of a model that does not say its own, one of {processes}.
        data: Pictures in place of the recipe's: one of {data_sets}, or a folder with a subfolder per class, .zip, ...
        extractor: One of {extractors}, in place of the recipe's.
        extractor_weights: Weights of the extractor, if they do not ship with the package.
        num_images: Pictures in a seed block, in place of the recipe's number.
        from_scratch: Train the backbone first.
    """
    inputs = {"model": model, "process": process, "num_heads": num_heads, "weights": weights, "data": data, "vae": vae}
    inputs |= {"extractor": extractor, "extractor_weights": extractor_weights, "num_images": num_images}
    inputs |= {"device": device, "from_scratch": from_scratch}
    _compare(recipe, "experiment", out, json_=json_, dtype=dtype, **inputs)


def _compare(recipe: str, attribute: str, out: Path, *, json_: bool, dtype: str, **inputs: Any) -> None:
    from dyndit.analysis.compare import run as comparison
    from dyndit.analysis.compare.experiment import Experiment, Inputs
    from dyndit.analysis.report.terminal import record, show
    from dyndit.cli.recipes import find

    chosen = find(recipe, attribute, Experiment)
    if precision := trainings.precision_of(dtype, _device(str(inputs["device"]))):
        chosen = chosen.in_precision(precision)
    comparison.run(chosen, out, Inputs(**inputs))
    show(out, chosen.margin)
    print(f"report: {out / 'report.html'}")
    if json_:
        print(json.dumps({"report": str(out / "report.html"), "arms": record(out, chosen.margin)}))
