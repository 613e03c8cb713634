"""Energy, where the machine counts it: joules of a GPU (NVML) or of the CPU packages (RAPL).

Both are counters of the whole device, so other work on it counts too. NVML's is updated every tens of milliseconds:
read the joules of many calls, not of one. Where nothing can be read there is no meter, and nothing is said about it.
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
        """Microjoules since `before` was read, the counter having started over at most once."""
        return (self.read() - before) % self.wraps if self.wraps else self.read() - before


@dataclass(frozen=True)
class EnergyMeter:
    """One or several counters of a device."""

    source: str
    """"NVML" (the GPU) or "RAPL" (the CPU packages)."""
    counters: tuple[Counter, ...]

    def start(self) -> Callable[[], float]:
        """Read the counters -> what gives the joules since."""
        before = [counter.read() for counter in self.counters]
        return lambda: sum(c.since(b) for c, b in zip(self.counters, before, strict=True)) / 1e6


def energy_meter(device: str = "cpu", powercap: Path = POWERCAP) -> EnergyMeter | None:
    """The meter of a device; None where there is none or it may not be read."""
    return nvml(device) if device.startswith("cuda") else rapl(powercap)


def rapl(powercap: Path = POWERCAP) -> EnergyMeter | None:
    """The CPU packages' counters of the Linux kernel, `intel-rapl:N` (AMD's stand there too), parts included."""
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
            counter.read()  # root's alone on many systems
        except (OSError, ValueError):
            continue
        counters.append(counter)
    return EnergyMeter("RAPL", tuple(counters)) if counters else None


def nvml(device: str = "cuda") -> EnergyMeter | None:
    """The GPU's own counter, by pynvml where it is installed; the GPU is found by its identity, not its number."""
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
