"""One writer per folder, and nothing stored is replaced unasked"""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dyndit.calibration import measure
from dyndit.cli import models, plans, results
from dyndit.errors import CheckpointError, InputError
from dyndit.files import read_safetensors
from dyndit.locks import LOCK, locked
from dyndit.pictures import write_png
from dyndit.sampling.sample import sample_into
from dyndit.storage import load as checkpoints
from dyndit.training.data import load_digits
from support.damage import cuts, flips, unnoticed
from support.kills import Crash, changes
from support.tiny_verbs import TinyVerbs, left


class Holder:
    """Another process that holds a folder until it is killed."""

    def __init__(self, folder: Path, shared: bool = False) -> None:
        ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with locked(folder, shared=shared) as lock:
                    if shared:
                        lock.share()
                    os.write(ready[1], b".")
                    time.sleep(60)
            finally:
                os._exit(0)
        os.close(ready[1])  # so that a holder that fails is heard of
        assert os.read(ready[0], 1) == b"."
        os.close(ready[0])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_a_lock_is_the_holders_until_it_dies(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    with pytest.raises(InputError, match=rf"in use by process {holder.pid} on .*; expected a folder"), locked(tmp_path):
        pass
    holder.kill()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path), locked(tmp_path):  # the holder itself may take it again
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} ")
    assert not (tmp_path / LOCK).exists()


def test_where_nobody_can_write_there_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal comes from what the block writes, with its own message."""

    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("pathlib.Path.mkdir", "os.open"):
        with monkeypatch.context() as patch:
            patch.setattr(call, refuses)
            with locked(tmp_path) as lock:
                assert lock.handle is None
                lock.share()
        assert not list(tmp_path.iterdir())
    with locked(tmp_path) as lock:  # it was given back
        assert lock.handle is not None


def test_processes_of_one_run_share_a_lock(tmp_path: Path) -> None:
    first = Holder(tmp_path, shared=True)
    second = Holder(tmp_path, shared=True)
    with locked(tmp_path, shared=True):
        pass
    for holder in (first, second):
        with pytest.raises(InputError, match="in use by process"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


def test_a_child_neither_holds_nor_frees_its_parents_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        pid = os.fork()
        if pid == 0:
            try:
                with locked(tmp_path):
                    os._exit(0)
            except InputError:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        assert (tmp_path / LOCK).exists()


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.reliability("A second writer into a folder is refused and names the holder; a kill frees the folder")
@pytest.mark.parametrize("verb", ["train", "distill", "calibrate", "sample", "evaluate", "compare", "quickstart"])
def test_a_second_writer_is_refused(verb: str, verbs: TinyVerbs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(results, "_PATIENCE", 0.0)
    out = tmp_path / "out"
    if verb == "calibrate":
        verbs.work(verb, out)()
    folder = out / "run" if verb in ("evaluate", "compare", "quickstart") else out
    holder, before = Holder(folder), left(out)
    with pytest.raises(InputError, match=f"{folder}: in use by process {holder.pid}"):
        verbs.work(verb, out)()
    assert left(out) == before
    holder.kill()
    if verb not in ("compare", "quickstart"):  # they take longer
        verbs.work(verb, out)()
        assert not (folder / LOCK).exists()


@pytest.mark.reliability("A stored shift table stays until another is asked for, whole, and has given a plan")
def test_a_stored_table_is_replaced_only_if_asked_for(verbs: TinyVerbs, tmp_path: Path, capsys) -> None:
    verbs.calibrate(out := tmp_path / "model")
    before, small = left(out), {"num_pictures": 70, "batch_size": 35, "table_steps": 2, "num_bands": 1, "num_depths": 1}
    for asked, named in (
        ({"cfg_scale": 2.0}, "measured at --cfg-scale 1.5, now 2; expected the same, or --fresh"),
        ({"budget": 0.01}, "budget"),
    ):
        with pytest.raises(InputError, match=named):
            plans.calibrate(out, **{"budget": 0.9, "steps": 2} | asked)
        assert left(out) == before
    other = small | {"num_bands": 2, "fresh": True, "steps": 2}
    with pytest.raises(InputError, match="budget"):
        plans.calibrate(out, budget=0.01, **other)
    assert {name: content for name, content in left(out).items() if name in before} == before
    capsys.readouterr()
    plans.calibrate(out, budget=0.9, **other)  # the table of the refused call is whole, and is taken
    assert "measured already" in capsys.readouterr().out
    assert left(out).keys() == before.keys()
    assert left(out)["shift-table.safetensors"] != before["shift-table.safetensors"]


@pytest.mark.reliability("Any flipped bit or cut of calibrate's partial sums: the sums are measured again")
def test_damaged_partial_sums_are_not_used(verbs: TinyVerbs, tmp_path: Path) -> None:
    seen: list[Path] = []

    def stop(_number: int, act: str, path: Path) -> None:
        if act == "rename" and path.suffix == ".partial":
            seen.append(path)
        if len(seen) == 2:  # one batch is done
            raise Crash

    verbs.calibrate(tmp_path / "whole")
    with changes(stop), pytest.raises(Crash):
        verbs.calibrate(tmp_path / "stopped")
    (partial,) = (tmp_path / "stopped").glob("*.partial")
    key = read_safetensors(partial)[1]["key"]

    def sums() -> object:
        found, done, seconds = measure._restore(partial, key)
        if not done:  # measured again
            raise InputError("noticed")
        return {name: tensor.tolist() for name, tensor in found.items()}, done, seconds

    assert not unnoticed(partial, flips(partial.read_bytes(), 100, seed=0), sums)
    assert not unnoticed(partial, cuts(partial.read_bytes(), 50, seed=1), sums)
    content, name = partial.read_bytes(), "shift-table.safetensors"
    for position in (60, content.index(b'"done"') + 8, len(content) // 2, len(content) - 8):
        damaged = bytearray(content)
        damaged[position] ^= 1
        partial.write_bytes(damaged)
        shutil.copytree(tmp_path / "stopped", out := tmp_path / str(position))
        verbs.calibrate(out)
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.reliability("Evaluating a set twice into one run replaces its row")
def test_evaluating_twice_gives_one_row(verbs: TinyVerbs, tmp_path: Path) -> None:
    for _ in range(2):
        verbs.evaluate(tmp_path)
    text = (tmp_path / "run" / "runs.csv").read_text()
    assert len(pd.read_csv(tmp_path / "run" / "runs.csv")) == 1
    verbs.evaluate(tmp_path / "again")
    assert (tmp_path / "again" / "run" / "runs.csv").read_text() == text
    with pytest.raises(InputError, match="holds arm full-ddim-1, block 0 already"):
        results.evaluate(
            verbs.root / "samples", str(verbs.root / "samples"), extractor="digits", metrics=("fd",),
            cache=tmp_path / "cache", out=tmp_path / "run",
        )  # fmt: skip
    assert (tmp_path / "run" / "runs.csv").read_text() == text


def test_two_samplings_of_other_seeds_do_not_mix(verbs: TinyVerbs, tmp_path: Path) -> None:
    """Processes of one run may share a folder; of two settings, one is refused before it writes."""
    model = checkpoints.load(verbs.root / "model")
    pids = []
    for seed in range(4):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 1
            try:
                sample_into(tmp_path / "set", model, None, 4, ids=range(4), num_steps=1, batch_size=2, seed=seed)
                status = 0
            except InputError:
                status = 2
            finally:
                os._exit(status)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(ended) == [0, 2, 2, 2]
    seed = json.loads((tmp_path / "set" / "manifest.json").read_text())["settings"]["seed"]
    assert seed == ended.index(0)


@pytest.mark.reliability("A damaged picture is refused before anything is written; once mended, the same command runs")
def test_a_damaged_picture_can_be_mended(verbs: TinyVerbs, tmp_path: Path) -> None:
    digits, out = load_digits(), tmp_path / "out"
    for k in range(20):
        write_png(tmp_path / "set" / str(k % 10) / f"{k}.png", Image.fromarray(digits.uint8([k])[0, 0].numpy()))
    damaged = tmp_path / "set" / "3" / "13.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"13\.png.*--skip-damaged"):
        models.train(str(verbs.recipe), out, data=str(tmp_path / "set"))
    assert not out.exists()
    damaged.write_bytes(whole)
    models.train(str(verbs.recipe), out, data=str(tmp_path / "set"))
    assert checkpoints.load(out).exits is None


@pytest.mark.reliability("Figures of a report beside the plans of a model do not make it unreadable")
def test_a_reports_files_beside_a_model(verbs: TinyVerbs, tmp_path: Path) -> None:
    verbs.calibrate(tmp_path / "model")
    (tmp_path / "model" / "plan-map.manifest.json").write_text('{"settings": {}}')
    assert checkpoints.load(tmp_path / "model").exits is not None
    (tmp_path / "model" / "plan-mine.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"plan-mine\.json"):
        checkpoints.load(tmp_path / "model")
