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

import torch
from accelerate import Accelerator


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list. A second signal of a kind has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(over: Event, _worker: int) -> None:
    """Ignore signals in a worker until `over` is set. Ctrl-C and job managers signal every process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    if signal.SIGINT in caught:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
