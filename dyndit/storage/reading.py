"""Read pickled tensors without running code, and load them strictly. Every format uses this."""

import argparse
import difflib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath, WindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyndit import bounds, seals
from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.files import opened, refuse_pointer
from dyndit.limits import LIMITS
from dyndit.models.base import Backbone, outlined
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import AutoencoderRecord
from dyndit.process import DDPM, Process, from_config
from dyndit.untrusted import check_archive, tried_in_child

_MOST_REPEATED = 256 << 20
"""Most bytes that tensors of a pickle may have beyond their storage, as expanded tensors have."""
_LARGEST = 1 << 20
"""Largest number in a config: no size of a model comes near it."""


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
    recorded: Any, asked: AskedProcess, path: Path, usual: Process = DDPM()
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
        return wanted or usual, ()
    try:
        found = from_config(recorded)
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    if wanted is not None and (found.name if isinstance(asked, str) else found) not in (asked, wanted):
        raise CheckpointError(f"{path}: made for the process {found}, but --process {wanted} is asked for")
    return found, ()


def autoencoder_record(recorded: Any, path: Path) -> AutoencoderRecord | None:
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
_PLAIN: tuple[Any, ...] = (
    *(argparse.Namespace, SimpleNamespace, PosixPath, WindowsPath, np.dtype, np.dtypes.Float64DType),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)
"""Types of plain data that training scripts save beside the tensors: settings, paths, a best score."""


def read_pickled(path: Path) -> object:
    """Read a file of `torch.save` that holds only tensors, plain data and `argparse.Namespace`.

    Raises CheckpointError: the file is damaged, or reading it would run code.
    """

    def read() -> object:
        # Pass a file, not a path: torch.load trusts the suffix of a path.
        with opened(path) as file, torch.serialization.safe_globals([*_PLAIN]):
            return torch.load(file, map_location="cpu", weights_only=True)

    try:
        check_archive(path)
        tried_in_child(path, read, min(LIMITS.memory, (1 << 30) + 3 * path.stat().st_size))
        data = read()
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler may raise anything on arbitrary bytes
        refuse_pointer(path, error)
        name = type(error).__name__
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        found = f"holds {unsafe[1]}" if unsafe else f"damaged or of another kind, {name}: {first_line(error)}"
        raise CheckpointError(f"{path}: expected a PyTorch checkpoint of tensors alone ({found})") from error
    if damaged := _damaged_record(path):
        raise CheckpointError(f"{path}: damaged (the checksum of {damaged} does not fit)")
    repeated = 0  # bytes
    for tensor in _tensors(data):
        if tensor.layout == torch.strided:
            repeated += max(0, tensor.nbytes - tensor.untyped_storage().nbytes())
        if repeated > _MOST_REPEATED:
            raise CheckpointError(
                f"{path}: a tensor of shape {tuple(tensor.shape)} repeats {tensor.untyped_storage().nbytes()} bytes; "
                "expected tensors that hold their own values"
            )
    return data


def _tensors(data: object) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    waiting, seen = [data], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, dict | list | tuple) and id(found) not in seen:
            seen.add(id(found))
            waiting += found.values() if isinstance(found, dict) else found


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


def _check_numbers(config: object) -> None:
    """Refuse numbers of a config that no model has. Raises TypeError if the config is no object, InputError else."""
    if not isinstance(config, dict):
        raise TypeError(f"{type(config).__name__}, expected an object")
    for name, value in config.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, bool) or not isinstance(each, int | float):
                continue
            if not bounds.is_number(each) or abs(each) > _LARGEST:
                raise InputError(f"{name} {each!r:.40}: expected at most {_LARGEST}")


def built(
    family: type[Backbone], config: dict[str, Any], path: Path, tensors: Mapping[str, Tensor], weights: Path
) -> Backbone:
    """Build a backbone of the architecture in the file `path`, and load the tensors of the file `weights` strictly.

    Raises CheckpointError: the architecture is impossible, or does not fit the memory or the tensors.
    """
    try:
        _check_numbers(config)
        if (num := config.get("num_blocks", 0)) > len(tensors):
            raise InputError(f"{num} blocks, but {len(tensors)} tensors")
        outline = outlined(family, config)  # shapes alone: nothing is built that the file cannot fill
        check_shapes(outline, tensors, weights)
        backbone = family.from_config(config)
    except CheckpointError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: impossible architecture ({first_line(error)})") from error
    load_strictly(backbone, tensors, weights)
    return backbone


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors. Refuse missing, extra and reshaped tensors, and tensors without plain floating-point numbers.

    Raises CheckpointError, which names the first such tensor.
    """
    check_shapes(module, tensors, path)
    own = module.state_dict()
    check_finite(tensors, path)
    try:
        module.load_state_dict({name: t.to(own[name].dtype) for name, t in tensors.items()})
    except (RuntimeError, NotImplementedError) as error:  # for example, tensors without values
        raise CheckpointError(f"{path}: its tensors cannot be read ({first_line(error)})") from error


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse NaN and infinities. Raises CheckpointError, which names the first such tensor and the file."""
    if odd := seals.first_not_finite(tensors):
        raise CheckpointError(f"{path}: {odd} holds numbers that are not finite; expected finite numbers")


def check_shapes(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse missing, extra and reshaped tensors, and tensors without plain floating-point numbers.

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
