"""The command line. Every verb is a thin function over the package, and a notebook can call the same functions.

Every verb imports torch and the package only when it runs, so that `--help` is quick.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence

import tyro

from dyndit.cli.flags import PlanChoice, checked
from dyndit.errors import InputError
from dyndit.limits import take_limits
from dyndit.runtime import keep_freed_memory

VERBS: dict[str, str] = {
    "train": "models",
    "distill": "models",
    "calibrate": "plans",
    "plan": "plans",
    "sample": "pictures",
    "evaluate": "results",
    "bench": "results",
    "report": "results",
    "compare": "results",
    "convert": "models",
    "quickstart": "results",
}
"""The module of this package that defines each verb."""

REGISTRIES = {
    "solvers": "dyndit.sampling.solvers:SOLVERS",
    "extractors": "dyndit.analysis.metrics.extractors:EXTRACTORS",
    "metrics": "dyndit.analysis.metrics.metric:metrics_by_name",
    "heads": "dyndit.models.exits:HEADS",
    "routers": "dyndit.plans.schedules:ROUTERS",
    "processes": "dyndit.process:processes",
    "recipes": "dyndit.cli.recipes:packaged",
}
"""Registries whose names stand for `{solvers}` and the like in a verb's docstring. They import torch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb. Bad input gives one line and exit status 2, and a traceback only with `--debug`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    keep_freed_memory()
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs(arguments),
            prog="dyndit",
            description="Diffusion Transformers that stop early. --debug before or after a verb shows tracebacks.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except InputError as error:
        if debug:
            raise
        print(f"dyndit: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"dyndit: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dyndit: stopped", file=sys.stderr)
        sys.exit(130)


def verbs(arguments: Sequence[str]) -> dict[str, Callable[..., None]]:
    """Return the functions of all verbs. If help is asked for, fill in the names of the registries."""
    found = {verb: getattr(importlib.import_module(f"{__name__}.{module}"), verb) for verb, module in VERBS.items()}
    asked = next((word for word in arguments if word in VERBS), None)
    if asked is not None and {"--help", "-h"} & set(arguments):
        for text in (found[asked], PlanChoice):
            text.__doc__ = filled(text.__doc__ or "")
    take_limits(arguments)
    if "" in arguments:
        flag = arguments[arguments.index("") - 1] if arguments.index("") else "arguments"
        raise InputError(f"{flag} '': empty; expected a value, or nothing")
    return {verb: checked(function) for verb, function in found.items()}


def filled(text: str) -> str:
    """Replace each `{registry}` of a docstring by the registry's names."""
    for name, place in REGISTRIES.items():
        if (mark := f"{{{name}}}") in text:
            names = pkgutil.resolve_name(place)
            text = text.replace(mark, ", ".join(names() if callable(names) else names))
    return text
