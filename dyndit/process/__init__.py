"""Processes: how noise and picture mix, and the quantity that a network predicts.

A process belongs to its model (`DynamicDepth.process`), which saves it in its config. Losses, the sampler, forecasts,
calibration and peers use the model's process. To add a process, add one file here; `processes()` finds it.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from dyndit.discovery import subclasses_in
from dyndit.errors import InputError, expected_one_of
from dyndit.process.base import Process
from dyndit.process.ddpm import DDPM
from dyndit.process.flow import RectifiedFlow

__all__ = ["DDPM", "Process", "RectifiedFlow", "from_config", "processes"]


@cache
def processes() -> dict[str, type[Process]]:
    """Return every process of this package, by name."""
    return {process.name: process for process in subclasses_in(__name__, __path__, Process)}


def from_config(config: Mapping[str, Any]) -> Process:
    """Build the process that `Process.config()` described. Raises InputError for unknown or impossible fields."""
    fields = dict(config)
    name = fields.pop("name", None)
    if name not in processes():
        raise InputError(f"process {name!r:.60}: {expected_one_of(name, processes())}")
    try:
        return processes()[name](**fields)
    except TypeError as error:
        raise InputError(f"process {name}: {error}") from error
