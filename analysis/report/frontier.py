"""Quality against time: what a run measured, and what it says about dynamic depth.

`runs.csv` holds a row per measured arm and seed block, raw numbers only (`COLUMNS` says what each column
is). `summary` turns it into one row per arm. The reference is always full depth: at the same solver and
number of steps (paired by seed block), and at equal quality or equal time on the full-depth frontier of the
same solver, interpolated piecewise linearly in log time. Times are medians over the blocks of an arm, as
their noise is small beside that of FD; every comparison of FD is made block by block and then given its
interval.
"""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from dyndit.analysis.metrics.intervals import Interval, non_inferior, paired_interval
from dyndit.errors import InputError
from dyndit.files import read_json, write_text
from dyndit.manifest import MANIFEST

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
    "role": "score: fresh seeds, counted in results; search: seeds that chose the plan",
    "plan": "file of the plan; empty for full depth",
    "macs": "multiply-accumulates of the denoiser per picture, over the whole sampling",
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
}
QUALITY = ("kid", "is", "precision", "recall")  # measured beside fd, where they are
# `threads` and `batch_size` tell settings apart and are never computed with, so they are labels.
TEXT = (
    "run", "machine", "extractor", "metric", "model", "arm", "family", "solver", "role", "plan", "compiled", "dtype",
    "threads", "batch_size",
)  # fmt: skip
# Columns that came later: files and rows without them are read, and count as empty there.
LATER = (
    "macs", "predicted_ms", "peak_memory_mib", "compiled", "dtype", "threads", "batch_size", "kid", "is", "precision",
    "recall",
)  # fmt: skip
# May be empty in a row.
OPTIONAL = ("budget", "share_of_blocks", "mean_depth_cond", "mean_depth_uncond", "ms_denoiser", "predicted_fd", *LATER)
# Arms are never compared, and figures never averaged, across these.
GROUP = [
    "run", "machine", "model", "extractor", "metric", "cfg_scale", "num_images", "compiled", "dtype", "threads",
    "batch_size",
]  # fmt: skip


def read_runs(path: Path) -> pd.DataFrame:
    """Return the runs of a CSV or Parquet file, or of the folder that holds runs.csv or runs.parquet.

    Columns as in COLUMNS, then any others the file has; those of LATER are empty where the file lacks them. Parquet
    needs pyarrow. Raises InputError: no such file, a column missing, a value that is no number, an arm measured twice.
    """
    file = runs_file(path)
    runs = _read_table(file)
    for name in LATER:
        if name not in runs:
            runs[name] = "" if name in TEXT else math.nan
    if missing := [name for name in COLUMNS if name not in runs]:
        raise InputError(f"{file}: no column '{missing[0]}', expected {', '.join(COLUMNS)}")
    if runs.empty:
        raise InputError(f"{file}: no rows, expected one per arm and seed block")
    for name in COLUMNS:
        if name in TEXT:
            runs[name] = runs[name].map(_label)
        else:
            _require_numbers(file, runs[name], required=name not in OPTIONAL)
    twice = runs.duplicated([*GROUP, "arm", "block", "role"])
    if twice.any():
        row = runs[twice].iloc[0]
        raise InputError(f"{file}: arm {row['arm']}, block {row['block']} stands twice, expected once")
    return runs[[*COLUMNS, *(name for name in runs if name not in COLUMNS)]]


def runs_file(path: Path) -> Path:
    """Return the file that holds the runs: `path` itself, or runs.csv, or runs.parquet in it. Raises InputError."""
    path = Path(path)
    file = path
    if path.is_dir():
        file = path / (PARQUET if (path / PARQUET).is_file() and not (path / RUNS).is_file() else RUNS)
    if not file.is_file():
        raise InputError(f"{file}: no such file, expected the {RUNS} of a run")
    return file


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


def _label(value: object) -> str:
    """Text of a label: empty for a missing one, and whole numbers without the point a float column gives them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def scored_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that count in results, with every label of GROUP a text, so that none drops out of a group."""
    scored = runs[runs["role"] == "score"].copy()
    for name in set(GROUP) & set(TEXT):
        scored[name] = scored[name].map(_label) if name in scored else ""
    return scored


def _require_numbers(file: Path, column: pd.Series, required: bool) -> None:
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~np.isfinite(numbers) if required else numbers.isna() & column.notna()
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0]) + 2
        found = column[wrong].iloc[0]
        raise InputError(f"{file}, line {line}: {column.name} is '{found}', expected a finite number")


def append_run(path: Path, *rows: Mapping[str, object]) -> None:
    """Add rows to a runs.csv, made if need be. A kill at any moment leaves the old file or the new one.

    rows: each a value for each of COLUMNS, those of LATER as known; None and NaN are written as empty. A file without
    the columns of LATER gets them. Raises InputError: an unknown column, or one missing.
    """
    path = Path(path)
    for row in rows:
        if odd := sorted(row.keys() - COLUMNS.keys()) + sorted(COLUMNS.keys() - row.keys() - set(LATER)):
            raise InputError(f"{path}: column '{odd[0]}' unknown or missing in the row, expected {', '.join(COLUMNS)}")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(COLUMNS), restval="", lineterminator="\n")
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = csv.DictReader(io.StringIO(old, newline=""))
    if odd := [name for name in lines.fieldnames or () if name not in COLUMNS]:
        raise InputError(f"{path}: column '{odd[0]}' unknown, expected {', '.join(COLUMNS)}")
    if lines.fieldnames == list(COLUMNS):
        text.write(old)
    else:  # new, or written before the columns of LATER came
        writer.writeheader()
        writer.writerows(lines)
    for row in rows:
        empty = {k: "" for k, v in row.items() if v is None or (isinstance(v, float) and math.isnan(v))}
        writer.writerow({**row, **empty})
    write_text(path, text.getvalue())


def row_of_samples(samples: Path, figures: Mapping[str, object], run: str) -> dict[str, object]:
    """A row of runs.csv from a folder that `dyndit sample` wrote and what `evaluate` found out about it.

    Raises InputError: the folder has no such manifest, or no Fréchet distance was computed.
    """
    path = Path(samples) / MANIFEST
    try:
        manifest = read_json(path)
        settings, plan = manifest["settings"], manifest["plan"]
        full = plan["router"] == "full"
        name = f"{plan['router']}-{settings['solver']}-{settings['steps']}"
        return {
            "run": run,
            "machine": manifest["machine"],
            "extractor": figures["extractor"],
            "metric": figures["metric"] + (" (forced)" if figures.get("forced") else ""),  # told apart, and seen
            "model": settings["model"],
            "arm": name if plan["budget"] is None else f"{name}-b{plan['budget']:g}",
            "family": plan["router"].split("-")[0],
            "solver": settings["solver"],
            "steps": settings["steps"],
            "budget": None if full else plan["budget"],
            "cfg_scale": settings["cfg_scale"],
            "block": settings["seed"],
            "seed": settings["seed"],
            "num_images": settings["num_images"],
            "share_of_blocks": plan["share_of_blocks"],
            "mean_depth_cond": plan["mean_depth"][0],
            "mean_depth_uncond": plan["mean_depth"][1],
            "ms_per_picture": manifest["ms_per_picture"],
            "ms_denoiser": manifest["ms_denoiser"],
            "fd": figures["fd"],
            "predicted_fd": plan["predicted_fd"],
            "role": "score",
            "plan": "",
            **{name: figures.get(name) for name in QUALITY},
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--out {run}: {path} and the metrics lack {error}; expected samples of `dyndit sample`, and fd among "
            "the metrics"
        ) from error


def measured(path: Path, role: str = "score") -> set[tuple[str, int]]:
    """Return which (arm, block) a runs.csv already holds, so that a run can go on; empty without a file."""
    path = Path(path)
    file = path / RUNS if path.is_dir() else path
    if not file.exists():
        return set()
    runs = read_runs(file)
    runs = runs[runs["role"] == role]
    return {(arm, int(block)) for arm, block in zip(runs["arm"], runs["block"], strict=True)}


def time_at_fd(times: np.ndarray, fds: np.ndarray, fd: float) -> float:
    """Return the shortest time at which a frontier reaches this FD; NaN outside the measured range.

    times: (K,) rising, fds: (K,). Piecewise linear in log time. Where the frontier crosses the FD more than
    once, the first crossing counts: full depth gets the benefit.
    """
    if fds[0] <= fd:  # already better at its fastest point: how fast it could be is not measured
        return float(times[0]) if fds[0] == fd else math.nan
    for k in range(1, len(times)):
        if fds[k] <= fd:
            weight = (fds[k - 1] - fd) / (fds[k - 1] - fds[k])
            return math.exp((1 - weight) * math.log(times[k - 1]) + weight * math.log(times[k]))
    return math.nan


def fd_at_time(times: np.ndarray, fds: np.ndarray, time: float) -> float:
    """Return a frontier's FD at this time, piecewise linear in log time; NaN outside the measured range."""
    if not times[0] <= time <= times[-1]:
        return math.nan
    return float(np.interp(math.log(time), np.log(times), fds))


def summary(runs: pd.DataFrame, margin: float = 0.05) -> pd.DataFrame:
    """Runs -> one row per arm, from the rows of role "score"; times in ms per picture.

    | column | what |
    |---|---|
    | the columns of GROUP, arm, family, solver, steps, budget | as in runs |
    | blocks | seed blocks measured |
    | share_of_blocks, mean_depth_cond, mean_depth_uncond | means over blocks |
    | ms, ms_q25, ms_q75 | median and quartiles over blocks |
    | fd | Interval over blocks |
    | predicted_fd, macs, predicted_ms, kid, is, precision, recall | means over blocks, NaN where there are none |
    | time_saved | 1 - time / time of full depth, same solver and steps: median of the blocks' ratios |
    | fd_diff | Interval of FD - FD of full depth, same solver and steps, paired by block |
    | unchanged | upper bound of fd_diff ≤ margin · FD of full depth; None without that arm |
    | time_saved_equal_fd | Interval of 1 - time / time at which full depth reaches this FD |
    | time_saved_at_least | NaN unless full depth never reaches this FD in some block; then a lower bound (*) |
    | fd_diff_equal_time | Interval of FD - FD of full depth at this time |
    | better, worse | whether fd_diff_equal_time lies wholly below, above 0 |
    | note | why an interpolation is missing |

    (*) the mean over blocks of 1 - time / t, where t is the longest time measured for full depth in the blocks
    that never reach it.

    A block counts in an interpolation only if the full frontier of that block covers it; if any block is not
    covered the Interval is NaN and the note says so, as an interval over the covered blocks would be biased.
    """
    scored = scored_rows(runs)
    rows = [
        _summarise_arm(arm, group, margin)
        for _, group in scored.groupby(GROUP, sort=False)
        for _, arm in group.groupby("arm", sort=False)
    ]
    return pd.DataFrame(rows)


def _summarise_arm(arm: pd.DataFrame, group: pd.DataFrame, margin: float) -> dict[str, object]:
    """Return the row of `summary` for the rows of one arm; group: all rows it may be compared with."""
    arm = arm.set_index("block").sort_index()
    first = arm.iloc[0]
    row: dict[str, object] = {name: first[name] for name in (*GROUP, "arm", "family", "solver", "steps", "budget")}
    row["steps"] = int(first["steps"])
    row["blocks"] = len(arm)
    row |= {k: arm[k].mean() for k in ("share_of_blocks", "mean_depth_cond", "mean_depth_uncond")}
    ms = arm["ms_per_picture"]
    row |= {"ms": ms.median(), "ms_q25": ms.quantile(0.25), "ms_q75": ms.quantile(0.75)}
    row |= {"fd": paired_interval(arm["fd"]), "predicted_fd": arm["predicted_fd"].mean()}
    row |= {name: pd.to_numeric(arm[name]).mean() for name in ("macs", "predicted_ms", *QUALITY)}
    full = group[(group["family"] == "full") & (group["solver"] == first["solver"])]
    return row | _against_same_steps(arm, full, margin) | _against_frontier(arm, full)


def _against_same_steps(arm: pd.DataFrame, full: pd.DataFrame, margin: float) -> dict[str, object]:
    """Compare with full depth at the same number of steps, in the blocks that both have."""
    nothing = {"time_saved": math.nan, "fd_diff": Interval(math.nan, math.nan, math.nan), "unchanged": None}
    same = full[full["steps"] == arm["steps"].iloc[0]].set_index("block")
    blocks = arm.index.intersection(same.index)
    if arm["family"].iloc[0] == "full" or blocks.empty:
        return nothing
    ours, theirs = arm.loc[blocks], same.loc[blocks]
    difference = paired_interval(ours["fd"], theirs["fd"])
    return {
        "time_saved": float(1 - (ours["ms_per_picture"] / theirs["ms_per_picture"]).median()),
        "fd_diff": difference,
        "unchanged": non_inferior(difference, float(theirs["fd"].mean()), margin),
    }


def _against_frontier(arm: pd.DataFrame, full: pd.DataFrame) -> dict[str, object]:
    """Compare with full depth at equal FD and at equal time, block by block."""
    missing = Interval(math.nan, math.nan, math.nan)
    row = {
        "time_saved_equal_fd": missing,
        "time_saved_at_least": math.nan,
        "fd_diff_equal_time": missing,
        "better": False,
        "worse": False,
        "note": "",
    }
    if arm["family"].iloc[0] == "full":
        return row
    times = full.groupby("steps")["ms_per_picture"].median().sort_values()
    if len(times) < 2:
        return row | {"note": "full depth measured at fewer than two step counts"}
    table = full.pivot(index="block", columns="steps", values="fd")[times.index].dropna()
    blocks = arm.index.intersection(table.index)
    if blocks.empty:
        return row | {"note": "no seed block shared with all of full depth"}
    ms, fds = float(arm["ms_per_picture"].median()), arm.loc[blocks, "fd"]
    frontiers = table.loc[blocks].to_numpy()
    notes = []
    equal_fd = [time_at_fd(times.to_numpy(), line, fd) for line, fd in zip(frontiers, fds, strict=True)]
    if np.isfinite(equal_fd).all():
        row["time_saved_equal_fd"] = paired_interval([1 - ms / t for t in equal_fd])
    else:
        above = sum(fd > line[0] for line, fd in zip(frontiers, fds, strict=True))
        if not above:
            longest = float(times.iloc[-1])
            row["time_saved_at_least"] = float(
                np.mean([1 - ms / (t if math.isfinite(t) else longest) for t in equal_fd])
            )
        where = "above the fastest" if above else "below the best"
        notes.append(f"FD {where} full-depth arm in {sum(map(math.isnan, equal_fd))} of {len(blocks)} blocks")
    equal_time = [fd_at_time(times.to_numpy(), line, ms) for line in frontiers]
    if np.isfinite(equal_time).all():
        difference = paired_interval(fds, equal_time)
        row |= {"fd_diff_equal_time": difference, "better": difference.high < 0, "worse": difference.low > 0}
    else:
        notes.append(f"time outside full depth's {times.iloc[0]:.3g} to {times.iloc[-1]:.3g} ms")
    return row | {"note": "; ".join(notes)}


def against_unguided(runs: pd.DataFrame) -> pd.DataFrame:
    """Searched plans against full depth without guidance, at equal time: what guidance costs is a saving too.

    One row per searched arm whose time the sweep covers: solver, arm, fd_diff (Interval, paired by block), better,
    worse.
    """
    scored = scored_rows(runs)
    rows = []
    for _, group in scored.groupby([*GROUP, "solver"], sort=False):
        sweep = group[group["family"] == "unguided"]
        for name, arm in group[group["family"] == "searched"].groupby("arm", sort=False):
            found = _against_frontier(arm.set_index("block").sort_index(), sweep)
            if not math.isnan(found["fd_diff_equal_time"].mean):
                row = {"solver": arm["solver"].iloc[0], "arm": name, "fd_diff": found["fd_diff_equal_time"]}
                rows.append(row | {"better": found["better"], "worse": found["worse"]})
    return pd.DataFrame(rows, columns=["solver", "arm", "fd_diff", "better", "worse"])


def against_controls(runs: pd.DataFrame) -> pd.DataFrame:
    """Searched plans held against the fixed schedules made for the same solver, steps and budget of time.

    One row per pair: solver, steps, budget, searched and control (arms), family (of the control), time_ratio (median
    of the blocks' ratios, searched over control), fd_diff (Interval of FD searched - FD control, paired by block),
    better, worse (whether it lies wholly below, above 0).
    """
    scored = scored_rows(runs)
    scored = scored[scored["family"] != "full"]
    rows = []
    for key, group in scored.groupby([*GROUP, "solver", "steps", "budget"], sort=False):
        searched = group[group["family"] == "searched"].set_index("block").sort_index()
        for control, theirs in group[group["family"] != "searched"].groupby("arm", sort=False):
            theirs = theirs.set_index("block").sort_index()
            blocks = searched.index.intersection(theirs.index)
            if blocks.empty:
                continue
            ours, others = searched.loc[blocks], theirs.loc[blocks]
            difference = paired_interval(ours["fd"], others["fd"])
            rows.append(
                dict(zip(("solver", "steps", "budget"), key[-3:], strict=True))
                | {
                    "searched": ours["arm"].iloc[0],
                    "control": control,
                    "family": others["family"].iloc[0],
                    "time_ratio": float((ours["ms_per_picture"] / others["ms_per_picture"]).median()),
                    "fd_control": float(others["fd"].mean()),
                    "fd_diff": difference,
                    "better": difference.high < 0,
                    "worse": difference.low > 0,
                }
            )
    return pd.DataFrame(rows)
