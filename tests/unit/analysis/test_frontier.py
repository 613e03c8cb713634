"""Frontier: interpolation in log time, paired verdicts; areas and budgets."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndit.analysis.report.budgets import against_full, areas, budget_grid, winners
from dyndit.analysis.report.frontier import fd_at_time, summary, time_at_fd
from dyndit.analysis.report.runs import append_run, read_runs
from support.runs import frame, run_row

# Full depth on a line in log time: FD = 16 at 4 steps, 4 less for each doubling of time.


def searched(runs: pd.DataFrame) -> pd.Series:
    table = summary(runs)
    return table[table["arm"] == "searched"].iloc[0]


def test_an_arm_on_the_frontier_saves_nothing() -> None:
    row = searched(frame(ms=math.sqrt(32), fd=14.0))  # halfway between 4 and 8 ms in log time
    assert row["time_saved_equal_fd"].mean == pytest.approx(0, abs=1e-12)
    assert row["fd_diff_equal_time"].mean == pytest.approx(0, abs=1e-12)


def test_savings_of_a_better_arm_are_exact() -> None:
    row = searched(frame(ms=5.0, fd=12.0))
    assert row["time_saved"] == pytest.approx(1 - 5 / 8)
    assert row["time_saved_equal_fd"].mean == pytest.approx(1 - 5 / 8)
    assert row["fd_diff"].mean == pytest.approx(0)
    assert row["fd_diff_equal_time"].mean == pytest.approx(12 - (16 - 4 * math.log2(5 / 4)))
    assert row["unchanged"] is True
    assert row["better"]
    assert not row["worse"]


def test_differences_are_paired_by_block() -> None:
    """The seeds move FD by 3 a block; the paired difference of 0.3 is seen all the same."""
    row = searched(frame(ms=5.0, fd=12.3, noise=0.02))
    assert row["fd"].half > 3
    assert row["fd_diff"].half < 0.1
    assert row["fd_diff"].excludes(0)
    assert row["unchanged"]  # 0.3 is less than 5% of 18


def test_unchanged_quality_depends_on_the_margin() -> None:
    runs = frame(ms=5.0, fd=13.0, noise=0.02)
    assert summary(runs, margin=0.10).iloc[-1]["unchanged"]
    assert not summary(runs, margin=0.03).iloc[-1]["unchanged"]


@pytest.mark.parametrize(
    ("ms", "fd", "note"),
    [(5.0, 7.0, "FD below the best"), (5.0, 17.0, "FD above the fastest"), (3.0, 12.0, "time outside")],
)
def test_nothing_is_extrapolated(ms: float, fd: float, note: str) -> None:
    row = searched(frame(ms=ms, fd=fd))
    assert note in row["note"]
    key = "fd_diff_equal_time" if "time" in note else "time_saved_equal_fd"
    assert math.isnan(row[key].mean)


def test_full_depth_is_not_compared_with_itself() -> None:
    table = summary(frame(ms=5.0, fd=12.0))
    full = table[table["family"] == "full"]
    assert full["time_saved"].isna().all()
    assert full["unchanged"].isna().all()


def test_without_full_depth_there_is_no_verdict() -> None:
    runs = frame(ms=5.0, fd=12.0)
    row = searched(runs[runs["family"] != "full"])
    assert row["unchanged"] is None
    assert "fewer than two" in row["note"]


def test_search_seeds_never_count() -> None:
    runs = frame(ms=5.0, fd=12.0)
    search = runs[runs["arm"] == "searched"].assign(fd=1.0, role="search")
    assert searched(pd.concat([runs, search]))["fd"] == searched(runs)["fd"]


def test_machines_are_kept_apart() -> None:
    slow = frame(ms=5.0, fd=12.0)
    fast = slow.assign(machine="gpu", ms_per_picture=slow["ms_per_picture"] / 10)
    table = summary(pd.concat([slow, fast]))
    assert len(table) == 8
    arms = table[table["arm"] == "searched"].set_index("machine")
    assert arms.loc["cpu", "ms"] == pytest.approx(10 * arms.loc["gpu", "ms"])
    assert arms.loc["cpu", "time_saved"] == pytest.approx(arms.loc["gpu", "time_saved"])


@given(weight=st.floats(0, 1), times=st.lists(st.floats(0.1, 100), min_size=2, max_size=6, unique=True))
def test_time_and_fd_are_inverse_on_a_falling_frontier(weight: float, times: list[float]) -> None:
    times = np.sort(np.array(times))
    fds = 20.0 - 3.0 * np.arange(len(times))
    fd = fds[-1] + weight * (fds[0] - fds[-1])
    time = time_at_fd(times, fds, fd)
    assert times[0] * (1 - 1e-9) <= time <= times[-1] * (1 + 1e-9)
    assert fd_at_time(times, fds, min(max(time, times[0]), times[-1])) == pytest.approx(fd, abs=1e-4)


def test_a_bump_gives_full_depth_the_benefit() -> None:
    times, fds = np.array([1.0, 2.0, 4.0, 8.0]), np.array([10.0, 6.0, 8.0, 4.0])
    assert time_at_fd(times, fds, 7.0) == pytest.approx(2**0.75)  # the first crossing, not the one after 4


def test_a_quality_full_depth_never_reaches_saves_at_least_against_its_longest_time() -> None:
    row = searched(frame(ms=4.0, fd=7.0))  # full depth's best is 8, at 16 ms
    assert math.isnan(row["time_saved_equal_fd"].mean)
    assert row["time_saved_at_least"] == pytest.approx(1 - 4 / 16)
    assert math.isnan(searched(frame(ms=4.0, fd=17.0))["time_saved_at_least"])  # worse than its fastest
    assert math.isnan(searched(frame(ms=4.0, fd=12.0))["time_saved_at_least"])  # reached: the interval says it


def test_precision_compilation_threads_and_batches_are_kept_apart() -> None:
    runs = frame(ms=5.0, fd=12.0)
    for name, value in (("compiled", "compiled"), ("dtype", "float16"), ("threads", 2), ("batch_size", 64)):
        both = pd.concat([runs, runs.assign(**{name: value, "ms_per_picture": runs["ms_per_picture"] / 10})])
        table = summary(both)
        assert len(table) == 8
        assert table.loc[table["arm"] == "searched", "time_saved"].tolist() == pytest.approx([0.375, 0.375])


def test_a_share_of_blocks_may_be_unknown(tmp_path: Path) -> None:
    append_run(tmp_path / "runs.csv", run_row(share_of_blocks=None))
    assert math.isnan(summary(read_runs(tmp_path))["share_of_blocks"].iloc[0])


# --- areas, budgets ----------- -----------------------------------------------------------------------------------


def family(name: str, points: dict[float, float], noise: float = 0.0, num_blocks: int = 5) -> pd.DataFrame:
    """Arms of a family, ms -> FD, on the blocks of `frame`."""
    rng = np.random.default_rng(len(name))
    rows = [
        run_row(arm=f"{name}-{ms:g}", family=name, block=b, ms_per_picture=ms, fd=fd + 3.0 * b + noise * rng.normal())
        for b in range(num_blocks)
        for ms, fd in points.items()
    ]
    return pd.DataFrame(rows)


def full_depth() -> pd.DataFrame:
    runs = frame(ms=5.0, fd=12.0)
    return runs[runs["family"] == "full"]


def test_area_of_a_parallel_frontier_is_its_distance_times_the_log_time() -> None:
    """Full depth less 1.5 FD, over 5.66 to 16 ms; a bad arm between is no part of the frontier."""
    ours = {math.sqrt(32): 12.5, 8.0: 10.5, 10.0: 99.0, 16.0: 6.5}
    row = areas(pd.concat([full_depth(), family("stale", ours)])).iloc[0]
    assert row["family"] == "stale"
    assert (row["from_ms"], row["to_ms"]) == pytest.approx((math.sqrt(32), 16.0))
    assert row["fd_diff"].mean == pytest.approx(-1.5)
    assert row["area"].mean == pytest.approx(-1.5 * math.log(16 / math.sqrt(32)))
    assert row["area"].low == pytest.approx(row["area"].high)  # the blocks' shift is common to both


def test_area_needs_a_common_range() -> None:
    table = areas(pd.concat([full_depth(), family("switch", {5.0: 9.0}), family("far", {100.0: 1.0, 200.0: 0.5})]))
    assert table["family"].tolist() == ["switch", "far"]
    assert all(math.isnan(area.mean) for area in table["area"])


def test_winners_take_the_best_arm_within_the_budget() -> None:
    runs = [full_depth(), family("searched", {5.0: 12.0, 9.0: 9.0}, 0.05), family("stale", {5.0: 10.0}, 0.05)]
    table = winners(pd.concat(runs)).set_index("budget_ms")
    assert table.loc[4, "winner"] == "full"
    assert table.loc[4, "best"] == {"full": ("full-4", pytest.approx(22.0))}
    assert table.loc[5, "winner"] == table.loc[8, "winner"] == "stale"
    assert table.loc[5, "clear"]
    assert table.loc[5, "margin"].mean == pytest.approx(2.0, abs=0.2)
    assert table.loc[5, "beats_searched"] == ["stale"]
    assert table.loc[9, "winner"] == "searched"
    assert table.loc[9, "arm"] == "searched-9"
    assert table.loc[9, "beats_searched"] == []


def test_choosing_among_many_equal_arms_is_no_advantage() -> None:
    """Fifty arms of the same mean against one: the best of them looks better, cross-fitting says it is not."""
    rng, rows = np.random.default_rng(3), []
    for arm in range(51):
        name = "many" if arm else "one"
        noise = rng.normal(size=5) if arm else [0.1, -0.1, 0.0, 0.1, -0.1]
        rows += [run_row(arm=f"{name}-{arm}", family=name, block=b, fd=10 + noise[b]) for b in range(5)]
    row = winners(pd.DataFrame(rows)).iloc[0]
    assert row["best"]["one"][1] - row["best"]["many"][1] > 0.7
    assert row["winner"] == "many"
    assert not row["clear"]


def test_budgets_are_round_and_within_the_times() -> None:
    assert budget_grid(3.9, 16) == [4, 5, 6, 7, 8, 9, 10, 12.5, 15]
    assert budget_grid(0.95, 1.3) == [1, 1.25]


def test_bootstrapped_savings_agree_with_the_blockwise_ones() -> None:
    runs = frame(ms=5.0, fd=12.0, noise=0.1)
    row, mine = against_full(runs).iloc[0], searched(runs)
    assert row["time_saved"].mean == pytest.approx(mine["time_saved_equal_fd"].mean, abs=0.01)
    assert row["fd_diff"].mean == pytest.approx(mine["fd_diff_equal_time"].mean)
    assert 0.6 < row["fd_diff"].half / mine["fd_diff_equal_time"].half < 1.3
    beyond = against_full(frame(ms=5.0, fd=7.0)).iloc[0]
    assert beyond["time_saved"].mean == math.inf
    assert beyond["saved_at_least"] == pytest.approx(1 - 5 / 16)
    assert against_full(frame(ms=5.0, fd=17.0)).iloc[0]["time_saved"].mean == -math.inf
    assert math.isnan(against_full(frame(ms=3.0, fd=12.0)).iloc[0]["fd_diff"].mean)
