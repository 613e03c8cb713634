"""Read pickled tensors without running code, and load them strictly. Every format uses this."""

import argparse
import difflib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath, WindowsPath
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.files import refuse_pointer
from dyndit.models.base import Backbone
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import AutoencoderRecord
from dyndit.process import DDPM, Process, from_config


@dataclass(frozen=True)
class Loaded:
    """A loaded model. notes: inferred settings, a line each."""

    model: DynamicDepth
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    """Folder of the plans, table and exits: the native folder, or the folder of the transformer's weights."""
    kind: str = "model"
    """The format, in words."""
    ignored: tuple[str, ...] = ()
    """Parts of the file that are not loaded, a line each."""


AskedProcess = Process | str | None
"""The process to load a model with, or its name. None: the file alone says it."""


def process_of(
    recorded: object, asked: AskedProcess, path: Path, usual: Process = DDPM()
) -> tuple[Process, tuple[str, ...]]:
    """Choose the process of a checkpoint -> the process, and a note if it is assumed.

    recorded: the `Process.config()` in the file; None if the file has none. usual: the family's process, assumed if
    nobody says one.

    Raises CheckpointError: the file's process is unknown, or differs from the asked process.
    """
    if recorded is None and asked is None:
        note = f"{path.name}: says no process; {usual.name} is assumed, --process (or process=) says another"
        return usual, (note,)
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


def autoencoder_record(recorded: object, path: Path) -> AutoencoderRecord | None:
    """Read the record of a model's autoencoder from plain data. Raises CheckpointError: it is no record."""
    if recorded is None:
        return None
    try:
        found = AutoencoderRecord(**recorded)
    except TypeError as error:
        raise CheckpointError(f"{path}: autoencoder is {recorded!r:.60}, expected kind, hash and source") from error
    if not all(isinstance(value, str) for value in vars(found).values()):
        raise CheckpointError(f"{path}: autoencoder is {recorded!r:.60}, expected text for kind, hash and source")
    return found


_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN = (
    *(argparse.Namespace, SimpleNamespace, PosixPath, WindowsPath, np.dtype, np.dtypes.Float64DType),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)
"""Types of plain data that training scripts save beside the tensors: settings, paths, a best score."""


def read_pickled(path: Path) -> object:
    """Read a file of `torch.save` that holds only tensors, plain data and `argparse.Namespace`.

    Raises CheckpointError: the file is damaged, or reading it would run code.
    """
    try:
        # Pass a file, not a path: torch.load trusts the suffix of a path.
        with path.open("rb") as file, torch.serialization.safe_globals(list(_PLAIN)):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler may raise anything on arbitrary bytes
        refuse_pointer(path, error)
        name = type(error).__name__
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        found = f"holds {unsafe[1]}" if unsafe else f"damaged or of another kind, {name}: {first_line(error)}"
        raise CheckpointError(f"{path}: expected a PyTorch checkpoint of tensors alone ({found})") from error
    if damaged := _damaged_record(path):
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not fit)")
    return data


def _damaged_record(path: Path) -> str | None:
    """Return the first record of a zip with a wrong checksum. torch.load does not check them."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save can leave the checksums out; then they are all zero.
            return archive.testzip() if any(record.CRC for record in archive.infolist()) else None
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return "the archive" if zipped else None  # the format before PyTorch 1.6 is no zip
    except Exception as error:  # a damaged directory can name any compression, size or text
        return f"the archive, {first_line(error)}"


def built(
    family: type[Backbone], config: dict[str, object], path: Path, tensors: Mapping[str, Tensor], weights: Path
) -> Backbone:
    """Build a backbone of the architecture in the file `path`, and load the tensors of the file `weights` strictly.

    Raises CheckpointError: the architecture is impossible, or does not fit the memory or the tensors.
    """
    try:
        backbone = family.from_config(config)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: impossible architecture ({first_line(error)})") from error
    load_strictly(backbone, tensors, weights)
    return backbone


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors. Refuse missing, extra and reshaped tensors, and tensors without plain floating-point numbers.

    Raises CheckpointError, which names the first such tensor.
    """
    own = module.state_dict()
    lacks, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    for problem, names, others, verb in (("lacks", lacks, extra, "found"), ("has extra", extra, list(own), "expected")):
        if names:
            near = difflib.get_close_matches(names[0], others[:10_000], 1, 0.0)
            closest = f"; the closest {verb} is {near[0]:.120}" if near else ""
            raise CheckpointError(f"{path}: {problem} {len(names)} tensors, first {names[0]:.120}{closest}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: {name} has shape {found}, expected {expected}")
        if not tensors[name].is_floating_point() or tensors[name].layout != torch.strided:
            found = f"{tensors[name].dtype}, {tensors[name].layout}"
            raise CheckpointError(f"{path}: {name} is {found}, expected plain floating-point numbers")
    try:
        module.load_state_dict({name: t.to(own[name].dtype) for name, t in tensors.items()})
    except (RuntimeError, NotImplementedError) as error:  # for example, tensors without values
        raise CheckpointError(f"{path}: its tensors cannot be read ({first_line(error)})") from error
