"""runs.csv: appending rows, and reading them back."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.runs import COLUMNS, OPTIONAL, RUNS, TEXT, append_run, measured, read_runs
from dyndit.errors import InputError
from support.runs import frame, run_row


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
        "from support.runs import run_row\n"
        "from dyndit.analysis.report.runs import append_run\n"
        "from pathlib import Path\n"
        "for k in range(10**6): append_run(Path(sys.argv[1]), run_row(block=k))\n"
    )
    here = str(Path(__file__).parents[2])
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


@pytest.mark.parametrize("missing", ["macs", "threads", "fd"])
def test_every_column_is_required(missing: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    pd.DataFrame([run_row()]).drop(columns=missing).to_csv(file, index=False)
    with pytest.raises(InputError, match=f"no column '{missing}'"):
        read_runs(file)
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"runs\.csv: columns run, machine, .*; expected run, machine"):
        append_run(file, run_row(block=1))
    assert file.read_bytes() == before


def test_only_some_numbers_may_be_empty(tmp_path: Path) -> None:
    numbers = [name for name in COLUMNS if name not in TEXT]
    for name in numbers:
        (tmp_path / name).mkdir()
        append_run(tmp_path / name / RUNS, run_row(**{name: None}))
        if name in OPTIONAL:
            assert read_runs(tmp_path / name)[name].isna().all()
        else:
            with pytest.raises(InputError, match=f"line 2: {name} is 'nan'"):
                read_runs(tmp_path / name)


def test_parquet_reads_as_csv_does_or_says_what_it_needs(tmp_path: Path) -> None:
    runs = frame(ms=5.0, fd=12.0).assign(threads=2)
    try:
        runs.to_parquet(tmp_path / "runs.parquet")
    except ImportError:
        (tmp_path / "runs.parquet").write_bytes(b"PAR1")
        with pytest.raises(InputError, match=r"runs\.parquet: needs pyarrow, which is not installed"):
            read_runs(tmp_path)
        return
    runs.to_csv(tmp_path / "runs.csv", index=False)
    pd.testing.assert_frame_equal(read_runs(tmp_path / "runs.parquet"), read_runs(tmp_path), check_dtype=False)
