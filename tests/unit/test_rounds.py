"""Arms that take turns: their order, pairing, warm-up, and when there are rounds enough."""

import math
import time
from collections import Counter

import numpy as np
import pytest

from dyndit.errors import InputError
from dyndit.rounds import Reading, Repeats, order_of, paired_rounds, paired_times, summarise
from dyndit.stats import relative_width


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_every_arm_stands_equally_often_in_every_place(num: int) -> None:
    arms = [f"arm{k}" for k in range(num)]
    places = Counter((name, place) for k in range(2 * num) for place, name in enumerate(order_of(arms, k)))
    assert set(places.values()) == {2}
    assert len(places) == num * num


def test_rounds_warmup_and_synchronisation_are_counted() -> None:
    calls = Counter()
    arms = {name: lambda name=name: calls.update([name]) for name in "ab"}

    def clock() -> float:
        calls.update(["clock"])
        return time.perf_counter()

    times = paired_times(arms, rounds=4, warmup=3, clock=clock)
    assert calls == {"a": 7, "b": 7, "clock": 16}  # a clock of a device synchronises at each reading
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

    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    arms = {"a": lambda: arm(1.0), "again": lambda: arm(1.0), "slow": lambda: arm(3.0)}
    times = paired_times(arms, rounds=9, warmup=0)
    result = summarise(times, "a")
    assert times[times["arm"] == "a"]["seconds"].nunique() == 3  # the drift is in the times, not in the ratios
    for name, ratio in (("a", 1), ("again", 1), ("slow", 3)):
        interval = result.loc[name, "ratio"]
        assert (interval.low, interval.mean, interval.high) == pytest.approx((ratio, ratio, ratio))
    assert (result.loc["slow", "q25"], result.loc["slow", "median"]) == pytest.approx((3.0, 4.5))


def clocked(monkeypatch: pytest.MonkeyPatch, costs) -> dict[str, object]:
    """Arms whose calls take what costs(arm, count of calls so far) says, on a clock of their own."""
    clock, calls = {"now": 0.0}, Counter()
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])

    def run(name: str) -> None:
        clock["now"] += costs(name, sum(calls.values()))
        calls.update([name])

    return {name: (lambda name=name: run(name)) for name in ("full", "full again", "plan")}


def test_one_slow_round_moves_the_median_ratio_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(name: str, calls: int) -> float:
        return (0.5 if name == "plan" else 1.0) * (100.0 if calls == 10 else 1.0)

    arms = clocked(monkeypatch, cost)
    result = summarise(paired_times(arms, rounds=9, warmup=0), "full")
    hit = max(result["ratio"], key=lambda ratio: abs(math.log(ratio.mean)))
    assert hit.mean > 5  # the mean of the ratios is carried away ...
    for arm, ratio in (("full again", 1.0), ("plan", 0.5)):
        interval = result.loc[arm, "median_ratio"]
        assert (interval.mean, interval.low, interval.high) == pytest.approx((ratio, ratio, ratio))  # ... this is not


def noisy(spread: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    return lambda name, _: (0.5 if name == "plan" else 1.0) * math.exp(rng.normal(0, spread))


def test_rounds_go_on_until_every_ratio_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {}
    for spread in (0.0, 0.02, 0.04):
        arms = clocked(monkeypatch, noisy(spread))
        times = paired_times(arms, rounds=7, warmup=0, until=0.02, max_rounds=600)
        rounds[spread] = times["round"].nunique()
        table = summarise(times, "full")
        assert max(relative_width(table.loc[arm, "median_ratio"]) for arm in ("full again", "plan")) <= 0.02
        assert rounds[spread] % 6 == 0  # every order of three arms equally often
    assert 12 == rounds[0.0] < rounds[0.02] < rounds[0.04] < 600


def test_rounds_end_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    times = paired_times(clocked(monkeypatch, noisy(1.0)), rounds=3, warmup=0, until=0.02, max_rounds=20)
    assert times["round"].nunique() == 20
    assert relative_width(summarise(times, "full").loc["plan", "median_ratio"]) > 0.02
    assert paired_times(clocked(monkeypatch, noisy(1.0)), rounds=3, warmup=0)["round"].nunique() == 3


def test_stopping_on_width_leaves_the_estimate_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A/A null stopped as soon as it is narrow is off by nothing on average, and covered as often as it says."""
    found = []
    for seed in range(60):
        times = paired_times(clocked(monkeypatch, noisy(0.03, seed)), rounds=7, warmup=0, until=0.04, max_rounds=60)
        found.append(summarise(times, "full").loc["full again", "median_ratio"])
    assert np.mean([ratio.mean for ratio in found]) == pytest.approx(1, abs=0.004)
    assert np.mean([ratio.excludes(1) for ratio in found]) <= 0.15


def test_scopes_are_kept_apart_and_an_arm_may_lack_one() -> None:
    arms = {
        "full": lambda: [Reading("whole", 2.0, 5.0), Reading("part", 1.0)],
        "bare": lambda: [Reading("whole", 4.0)],
    }
    times = paired_rounds(arms, Repeats(rounds=8, until=0.1, warmup=0))
    assert list(times.columns) == ["round", "arm", "scope", "seconds", "joules"]
    assert times.groupby(["arm", "scope"]).size().to_dict() == {
        ("bare", "whole"): 8,
        ("full", "part"): 8,
        ("full", "whole"): 8,
    }
    assert times["joules"].notna().sum() == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"until": 1.0}, "--until 1"),
        ({"until": -0.1}, "--until -0.1"),
        ({"rounds": 9, "most": 8, "until": 0.02}, "--max-rounds 8"),
    ],
)
def test_impossible_repeats_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Repeats(**settings)
