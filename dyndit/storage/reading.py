"""What every format shares: reading pickled tensors without running code, and strict loading."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.models.base import Backbone
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import DDPM, Process, from_config


@dataclass(frozen=True)
class Loaded:
    """A model and what was found out on the way, a line each, for whoever asked."""

    model: DynamicDepth
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    """Where its plans, table and exits lie: the native folder, or the folder of the transformer's weights."""


AskedProcess = Process | str | None
"""The process that a model is asked for with: itself, or its name; None where the file alone is to say."""


def process_of(recorded: object, asked: AskedProcess, path: Path) -> tuple[Process, tuple[str, ...]]:
    """Choose the process of a checkpoint -> it, and a note where it is assumed.

    recorded: what the file says, as `Process.config()` has it; None where it says nothing.

    Raises:
        CheckpointError: the file's process is unknown, or another than the one that is asked for.
    """
    if recorded is None and asked is None:
        note = f"{path.name}: says no process; {DDPM.name} is assumed, --process (or process=) says another"
        return DDPM(), (note,)
    wanted = from_config({"name": asked}) if isinstance(asked, str) else asked
    if recorded is None:
        return wanted, ()
    try:
        found = from_config(recorded)
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    if wanted is not None and (found.name if isinstance(asked, str) else found) not in (asked, wanted):
        raise CheckpointError(f"{path}: made for the process {found}, but --process {wanted} is asked for")
    return found, ()


def read_pickled(path: Path) -> object:
    """What `torch.save` wrote, as long as it is tensors, plain data and `argparse.Namespace`.

    Raises:
        CheckpointError: damaged, or it would have to run code to be read.
    """
    try:
        # A file, not a path: of a path torch.load believes the suffix.
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes, run through an unpickler, raise anything
        name = type(error).__name__
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        found = f"holds {unsafe[1]}" if unsafe else f"damaged or of another kind, {name}: {first_line(error)}"
        raise CheckpointError(f"{path}: expected a PyTorch checkpoint of tensors alone ({found})") from error
    if damaged := _damaged_record(path):
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not fit)")
    return data


def _damaged_record(path: Path) -> str | None:
    """The first record of a zip whose checksum does not fit: torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save can be told to leave the checksums out; they are all zero then.
            return archive.testzip() if any(record.CRC for record in archive.infolist()) else None
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return "the archive" if zipped else None  # the format before PyTorch 1.6 is no zip
    except Exception as error:  # a damaged directory can name any compression, size or text
        return f"the archive, {first_line(error)}"


def built(family: type[Backbone], config: dict[str, object], path: Path) -> Backbone:
    """A backbone of this architecture.

    Raises:
        CheckpointError: there is none, or it does not fit the memory.
    """
    try:
        return family.from_config(config)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: impossible architecture ({first_line(error)})") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load, refusing missing, extra and reshaped tensors, and any that hold no plain floating-point numbers.

    Raises:
        CheckpointError: naming the first of them.
    """
    own = module.state_dict()
    for problem, names in (
        ("lacks", own.keys() - tensors.keys()),
        ("has extra", tensors.keys() - own.keys()),
    ):
        if names:
            raise CheckpointError(f"{path}: {problem} {len(names)} tensors, first {min(names)}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: {name} has shape {found}, expected {expected}")
        if not tensors[name].is_floating_point() or tensors[name].layout != torch.strided:
            found = f"{tensors[name].dtype}, {tensors[name].layout}"
            raise CheckpointError(f"{path}: {name} is {found}, expected plain floating-point numbers")
    try:
        module.load_state_dict({name: t.to(own[name].dtype) for name, t in tensors.items()})
    except (RuntimeError, NotImplementedError) as error:  # tensors without values, say
        raise CheckpointError(f"{path}: its tensors cannot be read ({first_line(error)})") from error
