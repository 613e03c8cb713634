"""Energy counters and peak memory: read where they are there, silent where they are not."""

import threading
from pathlib import Path

import pytest
import torch

from dyndit.analysis.metrics.energy import energy_meter
from dyndit.analysis.metrics.memory import peak_memory


def zone(root: Path, name: str, label: str, microjoules: int, wraps: int = 1000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps}\n")
    return folder


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100, wraps=10**9)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 500, wraps=10**9)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)  # the whole board: holds the packages again
    meter = energy_meter("cpu", tmp_path)
    assert (meter.source, len(meter.counters)) == ("RAPL", 2)
    spent = meter.start()
    (first / "energy_uj").write_text("2000100\n")
    (second / "energy_uj").write_text("1000500\n")
    for other in (part, whole):
        (other / "energy_uj").write_text("77777777\n")
    assert spent() == pytest.approx(3.0)


def test_a_counter_that_started_over_counts_on(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 900, wraps=1000)
    spent = energy_meter("cpu", tmp_path).start()
    (folder / "energy_uj").write_text("150\n")
    assert spent() == pytest.approx(250e-6)


def test_no_counter_no_meter(tmp_path: Path) -> None:
    assert energy_meter("cpu", tmp_path) is None
    assert energy_meter("cpu", tmp_path / "absent") is None
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (folder / "energy_uj").unlink()  # as where only root may read
    assert energy_meter("cpu", tmp_path) is None
    if not torch.cuda.is_available():
        assert energy_meter("cuda") is None


MIB = 2**20


def hold(mib: int) -> None:
    """Two halves at once, then a third that finds the first one gone: a peak of `mib`."""
    half = torch.empty(mib * MIB // 2, dtype=torch.uint8)
    other = torch.empty(mib * MIB // 2, dtype=torch.uint8)
    del half
    torch.empty(mib * MIB // 4, dtype=torch.uint8).add_(other[0])


def test_peak_memory_is_that_of_the_call_whatever_ran_before() -> None:
    kept = torch.zeros(8 * MIB, dtype=torch.uint8)
    for mib in (96, 32, 96):
        assert mib * MIB <= peak_memory(lambda mib=mib: hold(mib)) < (mib + 1) * MIB
    assert len(kept) == 8 * MIB  # what was held before is no part of it


def test_peak_memory_does_not_depend_on_the_thread_or_on_what_the_allocator_keeps() -> None:
    # Freed memory stays in the arena of a thread, where the next call finds it: the process does not grow.
    peaks: list[int] = []
    thread = threading.Thread(target=lambda: peaks.extend(peak_memory(lambda mib=mib: hold(mib)) for mib in (64, 32)))
    thread.start()
    thread.join()
    assert [round(peak / MIB) for peak in peaks] == [64, 32]


def test_a_call_that_allocates_nothing_holds_nothing() -> None:
    given = [torch.zeros(8 * MIB, dtype=torch.uint8)]
    assert peak_memory(given.clear) == 0


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_counts_what_was_allocated() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert peak_memory(lambda: torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"), "cuda") >= 64 * MIB
