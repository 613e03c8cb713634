"""Frontier: reading and appending runs, interpolation in log time, paired verdicts."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndit.analysis.frontier import COLUMNS, append_run, fd_at_time, measured, read_runs, summary, time_at_fd
from dyndit.errors import InputError


def run_row(**changes) -> dict[str, object]:
    row = dict.fromkeys(COLUMNS) | {
        "run": "r", "machine": "cpu", "extractor": "digits", "metric": "FD-digits", "model": "m",
        "arm": "full-10", "family": "full", "solver": "ddim", "steps": 10, "cfg_scale": 1.5, "block": 0,
        "seed": 0, "num_images": 100, "share_of_blocks": 1.0, "mean_depth_cond": 12.0,
        "mean_depth_uncond": 12.0, "ms_per_picture": 10.0, "ms_denoiser": 9.0, "fd": 8.0, "role": "score",
        "plan": "",
    }  # fmt: skip
    return row | changes


# Full depth on a line in log time: FD = 16 at 4 steps, 4 less for each doubling of time.
FULL = {4: (4.0, 16.0), 8: (8.0, 12.0), 16: (16.0, 8.0)}


def frame(ms: float, fd: float, steps: int = 8, noise: float = 0.0, num_blocks: int = 5, **changes) -> pd.DataFrame:
    """Full depth, and one searched arm; all arms share a strong effect of the block's seed."""
    rng = np.random.default_rng(0)
    rows = []
    for block in range(num_blocks):
        shift = 3.0 * block
        for k, (time, value) in FULL.items():
            changed = {"arm": f"full-{k}", "steps": k, "ms_per_picture": time, "fd": value + shift}
            rows.append(run_row(block=block, **changed))
        arm = {"arm": "searched", "family": "searched", "steps": steps, "budget": 0.6, "share_of_blocks": 0.5}
        value = fd + shift + noise * rng.normal()
        rows.append(run_row(block=block, ms_per_picture=ms, fd=value, **{**arm, **changes}))
    return pd.DataFrame(rows)


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


def test_appended_rows_come_back(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    assert measured(file) == set()
    append_run(file, run_row(fd=8.123456789, budget=math.nan))
    append_run(file, run_row(block=1, arm='odd, "arm"'))
    append_run(file, run_row(block=7, role="search"))
    runs = read_runs(tmp_path)
    assert list(runs.columns) == list(COLUMNS)
    assert runs["fd"].iloc[0] == 8.123456789
    assert math.isnan(runs["budget"].iloc[0])
    assert runs["plan"].iloc[0] == ""
    assert measured(file) == {("full-10", 0), ('odd, "arm"', 1)}
    assert measured(tmp_path, role="search") == {("full-10", 7)}
    assert len(summary(runs)) == 2


def test_append_refuses_a_row_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'colour' unknown"):
        append_run(tmp_path / "runs.csv", run_row() | {"colour": 1})
    row = run_row()
    del row["fd"]
    with pytest.raises(InputError, match="'fd'"):
        append_run(tmp_path / "runs.csv", row)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that appends without end is killed; what it left is read without complaint."""
    file = tmp_path / "runs.csv"
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_frontier import run_row\n"
        "from dyndit.analysis.frontier import append_run\n"
        "from pathlib import Path\n"
        "for k in range(10**6): append_run(Path(sys.argv[1]), run_row(block=k))\n"
    )
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", code, str(file), here], env=os.environ)
    try:
        for _ in range(600):
            if file.exists() and len(file.read_text().splitlines()) > 20:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
    finally:
        process.kill()
        process.wait()
    blocks = sorted(block for _, block in measured(file))
    assert len(blocks) >= 20
    assert blocks == list(range(len(blocks)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("ms_per_picture", "ms"), "no column 'ms_per_picture'"),
        (lambda text: text.replace("8.5", "eight"), "line 2: fd is 'eight'"),
        (lambda text: text.replace("8.5", "inf"), "line 2: fd is 'inf'"),
        (lambda text: text.splitlines()[0], "no rows"),
        (lambda text: text + text.splitlines()[1] + "\n", "stands twice"),
        (lambda text: "", "unreadable"),
        (lambda text: text + '1,"2\n', "unreadable"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, spoil, message: str) -> None:
    file = tmp_path / "runs.csv"
    append_run(file, run_row(fd=8.5))
    file.write_text(spoil(file.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        read_runs(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs\.csv: no such file"):
        read_runs(tmp_path)


def test_a_quality_full_depth_never_reaches_saves_at_least_against_its_longest_time() -> None:
    row = searched(frame(ms=4.0, fd=7.0))  # full depth's best is 8, at 16 ms
    assert math.isnan(row["time_saved_equal_fd"].mean)
    assert row["time_saved_at_least"] == pytest.approx(1 - 4 / 16)
    assert math.isnan(searched(frame(ms=4.0, fd=17.0))["time_saved_at_least"])  # worse than its fastest
    assert math.isnan(searched(frame(ms=4.0, fd=12.0))["time_saved_at_least"])  # reached: the interval says it
