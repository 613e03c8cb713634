"""Measure the peak memory of a call: torch's allocations on a GPU, or the call's own tensors on a CPU.

Or estimate it without computing: the same call on fake tensors, which have shapes and no memory.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyndit.models.dynamic import DynamicDepth

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


def estimated_memory(model: DynamicDepth, rows: int, dtype: torch.dtype | None = None) -> int:
    """Estimate the bytes at the peak of one full-depth call on a CPU, weights not included. Nothing is computed.

    model: may be on the meta device. rows: pictures times guidance branches. dtype: default the weights' own.
    """
    dtype, stored = dtype or next(model.parameters()).dtype, model.state_dict()
    with torch.no_grad(), FakeTensorMode():
        call = model.backbone.example(rows)
        weights = {name: _unmade(value.shape, value.dtype, dtype) for name, value in stored.items()}
        with _LiveBytes() as live:
            functional_call(model, weights, (call.x.to(dtype), call.t, call.y))
    return live.peak


def _unmade(shape: torch.Size, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype if stored.is_floating_point else stored)


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view makes no memory, even of a weight that is not counted
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.held -= size
