"""The analysis suite: reads what a run left on disk, and never reaches into training.

`fidelity` and `extractors` measure quality, `latency` speed, `intervals` what is certain; `frontier` sets
one against the other, `figures` and `report` show it. Names load on first use: torch-fidelity and
matplotlib are slow to import.
"""

from importlib import import_module

_HOME = {
    "Extractor": "extractors",
    "load_extractor": "extractors",
    "FrechetTo": "fidelity",
    "Moments": "fidelity",
    "evaluate": "fidelity",
    "frechet_distance": "fidelity",
    "moments": "fidelity",
    "read_pictures": "fidelity",
    "append_run": "frontier",
    "measured": "frontier",
    "read_runs": "frontier",
    "summary": "frontier",
    "Interval": "intervals",
    "non_inferior": "intervals",
    "paired_interval": "intervals",
    "paired_times": "latency",
    "summarise": "latency",
    "markdown_table": "report",
    "terminal_table": "report",
    "write_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
