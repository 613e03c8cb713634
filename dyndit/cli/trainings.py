"""Flags of trainings and comparisons: where, in which precision, tracked by whom, and how far."""

from typing import Annotated, Any, Literal

import tyro

from dyndit.errors import InputError, expected_one_of

Precision = Annotated[
    str,
    tyro.conf.arg(
        help="Precision to compute in: own (the recipe's), auto (bfloat16 on a GPU that computes in it, else own), "
        "float32 or bfloat16. Weights and averages stay in float32."
    ),
]
Tracker = Annotated[
    Literal["tensorboard", "wandb", "none"],
    tyro.conf.arg(help="Where the losses go besides losses.csv; wandb needs dyndit[wandb]."),
]
Extend = Annotated[
    bool,
    tyro.conf.arg(
        help="Take up a finished run of fewer steps in --out, at the rates of a run of --steps from there on. A "
        "constant rate needs no --extend."
    ),
]


def training(device: str, dtype: str, **changes: Any) -> dict[str, Any]:
    """Let accelerate train on the device -> the fields of `FitConfig` to change: those given, and the precision."""
    from dyndit.runtime import train_on

    changes["precision"] = precision_of(dtype, train_on(device))
    return {name: value for name, value in changes.items() if value is not None}


def precision_of(dtype: str, device: str) -> "Literal['fp32', 'bf16'] | None":
    """Return the precision of a recipe for a flag of type `Precision`; None for the recipe's own."""
    from dyndit.runtime import chosen_dtype

    precisions: dict[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "bfloat16": "bf16"}
    if dtype not in ("own", "auto", *precisions):
        raise InputError(f"--dtype {dtype}: {expected_one_of(dtype, ('auto', 'own', *precisions))}")
    wanted = chosen_dtype(dtype, device)
    return None if wanted is None else precisions[str(wanted).removeprefix("torch.")]
