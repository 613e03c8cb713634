"""Peak memory of a call: what torch allocated on a GPU, or by how much the process grew on a CPU."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")

MEANING = {
    "cuda": "most memory allocated on the GPU during one call, weights included (torch.cuda.max_memory_allocated)",
    "cpu": "growth of the process's resident memory during one call, above what it held before (weights not included)",
}


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes at the peak of one call, as MEANING says; None where the system does not tell.

    On a CPU the peak of the process is reset before (Linux: clear_refs), and what the allocator holds free is given
    back, or a call that follows a larger one would seem to need nothing.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    _give_back_freed_memory()
    try:
        (PROCESS / "clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, ValueError):
        run()
        return None
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    """Bytes of an entry of /proc/self/status.

    Raises:
        ValueError: there is no such entry.
    """
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(name)


def _give_back_freed_memory() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
