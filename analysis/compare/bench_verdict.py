"""Sum up a benchmark's table of raw times: a row per arm, and a text."""

import math
from collections.abc import Iterable

import pandas as pd

from dyndit.analysis.compare.bench import AGAIN, FULL
from dyndit.analysis.metrics.macs import flops
from dyndit.analysis.metrics.memory import MEANING
from dyndit.rounds import summarise
from dyndit.stats import Interval, relative_width


def verdict(times: pd.DataFrame, baseline: str = FULL) -> pd.DataFrame:
    """Sum up `measure`'s rows: a row per batch size, scope and arm.

    Columns: batch_size, scope, arm, rounds; ms, q25, q75 (median and quartiles of the batch's time), ms_per_picture;
    ratio (Interval of the median ratio to the baseline), width (the interval's width, as a share of the ratio);
    predicted_ms, promised (predicted share of the baseline's time), kept (time saved by the median ratio, as a share of
    the predicted saving); macs, flops, peak_memory_mib, joules_per_picture.
    """
    rows = []
    for (size, scope), part in times.groupby(["batch_size", "scope"], sort=False):
        arms = list(part["arm"].unique())
        base = baseline if baseline in arms else arms[0]
        firsts, table, joules = part.groupby("arm").first(), summarise(part, base), part.groupby("arm")["joules"].mean()
        for arm, row in table.iterrows():
            facts, ratio = firsts.loc[arm], row["median_ratio"]
            promised = facts["predicted_seconds"] / firsts.loc[base, "predicted_seconds"]
            rows.append(
                {
                    "batch_size": int(size),
                    "scope": scope,
                    "arm": arm,
                    "rounds": int(row["rounds"]),
                    "ms": 1e3 * row["median"],
                    "q25": 1e3 * row["q25"],
                    "q75": 1e3 * row["q75"],
                    "ms_per_picture": 1e3 * row["median"] / size,
                    "ratio": ratio,
                    "width": 0.0 if arm == baseline else relative_width(ratio),
                    "predicted_ms": 1e3 * facts["predicted_seconds"],
                    "promised": promised,
                    "kept": math.nan if promised == 1 else (1 - ratio.mean) / (1 - promised),
                    "macs": int(facts["macs"]),
                    "flops": flops(int(facts["macs"])),
                    "peak_memory_mib": facts["peak_memory_mib"],
                    "joules_per_picture": joules[arm] / size,
                }
            )
    return pd.DataFrame(rows)


def lines(times: pd.DataFrame, until: float = 0.0, baseline: str = FULL) -> list[str]:
    """Write the report of a benchmark as lines.  until: the requested interval width; wider arms are named."""
    sizes = [part for _, part in times.groupby("batch_size", sort=False)]
    return head(times, baseline) + [line for part in sizes for line in of_size(part, until, baseline)]


def head(times: pd.DataFrame, baseline: str = FULL) -> list[str]:
    """Write the lines that stand above all batch sizes: the machine, and the arms' arithmetic."""
    table, facts = verdict(times, baseline), times.iloc[0]
    text = [
        f"{facts['machine']}; {facts['dtype']}, {facts['threads']} CPU threads, {facts['compiled']}; "
        f"{facts['steps']} steps of {facts['solver']}, guidance {facts['cfg_scale']:g}"
    ]
    return text + [
        f"  {arm:>12}  {of['macs'] / 1e9:.4g} GMACs ({of['flops'] / 1e9:.4g} GFLOPs) of the denoiser, one picture"
        for arm, of in table.groupby("arm", sort=False).first().iterrows()
    ]


def of_size(times: pd.DataFrame, until: float = 0.0, baseline: str = FULL) -> list[str]:
    """Write the lines of one batch size: times and ratios, then memory and energy."""
    table, facts, text = verdict(times, baseline), times.iloc[0], []
    for (size, scope), part in table.groupby(["batch_size", "scope"], sort=False):
        text.append(f"{scope}, batch of {size}, {part['rounds'].max()} rounds:")
        text += [_line(row, baseline) for _, row in part.iterrows()]
        text += _remarks(part, until)
    last = table.groupby("arm", sort=False).last()
    return text + _resources(last, int(facts["batch_size"]), str(facts["device"]), facts["energy_source"])


def ratios(times: pd.DataFrame, baseline: str = FULL) -> str:
    """Write each arm's median ratio so far, of the first scope: "full again 1.001, searched 0.612 of full"."""
    table = times[times["scope"] == times["scope"].iloc[0]].pivot(index="round", columns="arm", values="seconds")
    if baseline not in table:
        return ""
    found = table.div(table[baseline], axis=0).median().drop(baseline)
    return ", ".join(f"{arm} {ratio:.3f}" for arm, ratio in found.items()) + f" of {baseline}"


def is_null(ratio: Interval) -> bool:
    """Tell if an A/A ratio shows no difference: its interval covers 1, and it is off by at most 1%."""
    return not ratio.excludes(1) and abs(ratio.mean - 1) <= 0.01


def span(ratio: Interval) -> str:
    """Write a ratio as `0.998 (0.995 to 1.003)`, or as `0.998` if it has no limits."""
    limits = "" if math.isnan(ratio.low) else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{ratio.mean:.3f}{limits}"


def _line(row: pd.Series, baseline: str) -> str:
    text = f"  {row['arm']:>12}  median {row['ms']:.1f} ms, quartiles {row['q25']:.1f} to {row['q75']:.1f}"
    if not math.isnan(row["predicted_ms"]):
        text += f", predicted {row['predicted_ms']:.1f}"
    if row["arm"] != baseline:
        text += f"; of full depth {span(row['ratio'])}"
    if not math.isnan(row["kept"]):
        text += f", predicted {row['promised']:.3f}; saved {row['kept']:.2f} of what was promised"
    return text


def _remarks(part: pd.DataFrame, until: float) -> Iterable[str]:
    """Yield a line on the A/A null, and a line for each interval wider than `until`."""
    for row in part[part["arm"] == AGAIN].itertuples():
        says = "shows nothing, as it must" if is_null(row.ratio) else "FAILED: this timing is not to be trusted to 1%"
        if math.isnan(row.ratio.low):
            says = "too few rounds to tell (6 at least)"
        yield f"  null (the same twice): {span(row.ratio)}: {says}"
    wide = part[part["width"] > until] if until else part[:0]
    for row in wide.itertuples():
        width = "unknown" if math.isinf(row.width) else f"{row.width:.1%} wide"
        yield f"  {row.arm}: interval still {width} after {row.rounds} rounds; {until:.1%} was asked for"


def _resources(arms: pd.DataFrame, size: int, device: str, source: str) -> list[str]:
    """Write lines on peak memory, and on energy if there is a meter."""
    text = []
    if arms["peak_memory_mib"].notna().any():
        peaks = ", ".join(f"{arm} {value:.1f}" for arm, value in arms["peak_memory_mib"].items())
        text = [f"peak memory, batch of {size}, MiB: {peaks}", f"  {MEANING[device]}"]
    joules = arms["joules_per_picture"].dropna()
    if len(joules):
        each = ", ".join(f"{arm} {value:.4g}" for arm, value in joules.items())
        text.append(f"joules a picture, batch of {size} ({source}): {each}")
    return text
