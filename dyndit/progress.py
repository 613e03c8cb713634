"""Say how far long work is, on standard error: a bar on a terminal and in a notebook, else a line now and then.

Long work is a stage: it has a name, and counts what is done if it can. A stage that is over within `PATIENCE` seconds
leaves no line. A longer one says its name, how far it is and the time left at 1, 2, 4, ... seconds, then every half
minute, and at its end, whether it moved or not. A stage within a stage is shown behind the outer one, in its line:

    measuring the plan: 1 of 2, 12 s, about 12 s left (sampling 512 pictures: 40 of 80 steps, 6 s, about 6 s left)

`DYNDIT_PROGRESS=off` in the environment keeps every stage silent. Of several processes of one run, the first speaks.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds after which a stage says its name where no bar can be shown."""
BEAT = 0.5
"""Seconds between two looks at a stage that does not move."""


class Advance(Protocol):
    """Reports how far the work is.  words: further news, for example "loss 0.12"; shown until the next words."""

    def __call__(self, done: int, total: int, words: str | None = None) -> None:
        """Show that `done` of `total` are done."""


class _Stage:
    """What is known of a stage. Nothing is printed here."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self.began = title, unit, time.monotonic()
        self.done, self.total, self.words = 0, 0, ""
        self.first: tuple[int, float] | None = None
        self.inner: _Stage | None = None
        self.moved: Callable[[], None] = lambda: None

    def advance(self, done: int, total: int, words: str | None = None) -> None:
        """Note how far the work is. What the first call reports was done before: it tells nothing about the speed."""
        self.done, self.total, self.words = done, total, self.words if words is None else words
        self.first = self.first or (done, time.monotonic())
        self.moved()

    @property
    def spent(self) -> float:
        """Return the seconds since the stage began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Return the estimated seconds left; None if they cannot be told yet."""
        before, since = self.first or (0, 0.0)
        if not before < self.done < self.total:
            return None
        return (time.monotonic() - since) / (self.done - before) * (self.total - self.done)

    @property
    def news(self) -> str:
        """Return the last words, and the stage within."""
        inner = self.inner  # another thread may end it meanwhile
        return " ".join(filter(None, (self.words, inner and f"({inner.line})")))

    @property
    def line(self) -> str:
        """Return the whole state: "sampling: 40 of 80 steps, 12 s, about 12 s left, loss 0.12"."""
        count = f"{self.done} of {self.total} {self.unit}".rstrip() if self.total else ""
        left = "" if self.left is None else f"about {_span(self.left)} left"
        return f"{self.title}: " + ", ".join(filter(None, (count, _span(self.spent), left, self.news)))


_here = threading.local()
"""`_here.stage`: the stage that is under way in this thread."""


@contextmanager
def progress_bar(
    title: str, console: Console | None = None, *, unit: str = "", shown: bool = True, every: float = 30.0
) -> Iterator[Advance]:
    """Show a stage while open, with elapsed and remaining time. Yield the function that moves it. Calls are optional.

    unit: what is counted, for example "steps". shown: False also silences the stages within. every: seconds between two
    lines, at most, where there is no bar. Work that the first call reports was done before: it does not count in the
    estimate of the remaining time.
    """
    stage, outer = _Stage(title, unit), getattr(_here, "stage", None)
    _here.stage = stage
    try:
        if outer is not None:
            stage.moved, outer.inner = outer.moved, stage
            yield stage.advance
        elif not shown or _is_silent():
            yield stage.advance
        else:
            with _face(stage, console or Console(stderr=True), every):
                yield stage.advance
    finally:
        _here.stage = outer
        if outer is not None:
            outer.inner = None


def tracked(items: Sequence[Item], title: str, *, unit: str = "", shown: bool = True) -> Iterator[Item]:
    """Yield the items, and show how many are done."""
    with progress_bar(title, unit=unit, shown=shown) as advance:
        advance(0, len(items))
        for done, item in enumerate(items, 1):
            yield item
            advance(done, len(items))


def _is_silent() -> bool:
    """Tell if the user wants silence, or another process of the same run speaks."""
    wanted = os.environ.get("DYNDIT_PROGRESS", "").lower()
    return wanted in ("0", "off", "no", "false") or os.environ.get("RANK", "0") != "0"


def _face(stage: _Stage, console: Console, every: float) -> AbstractContextManager[None]:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "IPKernelApp" in getattr(shell, "config", ()):
        return _in_notebook(stage)
    return _on_terminal(stage, console) if console.is_terminal else _in_lines(stage, console, every)


@contextmanager
def _on_terminal(stage: _Stage, console: Console) -> Iterator[None]:
    def drawn() -> Table:
        count = f"{stage.done}/{stage.total} {stage.unit}".rstrip() if stage.total else ""
        left = "" if stage.left is None else f"{_span(stage.left)} left"
        bar = ProgressBar(stage.total or None, stage.done, width=30, pulse=not stage.total)
        row = Table.grid(padding=(0, 1))
        row.add_row(stage.title, bar, count, _span(stage.spent), left, stage.news)
        return row

    # Prints to a piped standard output stay there.
    piped: dict[str, Any] = {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": sys.stderr.isatty()}
    with Live(console=console, get_renderable=drawn, refresh_per_second=4, **piped) as live:
        yield
        live.transient = stage.spent < PATIENCE


@contextmanager
def _in_notebook(stage: _Stage) -> Iterator[None]:
    from tqdm import TqdmWarning
    from tqdm.auto import tqdm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets it draws in text
        bar = tqdm(desc=stage.title, unit=f" {stage.unit}" if stage.unit else "it")

    def show() -> None:
        bar.total, bar.n, bar.initial = stage.total or None, stage.done, (stage.first or (0, 0.0))[0]
        bar.set_postfix_str(stage.news, refresh=False)
        bar.refresh()

    with _beating(stage, show, wait=0.2):
        yield
    show()
    bar.leave = stage.spent >= PATIENCE
    bar.close()


@contextmanager
def _in_lines(stage: _Stage, console: Console, every: float) -> Iterator[None]:
    said = 0

    def show() -> None:
        nonlocal said
        said += 1
        console.print(stage.line, highlight=False, markup=False, soft_wrap=True)

    with _beating(stage, show, wait=PATIENCE, most=every):
        yield
    if said or stage.spent >= PATIENCE:
        show()


@contextmanager
def _beating(stage: _Stage, show: Callable[[], None], *, wait: float, most: float = 0.0) -> Iterator[None]:
    """Show the stage after `wait` seconds and then in gaps that double up to `most`, also if nothing moves."""
    due, busy, over = wait, threading.Lock(), threading.Event()

    def look() -> None:
        nonlocal due
        if stage.spent < due or not busy.acquire(blocking=False):  # another thread shows it
            return
        try:
            if not over.is_set():
                due = stage.spent + min(max(stage.spent, 1.0), most or wait)
                show()
        finally:
            busy.release()

    def beat() -> None:
        while not over.wait(BEAT):
            look()

    stage.moved = look
    look()
    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with busy:
            stage.moved = lambda: None


def _span(seconds: float) -> str:
    """Write a time: "45 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"
