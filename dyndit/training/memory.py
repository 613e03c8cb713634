"""Cut a batch that does not fit into memory."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dyndit.errors import InputError, first_line
from dyndit.models.base import Inputs
from dyndit.models.conditions import Conditioning

Rows = Tensor | Inputs | Conditioning | dict[str, "Rows"] | tuple["Rows", ...]
"""Tensors of B rows each."""


def is_out_of_memory(error: Exception) -> bool:
    """Tell if an error says that memory ran out, on the device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def smaller(num_parts: int, batch_size: int, step: int, error: Exception) -> int:
    """Return twice the number of parts, and say so.  batch_size: pictures of a micro-batch.

    Raises:
        InputError: each part is a single picture already.
    """
    if num_parts >= batch_size:
        raise InputError(
            f"training: out of memory at step {step} with one picture at a time ({first_line(error)}); expected more "
            "memory, or a smaller model"
        ) from error
    num_parts = min(2 * num_parts, batch_size)
    print(
        f"training: out of memory at step {step}; from here on {-(-batch_size // num_parts)} pictures at a time, "
        "and the same batch in all",
        file=sys.stderr,
    )
    return num_parts


def in_parts(x: Tensor, y: Any, num: int) -> Iterator[tuple[float, Tensor, Any]]:
    """Cut a batch into at most `num` parts. Yield the share of the batch, and the rows of x and y, of each part."""
    size = -(-len(x) // num)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        yield len(part) / len(x), part, rows(y, start, start + size)


def rows(of: Any, start: int, stop: int) -> Any:
    """Return rows `start:stop` of every tensor."""
    if isinstance(of, dict):
        return {name: rows(value, start, stop) for name, value in of.items()}
    if isinstance(of, tuple):
        return tuple(rows(value, start, stop) for value in of)
    if isinstance(of, Inputs):
        return of.rows(start, stop)
    return of.select(slice(start, stop)) if isinstance(of, Conditioning) else of[start:stop]
