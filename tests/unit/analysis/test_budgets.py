"""Frontiers of all resamples at once are those of one resample after the other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndit.analysis.report.budgets import Arms, _against_full, _area, _frontier, _saved
from dyndit.stats import bootstrap_interval

BLOCKS = 4


@st.composite
def arms(draw: st.DrawFn, family: str = "full", least: int = 1) -> Arms:
    """Arms of one family, fastest first, also with equal distances."""
    num = draw(st.integers(least, 6))
    ms = np.cumsum(draw(st.lists(st.floats(0.1, 10), min_size=num, max_size=num)))
    fds = draw(st.lists(st.lists(st.integers(1, 9), min_size=BLOCKS, max_size=BLOCKS), min_size=num, max_size=num))
    return Arms([f"{family}-{k}" for k in range(num)], np.array([family] * num), ms, np.array(fds, float))


def resamples(seed: int, num: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(BLOCKS, [1 / BLOCKS] * BLOCKS, size=num) / BLOCKS


@given(found=arms(), log_ms=st.lists(st.floats(-3, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_frontiers_join_the_arms_that_no_faster_arm_equals(found: Arms, log_ms: list[float], seed: int) -> None:
    weights = resamples(seed)
    values = _frontier(found, weights, np.array(log_ms))
    for line, row in zip(weights @ found.fds.T, values, strict=True):
        kept = [k for k in range(len(line)) if all(line[k] < line[j] for j in range(k))]
        assert row == pytest.approx(np.interp(log_ms, np.log(found.ms)[kept], line[kept]), rel=1e-9)


def saved(ms: float, log_ms: np.ndarray, line: np.ndarray, fd: float) -> float:
    if line[0] < fd:
        return -math.inf
    for k, (here, log) in enumerate(zip(line, log_ms, strict=True)):
        if here <= fd:
            share = (line[k - 1] - fd) / (line[k - 1] - here) if k else 1.0
            return 1 - ms / math.exp(log_ms[k - 1] + share * (log - log_ms[k - 1]) if k else log)
    return math.inf


@given(
    full=arms(),
    fds=st.lists(st.floats(0.5, 9.5), min_size=7, max_size=7),
    ms=st.floats(0.1, 30),
    seed=st.integers(0, 99),
)
def test_time_is_saved_to_where_full_depth_first_reaches_the_distance(
    full: Arms, fds: list[float], ms: float, seed: int
) -> None:
    lines, log_ms = resamples(seed) @ full.fds.T, np.log(full.ms)
    expected = [saved(ms, log_ms, line, fd) for line, fd in zip(lines, fds, strict=True)]
    assert _saved(ms, log_ms, lines, np.array(fds)) == pytest.approx(expected, rel=1e-9)


@given(full=arms(least=2), ours=arms("searched", least=1), place=st.floats(0, 1))
def test_distances_at_equal_time_are_read_between_two_arms(full: Arms, ours: Arms, place: float) -> None:
    ms = full.ms[0] + place * (full.ms[-1] - full.ms[0])
    both = Arms(
        [*full.names, "ours"],
        np.append(full.families, "searched"),
        np.append(full.ms, ms),
        np.vstack([full.fds, ours.fds[:1]]),
    )
    found = _against_full(both)["fd_diff"]

    def difference(weights: np.ndarray) -> np.ndarray:
        lines = weights @ full.fds.T
        return weights @ ours.fds[0] - np.array([np.interp(math.log(ms), np.log(full.ms), line) for line in lines])

    expected = bootstrap_interval(difference, BLOCKS)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-9)


@given(full=arms(least=2), quarters=st.integers(-8, 8))
def test_a_frontier_that_is_lower_everywhere_has_that_area(full: Arms, quarters: int) -> None:
    shift = quarters / 4  # sums are exact, so equal distances stay equal
    lower = Arms(full.names, full.families, full.ms, full.fds + shift)
    found = _area(lower, full)
    assert found["fd_diff"].mean == pytest.approx(shift, abs=1e-9)
    assert found["fd_diff"].half == pytest.approx(0, abs=1e-9)
