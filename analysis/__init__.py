"""The analysis suite: reads what a run left on disk, and never reaches into training.

- `metrics` measure. `sets` and `features` read pictures, `extractors` turn them into features; `infinity`, `kid`,
  `memorisation` and `paired` compare them; `quality` gathers it all. `macs`, `energy` and `memory` measure cost.
- `report` shows. `runs` holds the rows, `frontier` sets quality against time, `budgets` says who wins. `write` makes
  a report of `tables`, `findings`, `figures` and `plan_figures` on a `page`; `verify` checks one against the rows.
- `compare` runs. `run` measures the `arms` of an `experiment`, `peers` are what a user might pick instead, `bench`
  times plans.

Distances, intervals and times of arms that take turns lie in `dyndit.stats`. Names load on first use: torch-fidelity
and matplotlib are slow to import.
"""

from importlib import import_module

_HOME = {
    "Extractor": "metrics.extractors",
    "load_extractor": "metrics.extractors",
    "distance_at_infinity": "metrics.infinity",
    "kernel_distance": "metrics.kid",
    "check_memorisation": "metrics.memorisation",
    "paired_distances": "metrics.paired",
    "evaluate": "metrics.quality",
    "read_pictures": "metrics.sets",
    "read_set": "metrics.sets",
    "save_statistics": "metrics.sets",
    "append_run": "report.runs",
    "measured": "report.runs",
    "read_runs": "report.runs",
    "summary": "report.frontier",
    "full_macs": "metrics.macs",
    "plan_macs": "metrics.macs",
    "markdown_table": "report.tables",
    "terminal_table": "report.tables",
    "write_report": "report.write",
    "verify": "report.verify",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
