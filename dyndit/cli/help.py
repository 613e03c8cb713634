"""Fill in help texts: `{solvers}` in a verb's docstring becomes the names in the registry of solvers.

Registries are read only when a verb's help is asked for, since they import torch.
"""

import pkgutil

REGISTRIES = {
    "solvers": "dyndit.sampling.solvers:SOLVERS",
    "extractors": "dyndit.analysis.metrics.extractors:EXTRACTORS",
    "metrics": "dyndit.analysis.metrics.metric:metrics_by_name",
    "heads": "dyndit.models.exits:HEADS",
    "routers": "dyndit.plans.schedules:ROUTERS",
    "processes": "dyndit.process:processes",
    "recipes": "dyndit.cli.recipes:packaged",
}
"""Registries that a docstring may name, each with its names or the function that lists them."""


def filled(text: str) -> str:
    """Replace each `{registry}` of a docstring by the registry's names."""
    for name, place in REGISTRIES.items():
        if (mark := f"{{{name}}}") in text:
            names = pkgutil.resolve_name(place)
            text = text.replace(mark, ", ".join(names() if callable(names) else names))
    return text
