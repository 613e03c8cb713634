"""Seal JSON and tensors with a checksum over everything else in the file, and check the seal at reading."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndit.errors import CheckpointError, InputError

SEAL = "checksum"


def checksum(data: object) -> str:
    """Return the checksum of plain data: SHA-256 of its JSON with sorted names, 16 hexadecimal digits."""
    plain = json.loads(json.dumps(data, default=str))  # as a file gives it back: names are text, tuples are lists
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with the seal as its last entry. An older seal is replaced."""
    bare = {name: value for name, value in data.items() if name != SEAL}
    return bare | {SEAL: checksum(bare)}


def unsealed(
    path: Path, data: Mapping[str, Any], kind: type[InputError] = CheckpointError, *, needed: bool = True
) -> dict[str, Any]:
    """Return the data without its seal, which is checked.

    needed: False takes data without a seal as they are; `SEAL in data` tells.

    Raises:
        CheckpointError, or `kind` if given: another checksum, or none where one is needed.
    """
    bare = {name: value for name, value in data.items() if name != SEAL}
    if SEAL not in data and not needed:
        *rest, last = data.items() or [("", None)]
        if last[1] != checksum(dict(rest)):  # else the name of the seal is damaged
            return bare
    if data.get(SEAL) != (found := checksum(bare)):
        recorded = f"checksum {found}, it records {data[SEAL]!r:.24}" if SEAL in data else "it has no checksum"
        raise kind(f"{path}: damaged or edited ({recorded}); expected it as it was written")
    return bare


def tensors_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the checksum of a safetensors file's content: names, shapes, dtypes, bytes, and all metadata but the seal.

    The same content gives the same checksum, whatever the order in the file.
    """
    digest = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != SEAL}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        # A copy: one expanded value counts as contiguous, and cannot be seen as bytes.
        values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Check the seal of a safetensors file, and that its numbers are finite.

    Raises:
        CheckpointError: another checksum, no checksum, or a tensor that holds NaN or an infinity.
    """
    if metadata.get(SEAL) != (found := tensors_checksum(tensors, metadata)):
        recorded = f"it records {metadata[SEAL]!r:.24}" if SEAL in metadata else "it has none"
        raise CheckpointError(
            f"{path}: damaged or edited (checksum {found}, {recorded}); expected it as it was written"
        )
    if odd := first_not_finite(tensors):
        raise CheckpointError(f"{path}: {odd} holds numbers that are not finite; expected finite numbers")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity; None if all numbers are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return name
    return None
