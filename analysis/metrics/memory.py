"""Measure the peak memory of a call: torch's allocations on a GPU, or the call's own tensors on a CPU."""

import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MEANING = {
    "cuda": "most memory allocated on the GPU during one call, weights included (torch.cuda.max_memory_allocated)",
    "cpu": "most memory that tensors made during one call held at once (torch's profiler; weights not included)",
}


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int:
    """Return the bytes at the peak of one call; MEANING defines them.

    On a CPU count torch's allocations in the calling thread. Resident memory of the process would mislead: the
    allocator keeps freed memory in arenas that `malloc_trim` cannot empty, which hides the need of the next call.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports its start and stop to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()  # negative where memory is freed
        peak = max(peak, held)
    return peak
