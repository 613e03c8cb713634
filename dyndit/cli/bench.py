"""The verb that times plans: bench."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndit.cli import flags
from dyndit.cli.checks import print_checks
from dyndit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd


def bench(
    model: flags.Positional[str] = "",
    /,
    depth: flags.Unnamed[flags.PlanChoice] = flags.FULL_DEPTH,
    solver: str = "",
    steps: int = 20,
    cfg_scale: flags.CfgScale = 1.5,
    batch_size: tuple[int, ...] = (1, 8, 64),
    rounds: int = 9,
    until: float = 0.02,
    max_rounds: int | None = None,
    num_heads: flags.NumHeads = None,
    weights: flags.Weights = None,
    process: str = "",
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    vae: str = "",
    in_pipeline: bool = False,
    compile: bool = False,
    self_check: bool = False,
    out: Path | None = None,
    json_: flags.Json = False,
) -> None:
    """Time a plan against full depth: paired, alternating, warmed up; end to end, the denoiser and the decoder.

    Each batch size is printed when it is done, and Ctrl-C keeps every whole round.

    Full depth is timed twice under two names: the ratio of the two is the error of the method itself. Rounds go on
    until the 95% interval of every ratio is narrow enough; otherwise the report names the wide intervals. The report
    also gives multiply-accumulates, FLOPs, peak memory, and joules if the machine counts them. It gives the time that
    the parts' measured times promise for the plan, and the share of the promised saving that was reached.

    Args:
        model: A model folder, a published DiT .pt, "digits"; or "random:" and a card's name (random:DiT-S/4).
        depth: Which depths to run beside full depth.
        solver: One of {solvers} (default: the usual solver of the model's process).
        steps: Sampling steps.
        batch_size: Pictures at a time; several are timed one after the other.
        rounds: Timed rounds at least; each runs every arm once.
        until: Go on until the interval (from its low to its high end) of each ratio is below this share of it; 0 times
            exactly --rounds.
        max_rounds: Rounds at most (default: 60, or --rounds if that is more).
        process: Process of a model that does not say its own, one of {processes}.
        vae: Folder or hub id of an autoencoder of diffusers that decodes latents, or "random:f8" for random weights.
        in_pipeline: Time the plug-in inside diffusers' unmodified DiTPipeline, beside the pipeline without it.
        compile: Compile every block and exit head first, for all arms alike.
        self_check: Only check the timing on work of known time (the same twice, a sleep, twice the work); exit
            status 1 if it fails.
        out: File for the table of raw times, written after each round (CSV; its columns are in
            dyndit.analysis.compare.bench.COLUMNS).
    """
    from dyndit.analysis.compare import bench as benchmark
    from dyndit.analysis.compare.bench_verdict import verdict
    from dyndit.rounds import Repeats
    from dyndit.runtime import chosen_device, chosen_dtype
    from dyndit.sampling.loop import full_plan
    from dyndit.sampling.sample import resolve_plan
    from dyndit.storage import load as checkpoints

    device = chosen_device(device)
    if self_check:
        _self_check(device, json_)
        return
    if not model:
        raise InputError("MODEL: missing; expected a model to time, or --self-check")
    if out is not None and out.is_dir():
        raise InputError(f"--out {out}: is a folder; expected a file for the table")
    most = max(rounds, 60) if max_rounds is None else max_rounds
    settings = benchmark.Bench(tuple(batch_size), Repeats(rounds, until, most), compile, in_pipeline)
    name = model
    if model.startswith(benchmark.RANDOM):
        dynamic = benchmark.random_model(model, device)
    else:
        told: dict[str, Any] = {"num_heads": num_heads, "process": process or None, "weights": weights}
        loaded = checkpoints.inspect(model, device=device, **told)
        for note in loaded.notes:
            print(note)
        dynamic, model = loaded.model, str(loaded.folder or model)
    solver = solver or dynamic.process.usual_solver
    full = full_plan(dynamic, solver, steps, cfg_scale)
    plan = flags.chosen_plan(dynamic, model, depth, solver, steps, cfg_scale)
    resolve_plan(dynamic, plan, solver, steps, cfg_scale, origin=str(depth.plan or "plan"))
    if (wanted := chosen_dtype(dtype, device)) is not None:
        dynamic.to(wanted)
    if vae:
        settings = replace(settings, decoder=benchmark.open_decoder(vae, dynamic))
    plans = {benchmark.FULL: full, benchmark.AGAIN: full} | ({plan.router: plan} if plan is not None else {})
    times = _timed(partial(benchmark.measure, dynamic, plans, settings, name=name), until, out)
    if json_:
        table = verdict(times)
        rows = table.drop(columns=["ratio", "width"])
        rows[["ratio", "ratio_low", "ratio_high"]] = [[r.mean, r.low, r.high] for r in table["ratio"]]
        shared = ("machine", "device", "dtype", "threads", "compiled")
        recorded = json.loads(times[list(shared)].iloc[0].to_json() or "{}")
        print(json.dumps(recorded | {"arms": json.loads(rows.to_json(orient="records") or "[]")}))


def _timed(measure: "Callable[..., pd.DataFrame]", until: float, out: Path | None) -> "pd.DataFrame":
    """Measure, print each batch size when it is done, and keep every round in `out`. Ctrl-C keeps and prints them too.

    measure: takes `on_round` and `on_size`. -> its table.
    """
    import pandas as pd

    from dyndit import sealed_csv
    from dyndit.analysis.compare.bench_verdict import head, of_size, ratios

    done: list[pd.DataFrame] = []  # a table per batch size that is done
    now: list[pd.DataFrame] = []  # the table of the batch size under way

    def on_round(rows: pd.DataFrame) -> str:
        now[:] = [rows]
        if out is not None:
            sealed_csv.write(out, pd.concat(done + now))
        return ratios(rows)

    def on_size(rows: pd.DataFrame) -> None:
        print("\n".join(([] if done else head(rows)) + of_size(rows, until)), flush=True)
        done.append(rows)
        now.clear()

    try:
        return measure(on_round=on_round, on_size=on_size)
    except KeyboardInterrupt:
        for rows in list(now):
            on_size(rows)
        if not done:
            raise
        where = "printed above" if out is None else f"kept in {out}"
        print(f"dyndit: stopped; {sum(map(len, done))} timed calls are {where}", file=sys.stderr)
        raise KeyboardInterrupt("said") from None


def _self_check(device: str, json_: bool) -> None:
    """Check the timing on work of known time and print the result. Exit with status 1 if a check fails."""
    from dyndit.analysis.compare import bench_check

    print_checks(bench_check.self_check(bench_check.known_work(device)), json_)
