"""Processes: how noise and picture mix, and the quantity that a network predicts.

A process belongs to its model (`DynamicDepth.process`), which saves it in its config. Losses, the sampler, forecasts,
calibration and peers use the model's process. To add a process, add one file here; `processes()` finds it.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from dyndit.errors import InputError
from dyndit.process.base import Process
from dyndit.process.ddpm import DDPM
from dyndit.process.flow import RectifiedFlow

__all__ = ["DDPM", "Process", "RectifiedFlow", "from_config", "processes"]


@cache
def processes() -> dict[str, type[Process]]:
    """Return every process of this package, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {process.name: process for process in Process.__subclasses__()}


def from_config(config: Mapping[str, object]) -> Process:
    """Build the process that `Process.config()` described.

    Raises:
        InputError: an unknown name, or impossible fields.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if name not in processes():
        raise InputError(f"process {name!r:.60}: expected one of {', '.join(processes())}")
    return processes()[name].of(fields)
