"""The analysis suite: reads what a run left on disk, and never reaches into training.

`quality` compares two sets of pictures: `sets` and `features` read and measure them, `extractors` are the
networks, `fidelity`, `kid`, `memorisation` and `paired` the metrics. `latency` measures speed, `macs`, `energy` and
`memory` cost, `intervals` what is certain; `frontier` sets one against the other, `budgets` says who wins, `tables`,
`findings`, `figures`, `page` and `report` show it, and `verify` checks a report against the raw rows. Names load on
first use: torch-fidelity and matplotlib are slow to import.
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
    "append_run": "report.frontier",
    "measured": "report.frontier",
    "read_runs": "report.frontier",
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
