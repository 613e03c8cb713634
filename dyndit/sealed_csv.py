"""Write tables as CSV files under a seal, and check the seal at reading.

Every row ends with the checksum of all rows, in the column `checksum`. A lost row, an edit or a flipped bit is noticed.
A file without that column is taken as it is: `check` tells.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dyndit import seals
from dyndit.errors import InputError, first_line
from dyndit.files import opened, write_text

Row = Sequence[object]


def text_of(head: Row, rows: Sequence[Row], *, sealed: bool = True) -> str:
    """Return the text of a file.  head: names of the columns. A table without rows carries no checksum."""
    text = _text([head, *rows])
    if not sealed:
        return text
    head, *rows = csv.reader(io.StringIO(text))  # the texts that a reader finds
    seal = seals.checksum([head, rows])
    return _text([[*head, seals.SEAL], *([*row, seal] for row in rows)])


def _text(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write(path: Path, frame: pd.DataFrame, *, sealed: bool = True) -> None:
    """Write a table. Raises InputError: the file cannot be written."""
    head, *rows = csv.reader(io.StringIO(frame.to_csv(index=False)))
    write_text(path, text_of(head, rows, sealed=sealed))


def read(path: Path, needed: Sequence[str], **options: Any) -> pd.DataFrame:
    """Read a table without the column of its seal, which is checked.  options: of `pandas.read_csv`.

    Raises:
        InputError: missing, unreadable, damaged, without rows, or without one of the `needed` columns.
    """
    check(path)
    try:
        found = pd.read_csv(path, **options).drop(columns=seals.SEAL, errors="ignore")
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{path}: unreadable ({first_line(error)}), expected a CSV file") from error
    if found.empty:
        raise InputError(f"{path}: no rows, expected one at least")
    if missing := [name for name in needed if name not in found]:
        raise InputError(f"{path}: no column '{missing[0]}', expected {', '.join(needed)}")
    return found


def rows_of(path: Path) -> list[list[str]]:
    """Return the heading and the rows of a CSV file as text. Raises InputError: missing or unreadable."""
    try:
        with opened(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            return [row for row in csv.reader(text, strict=True) if row] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: unreadable ({first_line(error)}), expected a CSV file") from error


def check(path: Path) -> bool:
    """Tell if a file has a seal, which is checked.

    Raises:
        InputError: unreadable, a row of another length, or rows that do not fit the seal.
    """
    head, *rows = rows_of(path)
    if ragged := next((number for number, row in enumerate(rows, 2) if len(row) != len(head)), None):
        raise InputError(
            f"{path}, row {ragged}: {len(rows[ragged - 2])} values, expected {len(head)} as in the heading"
        )
    found, recorded = seals.checksum([head[:-1], [row[:-1] for row in rows]]), {row[-1] for row in rows if row}
    is_whole = recorded == {found}
    if is_whole != (head[-1:] == [seals.SEAL]):
        raise InputError(
            f"{path}: damaged or edited (checksum {found}, it records {min(recorded, default='none')!r:.24}); expected "
            f"it as it was written, or without the column {seals.SEAL}"
        )
    return is_whole
