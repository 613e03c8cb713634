"""The analysis suite: reads what a run left on disk, and never reaches into training.

`quality` compares two sets of pictures: `sets` and `features` read and measure them, `extractors` are the
networks, `fidelity`, `kid`, `memorisation` and `paired` the metrics. `latency` measures speed, `macs`, `energy` and
`memory` cost, `intervals` what is certain; `frontier` sets one against the other, `budgets` says who wins, `tables`,
`findings`, `figures`, `page` and `report` show it, and `verify` checks a report against the raw rows. Names load on
first use: torch-fidelity and matplotlib are slow to import.
"""

from importlib import import_module

_HOME = {
    "Extractor": "extractors",
    "load_extractor": "extractors",
    "FrechetTo": "fidelity",
    "Moments": "fidelity",
    "distance_at_infinity": "fidelity",
    "frechet_distance": "fidelity",
    "moments": "fidelity",
    "kernel_distance": "kid",
    "check_memorisation": "memorisation",
    "paired_distances": "paired",
    "evaluate": "quality",
    "read_pictures": "sets",
    "read_set": "sets",
    "save_statistics": "sets",
    "append_run": "frontier",
    "measured": "frontier",
    "read_runs": "frontier",
    "summary": "frontier",
    "Interval": "intervals",
    "non_inferior": "intervals",
    "paired_interval": "intervals",
    "full_macs": "macs",
    "plan_macs": "macs",
    "median_interval": "latency",
    "paired_times": "latency",
    "summarise": "latency",
    "markdown_table": "tables",
    "terminal_table": "tables",
    "write_report": "report",
    "verify": "verify",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
