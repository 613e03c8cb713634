"""The clock of a device: the CPU's reads at once, a GPU's waits for the device; marks wait for nothing."""

import time

import pytest
import torch

from dyndit.clock import Clock


def test_the_cpu_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1.0, 3.5, 4.0, 4.25))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("there is nothing to wait for"))
    clock = Clock()
    began = clock()
    assert clock() - began == 2.5
    assert clock.between(clock.mark(), clock.mark()) == 0.25


def test_a_gpu_is_waited_for_at_readings_and_not_at_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the device, whose events are 4 ms apart."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")

        def synchronize(self) -> None:
            log.append("wait for event")

        def elapsed_time(self, other: "Event") -> float:
            return 4.0 if other is not self else 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait for {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock("cuda:1")
    assert clock() <= clock()
    assert log == ["wait for cuda:1"] * 2
    log.clear()
    began, ended = clock.mark(), clock.mark()
    assert log == ["record on the stream of cuda:1"] * 2
    assert clock.between(began, ended) == pytest.approx(0.004)
    assert log[2:] == ["wait for event"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_s_work_is_in_both_readings() -> None:
    a, clock = torch.rand(4096, 4096, device="cuda"), Clock("cuda")
    for _ in range(2):  # the first warms up
        began, mark = clock(), clock.mark()
        for _ in range(20):
            a @ a
        returned = time.perf_counter() - began
        ended = clock.mark()
        waited, marked = clock() - began, clock.between(mark, ended)
    assert returned < 0.5 * waited
    assert marked == pytest.approx(waited, rel=0.2)
