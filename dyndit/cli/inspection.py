"""Verbs that describe: inspect says what a path is, info what a model is made of."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from dyndit.cli import flags
from dyndit.errors import InputError, did_you_mean

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


def info(
    model: flags.Positional[str],
    /,
    layers: tuple[int, ...] = (),
    head: str = "wide",
    conditioning: str = "",
    batch_size: int = 1,
    cfg_scale: float = 1.5,
    dtype: str = "own",
    tflops: float | None = None,
    num_heads: int | None = None,
    process: str = "",
    json_: flags.Json = False,
) -> None:
    """Print a model's parameters, tokens, arithmetic at each exit, and its estimated time and memory. Nothing is run.

    Args:
        model: A card, one of {cards}; or a model folder, a published DiT .pt, "digits", or a hub id.
        layers: Exits of a card (default: after every layer, or every fourth of a deep model).
        head: Head of a card's exits, one of {heads}.
        conditioning: How a card's blocks learn of timestep and label, one of {conditionings}.
        batch_size: Pictures of the call whose memory is estimated.
        cfg_scale: Guidance scale; 1 is one pass a picture, any other two.
        dtype: Precision: own, float32, bfloat16 or float16.
        tflops: TFLOP/s to estimate times with (default: this machine's rate of matrix products). A model with a shift
            table has measured times.
        num_heads: Attention heads of a .pt whose width does not tell them.
        process: Process of a model that does not say its own, one of {processes}.
        json_: End with one line of JSON.
    """
    from dyndit.analysis.metrics.describe import describe, outline
    from dyndit.models.dit import CARDS
    from dyndit.models.exits import ExitConfig
    from dyndit.plans.table import ShiftTable
    from dyndit.runtime import chosen_dtype
    from dyndit.storage import load as checkpoints

    if tflops is not None and tflops <= 0:
        raise InputError(f"--tflops {tflops:g}: expected above 0")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected at least 1")
    card, cost = model in CARDS and not Path(model).exists() and model != "digits", None
    if not card and model.startswith("DiT-") and not Path(model).exists():
        raise InputError(f"{model}: no such card{did_you_mean(model, CARDS)} (`dyndit info --help` lists them)")
    if card:
        changes = {"conditioning": conditioning} if conditioning else {}
        exits: Any = {"layers": layers, "head": head}
        described = outline(model, ExitConfig(**exits), **changes)
    else:
        if layers or conditioning:
            flag = f"--layers {layers[0]}" if layers else f"--conditioning {conditioning}"
            raise InputError(f"{flag}: {model} has its own; expected a card with it")
        loaded = checkpoints.inspect(model, num_heads=num_heads, process=process or None, device="cpu")
        described, table = loaded.model, (loaded.folder or Path(model)) / checkpoints.TABLE
        cost = ShiftTable.load(table).cost if table.is_file() and tflops is None else None
    rate = None if tflops is None else 1e12 * tflops
    rows, precision = batch_size * (1 if cfg_scale == 1 else 2), chosen_dtype(dtype, "cpu")
    found = describe(model, described, rows=rows, dtype=precision, rate=rate, cost=cost)
    print("\n".join(found.lines()))
    if json_:
        print(json.dumps(found.record()))
