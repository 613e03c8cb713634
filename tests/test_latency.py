"""Latency: order, pairing, warm-up, and intervals."""

import math
from collections import Counter

import numpy as np
import pytest

from dyndit.analysis import latency
from dyndit.analysis.intervals import Interval, non_inferior, paired_interval
from dyndit.analysis.latency import order_of, paired_times, summarise


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_every_arm_stands_equally_often_in_every_place(num: int) -> None:
    arms = [f"arm{k}" for k in range(num)]
    places = Counter((name, place) for k in range(2 * num) for place, name in enumerate(order_of(arms, k)))
    assert set(places.values()) == {2}
    assert len(places) == num * num


def test_rounds_warmup_and_synchronisation_are_counted() -> None:
    calls = Counter()
    arms = {name: lambda name=name: calls.update([name]) for name in "ab"}
    times = paired_times(arms, rounds=4, warmup=3, synchronize=lambda: calls.update(["sync"]))
    assert calls == {"a": 7, "b": 7, "sync": 16}
    assert list(times.columns) == ["round", "arm", "seconds"]
    assert len(times) == 8
    assert [list(group["arm"]) for _, group in times.groupby("round")][:2] == [["a", "b"], ["b", "a"]]
    assert (times["seconds"] >= 0).all()


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slows down twofold on the way; "slow" takes three times as long as "a" in every round."""
    clock = {"now": 0.0, "calls": 0}

    def arm(cost: float) -> None:
        clock["now"] += cost * (1 + clock["calls"] // 9 / 2)
        clock["calls"] += 1

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock["now"])
    arms = {"a": lambda: arm(1.0), "again": lambda: arm(1.0), "slow": lambda: arm(3.0)}
    times = paired_times(arms, rounds=9, warmup=0)
    result = summarise(times, "a")
    assert times[times["arm"] == "a"]["seconds"].nunique() == 3  # the drift is in the times, not in the ratios
    for name, ratio in (("a", 1), ("again", 1), ("slow", 3)):
        interval = result.loc[name, "ratio"]
        assert (interval.low, interval.mean, interval.high) == pytest.approx((ratio, ratio, ratio))
    assert (result.loc["slow", "q25"], result.loc["slow", "median"]) == pytest.approx((3.0, 4.5))


def test_interval_is_student_t_of_the_differences() -> None:
    a, b = [3.0, 5.0, 4.0, 6.0], [1.0, 2.0, 3.0, 2.0]
    interval = paired_interval(a, b)
    half = 3.182446305 * np.std([2, 3, 1, 4], ddof=1) / 2  # t quantile .975 with 3 degrees of freedom
    assert interval.mean == pytest.approx(2.5)
    assert (interval.low, interval.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))
    assert interval.excludes(0)
    assert not interval.excludes(2)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [not paired_interval(rng.normal(1, 2, 5)).excludes(1) for _ in range(2000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_pairing_cancels_what_the_seeds_do() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 5, 6)
    full, arm = seeds + rng.normal(0, 0.1, 6), seeds + 0.5 + rng.normal(0, 0.1, 6)
    assert paired_interval(arm, full).excludes(0)
    assert not paired_interval(arm - full.mean()).excludes(0)  # unpaired, the same difference drowns


def test_one_block_has_no_limits_and_proves_nothing() -> None:
    single = paired_interval([1.0])
    assert single.mean == 1
    assert math.isnan(single.low)
    assert not single.excludes(0)
    assert not non_inferior(single, 100, 0.05)
    assert math.isnan(paired_interval([]).mean)


def test_interval_text() -> None:
    assert str(Interval(8.41, 8.19, 8.63)) == "8.41 ± 0.22"
    assert f"{Interval(-0.5, -0.75, -0.25):+.1f}" == "-0.5 ± 0.2"
    assert f"{Interval(1, math.nan, math.nan):.1f}" == "1.0"
    assert str(Interval(math.nan, math.nan, math.nan)) == "–"


def test_unchanged_quality_needs_the_whole_interval() -> None:
    assert non_inferior(Interval(0.2, 0.0, 0.4), reference=10, margin=0.05)
    assert not non_inferior(Interval(0.2, -0.2, 0.6), reference=10, margin=0.05)
