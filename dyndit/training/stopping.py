"""Stop a run on a signal, after the step that is under way."""

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
    """Collect SIGINT and SIGTERM in a list; a second one acts as it always does."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
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
    """Ctrl-C and job managers signal every process; a worker is needed until the step is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.is_set() else None)


def any_caught(caught: list[int], accelerator: Accelerator, meet: bool) -> bool:
    """Was a signal caught, here or, asked on the steps where all processes `meet`, in any process?"""
    if accelerator.num_processes == 1:
        return bool(caught)
    return meet and bool(accelerator.reduce(torch.tensor(len(caught), device=accelerator.device)))


def leave(caught: list[int], step: int, steps: int, out: Path, say: bool) -> None:
    """Say where the run stands, and end the process by the signal that was caught."""
    if say:
        print(f"{out}: stopped at step {step} of {steps}; run the same again to go on", file=sys.stderr)
    if signal.SIGINT in caught:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
