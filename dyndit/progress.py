"""Show progress of long work on standard error: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Advance(Protocol):
    """Reports how far the work is.  words: further news, for example "loss 0.12"; shown until the next words."""

    def __call__(self, done: int, total: int, words: str | None = None) -> None:
        """Show that `done` of `total` are done."""


@contextmanager
def progress_bar(
    title: str, console: Console | None = None, *, shown: bool = True, every: float = 30.0
) -> Iterator[Advance]:
    """Show a bar with elapsed and remaining time while open. Yield the function that moves it.

    If standard error is no terminal, print a line about every `every` seconds, at new words, and at the end. Work that
    the first call reports was done before: it does not count in the estimate of the remaining time.
    """
    console = console or Console(stderr=True)
    if not shown:
        yield _unseen
    elif console.is_terminal:
        with _on_terminal(title, console) as advance:
            yield advance
    else:
        yield _in_lines(title, console, every)


def _unseen(done: int, total: int, words: str | None = None) -> None:
    """Show nothing."""


def tracked(items: Sequence[Item], title: str, *, shown: bool = True) -> Iterator[Item]:
    """Yield the items, and show how many are done."""
    with progress_bar(title, shown=shown) as advance:
        for done, item in enumerate(items, 1):
            yield item
            advance(done, len(items))


@contextmanager
def _on_terminal(title: str, console: Console) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console) as progress:
        task, before = progress.add_task(title, total=None, words=""), True

        def advance(done: int, total: int, words: str | None = None) -> None:
            nonlocal before
            if before:  # earlier work tells nothing about the speed
                progress.reset(task, total=total, completed=done)
            before = False
            said: dict[str, Any] = {} if words is None else {"words": words}
            progress.update(task, completed=done, total=total, **said)

        yield advance


def _in_lines(title: str, console: Console, every: float) -> Advance:
    began = said = time.monotonic()
    first: tuple[int, float] | None = None
    known = ""

    def advance(done: int, total: int, words: str | None = None) -> None:
        nonlocal first, said, known
        now, known = time.monotonic(), known if words is None else f", {words}"
        before, since = first = first or (done, now)
        if words is None and now - said < every and done != total:
            return
        said, left = now, ""
        if before < done < total:
            left = f", about {_span((now - since) / (done - before) * (total - done))} left"
        console.print(f"{title}: {done} of {total}, {_span(now - began)}{left}{known}", highlight=False, soft_wrap=True)

    return advance


def _span(seconds: float) -> str:
    """Write a time: "45 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"
