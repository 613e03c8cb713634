"""Time work on a device. On a GPU a call returns before its work is done, so a plain clock reads too early.

clock = Clock(x.device)
began = clock()                         # waits for the device
model(x)
seconds = clock() - began

began = clock.mark()                    # waits for nothing
model(x)
ended = clock.mark()
seconds = clock.between(began, ended)   # waits until the device has passed the second mark
"""

import time
from typing import Any

import torch

Mark = float | torch.cuda.Event
"""A point in the work of a device: seconds on the CPU, an event on a GPU."""


class Clock:
    """Read the time at which a device has finished its work, in seconds."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def wait(self) -> None:
        """Wait until the device has finished its work. The CPU never has to wait."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __call__(self) -> float:
        """Wait for the device, then read the seconds."""
        self.wait()
        return time.perf_counter()

    def mark(self) -> Mark:
        """Mark this point in the device's work, without waiting for the device."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, began: Any, ended: Any) -> float:
        """Return the seconds between two marks. Wait until the device has passed the second mark."""
        if isinstance(ended, float):
            return ended - began
        ended.synchronize()
        return 1e-3 * began.elapsed_time(ended)
