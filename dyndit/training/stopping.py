"""Stop a run on a signal, after the current step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dyndit import runtime


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect the signals of `runtime.STOPS` in a list. A second signal has its usual effect."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in runtime.STOPS}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        runtime.stopping.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    with runtime.handling(note):
        yield caught


@contextmanager
def undisturbed() -> Iterator[list[RuntimeError]]:
    """Collect the news of a dead loader in a list. torch would raise it wherever the main thread stands."""
    deaths: list[RuntimeError] = []
    number: Any = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler: Any = None if number is None else signal.getsignal(number)
    if number is None or not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield deaths
        return

    def note(received: int, frame: Any) -> None:
        try:
            handler(received, frame)
        except RuntimeError as error:
            deaths.append(error)

    signal.signal(number, note)
    try:
        yield deaths
    finally:
        signal.signal(number, handler)


def outlive_signals(over: Event, _worker: int) -> None:
    """Ignore signals in a worker until `over` is set. Ctrl-C and job managers signal every process."""
    for number in set(runtime.STOPS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.is_set() else None)


def any_caught(caught: list[int], accelerator: Accelerator, meet: bool) -> bool:
    """Tell whether a signal was caught. With many processes, ask all of them, and only when they `meet`."""
    if accelerator.num_processes == 1:
        return bool(caught)
    return meet and bool(accelerator.reduce(torch.tensor(len(caught), device=accelerator.device)))


def leave(caught: list[int], step: int, steps: int, out: Path, say: bool) -> None:
    """Print the run's step, and end the process as the caught signal would."""
    if say:
        print(f"{out}: stopped at step {step} of {steps}; run the same again to go on", file=sys.stderr)
    number = caught[0] if caught else signal.SIGTERM  # another process of the run was asked to stop
    if number == signal.SIGINT:
        raise KeyboardInterrupt("said")
    raise SystemExit(128 + number)
