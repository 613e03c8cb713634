"""Fill in help texts: `{solvers}` in a verb's docstring becomes the names in the registry of solvers.

Registries are read only when a verb's help is asked for, since they import torch.
"""

from collections.abc import Callable, Iterable


def filled(text: str) -> str:
    """Replace each `{registry}` of a docstring by the registry's names."""
    for name, names in REGISTRIES.items():
        if (mark := f"{{{name}}}") in text:
            text = text.replace(mark, ", ".join(names()))
    return text


def _solvers() -> Iterable[str]:
    from dyndit.sampling.solvers import SOLVERS

    return SOLVERS


def _extractors() -> Iterable[str]:
    from dyndit.analysis.metrics.extractors import EXTRACTORS

    return EXTRACTORS


def _metrics() -> Iterable[str]:
    from dyndit.analysis.metrics.metric import metrics_by_name

    return metrics_by_name()


def _heads() -> Iterable[str]:
    from dyndit.models.exits import HEADS

    return HEADS


def _cards() -> Iterable[str]:
    from dyndit.models.dit import CARDS

    return CARDS


def _conditionings() -> Iterable[str]:
    from dyndit.models.conditioning import CONDITIONINGS

    return CONDITIONINGS


def _routers() -> Iterable[str]:
    from dyndit.plans.schedules import ROUTERS

    return ROUTERS


def _processes() -> Iterable[str]:
    from dyndit.process import processes

    return processes()


def _recipes() -> Iterable[str]:
    from dyndit.cli.recipes import packaged

    return packaged()


REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {
    "solvers": _solvers,
    "extractors": _extractors,
    "metrics": _metrics,
    "heads": _heads,
    "cards": _cards,
    "conditionings": _conditionings,
    "routers": _routers,
    "processes": _processes,
    "recipes": _recipes,
}
"""Registries that a docstring may name, each with the function that lists its names."""
