"""Check the timing itself on work of known time: the same work twice, a sleep, and twice the work."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from dyndit.analysis.compare.bench_verdict import is_null, span
from dyndit.clock import Clock
from dyndit.rounds import paired_times, summarise


@dataclass(frozen=True)
class Check:
    """Result of one check of the timing."""

    name: str
    found: str
    expected: str
    passed: bool


@dataclass(frozen=True)
class Work:
    """Work for the self-check: `one` call, `two` times the same work in one call, a `wait` of known length."""

    one: Callable[[], object]
    two: Callable[[], object]
    wait: Callable[[], object]
    wait_seconds: float
    clock: Clock = field(default_factory=Clock)


def known_work(device: str = "cpu") -> Work:
    """Make work of known time: one matrix product, two products, a sleep of 50 ms."""
    side = 4096 if device.startswith("cuda") else 1024
    a, b, out = (torch.full((side, side), 0.5, device=device) for _ in range(3))
    seconds = 0.05

    def products(num: int) -> None:
        for _ in range(num):
            torch.mm(a, b, out=out)

    return Work(partial(products, 1), partial(products, 2), partial(time.sleep, seconds), seconds, Clock(device))


def self_check(work: Work, rounds: int = 60) -> list[Check]:
    """Check the timing on work of known time: an A/A null, a sleep, and twice the work.

    Run nothing else meanwhile. The null's interval is at 95%: one in twenty misses 1 even on a quiet machine.
    """
    arms = {"one": work.one, "again": work.one, "two": work.two}
    times = paired_times(arms, rounds=rounds, warmup=3, clock=work.clock)
    table = summarise(times, "one")
    null, double = table.loc["again", "median_ratio"], table.loc["two", "median_ratio"]
    waits = paired_times({"wait": work.wait}, rounds=max(rounds // 3, 6), warmup=1)
    waited, asked = float(waits["seconds"].median()), work.wait_seconds
    kept = abs(waited - asked) <= 0.02 * asked
    return [
        Check("the same twice (A/A)", span(null), "covers 1, off by at most 0.01", is_null(null)),
        Check(f"a sleep of {1e3 * asked:g} ms", f"{1e3 * waited:.3f} ms", "within 2%", kept),
        Check("two matrix products to one", span(double), "2.00 ± 0.04", abs(double.mean - 2) <= 0.04),
    ]
