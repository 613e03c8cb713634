"""Choose the batch of each training step.

The batch of step s is a pure function of (seed, s). So a training run resumes exactly without storing any random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from dyndit.errors import InputError


@lru_cache(maxsize=4)
def _permutation(num_pictures: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pictures)


@lru_cache(maxsize=4)
def _grouped(groups: tuple[tuple[int, ...], ...], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Cut an epoch into batches of one group each, in a random order -> (num batches, B).

    The last batch of a group is filled up from the group's start: every item is in an epoch, a few are twice.
    """
    rng, batches = np.random.default_rng((seed, epoch)), []
    for group in groups:
        order, num = rng.permutation(group), -(-len(group) // batch_size)
        batches.append(np.resize(order, (num, batch_size)))
    return rng.permutation(np.concatenate(batches))


@dataclass(frozen=True)
class StepBatches(Sampler[list[int]]):
    """Choose the pictures of step s: a pure function of (seed, s), so a run can start at any step.

    Each epoch has one permutation, seeded by (seed, epoch). Joined, they make an endless stream; step s takes
    its positions [s·B, (s+1)·B). Each process gets `num_slices` equal micro-batches of a step. Together the processes
    see the same batch of B pictures for any number of processes.

    With `groups`, for example clips of one shape each, a step's batch is of one group. An epoch has each group's
    batches once, in a random order (see `_grouped`).
    """

    num_pictures: int
    batch_size: int  # B: pictures per step, over all micro-batches and processes
    seed: int
    start: int = 0
    stop: int = 2**62
    num_slices: int = 1
    rank: int = 0
    world: int = 1
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if self.batch_size % (self.num_slices * self.world):
            raise InputError(
                f"batch_size: found {self.batch_size}, expected a multiple of accumulation x processes "
                f"({self.num_slices} x {self.world})"
            )

    def batch(self, step: int) -> np.ndarray:
        """Return the indices of the whole batch of `step`, (B,)."""
        if self.groups:
            epoch, position = divmod(step, sum(-(-len(group) // self.batch_size) for group in self.groups))
            return _grouped(self.groups, self.batch_size, self.seed, epoch)[position]
        parts, position, missing = [], step * self.batch_size, self.batch_size
        while missing:
            epoch, offset = divmod(position, self.num_pictures)
            part = _permutation(self.num_pictures, self.seed, epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            slices = self.batch(step).reshape(self.num_slices, self.world, -1)
            yield from slices[:, self.rank].tolist()

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.num_slices
