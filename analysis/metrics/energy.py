"""Measure energy, if the machine counts it: joules of a GPU (NVML) or of the CPU packages (RAPL).

Both counters cover the whole device, so other work on it counts too. NVML updates its counter every tens of
milliseconds: measure many calls, not one. A machine without a readable counter has no meter, silently.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of microjoules that starts over at `wraps` (0: never)."""

    read: Callable[[], int]
    wraps: int = 0

    def since(self, before: int) -> int:
        """Return the microjoules since `before` was read. The counter may have started over once."""
        return (self.read() - before) % self.wraps if self.wraps else self.read() - before


@dataclass(frozen=True)
class EnergyMeter:
    """One or several counters of a device."""

    source: str
    """"NVML" (the GPU) or "RAPL" (the CPU packages)."""
    counters: tuple[Counter, ...]

    def start(self) -> Callable[[], float]:
        """Read the counters; return a function that gives the joules since then."""
        before = [counter.read() for counter in self.counters]
        return lambda: sum(c.since(b) for c, b in zip(self.counters, before, strict=True)) / 1e6


def energy_meter(device: str = "cpu", powercap: Path = POWERCAP) -> EnergyMeter | None:
    """Return the meter of a device; None if the device has no readable counter."""
    return nvml(device) if device.startswith("cuda") else rapl(powercap)


def rapl(powercap: Path = POWERCAP) -> EnergyMeter | None:
    """Read the Linux kernel's counters of whole CPU packages, `intel-rapl:N` (AMD's too)."""
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package: cores, memory
            continue
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue
            counter = Counter(
                lambda path=zone / "energy_uj": int(path.read_text()), int((zone / "max_energy_range_uj").read_text())
            )
            counter.read()  # only root may read it on many systems
        except (OSError, ValueError):
            continue
        counters.append(counter)
    return EnergyMeter("RAPL", tuple(counters)) if counters else None


def nvml(device: str = "cuda") -> EnergyMeter | None:
    """Read the GPU's own counter if pynvml is installed. Find the GPU by its identity, not its number."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = library.nvmlDeviceGetHandleByUUID(identity)
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (library.NVMLError, RuntimeError, AttributeError):
        return None
    return EnergyMeter("NVML", (Counter(lambda: 1000 * library.nvmlDeviceGetTotalEnergyConsumption(handle)),))
