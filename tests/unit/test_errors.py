"""Errors that name what was found: one printable line, whatever a file says."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndit.errors import LONGEST, CheckpointError, InputError, PlanError


@given(kind=st.sampled_from([InputError, CheckpointError, PlanError]), found=st.text(max_size=2 * LONGEST))
def test_a_message_is_one_printable_line(kind: type[InputError], found: str) -> None:
    message = str(kind(f"runs.csv: found '{found}', expected a number"))
    assert message.isprintable()
    assert len(message) <= LONGEST + 3
    assert message.startswith("runs.csv: found '")


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("naïve ⟨3⟩ 数", "naïve ⟨3⟩ 数"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("C:\\data", "C:\\data"),
    ],
)
def test_what_can_be_printed_stays_as_it_is(found: str, shown: str) -> None:
    assert str(InputError(found)) == shown
    assert str(pickle.loads(pickle.dumps(PlanError(found)))) == shown


def test_a_long_message_ends() -> None:
    assert str(InputError("x" * LONGEST)) == "x" * LONGEST
    assert str(InputError("x" * (LONGEST + 1))) == "x" * LONGEST + "..."
