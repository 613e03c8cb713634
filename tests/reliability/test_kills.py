"""Killed anywhere, a run goes on to the same bytes"""

import errno
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from dyndit import files
from dyndit.errors import InputError
from dyndit.plans.table import FILE as TABLE
from support.damage import FULL
from support.kills import changes_of, crashes_at, fills_at, killed_at_random, num_changes
from support.tiny_verbs import TinyVerbs, left

SHARES = (0.2, 0.2, 0.2, 1.0)
"""Within which share of a run's time it is killed."""
SHORT = ("train", "distill", "calibrate", "sample", "evaluate", "convert")
LONG = ("report", "compare", "quickstart")
"""Verbs that are crashed at ten moments only, unless `FULL`: they change the disk at hundreds."""


@pytest.mark.reliability("A crash at any write, flush, rename or removal: the run goes on to the same bytes")
@pytest.mark.parametrize("verb", SHORT + LONG * FULL)
def test_a_crash_at_any_change_of_the_disk(verb: str, verbs: TinyVerbs, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    num = num_changes(verbs.work(verb, whole))
    for moment in range(num):
        out = tmp_path / str(moment)
        assert crashes_at(moment, verbs.work(verb, out))
        verbs.work(verb, out)()
        assert left(out) == left(whole), moment
    assert not crashes_at(num, verbs.work(verb, tmp_path / "beyond"))


def test_a_crash_where_the_table_lands_loses_no_cost(verbs: TinyVerbs, tmp_path: Path) -> None:
    """A table in its file is done: what it took has to be noted before."""
    whole = tmp_path / "whole"
    moments = changes_of(TABLE, verbs.work("compare", whole))
    assert len(moments) > 2
    for moment in sorted({moments[0], moments[-1], moments[-1] + 1}):
        out = tmp_path / str(moment)
        assert crashes_at(moment, verbs.work("compare", out))
        verbs.work("compare", out)()
        assert left(out) == left(whole), moment


@pytest.mark.reliability("Crashes one after the other in one report or comparison: it goes on to the same files")
@pytest.mark.parametrize("verb", LONG)
def test_crashes_in_a_row(verb: str, verbs: TinyVerbs, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    num = num_changes(verbs.work(verb, whole))
    crashed = [crashes_at(moment, verbs.work(verb, out)) for moment in range(3, num, num // 10)]
    assert sum(crashed) > 4  # the later ones meet a run that is done
    verbs.work(verb, out)()
    assert left(out) == left(whole)


@pytest.mark.reliability("SIGKILL at 20 random moments of each verb: it goes on to the same bytes")
@pytest.mark.parametrize("verb", SHORT + LONG)
def test_sigkill_at_random_moments(verb: str, verbs: TinyVerbs, tmp_path: Path) -> None:
    whole, began, chance = tmp_path / "whole", time.monotonic(), random.Random(2)
    verbs.work(verb, whole)()
    takes, expected, num_killed, number = time.monotonic() - began, left(whole), 0, 0
    while num_killed < 20:
        out, number = tmp_path / str(number), number + 1
        while num_killed < 20 and killed_at_random(verbs.work(verb, out), takes * chance.choice(SHARES), chance):
            num_killed += 1
        verbs.work(verb, out)()
        assert left(out) == expected


@pytest.mark.reliability("A disk that fills at any write: one line, no draft left, the run goes on to the same bytes")
@pytest.mark.parametrize("verb", SHORT + LONG * FULL)
def test_a_full_disk_at_any_write(verb: str, verbs: TinyVerbs, tmp_path: Path) -> None:
    whole, acts = tmp_path / "whole", []
    num_changes(verbs.work(verb, whole), acts)
    for moment in (number for number, act in enumerate(acts) if act in ("make", "write", "append")):
        out = tmp_path / str(moment)
        error = fills_at(moment, verbs.work(verb, out))
        if verb != "evaluate" or error is not None:  # features that cannot be kept are only computed again
            assert isinstance(error, InputError), (moment, error)
            assert "No space left" in str(error)
            assert "\n" not in str(error)
        assert not [path for path in out.rglob("*") if files.is_draft(path) or path.name == ".lock"]
        verbs.work(verb, out)()
        assert left(out) == left(whole), moment


@pytest.mark.reliability("A read-only disk, or one without quota: one line, nothing is left behind")
@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("verb", [*SHORT, "report"])
def test_a_disk_that_takes_nothing(verb: str, number: int, verbs: TinyVerbs, tmp_path: Path) -> None:
    if verb == "calibrate":
        shutil.copytree(verbs.root / "model", tmp_path / "out")
    before = left(tmp_path)
    error = fills_at(0, verbs.work(verb, tmp_path / "out"), number)
    assert isinstance(error, InputError), error
    assert os.strerror(number) in str(error)
    assert "\n" not in str(error)
    assert left(tmp_path) == before
