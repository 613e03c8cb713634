"""Measure plans for a descent, and keep every round on disk: a descent that was killed goes on."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dyndit import seals
from dyndit.errors import CheckpointError
from dyndit.files import read_safetensors, write_safetensors
from dyndit.plans.descent import MeasureAround
from dyndit.plans.plan import DepthPlan
from dyndit.stats import Moments

PARTS, SECONDS = ("mean", "second"), "seconds"
"""Names in a round's file: of a plan's moments, and of the time that they took."""


@dataclass
class Rounds:
    """Rounds of a descent: measured now, or read from `folder`.

    key: what the moments depend on besides the plans. earlier: seconds of the rounds that were read.
    """

    folder: Path
    key: str
    measure: MeasureAround
    earlier: float = 0.0

    def __call__(self, plan: DepthPlan, others: Sequence[DepthPlan]) -> list[Moments]:
        """Return the moments under a plan and under others: see `MeasureAround`."""
        texts = [" ".join(map(str, one.steps)) for one in (plan, *others)]
        name = hashlib.sha256("\n".join([self.key, f"{plan.cfg_scale!r}", *texts]).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        if (known := self._read(path, len(texts))) is not None:
            return known
        began = time.monotonic()
        found = self.measure(plan, others)
        tensors = {f"{number}.{part}": getattr(one, part) for number, one in enumerate(found) for part in PARTS}
        told = {"num": str(found[0].num), SECONDS: str(time.monotonic() - began)}
        write_safetensors(path, tensors, told | {seals.SEAL: seals.tensors_checksum(tensors, told)})
        return found

    def _read(self, path: Path, num_plans: int) -> list[Moments] | None:
        """Read a round; None if there is none, or a damaged one."""
        if not path.exists():
            return None
        try:
            tensors, told = read_safetensors(path)
            whole = told[seals.SEAL] == seals.tensors_checksum(tensors, told)
            found = [_moments(tensors, number, int(told["num"])) for number in range(num_plans)]
            seconds = float(told[SECONDS])
        except (CheckpointError, KeyError, ValueError):
            return None
        if not whole:
            return None
        self.earlier += seconds
        return found


def _moments(tensors: dict[str, Tensor], number: int, num: int) -> Moments:
    mean, second = (tensors[f"{number}.{part}"] for part in PARTS)
    return Moments(mean, second, num)
