"""Settings of a process: memory, the device, the precision."""

import ctypes
import sys
from typing import TYPE_CHECKING

from dyndit.errors import InputError

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_GIB = 1 << 30

DTYPES = ("own", "float32", "bfloat16", "float16")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory in the process instead of giving it back after every large tensor.

    Otherwise the kernel maps, zeroes and unmaps every activation above some hundred KiB. For a small DiT on two
    virtual cores this took a quarter to a third of the time. Every arm of a comparison gains alike. Return True if
    the allocator is glibc's and took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6", use_errno=True).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _GIB), (_M_TRIM_THRESHOLD, 2 * _GIB - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


def chosen_device(device: str) -> str:
    """Return the device to compute on, or raise InputError. "auto" is a GPU if there is one, else the CPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("no values on it")
    except (RuntimeError, AssertionError) as error:
        found = f"--device {device}: not available"
        raise InputError(f"{found}; expected auto, cpu, or cuda on a machine with a GPU") from error
    return device


def chosen_dtype(dtype: str, device: str) -> "torch.dtype | None":
    """Return the precision to compute in, or raise InputError. None, for "own", keeps the precision of the weights.

    "auto" is bfloat16 on a GPU that computes in it, else None.
    """
    import torch

    if dtype == "auto":
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected one of auto, {', '.join(DTYPES)}")
    return None if dtype == "own" else getattr(torch, dtype)
