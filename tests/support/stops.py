"""Processes that get signals while they work; a small training for them to do."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dyndit import cli
from dyndit.cli import main
from dyndit.runtime import STOPS
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.fit import Task, fit

# A fork of this very process could not train: after some tests autograd has threads, which no fork takes along.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["dyndit.cli", "dyndit.training.fit", "dyndit.training.data", "accelerate", "pandas"])

Go = Callable[[], object]


def ended(work: Callable[[Go], object], signals: tuple[int, ...], pause: float = 0.1) -> tuple[int, str]:
    """Do the work in a process that gets the signals, the first when the work says "go"; its status and its words."""
    (here, go), (read, words) = FRESH.Pipe(duplex=False), FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=begin, args=(work, go, words))
    process.start()
    go.close()
    words.close()
    with suppress(EOFError):  # it ended before
        here.recv()
        for number in signals:
            os.kill(process.pid, number)
            time.sleep(pause)
    text = b""
    while part := os.read(read.fileno(), 1 << 16):
        text += part
    process.join()
    return process.exitcode, text.decode()


def begin(work: Callable[[Go], object], go: Connection, words: Connection) -> None:
    """Do the work, in the other process."""
    os.dup2(words.fileno(), 2)
    words.close()
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115 - this process does not outlive it
    for number in STOPS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        work(lambda: go.send(None))
        os._exit(0)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    finally:
        os._exit(77)


def as_verb(verb: Callable[[Go], object], go: Go) -> None:
    """Let the command line run a function as its only verb."""
    cli.verbs = lambda _: {"run": lambda: verb(go), "other": lambda: None}
    main(["run"])


def waits(go: Go) -> None:
    go()
    time.sleep(20)


def lingers(go: Go) -> None:
    try:
        waits(go)
    finally:
        time.sleep(20)


class Plain(Task):
    """Predict a picture from its noisy self, on draws that are made before a batch is cut."""

    def __init__(self, react=lambda calls, rows: None) -> None:
        torch.manual_seed(0)
        self.trainable = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64))
        self.react, self.calls = react, 0

    def draw(self, x, y, generator):
        return x, (torch.randn(x.shape, generator=generator), y)

    def loss(self, module, x, drawn, generator):
        self.calls += 1
        self.react(self.calls, len(x))
        loss = (module(x + drawn[0]) - x.flatten(1)).square().mean()
        return loss, {"again": loss.detach()}


def trains(out: Path, config: FitConfig, moment: int, seconds: float, go: Go) -> None:
    """Train, and say "go" at the so-and-so-many-th micro-batch, which then takes some seconds."""

    def react(calls: int, _rows: int) -> None:
        if calls == moment:
            go()
            time.sleep(seconds)

    fit(Plain(react), load_digits(), config, out, progress=False)
