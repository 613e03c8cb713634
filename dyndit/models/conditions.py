"""Conditions: what a model is conditioned on. A condition knows its null, its dropout and its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from dyndit.errors import InputError


@dataclass(frozen=True)
class Conditioning:
    """What a family that takes more than labels is conditioned on, by the names of its own `forward`.

    rows: tensors with the batch first (prompt embeddings, their masks). shared: what serves every row alike (positions,
    flags). An absent entry reads as None.
    """

    rows: Mapping[str, Tensor]
    shared: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> object:
        """The entry of that name, of either kind; None if there is none."""
        return self.rows[name] if name in self.rows else self.shared.get(name)

    def select(self, rows: slice) -> Self:
        """The condition of these rows of the batch."""
        return replace(self, rows={name: value[rows] for name, value in self.rows.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same condition on another device."""
        moved = {name: value.to(device) for name, value in self.rows.items()}
        shared = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.shared.items()}
        return replace(self, rows=moved, shared=shared)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One batch of several; what is shared is the first's."""
        rows = {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows}
        return replace(parts[0], rows=rows)


Condition = Tensor | Conditioning
"""Labels (B,), or a `Conditioning` of B rows."""


class ConditionType(Protocol):
    """The kind of condition that a backbone takes. Samplers, training and tests ask it, and know nothing of labels."""

    guided: bool
    """Whether there is a null condition, which classifier-free guidance needs."""

    def null(self, like: Condition) -> Condition:
        """The null condition, for as many rows as `like` has.

        Raises:
            InputError: there is none.
        """

    def dropped(self, condition: Condition, generator: torch.Generator, share: float | None = None) -> Condition:
        """Replace each row by the null condition with probability `share` (default: the model's own dropout).

        Without a null nothing is replaced. Random numbers are drawn either way, so that a step's later ones stay.
        """

    def of(self, values: Sequence[object], device: torch.device | str = "cpu") -> Condition:
        """The condition of these values, one row each; a class label is a whole number.

        Raises:
            InputError: naming a value that this model does not know.
        """

    def in_turn(self, num: int, first: int = 0) -> list[object]:
        """Values for the pictures `first` to `first + num - 1` of an evaluation: every class in turn."""

    def example(self, rows: int, generator: torch.Generator | None = None) -> Condition:
        """A random condition of so many rows, for tests and for timing."""


@dataclass(frozen=True)
class ClassLabels:
    """Class labels 0 to num_classes - 1. The label after them is the null label, if labels are dropped in training."""

    num_classes: int
    dropout: float = 0.1

    @property
    def guided(self) -> bool:
        """Whether labels were dropped in training, so that there is a null label."""
        return self.dropout > 0

    @property
    def null_label(self) -> int | None:
        """The null label; None for a model trained without one."""
        return self.num_classes if self.guided else None

    def null(self, like: Tensor) -> Tensor:
        """As of `ConditionType`.  like: (B,) -> (B,)."""
        if self.null_label is None:
            raise InputError("guidance: this model was trained without a null class; expected a guidance scale of 1")
        return torch.full_like(like, self.null_label)

    def dropped(self, condition: Tensor, generator: torch.Generator, share: float | None = None) -> Tensor:
        """As of `ConditionType`.  condition: (B,) -> (B,)."""
        lost = torch.rand(len(condition), generator=generator) < (self.dropout if share is None else share)
        if self.null_label is None:
            return condition
        return torch.where(lost.to(condition.device), self.null_label, condition)

    def of(self, values: Sequence[object], device: torch.device | str = "cpu") -> Tensor:
        """As of `ConditionType`: labels -> (B,)."""
        labels = [int(value) for value in values]
        if bad := [label for label in labels if not 0 <= label < self.num_classes]:
            raise InputError(f"--class-labels {bad[0]}: expected 0 to {self.num_classes - 1}")
        return torch.tensor(labels, device=device)

    def in_turn(self, num: int, first: int = 0) -> list[object]:
        """As of `ConditionType`."""
        return [i % self.num_classes for i in range(first, first + num)]

    def example(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """As of `ConditionType`.  -> (rows,)."""
        return torch.randint(self.num_classes, (rows,), generator=generator)


@dataclass(frozen=True)
class GivenRows:
    """Conditions that come from a pipeline, which knows their null and their meaning."""

    guided: bool = False

    def null(self, like: Condition) -> Condition:
        """As of `ConditionType`: refused."""
        raise InputError("condition: the pipeline that made it knows its null; expected a guidance scale of 1 here")

    def dropped(self, condition: Condition, generator: torch.Generator, share: float | None = None) -> Condition:
        """As of `ConditionType`: nothing is replaced."""
        return condition

    def of(self, values: Sequence[object], device: torch.device | str = "cpu") -> Condition:
        """As of `ConditionType`: refused."""
        raise InputError("condition: this model's come from its pipeline; expected calls of the pipeline")

    def in_turn(self, num: int, first: int = 0) -> list[object]:
        """As of `ConditionType`: refused."""
        raise InputError("condition: this model's come from its pipeline; expected calls of the pipeline")

    def example(self, rows: int, generator: torch.Generator | None = None) -> Condition:
        """As of `ConditionType`: refused."""
        raise InputError("condition: this model's come from its pipeline; expected recorded calls as examples")
