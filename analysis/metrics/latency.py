"""Speed: arms timed against each other in one process, round by round.

Two processes on few cores slow each other far more than twofold, and a machine drifts while it is measured.
So every round runs each arm once, the order changes from round to round, and ratios are taken within a
round. What is reported is the median of those ratios with a distribution-free interval: one slow round moves
neither. To see what the method itself adds, pass the same callable twice: the ratio must be 1 (an A/A null).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

from dyndit.analysis.metrics.intervals import Interval, paired_interval
from dyndit.errors import InputError


@dataclass(frozen=True)
class Reading:
    """One timed call, or a part of it: seconds, and the joules it took where a meter was read."""

    scope: str
    seconds: float
    joules: float = math.nan


@dataclass(frozen=True)
class Repeats:
    """How often arms are timed: `rounds`, and then on until every ratio's interval is narrow, or `most` are done.

    until: width of the 95% interval (high - low) as a share of the ratio; 0 times exactly `rounds`. Looking again
    and again is harmless here: it stops on how wide the interval is, not on where it lies.
    """

    rounds: int = 9
    until: float = 0.0
    most: int = 60
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}: expected at least 1")
        if not 0 <= self.until < 1:
            raise InputError(f"--until {self.until:g}: expected 0 (exactly --rounds) or a share below 1")
        if self.until and self.most < self.rounds:
            raise InputError(f"--max-rounds {self.most}: expected at least --rounds, which is {self.rounds}")

    def enough(self, done: int, num_arms: int, narrow: Callable[[], bool]) -> bool:
        """Whether to stop after `done` rounds. Past `rounds`, only where every order of the arms came equally often."""
        if done < self.rounds or not self.until:
            return done >= self.rounds
        return done >= self.most or (done % (2 * num_arms) == 0 and narrow())


def order_of(arms: list[str], round_index: int) -> list[str]:
    """Return the arms in this round's order: rotated by one each round, every second round reversed.

    Over 2 · len(arms) rounds each arm stands equally often in each place, before and after each neighbour.
    """
    shift = (round_index // 2) % len(arms)
    order = arms[shift:] + arms[:shift]
    return order[::-1] if round_index % 2 else order


def paired_rounds(
    arms: Mapping[str, Callable[[], Sequence[Reading]]], repeats: Repeats, baseline: str | None = None
) -> pd.DataFrame:
    """Let the arms take turns; each call times itself. -> columns round, arm, scope, seconds, joules.

    baseline: the arm whose ratios have to become narrow (default: the first).
    """
    names: list[str] = list(arms)
    rows: list[dict[str, object]] = []
    baseline = baseline or names[0]
    for name in names * repeats.warmup:
        arms[name]()

    def narrow() -> bool:
        return widest_ratio(_frame(rows), baseline) <= repeats.until

    done = 0
    while not repeats.enough(done, len(names), narrow):
        for name in order_of(names, done):
            rows += [{"round": done, "arm": name, **asdict(reading)} for reading in arms[name]()]
        done += 1
    return _frame(rows)


def paired_times(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    synchronize: Callable[[], object] | None = None,
    until: float = 0.0,
    max_rounds: int = 60,
    baseline: str | None = None,
) -> pd.DataFrame:
    """Time the arms: one row per round and arm, columns round, arm, seconds.

    warmup: calls of each arm before the first round, not timed. synchronize: called before and after each
    timed call; pass torch.cuda.synchronize on a GPU, where calls return before their work is done.
    until, max_rounds, baseline: as in `Repeats` and `paired_rounds`.
    """
    wait = synchronize or (lambda: None)

    def timed(run: Callable[[], object]) -> list[Reading]:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return [Reading("", time.perf_counter() - start)]

    for name in list(arms) * warmup:
        arms[name]()
    calls = {name: (lambda run=run: timed(run)) for name, run in arms.items()}
    repeats = Repeats(rounds, until, max_rounds, warmup=0)
    return paired_rounds(calls, repeats, baseline)[["round", "arm", "seconds"]]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median, between two order statistics that hold the distribution's median with at least this confidence.

    Distribution-free (the count below the median is binomial): of 9 values the 2nd and the 8th, of 60 the 22nd and the
    39th. NaN limits for fewer than 6 values at 95%. Values that are NaN drop out. `Interval.mean` is the median.
    """
    ordered = np.sort(np.asarray(values, float))
    ordered = ordered[np.isfinite(ordered)]
    count = len(ordered)
    if not count:
        return Interval(math.nan, math.nan, math.nan)
    middle, rank = float(np.median(ordered)), int(stats.binom.ppf((1 - confidence) / 2, count, 0.5))
    if rank < 1:
        return Interval(middle, math.nan, math.nan)
    return Interval(middle, float(ordered[rank - 1]), float(ordered[count - rank]))


def relative_width(interval: Interval) -> float:
    """Width of an interval (high - low), as a share of its middle; infinite where it has no limits."""
    width = (interval.high - interval.low) / abs(interval.mean) if interval.mean else math.inf
    return math.inf if math.isnan(width) else width


def widest_ratio(times: pd.DataFrame, baseline: str) -> float:
    """The widest relative interval of any arm's median ratio to the baseline, in any scope that has the baseline."""
    widths = [0.0]
    for _, part in times.groupby("scope"):
        table = part.pivot(index="round", columns="arm", values="seconds")
        if baseline in table:
            others = table.columns.drop(baseline)
            widths += [relative_width(median_interval(table[arm] / table[baseline])) for arm in others]
    return max(widths)


def summarise(times: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Times of paired_times -> a row per arm: median, q25, q75 (seconds), ratio, median_ratio (Intervals), rounds.

    ratio: time over the baseline's in the same round, mean with its 95% interval. median_ratio: the median of the
    same ratios (`median_interval`), which one slow round does not move.
    """
    table = times.pivot(index="round", columns="arm", values="seconds")
    rows = {
        arm: {
            "median": table[arm].median(),
            "q25": table[arm].quantile(0.25),
            "q75": table[arm].quantile(0.75),
            "ratio": paired_interval(table[arm] / table[baseline]),
            "median_ratio": median_interval(table[arm] / table[baseline]),
            "rounds": len(table),
        }
        for arm in times["arm"].unique()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def _frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["round", "arm", "scope", "seconds", "joules"])
