"""Conditions of a model, such as class labels. A condition type knows its null, its dropout and its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dyndit.errors import InputError


@dataclass(frozen=True)
class Conditioning:
    """The condition of a family that takes more than labels. Keys are the argument names of its own `forward`.

    rows: tensors with the batch first, for example prompt embeddings. shared: entries that serve every row, for
    example positions. An absent entry reads as None.
    """

    rows: Mapping[str, Tensor]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Return the entry `name` from `rows` or `shared`; None if it is absent."""
        return self.rows[name] if name in self.rows else self.shared.get(name)

    def select(self, rows: slice) -> Self:
        """Return the condition of these rows of the batch."""
        return replace(self, rows={name: value[rows] for name, value in self.rows.items()})

    def to(self, device: torch.device | str) -> Self:
        """Return the same condition on another device."""
        moved = {name: value.to(device) for name, value in self.rows.items()}
        shared = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.shared.items()}
        return replace(self, rows=moved, shared=shared)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Join several batches into one. Entries that all rows share are taken from the first batch."""
        rows = {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows}
        return replace(parts[0], rows=rows)


Condition = Tensor | Conditioning
"""Labels (B,), words of captions (B, S), or a `Conditioning` of B rows."""


Value = int | str
"""What a user asks for: the number of a class, or a caption."""


class Described(Protocol):
    """Pictures with a label and a caption each."""

    @property
    def labels(self) -> Sequence[int]:
        """Return the class of every picture."""
        ...

    @property
    def captions(self) -> Sequence[str]:
        """Return the caption of every picture."""
        ...


class ConditionType(Protocol):
    """The kind of condition that a backbone takes. Samplers, training and tests use it instead of labels.

    `Any` stands for the kind's own rows: `Tensor` of labels, or `Conditioning`.
    """

    @property
    def guided(self) -> bool:
        """Tell if there is a null condition. Classifier-free guidance needs it."""
        ...

    def null(self, like: Any) -> Any:
        """Return the null condition, repeated for the rows of `like`. Raises InputError if there is none."""

    def dropped(self, condition: Any, generator: torch.Generator, share: float | None = None) -> Any:
        """Replace each row by the null condition with probability `share` (default: the model's own dropout).

        Without a null condition, return the rows unchanged. Random numbers are drawn either way, so that later draws
        of the step do not change.
        """

    def plain(self, values: Sequence[Value]) -> list[Value]:
        """Check values, and return them as plain numbers or text.

        Raises InputError, naming a value that this model does not know.
        """
        ...

    def of(self, values: Sequence[Value], device: torch.device | str = "cpu") -> Condition:
        """Build the condition of these values, one row per value.

        Raises:
            InputError: see `plain`.
        """
        ...

    def in_turn(self, num: int, first: int = 0) -> list[Value]:
        """Return values for pictures `first` to `first + num - 1` of an evaluation: every class in turn."""
        ...

    def values_of(self, pictures: Described) -> Sequence[Value]:
        """Return the value of every picture of a data set: its labels, or its captions."""
        ...

    def example(self, rows: int, generator: torch.Generator | None = None) -> Condition:
        """Draw a random condition of `rows` rows, for tests and timing."""
        ...


@dataclass(frozen=True)
class ClassLabels:
    """Class labels 0 to num_classes - 1: `dyndit.ClassLabels(10)`.

    num_classes: classes, without the null class. dropout: share of labels that training replaced by the null label,
    which is `num_classes`: an embedding of labels has one row more. 0: no null label, and no guidance.
    """

    num_classes: int
    dropout: float = 0.1

    @property
    def guided(self) -> bool:
        """Tell if training dropped labels, so that there is a null label."""
        return self.dropout > 0

    @property
    def null_label(self) -> int | None:
        """Return the null label; None if the model was trained without a null label."""
        return self.num_classes if self.guided else None

    def null(self, like: Tensor) -> Tensor:
        """See `ConditionType`.  like: (B,) -> (B,)."""
        if self.null_label is None:
            raise InputError("guidance: this model was trained without a null class; expected a guidance scale of 1")
        return torch.full_like(like, self.null_label)

    def dropped(self, condition: Tensor, generator: torch.Generator, share: float | None = None) -> Tensor:
        """See `ConditionType`.  condition: (B,) -> (B,)."""
        lost = torch.rand(len(condition), generator=generator) < (self.dropout if share is None else share)
        if self.null_label is None:
            return condition
        return torch.where(lost.to(condition.device), self.null_label, condition)

    def plain(self, values: Sequence[Value]) -> list[Value]:
        """See `ConditionType`.  labels -> whole numbers."""
        if words := [value for value in values if isinstance(value, str)]:
            raise InputError(f"--prompt {words[0]!r:.40}: this model takes class labels, 0 to {self.num_classes - 1}")
        labels: list[Value] = [int(value) for value in values]
        if bad := [label for label in labels if not 0 <= int(label) < self.num_classes]:
            raise InputError(f"--class-labels {bad[0]}: expected 0 to {self.num_classes - 1}")
        return labels

    def of(self, values: Sequence[Value], device: torch.device | str = "cpu") -> Tensor:
        """See `ConditionType`.  labels -> (B,)."""
        return torch.tensor(self.plain(values), device=device)

    def in_turn(self, num: int, first: int = 0) -> list[Value]:
        """See `ConditionType`."""
        return [i % self.num_classes for i in range(first, first + num)]

    def values_of(self, pictures: Described) -> Sequence[Value]:
        """See `ConditionType`."""
        return pictures.labels

    def example(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """See `ConditionType`.  -> (rows,)."""
        return torch.randint(self.num_classes, (rows,), generator=generator)


@dataclass(frozen=True)
class GivenRows:
    """Conditions that come from a pipeline. The pipeline knows their null and their meaning."""

    guided: bool = False

    def null(self, like: Condition) -> Condition:
        """Refuse: the pipeline makes the null condition."""
        raise InputError("condition: the pipeline that made it knows its null; expected a guidance scale of 1 here")

    def dropped(self, condition: Condition, generator: torch.Generator, share: float | None = None) -> Condition:
        """Return the condition unchanged."""
        return condition

    def plain(self, values: Sequence[Value]) -> list[Value]:
        """Refuse: the pipeline makes the conditions."""
        raise InputError("condition: this model's come from its pipeline; expected calls of the pipeline")

    def of(self, values: Sequence[Value], device: torch.device | str = "cpu") -> Condition:
        """Refuse: the pipeline makes the conditions."""
        raise InputError("condition: this model's come from its pipeline; expected calls of the pipeline")

    def in_turn(self, num: int, first: int = 0) -> list[Value]:
        """Refuse: the pipeline makes the conditions."""
        raise InputError("condition: this model's come from its pipeline; expected calls of the pipeline")

    def values_of(self, pictures: Described) -> Sequence[Value]:
        """Refuse: the pipeline makes the conditions."""
        raise InputError("condition: this model's come from its pipeline; expected calls of the pipeline")

    def example(self, rows: int, generator: torch.Generator | None = None) -> Condition:
        """Refuse: recorded calls of the pipeline serve as examples."""
        raise InputError("condition: this model's come from its pipeline; expected recorded calls as examples")
