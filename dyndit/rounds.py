"""Times of arms that take turns.

Two processes on few cores slow each other far more than twofold, and a machine drifts while it is measured.
So every round runs each arm once, the order changes from round to round, and ratios are taken within a round. The
result is the median of these ratios with a distribution-free interval: one slow round moves neither. To measure the
method's own error, pass the same callable twice: the ratio must be 1 (an A/A null).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from dyndit.clock import Clock
from dyndit.errors import InputError
from dyndit.progress import Advance, progress_bar
from dyndit.stats import median_interval, paired_interval, relative_width


@dataclass(frozen=True)
class Reading:
    """One timed call, or a part of a call. joules: NaN unless a meter was read."""

    scope: str
    seconds: float
    joules: float = math.nan


@dataclass(frozen=True)
class Repeats:
    """Time arms for `rounds`, then go on until every ratio's interval is narrow or `most` rounds are done.

    until: width of the 95% interval (high - low) as a share of the ratio; 0: time exactly `rounds`. Repeated looks are
    harmless here: the width of the interval decides when to stop, not its place.
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
        """Return True to stop after `done` rounds. Past `rounds`, stop only when all orders came equally often."""
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
    arms: Mapping[str, Callable[[], Sequence[Reading]]],
    repeats: Repeats,
    baseline: str | None = None,
    *,
    title: str = "timing",
    on_round: Callable[[pd.DataFrame], str | None] | None = None,
) -> pd.DataFrame:
    """Let the arms take turns; each call times itself. -> columns round, arm, scope, seconds, joules.

    baseline: every other arm's ratio to this arm has to become narrow (default: the first arm). title: of the stage.
    on_round(table so far) is called after each round; what it returns is shown with the progress.
    """
    with progress_bar(title, unit="rounds") as advance:
        return _paired_rounds(arms, repeats, baseline or next(iter(arms)), advance, on_round)


def _paired_rounds(
    arms: Mapping[str, Callable[[], Sequence[Reading]]],
    repeats: Repeats,
    baseline: str,
    advance: Advance,
    on_round: Callable[[pd.DataFrame], str | None] | None,
) -> pd.DataFrame:
    names: list[str] = list(arms)
    rows: list[dict[str, Any]] = []
    most = max(repeats.rounds, repeats.most) if repeats.until else repeats.rounds
    advance(0, most, "warming up" if repeats.warmup else None)
    for name in names * repeats.warmup:
        arms[name]()

    def narrow() -> bool:
        return _widest_ratio(_frame(rows), baseline) <= repeats.until

    done = 0
    while not repeats.enough(done, len(names), narrow):
        for name in order_of(names, done):
            rows += [{"round": done, "arm": name, **asdict(reading)} for reading in arms[name]()]
        done += 1
        advance(done, most, "" if on_round is None else on_round(_frame(rows)))
    return _frame(rows)


def paired_times(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[], float] | None = None,
    until: float = 0.0,
    max_rounds: int = 60,
    title: str = "timing",
) -> pd.DataFrame:
    """Time the arms: one row per round and arm, columns round, arm, seconds.

    warmup: calls of each arm before the first round, not timed. clock: read before and after each timed call
    (default: the CPU's clock). For a GPU pass its `Clock`, because calls return before their work is done.
    until, max_rounds: see `Repeats`. title: of the stage that shows the progress.
    """
    clock = clock or Clock()

    def timed(run: Callable[[], object]) -> list[Reading]:
        began = clock()
        run()
        return [Reading("", clock() - began)]

    for name in list(arms) * warmup:
        arms[name]()
    calls = {name: (lambda run=run: timed(run)) for name, run in arms.items()}
    found: Any = paired_rounds(calls, Repeats(rounds, until, max_rounds, warmup=0), title=title)
    return found[["round", "arm", "seconds"]]


def _widest_ratio(times: pd.DataFrame, baseline: str) -> float:
    """Return the widest relative interval of any arm's median ratio to the baseline, over scopes with the baseline."""
    widths = [0.0]
    for _, part in times.groupby("scope"):
        table = part.pivot(index="round", columns="arm", values="seconds")
        if baseline in table:
            others = table.columns.drop(baseline)
            widths += [relative_width(median_interval(table[arm] / table[baseline])) for arm in others]
    return max(widths)


def summarise(times: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Summarise times: a row per arm with median, q25, q75 (seconds), ratio, median_ratio (Intervals), rounds.

    times: the output of `paired_times`. ratio: time over the baseline's time in the same round, mean with its 95%
    interval. median_ratio: median of the same ratios (`median_interval`); one slow round does not move it.
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


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["round", "arm", "scope", "seconds", "joules"])
