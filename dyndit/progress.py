"""Progress of long work: a bar on a terminal, and a line now and then without a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(title: str, console: Console, every: float = 30.0) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with elapsed and remaining time; yield `advance(done, total)`.

    If the console is not a terminal, print a plain line about every `every` seconds.
    """
    if not console.is_terminal:
        began = said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= every or done == total:
                left = (now - began) / max(done, 1) * (total - done)
                console.print(f"{title}: {done} of {total}, {now - began:.0f} s, about {left:.0f} s left")
                said = now

        yield say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
