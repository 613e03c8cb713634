"""One call of a pipeline: find the step of each transformer call and record its work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.memory import Memory


def find_step(timesteps: Sequence[float], timestep: float, slack: float, last: int) -> int | None:
    """Find the step at `timestep`, which may be off by `slack`: a pipeline in half precision rounds it.

    If several steps are within `slack`, return the next step after step `last` of the same call (-1: a new call), else
    the nearest step. Return None if no step is within `slack`.
    """
    gaps = {k: abs(t - timestep) for k, t in enumerate(timesteps) if abs(t - timestep) <= slack}
    later = [k for k in gaps if k > last] if last >= 0 else []
    if len(gaps) > 1 and later:
        return min(later)
    return min(gaps, key=lambda k: gaps[k], default=None)


COLUMNS = ["step", "timestep", "branch", "rows", "depth", "blocks", "seconds"]


@dataclass(frozen=True)
class Record:
    """One call of the transformer: (branch, rows, depth) of each branch in its batch, and its time."""

    step: int
    timestep: float
    branches: tuple[tuple[str, int, int], ...]
    seconds: Callable[[], float]

    def rows(self) -> list[tuple[object, ...]]:
        """Return the rows for `stats`."""
        parts = [
            (branch, rows // 2 if name == "both" else rows, depth)
            for name, rows, depth in self.branches
            for branch in (("cond", "uncond") if name == "both" else (name,))
        ]
        total, seconds = sum(rows * depth for _, rows, depth in parts) or 1, self.seconds()
        return [
            (self.step, self.timestep, branch, rows, depth, rows * depth, seconds * rows * depth / total)
            for branch, rows, depth in parts
        ]


@dataclass
class Call:
    """The memory of one pipeline call from step to step. The next pipeline call starts a new `Call`."""

    records: list[Record] = field(default_factory=list)
    step: int = -1
    timestep: float = float("inf")
    """Timestep of the last transformer call, rounded to the pipeline's precision."""
    memory: Memory = field(default_factory=Memory)
    """Values that steps leave for later steps."""
    first: list[Tensor] = field(default_factory=list)
    """Predictions of the first of two calls: the conditional prediction, then its guide if that call made it."""
    passes: int = 0
    """Transformer calls of the last evaluation of a step: 2 after both branches of a family that calls them apart."""
    evaluations: int = 0
    """Evaluations of the last step. A solver of order 2, such as Heun's, evaluates a step twice."""
    _latents: Tensor | None = None

    def is_second_pass(self, x: Tensor, timestep: float) -> bool:
        """Return True if the last call had the same latents: this call is the same step's other branch.

        The timestep tells it from the next step of a loop that writes into its latents. A hook that moves inputs makes
        new tensors, so their values are compared.
        """
        if self.passes != 1 or self.timestep != timestep or self._latents is None:
            return False
        last = self._latents
        return last is x or (last.shape == x.shape and last.device == x.device and torch.equal(last, x))

    def is_over(self, step: int, evaluations: int = 1) -> bool:
        """Return True if a transformer call at `step` belongs to a new pipeline call.

        evaluations: how often the solver evaluates this step.
        """
        return step < self.step or (step == self.step and self.evaluations >= evaluations)

    def enter(self, record: Record, timestep: float, x: Tensor, *, second: bool) -> None:
        """Record the work and the latents of a transformer call."""
        self.passes = 2 if second else 1
        if not second:
            self.evaluations = self.evaluations + 1 if record.step == self.step else 1
        self.records.append(record)
        self.step, self.timestep, self._latents = record.step, timestep, x


def the_timestep(t: Tensor) -> float:
    """Return the one timestep of all rows.

    Raises:
        InputError: rows have different timesteps, which no plan allows.
    """
    values = t.tolist()
    if any(value != values[0] for value in values):
        raise InputError(f"transformer: called with timesteps {sorted(set(values))[:3]} in one batch; expected one")
    return values[0]
