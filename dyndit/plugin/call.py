"""One call of a pipeline: which step each call of its transformer belongs to, and what it ran."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.dynamic import Memory


def find_step(timesteps: Sequence[float], timestep: float, slack: float, last: int) -> int | None:
    """The step at `timestep`, which may be off by `slack`: a pipeline in half precision rounds it.

    Where rounding leaves several in reach, the next one after step `last` of the same call (-1: a new call), else the
    nearest. None: there is none in reach.
    """
    gaps = {k: abs(t - timestep) for k, t in enumerate(timesteps) if abs(t - timestep) <= slack}
    later = [k for k in gaps if k > last] if last >= 0 else []
    if len(gaps) > 1 and later:
        return min(later)
    return min(gaps, key=gaps.get, default=None)


COLUMNS = ["step", "timestep", "branch", "rows", "depth", "blocks", "seconds"]


@dataclass(frozen=True)
class Record:
    """One call of the transformer: (branch, rows, depth) of what ran as one batch, and its time."""

    step: int
    timestep: float
    branches: tuple[tuple[str, int, int], ...]
    seconds: Callable[[], float]

    def rows(self) -> list[tuple[object, ...]]:
        """Rows of `stats`."""
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
    """What one pipeline call leaves from step to step. A new one takes its place when the next call begins."""

    records: list[Record] = field(default_factory=list)
    step: int = -1
    timestep: float = float("inf")
    """As the transformer was given it, rounded to the pipeline's precision."""
    memory: Memory = field(default_factory=Memory)
    """What steps left for later ones."""
    first: list[Tensor] = field(default_factory=list)
    """What the first of two calls predicted: the conditional prediction and, where it was made there, its guide."""
    passes: int = 0
    _latents: Callable[[], Tensor | None] = lambda: None

    def is_second_pass(self, x: Tensor, timestep: float) -> bool:
        """Whether the last call was on these very latents: the same step's other branch.

        The timestep tells from the next step of a loop that writes into its latents.
        """
        return self.passes == 1 and self._latents() is x and self.timestep == timestep

    def is_over(self, step: int) -> bool:
        """Whether a call that begins at `step` belongs to another pipeline call."""
        return step <= self.step

    def enter(self, record: Record, timestep: float, x: Tensor) -> None:
        """Note what was run, and on which latents."""
        self.passes = 2 if self.is_second_pass(x, timestep) else 1
        self.records.append(record)
        self.step, self.timestep = record.step, timestep
        self._latents = weakref.ref(x)


def the_timestep(t: Tensor) -> float:
    """The one timestep of all rows.

    Raises:
        InputError: rows of different timesteps, which no plan has.
    """
    values = t.tolist()
    if any(value != values[0] for value in values):
        raise InputError(f"transformer: called with timesteps {sorted(set(values))[:3]} in one batch; expected one")
    return values[0]
