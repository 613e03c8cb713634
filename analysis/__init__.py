"""Analyse the files that a run left on disk. The suite never reaches into training.

- `metrics` measure. `sets` and `features` read pictures, `extractors` turn them into features; `infinity`, `kid`,
  `manifold`, `memorisation` and `paired` compare them; `quality` gathers all figures. `macs`, `energy` and `memory`
  measure cost.
- `report` shows. `runs` holds the rows, `frontier` sets quality against time, `budgets` finds the best family.
  `write` makes a report from `tables`, `findings`, `figures` and `plan_figures` on a `page`; `verify` checks a report.
- `compare` runs. `run` measures the `arms` of an `experiment`, `peers` are the alternatives, `bench` times plans.

`dyndit.stats` holds distances and intervals. Names load on first use: torch-fidelity and matplotlib import slowly.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "metrics.extractors": ("Extractor", "load_extractor"),
    "metrics.infinity": ("distance_at_infinity",),
    "metrics.kid": ("kernel_distance",),
    "metrics.macs": ("full_macs", "plan_macs"),
    "metrics.memorisation": ("check_memorisation",),
    "metrics.paired": ("paired_distances",),
    "metrics.quality": ("evaluate",),
    "metrics.sets": ("read_pictures", "read_set", "save_statistics"),
    "report.frontier": ("summary",),
    "report.runs": ("append_run", "measured", "read_runs"),
    "report.tables": ("markdown_table", "terminal_table"),
    "report.verify": ("verify",),
    "report.write": ("write_report",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
