"""Conditions: the null, the dropout, rows of a batch."""

import pytest
import torch

from dyndit.errors import InputError
from dyndit.models.conditions import ClassLabels, Conditioning, GivenRows


def test_labels_are_dropped_at_the_rate_and_from_the_generator() -> None:
    condition, y = ClassLabels(10, 0.3), torch.arange(20_000) % 10
    dropped = condition.dropped(y, torch.Generator().manual_seed(1))
    lost = dropped == condition.null_label
    assert lost.float().mean() == pytest.approx(0.3, abs=0.015)  # 4.6 standard deviations
    assert torch.equal(dropped[~lost], y[~lost])
    assert torch.equal(dropped, condition.dropped(y, torch.Generator().manual_seed(1)))
    assert not torch.equal(dropped, condition.dropped(y, torch.Generator().manual_seed(2)))
    more = condition.dropped(y, torch.Generator().manual_seed(1), share=0.6) == condition.null_label
    assert more.float().mean() == pytest.approx(0.6, abs=0.016)


def test_a_model_without_null_drops_nothing_and_draws_as_many_numbers() -> None:
    """What a training step draws after the dropout does not depend on whether there is a null label."""
    y, with_null, without = torch.arange(100) % 10, torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    ClassLabels(10, 0.1).dropped(y, with_null)
    assert torch.equal(ClassLabels(10, 0.0).dropped(y, without), y)
    assert torch.equal(torch.rand(3, generator=with_null), torch.rand(3, generator=without))
    with pytest.raises(InputError, match="null class"):
        ClassLabels(10, 0.0).null(y)


def test_labels_beyond_the_classes_are_refused() -> None:
    assert ClassLabels(3).in_turn(4, first=2) == [2, 0, 1, 2]
    assert ClassLabels(3).of([0, 2]).tolist() == [0, 2]
    for bad in (3, -1):  # 3 is the null label: not one to ask for
        with pytest.raises(InputError, match=f"--class-labels {bad}"):
            ClassLabels(3).of([0, bad])


def test_rows_are_selected_and_joined_and_what_is_shared_stays() -> None:
    whole = Conditioning({"prompt": torch.arange(12.0).view(4, 3)}, {"scale": 2, "positions": torch.zeros(5)})
    parts = [whole.select(slice(0, 1)), whole.select(slice(1, 4))]
    joined = Conditioning.joined(parts)
    assert torch.equal(joined["prompt"], whole["prompt"])
    assert joined["scale"] == 2
    assert joined["positions"] is whole["positions"]
    assert joined["absent"] is None


def test_conditions_of_a_pipeline_know_no_null() -> None:
    rows = Conditioning({"prompt": torch.ones(2, 3)})
    assert GivenRows().dropped(rows, torch.Generator()) is rows
    for refused in (lambda: GivenRows().null(rows), lambda: GivenRows().of([1]), lambda: GivenRows().in_turn(2)):
        with pytest.raises(InputError, match="pipeline"):
            refused()
