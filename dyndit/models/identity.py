"""The identity of a model: hashes that exits, plans and tables are bound to.

An identity is a hash over weights rounded to bfloat16, so a model in half precision is the same model. bfloat16 keeps 8
bits of a value and float16 keeps 11; rounding through float16 first can end in another bfloat16 value. So there are two
roundings, straight and through float16. An identity names both hashes if they differ ("a+b"). Two identities belong to
the same model if they share a hash. Files also carry an exact checksum (`tensors_hash`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndit.errors import InputError

VERSION_1 = "v1:"
"""Prefix of a hash from a file of version 1: SHA-256 over exact float32 values."""


@dataclass(frozen=True)
class AutoencoderRecord:
    """The autoencoder that made a model's latents. source: its hub id with the commit; "" if it has none."""

    kind: str
    hash: str
    source: str = ""


@dataclass(frozen=True)
class Identity:
    """Hashes of a model's backbone, of its exits ("" without exits), and of its autoencoder ("" if none is recorded).

    Exits, plans and tables are bound to backbone and exits. Comparisons of pictures also need the autoencoder.
    """

    backbone: str
    exits: str
    autoencoder: str = ""


def plain(tensor: Tensor) -> Tensor:
    """Return a weight's values as an ordinary tensor. Quantisers keep integers and scales; they are multiplied out."""
    tensor = tensor.detach()
    quantised = type(tensor).dequantize is not Tensor.dequantize
    return tensor.dequantize() if quantised else tensor


def identity_of(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """Name these weights: "a", or "a+b" if the two roundings differ. Each has 16 hexadecimal digits.

    more: text that tells this model from another model with the same tensors.
    """
    straight, through_half = hashlib.sha256(more.encode()), hashlib.sha256(more.encode())
    for name in sorted(tensors):
        values = plain(tensors[name]).cpu()
        head = f"{name}{tuple(values.shape)}".encode()
        for digest, rounded in ((straight, values), (through_half, values.half())):
            digest.update(head)
            digest.update(rounded.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return "+".join(dict.fromkeys(digest.hexdigest()[:16] for digest in (straight, through_half)))


def tensors_hash(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """Return an exact checksum: SHA-256 over names, shapes, float32 values and `more`, 16 hexadecimal digits.

    A flipped bit changes the checksum. Saving in half precision and loading in single precision keeps it.
    """
    digest = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        values = plain(tensors[name]).to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def same(mine: str, theirs: str) -> bool:
    """Return True if two identities name the same weights: they share a hash."""
    return bool(set(mine.split("+")) & set(theirs.split("+")))


def sketch(tensors: Mapping[str, Tensor], samples: int = 8) -> str:
    """Digest a few values of each weight and torch's count of changes to the weight.

    Training, fusing and replacing weights change the digest; changing single values through `.data` may not. It costs
    microseconds a tensor; `identity_of` reads every value.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor.is_meta:  # offloaded: nothing to look at
            continue
        picked = plain(tensor).flatten()[:: max(1, tensor.numel() // samples)][:samples]
        changes = 0 if tensor.is_inference() else tensor._version
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor.device}{changes}".encode())
        digest.update(picked.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def check(
    identity: Identity,
    backbone: str,
    exits: str,
    *,
    origin: str,
    exact: Identity | None = None,
    error: type[InputError] = InputError,
) -> None:
    """Refuse hashes of another backbone or of other exits. An empty hash fits any model.

    exact: the model's exact checksums; hashes of version 1 are compared with them.

    Raises:
        error: naming `origin`, the hash found and the model's hash.
    """
    for what, mine, theirs, checksum in (
        ("backbone", backbone, identity.backbone, exact and exact.backbone),
        ("exits", exits, identity.exits, exact and exact.exits),
    ):
        if mine.startswith(VERSION_1) and checksum is not None:
            fits = mine.removeprefix(VERSION_1) == checksum
        else:
            fits = not mine or same(mine, theirs)
        if not fits:
            raise error(f"{origin}: made for {what} {mine}, but the model's is {theirs or 'absent'}")
