"""One progress for all long work: a bar on a terminal and in a notebook, lines elsewhere."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from dyndit import progress
from dyndit.progress import progress_bar, tracked


@pytest.fixture(autouse=True)
def _aloud(monkeypatch) -> None:
    monkeypatch.delenv("DYNDIT_PROGRESS", raising=False)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, to be set by the test. Nothing is said but when the work moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "BEAT", 3600.0)
    return now


def lines(capsys: pytest.CaptureFixture) -> list[str]:
    found = capsys.readouterr()
    assert not found.out
    return found.err.splitlines()


def test_lines_come_at_once_then_in_doubling_gaps_and_at_the_end(clock: list[float], capsys) -> None:
    with progress_bar("sampling", unit="steps", every=30) as advance:
        advance(0, 100)
        for done in range(1, 101):
            clock[0] = float(done)
            advance(done, 100, "loss 0.5" if done == 50 else None)
    assert lines(capsys) == [
        "sampling: 1 of 100 steps, 1 s, about 99 s left",
        "sampling: 2 of 100 steps, 2 s, about 98 s left",
        "sampling: 4 of 100 steps, 4 s, about 96 s left",
        "sampling: 8 of 100 steps, 8 s, about 92 s left",
        "sampling: 16 of 100 steps, 16 s, about 84 s left",
        "sampling: 32 of 100 steps, 32 s, about 68 s left",
        "sampling: 62 of 100 steps, 62 s, about 38 s left, loss 0.5",
        "sampling: 92 of 100 steps, 92 s, about 8 s left, loss 0.5",
        "sampling: 100 of 100 steps, 2 min, loss 0.5",
    ]


def test_a_short_stage_says_nothing(clock: list[float], capsys) -> None:
    with progress_bar("sampling") as advance:
        advance(1, 2)
        clock[0] = 0.9
        advance(2, 2)
    assert list(tracked("abc", "encoding")) == ["a", "b", "c"]
    assert not lines(capsys)


def test_a_stage_that_does_not_move_says_its_name_all_the_same(monkeypatch, capsys) -> None:
    said = threading.Event()
    monkeypatch.setattr(progress, "BEAT", 0.01)
    monkeypatch.setattr(progress, "PATIENCE", 0.02)

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            said.set()
            return super().write(text)

    with progress_bar("loading", Console(file=(heard := Heard()), width=80)):
        assert said.wait(30)
    assert heard.getvalue().startswith("loading: 0 s")


def test_what_was_done_before_says_nothing_of_the_speed(clock: list[float], capsys) -> None:
    with progress_bar("sampling", every=10) as advance:
        advance(900, 1000)
        for done in (910, 920):
            clock[0] += 10
            advance(done, 1000)
    assert lines(capsys) == [
        "sampling: 910 of 1000, 10 s, about 90 s left",
        "sampling: 920 of 1000, 20 s, about 80 s left",
        "sampling: 920 of 1000, 20 s, about 80 s left",
    ]


def test_hours_are_hours(clock: list[float], capsys) -> None:
    with progress_bar("training") as advance:
        advance(0, 1000)
        clock[0] = 3600.0
        advance(100, 1000)
    assert lines(capsys)[0] == "training: 100 of 1000, 60 min, about 9.0 h left"


def test_a_stage_within_is_shown_behind_the_outer_one(clock: list[float], capsys) -> None:
    with progress_bar("measuring") as outer:
        outer(0, 2)
        outer(1, 2)
        with progress_bar("sampling", unit="steps") as inner:
            inner(0, 8)
            clock[0] = 4.0
            inner(2, 8)
        clock[0] = 30.0
        outer(1, 2)
    assert lines(capsys)[:2] == [
        "measuring: 1 of 2, 4 s, about 4 s left, (sampling: 2 of 8 steps, 4 s, about 12 s left)",
        "measuring: 1 of 2, 30 s, about 30 s left",
    ]


def test_a_silent_stage_silences_what_is_within(clock: list[float], capsys, monkeypatch) -> None:
    def work(**options: object) -> None:
        with progress_bar("outer", **options), progress_bar("inner") as advance:
            clock[0] += 5
            advance(1, 1)

    work(shown=False)
    monkeypatch.setenv("DYNDIT_PROGRESS", "off")
    work()
    assert not lines(capsys)
    monkeypatch.delenv("DYNDIT_PROGRESS")
    work()
    assert "inner: 1 of 1" in lines(capsys)[0]


def test_items_are_tracked(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert list(tracked("abc", "encoding", unit="letters")) == ["a", "b", "c"]
    assert [line.split(",")[0] for line in lines(capsys)] == ["encoding: 0 s", "encoding: 3 of 3 letters"]
    assert list(tracked("abc", "encoding", shown=False)) == ["a", "b", "c"]
    assert not lines(capsys)


def test_a_terminal_shows_a_bar() -> None:
    text = io.StringIO()
    with progress_bar("training", Console(file=text, force_terminal=True, width=120)) as advance:
        advance(5, 12)
        advance(7, 12, "loss 0.25")
    shown = text.getvalue()
    assert "training" in shown
    assert "7/12" in shown
    assert "loss 0.25" in shown


def test_a_notebook_shows_tqdms_bar(monkeypatch, capsys) -> None:
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, version_info=(8,)))
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress_bar("training", unit="steps") as advance:
        advance(5, 12)
        advance(7, 12, "loss 0.25")
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "7/12" in shown
    assert "loss 0.25" in shown
