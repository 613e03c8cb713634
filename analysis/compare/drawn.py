"""Keep the pictures of a block that is being drawn: a comparison that is killed goes on within the block.

A block's arms are drawn in turns and scored together at its end, which may be hours later.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from dyndit import files, seals
from dyndit.errors import CheckpointError
from dyndit.sampling.samples import Samples

FOLDER = "drawn"
EVERY = 10
"""Batches of every arm in a file."""
TIMES = ("seconds", "network")


@dataclass(frozen=True)
class Drawn:
    """Pictures of an arm, uint8 (N, C, ...), and what drawing them took, in seconds: in all, and in the network."""

    pictures: Tensor
    seconds: float
    network: float

    @classmethod
    def of(cls, samples: Samples) -> "Drawn":
        """Return what a row needs of samples."""
        return cls(samples.pictures, samples.seconds, sum(samples.network_seconds))


@dataclass(frozen=True)
class Parts:
    """The files of one block: each holds the next `EVERY` batches of the same arms.

    key: what the pictures depend on besides the arms' names.
    """

    folder: Path
    arms: Sequence[str]
    key: str

    def read(self) -> Iterator[Mapping[str, Drawn]]:
        """Yield the parts that are there, from the first on: arm -> pictures. A damaged one ends them."""
        for number in count():
            if not self._path(number).exists() or (part := self._read(self._path(number))) is None:
                return
            yield part

    def write(self, number: int, part: Mapping[str, Sequence[Drawn]]) -> None:
        """Write part `number`.  part: arm -> its batches."""
        tensors = {f"{k}.pictures": torch.cat([one.pictures for one in part[arm]]) for k, arm in enumerate(self.arms)}
        for name in TIMES:
            totals = [sum(getattr(one, name) for one in part[arm]) for arm in self.arms]
            tensors[name] = torch.tensor(totals, dtype=torch.float64)
        told = {"arms": "\n".join(self.arms), "key": self.key}
        files.write_safetensors(self._path(number), tensors, told | {seals.SEAL: seals.tensors_checksum(tensors, told)})

    def remove(self) -> None:
        """Remove the files of the block, once its rows are written."""
        for path in self.folder.glob("*.safetensors"):
            files.remove(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, path: Path) -> dict[str, Drawn] | None:
        try:
            tensors, told = files.read_safetensors(path)
            whole = told[seals.SEAL] == seals.tensors_checksum(tensors, told)
            if not whole or (told["arms"], told["key"]) != ("\n".join(self.arms), self.key):
                return None
            seconds, network = (tensors[name].tolist() for name in TIMES)
            return {arm: Drawn(tensors[f"{k}.pictures"], seconds[k], network[k]) for k, arm in enumerate(self.arms)}
        except (CheckpointError, KeyError, IndexError):
            return None
