"""Tables as CSV under a seal: they come back, and a lost or changed row is noticed."""

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyndit import sealed_csv
from dyndit.errors import InputError

FRAME = pd.DataFrame({"name": ["a,b", 'c"d\n'], "seed": [0, 1], "loss": [0.1, 0.25]})
texts = st.text(max_size=6).filter(lambda text: "\0" not in text and "\r" not in text)


def test_a_table_comes_back(tmp_path: Path) -> None:
    sealed_csv.write(path := tmp_path / "t.csv", FRAME)
    pd.testing.assert_frame_equal(sealed_csv.read(path, ("name", "loss")), FRAME)
    assert sealed_csv.check(path)
    before = path.read_bytes()
    sealed_csv.write(path, sealed_csv.read(path, ()))
    assert path.read_bytes() == before


@pytest.mark.reliability("Tables of a run come back, and any lost row is noticed")
@given(st.lists(st.tuples(texts.filter(bool), texts), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_and_any_lost_row_is_noticed(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = tmp_path / "t.csv"
    for sealed in (True, False):
        path.write_text(sealed_csv.text_of(("a", "b"), rows, sealed=sealed), encoding="utf-8", newline="")
        assert sealed_csv.check(path) is sealed
        head, *found = sealed_csv.rows_of(path)
        assert head[:2] == ["a", "b"]
        assert [tuple(row[:2]) for row in found] == rows
    path.write_text(sealed_csv.text_of(("a", "b"), [*rows, ("one", "more")]), encoding="utf-8", newline="")
    lines = sealed_csv.rows_of(path)
    for lost in range(1, len(lines)):
        kept = lines[:lost] + lines[lost + 1 :]
        path.write_text(sealed_csv.text_of(kept[0], kept[1:], sealed=False), encoding="utf-8", newline="")
        with pytest.raises(InputError, match="damaged or edited"):
            sealed_csv.check(path)


def test_a_table_without_a_checksum_is_taken_as_it_is(tmp_path: Path) -> None:
    sealed_csv.write(path := tmp_path / "t.csv", FRAME, sealed=False)
    assert not sealed_csv.check(path)
    assert sealed_csv.read(path, ("seed",))["seed"].tolist() == [0, 1]
    assert path.read_text() == FRAME.to_csv(index=False)


@pytest.mark.reliability("A file that is no table: one line")
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "unreadable"),
        ("", "unreadable"),
        ("a,b\n", "no rows"),
        ("a\n1\n", "no column 'b'"),
        ("a,b\n1\n", "row 2: 1 values, expected 2"),
        ("a,b\n1,2,3\n", "row 2: 3 values, expected 2"),
        ("a,checksum\n1,x\n", "damaged or edited"),
        ("a,checksum\n", "damaged or edited"),
        ('a,b\n1,"2\n', "unreadable"),
        ("a,b\n1,\udcff\n", "unreadable"),
    ],
)
def test_what_is_no_table_is_one_line(text: str | None, found: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=found) as error:
        sealed_csv.read(path, ("a", "b"))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
