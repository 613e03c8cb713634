"""Peak memory of a call: what torch allocated on a GPU, or what a call's tensors held at once on a CPU."""

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
    """Bytes at the peak of one call, as MEANING says.

    On a CPU torch's own allocations are counted, those of the calling thread. The process's resident memory would
    tell of the allocator besides: freed memory that it keeps, in arenas that `malloc_trim` cannot empty, hides what
    the next call needs.
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
    for change in _changes(recorded):
        held += change
        peak = max(peak, held)
    return peak


def _changes(recorded: profile) -> list[int]:
    """Bytes allocated, and freed (negative), in the order in which that happened."""
    events = recorded.profiler.kineto_results.events()
    found = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    return [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]
