"""The kinds of paths that evaluation reads, for `dyndit inspect`: statistics of features, and pictures."""

from pathlib import Path

from dyndit.analysis.metrics.statistics import is_of_fidelity, read_statistics
from dyndit.errors import InputError
from dyndit.pictures.arrays import PICTURES, headers_of
from dyndit.pictures.collection import account_of, open_source, read_image, said_of
from dyndit.storage.inspect import Description, kind

ARCHIVES = (".zip", ".tar", ".parquet", ".arrow", ".npy", ".npz")
MODELS = ("config.json", "model_index.json")
"""Files of folders that hold a model."""


@kind("statistics of features")
def _statistics(path: Path) -> Description | None:
    if not path.is_file() or not _may_hold_statistics(path):
        return None
    found = read_statistics(path)
    facts = {"written by": found.program or "unknown", "extractor": found.extractor or "unknown"}
    facts |= {"features": len(found.features.mean), "pictures": found.num or "unknown"}
    facts |= {"resize": found.resize or "unknown", "source": found.source or "unknown"}
    loaded = ["mean and covariance"] + (["mean and covariance of spatial features"] if found.spatial else [])
    missing = tuple(
        f"{name}: --reference-{flag} says it"
        for name, flag, value in (
            ("extractor", "extractor", found.extractor),
            ("number of pictures", "count", found.num),
            ("resize", "resize", found.resize),
            ("source", "source", found.source),
        )
        if not value
    )
    return Description("statistics of features", facts, tuple(loaded), missing=missing)


def _may_hold_statistics(path: Path) -> bool:
    if path.suffix == ".npz":
        return "mu" in headers_of(path)
    return path.suffix == ".pkl" or is_of_fidelity(path)


@kind("pictures")
def _pictures(path: Path) -> Description | None:
    if path.is_file():
        if path.suffix.lower() not in ARCHIVES:
            return None
        if path.suffix == ".npz" and not set(PICTURES) & headers_of(path).keys():
            return None
    elif any((path / name).exists() for name in MODELS):
        return None
    try:
        source = open_source(path)
    except InputError:
        if path.is_file():
            raise
        return None
    first = read_image(source, 0)
    account = account_of(source, len(source.names), {}, None)
    facts = {"pictures": len(source.names), "first": f"{first.height}x{first.width} {first.mode}"}
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    if folders:
        facts["subfolders (classes to train on)"] = f"{len(folders)}: {', '.join(folders[:5])}"
    return Description("pictures", facts, (f"pictures: {len(source.names)}",), tuple(said_of(account)))
