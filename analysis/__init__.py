"""Analyse the files that a run left on disk. The suite never reaches into training.

- `metrics` measure. `sets` and `features` read pictures, `extractors` turn them into features; `infinity`, `kid`,
  `memorisation` and `paired` compare them; `quality` gathers all figures. `macs`, `energy` and `memory` measure cost.
- `report` shows. `runs` holds the rows, `frontier` sets quality against time, `budgets` finds the best family.
  `write` makes a report from `tables`, `findings`, `figures` and `plan_figures` on a `page`; `verify` checks a report.
- `compare` runs. `run` measures the `arms` of an `experiment`, `peers` are the alternatives, `bench` times plans.

`dyndit.stats` holds distances and intervals. Names load on first use: torch-fidelity and matplotlib import slowly.
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
