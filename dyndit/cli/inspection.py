"""The verb that says what a path is: inspect."""

import importlib
import json
import sys

from dyndit.cli import flags

KINDS = ("dyndit.storage.kinds", "dyndit.analysis.metrics.kinds")
"""Modules that register kinds of paths (`dyndit.storage.inspect.kind`), each beside the code that reads such paths."""


def inspect(
    path: flags.Positional[str],
    /,
    num_heads: flags.NumHeads = None,
    process: str = "",
    weights: flags.Weights = None,
    num_classes: flags.NumClasses = None,
    revision: str | None = None,
    json_: flags.Json = False,
) -> None:
    """Say what a path is, what of it would be loaded, what is ignored and what is missing. Nothing is written.

    The exit status is 2 if the path would be refused.

    Args:
        path: A checkpoint, a folder, a plan, statistics, pictures, "digits", or a hub id (org/name@revision).
        process: Process of a model that does not say its own, one of {processes}; flow:sit and flow:repa also say
            whose time and velocity.
        revision: Branch, tag or commit of a hub id.
    """
    from dyndit.storage.kinds import describe

    for module in KINDS:
        importlib.import_module(module)
    told = {"num_heads": num_heads, "process": process or None, "weights": weights, "num_classes": num_classes}
    found = describe(path, revision=revision, **told)
    print(json.dumps(found.data(), default=str) if json_ else "\n".join(found.lines()))
    if found.problem:
        sys.exit(2)
