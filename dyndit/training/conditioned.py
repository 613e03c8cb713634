"""Pair pictures with rows of a model's condition."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from dyndit.models.conditions import ClassLabels, Condition, Conditioning, ConditionType
from dyndit.training.data import Pictures

Rows = Tensor | dict[str, Tensor]
"""Conditions of a batch: labels (B,), words (B, S), or tensors of B rows by name."""


class Conditioned(Dataset[Any]):
    """Pictures with rows of a model's condition in place of labels. Item i is (x, row): a tensor, or tensors by name.

    The rows of each value are made once.
    """

    def __init__(self, pictures: Pictures, condition: ConditionType):
        self.pictures, self.values = pictures, condition.values_of(pictures)
        self.can_flip, self.fingerprint, self.groups = pictures.can_flip, pictures.fingerprint, pictures.groups
        self._rows: dict[object, Rows] = {}
        for value in dict.fromkeys(self.values):
            row = condition.of([value])
            named = isinstance(row, Conditioning)
            self._rows[value] = {name: part[0] for name, part in row.rows.items()} if named else row[0]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Rows]:
        return self.pictures[index][0], self._rows[self.values[index]]


def conditioned(pictures: Pictures, condition: ConditionType) -> Pictures | Conditioned:
    """Return the pictures with rows of `condition`. Class labels are the pictures' own."""
    return pictures if isinstance(condition, ClassLabels) else Conditioned(pictures, condition)


def as_condition(rows: Rows) -> Condition:
    """Return a batch of rows as the model takes it."""
    return Conditioning(rows) if isinstance(rows, dict) else rows
