"""One progress for all long work: a bar on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from dyndit import progress
from dyndit.progress import progress_bar, tracked


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture) -> list[str]:
    found = capsys.readouterr()
    assert not found.out
    return found.err.splitlines()


def test_lines_come_now_and_then_with_news_and_at_the_end(clock: list[float], capsys) -> None:
    with progress_bar("sampling", every=30) as advance:
        for done in range(101):
            clock[0] = float(done)
            advance(done, 100, "loss 0.5" if done == 50 else None)
    assert lines(capsys) == [
        "sampling: 30 of 100, 30 s, about 70 s left",
        "sampling: 50 of 100, 50 s, about 50 s left, loss 0.5",
        "sampling: 80 of 100, 80 s, about 20 s left, loss 0.5",
        "sampling: 100 of 100, 2 min, loss 0.5",
    ]


def test_what_was_done_before_says_nothing_of_the_speed(clock: list[float], capsys) -> None:
    with progress_bar("sampling", every=10) as advance:
        advance(900, 1000)
        for done in (910, 920):
            clock[0] += 10
            advance(done, 1000)
    assert lines(capsys) == [
        "sampling: 910 of 1000, 10 s, about 90 s left",
        "sampling: 920 of 1000, 20 s, about 80 s left",
    ]


def test_hours_are_hours(clock: list[float], capsys) -> None:
    with progress_bar("training") as advance:
        advance(0, 1000)
        clock[0] = 3600.0
        advance(100, 1000)
    assert lines(capsys) == ["training: 100 of 1000, 60 min, about 9.0 h left"]


def test_items_are_tracked(capsys) -> None:
    assert list(tracked("abc", "encoding")) == ["a", "b", "c"]
    assert [line.split(",")[0] for line in lines(capsys)] == ["encoding: 3 of 3"]
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
