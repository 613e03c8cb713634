"""Define a metric: a function of a `Comparison`, marked `@metric("name")` in any file of this package."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from dyndit.analysis import metrics
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.paired import Lpips
from dyndit.analysis.metrics.sets import PictureSet

Figures = dict[str, float | int | str | bool | None]
"""Named numbers and their settings."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The samples and the sets to compare them with. held_out, full, lpips: only if a metric needs them.

    members: pictures of the reference that precision and recall take; 0: all.
    """

    samples: Measured
    reference: Measured
    train: Measured
    held_out: Measured | None = None
    full: PictureSet | None = None
    lpips: Lpips | None = None
    members: int = 0


Metric = Callable[[Comparison], Figures]

_METRICS: dict[str, Metric] = {}


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register a metric under the name that `evaluate --metrics` takes."""

    def register(function: Metric) -> Metric:
        _METRICS[name] = function
        return function

    return register


@cache
def metrics_by_name() -> dict[str, Metric]:
    """Return every metric of this package by name; the files are found by themselves."""
    for module in pkgutil.iter_modules(metrics.__path__):
        importlib.import_module(f"{metrics.__name__}.{module.name}")
    return dict(_METRICS)
