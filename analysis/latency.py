"""Speed: arms timed against each other in one process, round by round.

Two processes on few cores slow each other far more than twofold, and a machine drifts while it is measured.
So every round runs each arm once, the order changes from round to round, and ratios are taken within a
round. To see what the method itself adds, pass the same callable twice: the ratio must be 1 (an A/A null).
"""

import time
from collections.abc import Callable, Mapping

import pandas as pd

from dyndit.analysis.intervals import paired_interval


def order_of(arms: list[str], round_index: int) -> list[str]:
    """Return the arms in this round's order: rotated by one each round, every second round reversed.

    Over 2 · len(arms) rounds each arm stands equally often in each place, before and after each neighbour.
    """
    shift = (round_index // 2) % len(arms)
    order = arms[shift:] + arms[:shift]
    return order[::-1] if round_index % 2 else order


def paired_times(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    synchronize: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """Time the arms: one row per round and arm, columns round, arm, seconds.

    warmup: calls of each arm before the first round, not timed. synchronize: called before and after each
    timed call; pass torch.cuda.synchronize on a GPU, where calls return before their work is done.
    """
    wait = synchronize or (lambda: None)
    names = list(arms)
    for name in names * warmup:
        arms[name]()
    rows = []
    for k in range(rounds):
        for name in order_of(names, k):
            wait()
            start = time.perf_counter()
            arms[name]()
            wait()
            rows.append({"round": k, "arm": name, "seconds": time.perf_counter() - start})
    return pd.DataFrame(rows, columns=["round", "arm", "seconds"])


def summarise(times: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Times of paired_times -> a row per arm: median, q25, q75 (seconds), ratio (Interval), rounds.

    ratio: time over the baseline's in the same round, mean with its 95% interval.
    """
    table = times.pivot(index="round", columns="arm", values="seconds")
    rows = {
        arm: {
            "median": table[arm].median(),
            "q25": table[arm].quantile(0.25),
            "q75": table[arm].quantile(0.75),
            "ratio": paired_interval(table[arm] / table[baseline]),
            "rounds": len(table),
        }
        for arm in times["arm"].unique()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")
