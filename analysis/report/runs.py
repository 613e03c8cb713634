"""Read and write runs.csv: a row per measured arm and seed block, raw numbers only (`COLUMNS`)."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from dyndit import sealed_csv, seals
from dyndit.errors import InputError
from dyndit.files import write_text
from dyndit.manifest import MANIFEST
from dyndit.manifest import is_sealed as is_checked
from dyndit.manifest import read as read_manifest
from dyndit.sampling.solvers import kind_of

RUNS, PARQUET = "runs.csv", "runs.parquet"

COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "machine": "machine the time was taken on; figures are never averaged across machines",
    "extractor": "extractor of the features",
    "metric": "what fd is called: FID, or FD-<extractor>",
    "model": "name of the model",
    "arm": "unique label of the arm, such as full-ddim-10 or searched-ddim-10-b0.60",
    "family": "full, searched, ramp, constant, reversed, ...",
    "solver": "ddpm, ddim, dpmpp, unipc, euler",
    "steps": "sampling steps",
    "budget": "asked share of the full model's time; empty for full depth",
    "cfg_scale": "guidance scale",
    "block": "index of the seed block; arms share the noise of a block",
    "seed": "seed of the block",
    "num_images": "pictures in the block",
    "share_of_blocks": "transformer blocks run, over full depth's at the same steps; empty where the data decide",
    "mean_depth_cond": "mean depth of the conditional branch, in blocks",
    "mean_depth_uncond": "mean depth of the unconditional branch, in blocks",
    "ms_per_picture": "milliseconds from noise to uint8, per picture",
    "ms_denoiser": "of those, in the denoiser",
    "fd": "Fréchet distance to the reference pictures",
    "predicted_fd": "Fréchet distance predicted from the calibration table; empty where there is none",
    "role": "score: fresh seeds, counted in results; search: seeds that chose the plan; time: a timing in batches of "
    "another size, beside the figures of the scored pictures",
    "plan": "file of the plan; empty for full depth",
    "macs": "multiply-accumulates of the denoiser per picture, over the whole sampling",
    "macs_heads": "of those, in exit heads; empty: not recorded",
    "predicted_ms": "milliseconds per picture predicted by the cost model",
    "peak_memory_mib": "peak memory while sampling, in MiB",
    "compiled": "eager or compiled",
    "dtype": "dtype of the denoiser, such as float32",
    "threads": "CPU threads of the run",
    "batch_size": "pictures sampled at once",
    "kid": "kernel distance to the reference pictures",
    "is": "Inception score, or the same on the extractor's classes",
    "precision": "share of the pictures inside the reference's manifold (k = 3)",
    "recall": "share of the reference inside the pictures' manifold (k = 3)",
    "variant": "name of the variant that the arm belongs to; empty for the comparison's own arms",
    "settings": "what tells the arm from others of its family, solver, steps and budget, such as every2-depth6",
    "noise": "ODE or SDE: whether the solver adds noise; empty: unknown",
    "labels": "classes of the pictures: balanced, random, or their numbers in turn; empty: unknown",
    "resize": "how pictures came to one size, such as adm 256; empty: they were not resized",
    "reference": "pictures, or the provenance of statistics that stand for them; empty: unknown",
    "calibration": "number of the calibration (exits, table, search) that made the arm's plan; empty: none, or unknown",
}
# A file may lack these columns, and then tells nothing of them.
UNTOLD = ("noise", "labels", "resize", "reference", "macs_heads", "calibration")
ALIKE = ("resize", "reference")  # rows of one run, extractor and metric have one value of these
PLANS = ("searched", "refined", "descended", "chosen")
"""Families of the plans that a calibration makes. A variant's plans have the family "searched-NAME"."""
QUALITY = ("kid", "is", "precision", "recall")  # optional metrics beside fd
# `threads` and `batch_size` distinguish settings and enter no computation, so they are labels.
TEXT = (
    "run", "machine", "extractor", "metric", "model", "arm", "family", "solver", "role", "plan", "compiled", "dtype",
    "threads", "batch_size", "variant", "settings", "noise", "labels", "resize", "reference", "calibration",
)  # fmt: skip
# These columns may be empty in a row; labels (TEXT) may be empty too.
OPTIONAL = (
    "budget", "share_of_blocks", "mean_depth_cond", "mean_depth_uncond", "ms_denoiser", "predicted_fd", "macs",
    "macs_heads", "predicted_ms", "peak_memory_mib", "kid", "is", "precision", "recall",
)  # fmt: skip
# Arms are compared, and figures averaged, only within equal values of these columns.
GROUP = [
    "run", "machine", "model", "extractor", "metric", "cfg_scale", "num_images", "compiled", "dtype", "threads",
    "batch_size",
]  # fmt: skip


def read_runs(path: Path) -> pd.DataFrame:
    """Read the runs of a CSV or Parquet file, or of a folder with runs.csv or runs.parquet.

    The columns of COLUMNS come first, then other columns of the file. Parquet needs pyarrow.
    Raises InputError: the file or a column is missing, a value is not a number, an arm was measured twice, or the rows
    do not fit the column `checksum`. Rows of a file without that column are taken as they are, see `is_sealed`.
    """
    file = runs_file(path)
    runs = _read_table(file)
    runs = runs.assign(**{name: "" if name in TEXT else math.nan for name in UNTOLD if name not in runs})
    if missing := [name for name in COLUMNS if name not in runs]:
        raise InputError(f"{file}: no column '{missing[0]}', expected {', '.join(COLUMNS)}")
    if runs.empty:
        raise InputError(f"{file}: no rows, expected one per arm and seed block")
    for name in COLUMNS:
        if name in TEXT:
            runs[name] = runs[name].map(label)
        else:
            _require_numbers(file, runs[name], required=name not in OPTIONAL)
    twice = runs.duplicated([*GROUP, "arm", "block", "role"])
    if twice.any():
        row = runs[twice].iloc[0]
        raise InputError(f"{file}: arm {row['arm']}, block {row['block']} stands twice, expected once")
    if file.suffix != ".parquet":
        sealed_csv.check(file)
    check_alike(file, runs)
    return runs[[*COLUMNS, *(name for name in runs if name not in (*COLUMNS, seals.SEAL))]]


def is_sealed(path: Path) -> bool:
    """Tell if a runs file carries a checksum, which `read_runs` has checked."""
    file = runs_file(path)
    return file.suffix != ".parquet" and sealed_csv.check(file)


def check_alike(file: Path, runs: pd.DataFrame) -> None:
    """Raise InputError if scored rows of one run, extractor and metric were resized, or compared, in unlike ways."""
    scored = runs[runs["role"] == "score"].fillna(dict.fromkeys(ALIKE, ""))
    for _, rows in scored.groupby(["run", "extractor", "metric"], sort=False):
        for name in ALIKE:
            unlike = rows.drop_duplicates(name)
            if len(unlike) > 1:
                (a, b), arms = unlike[name].iloc[:2], unlike["arm"].iloc[:2]
                raise InputError(
                    f"{file}: {name} is '{a}' of arm {arms.iloc[0]} and '{b}' of arm {arms.iloc[1]}; their distances "
                    "do not compare, expected one way in one file"
                )


def runs_file(path: Path) -> Path:
    """Return the file of the runs: `path` itself, or runs.csv or runs.parquet in it. Raises InputError."""
    path = Path(path)
    file = path
    if path.is_dir():
        file = path / (PARQUET if (path / PARQUET).is_file() and not (path / RUNS).is_file() else RUNS)
    if not file.is_file():
        raise InputError(f"{file}: no such file, expected the {RUNS} of a run")
    return file


def runs_below(path: Path) -> list[Path]:
    """Return the runs of a folder: itself, or, if it has no rows of its own, every folder below it that has some."""
    path = Path(path)
    if not path.is_dir() or (path / RUNS).is_file() or (path / PARQUET).is_file():
        return [path]
    return sorted({file.parent for name in (RUNS, PARQUET) for file in path.rglob(name)}) or [path]


def _read_table(file: Path) -> pd.DataFrame:
    try:
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        return pd.read_csv(file, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=["", "nan"])
    except ImportError as error:
        raise InputError(f"{file}: needs pyarrow, which is not installed; expected it, or a {RUNS}") from error
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parser errors are ValueErrors
        kind = "Parquet" if file.suffix == ".parquet" else "CSV"
        raise InputError(f"{file}: unreadable ({str(error).splitlines()[0]}), expected a {kind} file") from error


def label(value: object) -> str:
    """Write a label as text: "" for a missing label, `2` for 2.0 (a column of floats turns 2 into 2.0)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def scored_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of role "score". Write the labels of GROUP as text, so that `groupby` keeps every row."""
    scored = runs[runs["role"] == "score"].copy()
    for name in set(GROUP) & set(TEXT):
        scored[name] = scored[name].map(label)
    return scored


def _require_numbers(file: Path, column: pd.Series, required: bool) -> None:
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~np.isfinite(numbers) if required else numbers.isna() & column.notna()
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0]) + 2
        found = column[wrong].iloc[0]
        raise InputError(f"{file}, line {line}: {column.name} is '{found}', expected a finite number")


def append_run(path: Path, *rows: Mapping[str, object]) -> None:
    """Add rows to a runs.csv; create the file if it is missing. A kill at any moment leaves the old or the new file.

    A row of the same arm, block and role, under the same settings, is replaced.

    rows: each has a value for each of COLUMNS; None and NaN are written as empty.
    Raises InputError: a row or the file has an unknown column, or lacks a column.
    """
    path = Path(path)
    for row in rows:
        if odd := sorted(row.keys() ^ COLUMNS.keys()):
            raise InputError(f"{path}: column '{odd[0]}' unknown or missing in the row, expected {', '.join(COLUMNS)}")
    sealed, kept = True, []
    if path.exists():
        sealed = sealed_csv.check(path)  # a file without checksums stays one
        found, *old = sealed_csv.rows_of(path)
        if not old:
            raise InputError(f"{path}: no rows, expected one per arm and seed block; or no file")
        if found[: len(found) - sealed] != list(COLUMNS):
            raise InputError(f"{path}: columns {', '.join(found)}; expected {', '.join(COLUMNS)}")
        new = {_key(row) for row in rows}
        kept = [row[: len(COLUMNS)] for row in old if _key(dict(zip(found, row, strict=True))) not in new]
    kept += [[filled[name] for name in COLUMNS] for filled in map(_without_none, rows)]
    write_text(path, sealed_csv.text_of(list(COLUMNS), kept, sealed=sealed))


def _without_none(row: Mapping[str, object]) -> dict[str, object]:
    """Return the row with empty text for None and NaN, as a file has it."""
    return {k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()}


def _key(row: Mapping[str, object]) -> tuple[str, ...]:
    """Return what tells a row from all others, as text of the file."""
    return tuple("" if row[name] is None else str(row[name]) for name in (*GROUP, "arm", "block", "role"))


def arm_name(family: str, solver: str, steps: int | str, budget: float | None, settings: str) -> str:
    """Make the printed name of an arm, such as "searched-ddim-10-b0.6". No code parses the name."""
    asked = "" if budget is None or math.isnan(budget) else f"b{budget:g}"
    return "-".join(part for part in (family, solver, str(steps), asked, settings) if part)


def row_of_samples(samples: Path, figures: Mapping[str, object], run: str) -> dict[str, object]:
    """Make a row from a folder of `dyndit sample` and figures of `evaluate`. Raises InputError: one lacks a part."""
    path = Path(samples) / MANIFEST
    try:
        if not is_checked(manifest := read_manifest(path)):
            raise ValueError("a checksum")
        settings, plan = manifest["settings"], manifest["plan"]
        full = plan["router"] == "full"
        # The same latents decode to other pictures under another autoencoder: its hash is part of the model's name.
        settings["model"] = "/".join(part for part in (settings["model"], settings.get("autoencoder")) if part)
        return dict.fromkeys(COLUMNS) | {
            **{name: settings[name] for name in ("model", "solver", "steps", "cfg_scale", "num_images")},
            **{name: plan[name] for name in ("share_of_blocks", "predicted_fd", "settings")},
            **{name: manifest[name] for name in ("machine", "ms_per_picture", "ms_denoiser")},
            **{name: figures[name] for name in ("extractor", "fd")},
            **{name: figures.get(name) for name in QUALITY},
            "dtype": settings.get("dtype"),
            "noise": kind_of(settings["solver"]),
            "labels": _labels_of(settings.get("labels")),
            "resize": figures.get("resize", ""),
            "reference": figures.get("reference", "pictures"),
            "run": run,
            "metric": figures["metric"] + (" (forced)" if figures.get("forced") else ""),  # its own group
            "arm": arm_name(plan["router"], settings["solver"], settings["steps"], plan["budget"], plan["settings"]),
            "family": plan["router"],
            "budget": None if full else plan["budget"],
            "block": settings["seed"],
            "seed": settings["seed"],
            "mean_depth_cond": plan["mean_depth"][0],
            "mean_depth_uncond": plan["mean_depth"][1],
            "role": "score",
            "plan": "",
            "variant": "",
            "calibration": "0" if plan["router"] in PLANS else "",
        }
    except (ValueError, KeyError, TypeError) as error:
        expected = "samples of `dyndit sample`, and fd among the metrics"
        raise InputError(f"--out {run}: {path} and the metrics lack {error}; expected {expected}") from error


def holds(path: Path, row: Mapping[str, object]) -> bool:
    """Tell if a runs.csv has this very row: the same set, evaluated to the same figures. Raises InputError: damage."""
    if not Path(path).exists():
        return False
    read_runs(path)
    head, *rows = sealed_csv.rows_of(Path(path))
    wanted = {name: str(value) for name, value in _without_none(row).items()}
    return any({k: v for k, v in zip(head, found, strict=True) if k != seals.SEAL} == wanted for found in rows)


def check_addable(path: Path, row: Mapping[str, object]) -> list[str]:
    """Return warnings about a row beside the rows of a runs.csv: classes of pictures that are unlike.

    Raises InputError: its arm and block stand there already, or it was resized or compared in another way.
    """
    if not Path(path).exists():
        return []
    runs = read_runs(path)
    added = pd.DataFrame([row])
    mine = runs[(runs["arm"] == row["arm"]) & (runs["block"] == row["block"]) & (runs["metric"] == row["metric"])]
    mine = mine[(mine["extractor"] == row["extractor"]) & (mine["role"] == row["role"])]
    for _, found in mine.iterrows():
        if all(label(found[name]) == label(row[name]) for name in GROUP):
            raise InputError(f"{path}: holds arm {row['arm']}, block {row['block']} already; expected another --out")
    check_alike(Path(path), pd.concat([runs, added], ignore_index=True))
    ours = row["labels"] or "unknown"
    others = sorted({label(value) or "unknown" for value in runs["labels"]} - {ours})
    return [f"class labels {ours} beside {', '.join(others)}: distances differ by that too"] if others else []


def _labels_of(labels: object) -> str:
    """Write the labels of a sampling: "balanced", "random", or numbers; "" if unknown."""
    if isinstance(labels, list | tuple):
        return " ".join(map(str, labels))
    return {"in turn": "balanced", None: ""}.get(labels, str(labels))


def measured(path: Path, role: str = "score") -> set[tuple[str, int]]:
    """Return every (arm, block) in a runs.csv, so that a run can go on; an empty set without a file."""
    path = Path(path)
    file = path / RUNS if path.is_dir() else path
    if not file.exists():
        return set()
    runs = read_runs(file)
    runs = runs[runs["role"] == role]
    return {(arm, int(block)) for arm, block in zip(runs["arm"], runs["block"], strict=True)}
