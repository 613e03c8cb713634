"""What a process sets once, before it computes."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory in the process instead of giving it back after every large tensor.

    Each activation of more than some hundred KiB is else mapped and unmapped by the kernel, which zeroes its pages
    every time: of a small DiT on two virtual cores that was a quarter to a third of the time. It serves every arm
    of a comparison alike. Returns whether the allocator is glibc's and took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6", use_errno=True).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _GIB), (_M_TRIM_THRESHOLD, 2 * _GIB - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
