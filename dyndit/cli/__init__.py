"""The command line. Every verb is a thin function over the package, and a notebook can call the same functions.

Every verb imports torch and the package only when it runs, so that `--help` is quick.
"""

import importlib
import importlib.metadata
import pkgutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import unwrap
from typing import Any

import tyro

from dyndit.cli.flags import PlanChoice, checked, flags_of, take_trust
from dyndit.errors import InputError, did_you_mean, expected_one_of, first_line
from dyndit.limits import take_limits
from dyndit.runtime import keep_freed_memory, stoppable

VERBS: dict[str, str] = {
    "train": "models",
    "distill": "models",
    "calibrate": "plans",
    "plan": "plans",
    "sample": "pictures",
    "grid": "pictures",
    "evaluate": "results",
    "bench": "bench",
    "report": "results",
    "compare": "results",
    "convert": "models",
    "inspect": "inspection",
    "info": "inspection",
    "quickstart": "results",
    "demo": "demo",
}
"""The module of this package that defines each verb."""

REGISTRIES = {
    "solvers": "dyndit.sampling.solvers:SOLVERS",
    "extractors": "dyndit.analysis.metrics.extractors:EXTRACTORS",
    "metrics": "dyndit.analysis.metrics.metric:metrics_by_name",
    "heads": "dyndit.models.exits:HEADS",
    "cards": "dyndit.models.dit:CARDS",
    "conditionings": "dyndit.models.conditioning:CONDITIONINGS",
    "routers": "dyndit.plans.schedules:ROUTERS",
    "processes": "dyndit.process:processes",
    "recipes": "dyndit.cli.recipes:packaged",
    "families": "dyndit.cli.recipes:quickstarts",
    "data_sets": "dyndit.training.data:PACKAGED",
}
"""Registries whose names stand for `{solvers}` and the like in a verb's docstring. They import torch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb. Every error is one line, and a traceback only with `--debug`.

    Exit status: 2 for bad input and for lack of room or memory, 1 for faults of the program, and 128 + the signal's
    number (130 for Ctrl-C) if a signal stopped it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"dyndit {importlib.metadata.version('dyndit')}")
        return
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    keep_freed_memory()
    with stoppable() as caught:
        _run(arguments, debug, caught)


def _run(arguments: list[str], debug: bool, caught: list[int]) -> None:
    try:
        take_trust(arguments)
        tyro.extras.subcommand_cli_from_dict(
            verbs(arguments),
            prog="dyndit",
            description="Diffusion Transformers that stop early. --debug before or after a verb shows tracebacks; "
            "--version alone prints the version; --tyro-write-completion bash|zsh|tcsh|fish FILE writes completions. "
            "--trust MODULE (or FILE.py, and again for more) imports a module that registers a backbone of your own.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except Exception as error:
        if debug:
            raise
        line, status = fault(error)
        print(f"dyndit: {line}", file=sys.stderr)
        sys.exit(status)
    except KeyboardInterrupt as error:
        number = caught[0] if caught else signal.SIGINT
        if not error.args:  # else the training loop has said so
            name = signal.Signals(number).name
            print(f"dyndit: stopped ({name}); what is written is whole, run the same again to go on", file=sys.stderr)
        sys.exit(128 + number)


def fault(error: Exception) -> tuple[str, int]:
    """Return the line that tells of an error, and the exit status. Other libraries' errors are known by their names."""
    names, found = {kind.__name__.removeprefix("_") for kind in type(error).__mro__}, first_line(error)
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or found) if part is not None), 2
    if names & {"MemoryError", "OutOfMemoryError"} or "allocate memory" in found:
        return f"out of memory ({found}); expected a smaller batch, or more memory", 2
    if "RecursionError" in names:
        return f"input nested too deep ({found}); expected a file that dyndit wrote", 2
    if "SafetensorError" in names:
        return f"no readable safetensors file ({found}); expected one that is whole", 2
    if "LinAlgError" in names:
        return f"features without a distance ({found}); expected finite features, of more pictures than features", 2
    return f"a fault of the program, {type(error).__name__}: {found}; --debug shows where", 1


def verbs(arguments: list[str]) -> dict[str, Callable[..., None]]:
    """Return the functions of all verbs. If help is asked for, fill in the names of the registries."""
    found = {verb: getattr(importlib.import_module(f"{__name__}.{module}"), verb) for verb, module in VERBS.items()}
    asked = next((word for word in arguments if word in VERBS), None)
    if asked is not None and {"--help", "-h"} & set(arguments):
        for text in (found[asked], unwrap(found[asked]), PlanChoice):
            text.__doc__ = filled(text.__doc__ or "")
    take_limits(arguments)
    _check_words(arguments, found)
    if "" in arguments:
        flag = arguments[arguments.index("") - 1] if arguments.index("") else "arguments"
        raise InputError(f"{flag} '': empty; expected a value, or nothing")
    return {verb: checked(function) for verb, function in found.items()}


def _check_words(arguments: Sequence[str], found: Mapping[str, Callable[..., None]]) -> None:
    """Refuse an unknown verb or flag in one line, and say what was perhaps meant."""
    if not arguments or arguments[0].startswith("-"):
        return
    if (verb := arguments[0]) not in found:
        raise InputError(f"{verb}: no verb; {expected_one_of(verb, found)}")
    known = {*flags_of(found[verb]), "--help"}
    for word in arguments[1:]:
        flag = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and flag not in known:
            where = f"`dyndit {verb}` (`dyndit {verb} --help` lists them)"
            raise InputError(f"{flag}: no flag of {where}{did_you_mean(flag, known)}")


def filled(text: str) -> str:
    """Replace each `{registry}` of a docstring by the registry's names."""
    for name, place in REGISTRIES.items():
        if (mark := f"{{{name}}}") in text:
            names: Any = pkgutil.resolve_name(place)
            known: Any = names() if callable(names) else names
            text = text.replace(mark, ", ".join(known))
    return text
