"""Settings of a process: memory, the device, the precision, the signals that stop it."""

import ctypes
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from dyndit.errors import InputError, expected_one_of

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_GIB = 1 << 30

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to stop: Ctrl-C, a job manager, a closed terminal."""

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


@contextmanager
def handling(react: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle the signals of `STOPS` by `react` in the block. Signals that are ignored, as under nohup, stay ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, react)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Collect the signals of `STOPS` in a list. The first raises KeyboardInterrupt; a second ends the process at once.

    What is being written then is dropped: files are written whole or not at all.
    """
    caught: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1 or stopping:
            os.write(2, f"dyndit: left at once ({signal.Signals(number).name})\n".encode())
            os._exit(128 + number)
        raise KeyboardInterrupt

    stopping.clear()
    with handling(stop):
        yield caught


stopping: list[int] = []
"""Signals that a training run has caught and will heed after its step. `stoppable` counts them as the first."""


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


def train_on(device: str) -> str:
    """Let accelerate train on a device, as `chosen_device` reads it -> the device. "auto" leaves it to accelerate.

    Raises InputError: accelerate trains on another already.
    """
    import torch
    from accelerate import PartialState

    wanted = torch.device(chosen_device(device))
    if device != "auto" and wanted.type == "cpu":
        PartialState(cpu=True)  # the first one of a process decides
    elif device != "auto" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    found = PartialState().device or wanted
    if device != "auto" and found.type != wanted.type:
        raise InputError(f"--device {device}: accelerate trains on {found}; expected auto, or that one")
    return str(found)


def chosen_dtype(dtype: str, device: str) -> "torch.dtype | None":
    """Return the precision to compute in, or raise InputError. None, for "own", keeps the precision of the weights.

    "auto" is bfloat16 on a GPU that computes in it, else None.
    """
    import torch

    if dtype == "auto":
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: {expected_one_of(dtype, ('auto', *DTYPES))}")
    return None if dtype == "own" else getattr(torch, dtype)


def emulates_bf16(device: str) -> bool:
    """Whether products in bfloat16 are emulated on a device, and slower there than those in single precision."""
    import torch

    if torch.device(device).type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    cpu: Any = torch.cpu  # torch has no public name for these; without them nothing is known, and nothing is said
    asked = (getattr(cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return all(supported is not None and not supported() for supported in asked)


def warn_of_emulation(device: str, precision: str) -> None:
    """Say once in a process that a precision of "bf16" is emulated on the device."""
    if precision == "bf16" and device not in _warned and emulates_bf16(device):
        _warned.add(device)
        print("warning: bf16 is emulated here, and slower than fp32; --dtype float32 computes in fp32", file=sys.stderr)


_warned: set[str] = set()
