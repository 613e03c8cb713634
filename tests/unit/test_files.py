"""Files are written whole or not at all, byte-equal for equal content, readable by colleagues; reading is bounded."""

import errno
import io
import json
import math
import os
import resource
import stat
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from dyndit import files, manifest
from dyndit.errors import CheckpointError, InputError, PlanError
from dyndit.pictures import write_png
from support.kills import dies_at, moments

OLD, NEW = "old " * 500, "new " * 700
WEIGHTS = {f"w{i}": torch.arange(60.0).view(6, 10) + i for i in range(5)}


def folder_of(path: Path) -> None:
    with files.written_whole(path, folder=True) as draft:
        draft.mkdir()
        files.write_text(draft / "a.txt", NEW)
        (draft / "b.txt").write_text(NEW)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.txt": lambda path: files.write_text(path, NEW),
    "a.json": lambda path: files.write_json(path, {"new": [1, 2, 3]}),
    "a.safetensors": lambda path: files.write_safetensors(path, WEIGHTS, {"b": "1", "a": "2"}),
    "a.npz": lambda path: files.write_npz(path, {"arr_0": np.arange(300)}),
    "a.png": lambda path: write_png(path, Image.fromarray(np.zeros((9, 9), np.uint8))),
    "copy": lambda path: files.copy(Path(__file__), path),
}


def content(path: Path) -> object:
    """What lies at a path; a folder as its files."""
    if path.is_dir():
        return {p.name: p.read_bytes() for p in path.iterdir() if not files.is_draft(Path(p.name))}
    return path.read_bytes() if path.exists() else None


@pytest.mark.reliability("A kill at any call of a writer leaves the old file or the new one")
@pytest.mark.parametrize(
    ("name", "is_new"), [("a.txt", False), ("a.txt", True), ("a.safetensors", False), ("a.npz", False)]
)
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(name: str, is_new: bool, tmp_path: Path) -> None:
    write, sample = WRITERS[name], tmp_path / "sample"
    when = moments(lambda: write(sample / name))
    new, seen = content(sample / name), set()
    for moment in when:
        folder = tmp_path / str(moment)
        folder.mkdir()
        path, old = folder / name, None if is_new else OLD.encode()
        if old is not None:
            path.write_bytes(old)
        killed = dies_at(moment, lambda path=path: write(path))
        found = content(path)
        assert found in (old, new), moment
        seen.add((killed, found == new))
        files.sweep(folder)
        assert {p.name for p in folder.iterdir()} <= {name}
        write(path)
        assert content(path) == new
    assert (True, False) in seen  # it was killed before the rename


@pytest.mark.reliability("A kill at any call leaves no folder or a whole folder")
def test_a_kill_at_any_moment_leaves_no_folder_or_a_whole_one(tmp_path: Path) -> None:
    seen = set()
    for moment in moments(lambda: folder_of(tmp_path / "sample")):
        path = tmp_path / str(moment) / "model"
        path.parent.mkdir()
        dies_at(moment, lambda path=path: folder_of(path))
        assert content(path) in (None, content(tmp_path / "sample"))
        seen.add(path.exists())
        files.sweep(path.parent)
        assert [p.name for p in path.parent.iterdir()] in ([], ["model"])
    assert seen == {False, True}


@pytest.mark.reliability("An error of any flush, rename or mkdir is one line; nothing is left over")
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_error_anywhere_is_one_line_and_leaves_nothing(name: str, call: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / name
    path.write_text(OLD)

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(call, fails)
        with pytest.raises(InputError) as caught:
            WRITERS[name](path)
    assert str(caught.value).startswith(f"{path}: cannot be written (No space left on device); expected a place")
    assert (content(path), [p.name for p in tmp_path.iterdir()]) == (OLD.encode(), [name])


@pytest.mark.reliability("A file is flushed before it gets its name, and its folder after: a power cut loses neither")
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_renamed_was_flushed_and_its_folder_is_flushed_after(name: str, tmp_path: Path, monkeypatch) -> None:
    acts: list[tuple[str, Path]] = []
    flushed, fsync, rename = set(), os.fsync, Path.replace

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        acts.append(("flush", Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def renamed(source: Path, target: Path) -> Path:
        assert source.stat().st_ino in flushed
        acts.append(("rename", Path(target)))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    WRITERS[name](tmp_path / name)
    assert acts[acts.index(("rename", tmp_path / name)) + 1 :] == [("flush", tmp_path)]


def test_file_systems_that_cannot_flush_folders_are_good_enough(tmp_path: Path, monkeypatch) -> None:
    number, fsync = errno.EINVAL, os.fsync

    def fails(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    files.write_text(tmp_path / "a.txt", NEW)
    assert (tmp_path / "a.txt").read_text() == NEW
    number = errno.EIO  # a broken disk is another matter
    with pytest.raises(InputError, match="cannot be written"):
        files.write_text(tmp_path / "b.txt", NEW)


@pytest.mark.reliability("A full disk is one line for every kind of file")
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.safetensors", "a.npz", "a.png", "copy"])
def test_a_full_disk_is_one_line(name: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # files of more bytes fail, as on a full disk
    try:
        with pytest.raises(InputError) as caught:
            WRITERS[name](tmp_path / "deep" / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "too large" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "deep").iterdir())


def test_an_error_of_the_block_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> None:
        with files.written_whole(tmp_path / "a") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(InputError, match=f"No such file or directory of {tmp_path / 'none'}"):
        files.copy(tmp_path / "none", tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("name", WRITERS)
def test_files_have_the_mode_that_the_umask_gives(name: str, umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        with pytest.raises(InputError, match="is no file"):
            files.write_text(tmp_path / name, NEW)
    with pytest.raises(InputError, match="is no folder"):
        folder_of(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "below", NEW)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "file", "folder"]


def test_names_may_be_long_and_odd(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".txt", "ä\n ✓.txt", ".hidden"):
        files.write_text(tmp_path / name, NEW)
        assert (tmp_path / name).read_text() == NEW


@pytest.mark.reliability("Only drafts of dead writers are removed")
def test_only_drafts_of_dead_writers_of_this_machine_are_swept(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    mine, other = files._host(), "0" * 8
    for name in (f"{mine}-{pid}-0", f"{mine}-{os.getpid()}-0", f"{other}-{pid}-0", "half"):
        (tmp_path / f".writing-{name}").mkdir()
    (tmp_path / "model").mkdir()
    files.sweep(tmp_path)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {f".writing-{mine}-{os.getpid()}-0", f".writing-{other}-{pid}-0", "model"}
    for name in (f"{mine}-{pid}-0", f"{mine}-{os.getpid()}-0", "half"):
        (tmp_path / "model" / f".writing-{name}").mkdir(parents=True)
        (tmp_path / f".writing-{name}").mkdir(exist_ok=True)
    files.sweep(tmp_path, ours=False)  # a user's folder: certain drafts, and nothing below
    assert {p.name for p in tmp_path.iterdir()} == left | {".writing-half"}
    assert len(list((tmp_path / "model").iterdir())) == 3


names = st.text(string.ascii_letters + 'ä✓"\\/\n\t ', min_size=1, max_size=8)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    specs = draw(st.dictionaries(names, st.tuples(dtypes, shapes), min_size=1, max_size=5))
    return {name: torch.arange(math.prod(shape)).reshape(shape).to(dtype) for name, (dtype, shape) in specs.items()}


@pytest.mark.reliability("Equal tensors and metadata make equal bytes, in whatever order they come")
@given(tensors(), st.dictionaries(names, st.text(max_size=20), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_safetensors_come_back_and_are_byte_equal(tmp_path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    files.write_safetensors(path, tensors, metadata)
    files.write_safetensors(again, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == again.read_bytes()
    found, words = files.read_safetensors(path)
    assert words == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def test_a_header_is_the_librarys_but_for_the_order_of_its_metadata(tmp_path: Path) -> None:
    metadata = {name: name * 3 for name in "zebra"} | {"config": json.dumps({"ä": [1, "\x7f"]})}
    files.write_safetensors(tmp_path / "a", WEIGHTS, metadata)
    with safe_open(tmp_path / "a", "pt") as file:
        assert list(file.keys()) == list(WEIGHTS)
        assert file.metadata() == metadata
    size = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "a").read_bytes()[8 : 8 + size])
    assert list(header["__metadata__"]) == sorted(metadata)


def test_views_and_parameters_are_stored_as_they_look(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    files.write_safetensors(tmp_path / "a", {"w": weight, "t": WEIGHTS["w0"].T})
    found, _ = files.read_safetensors(tmp_path / "a")
    assert torch.equal(found["w"], weight)
    assert torch.equal(found["t"], WEIGHTS["w0"].T)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), values, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_comes_back(tmp_path: Path, data: dict[str, object]) -> None:
    files.write_json(tmp_path / "a.json", data)
    assert files.read_json(tmp_path / "a.json") == data


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_comes_back(tmp_path: Path, text: str) -> None:
    files.write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == text.encode()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_json_knows_no_such_numbers(number: float, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(InputError, match=rf"a\.json: plan\.budgets\.1 is {number}; expected a finite number"):
        files.write_json(path, {"plan": {"budgets": [0.5, number]}, "path": tmp_path})
    loop: dict = {}
    loop["loop"] = loop
    with pytest.raises(ValueError, match=r"[Cc]ircular"):
        files.write_json(path, loop)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": NaN}', "not JSON (NaN is no number of JSON)"),
        ("[1]", "holds a JSON list, expected an object"),
        ("null", "holds a JSON NoneType, expected an object"),
        (b"\xff\xfe", "not JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not JSON"),
    ],
)
def test_bad_json_is_one_line(text: str | bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for kind in (CheckpointError, PlanError):
        with pytest.raises(kind) as caught:
            files.read_json(path, kind)
        assert str(caught.value).startswith(f"{path}: {found}")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.reliability("FIFOs and devices are refused unread")
def test_what_would_never_end_is_not_read(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read in (files.read_json, files.read_lines, files.sha256, files.read_safetensors):
        with pytest.raises(CheckpointError, match=r"fifo.*no regular file"):
            read(tmp_path / "fifo")
        with pytest.raises(CheckpointError, match=r"none.*[Nn]o such file"):
            read(tmp_path / "none")
        with pytest.raises(CheckpointError, match="directory"):
            read(tmp_path)
    monkeypatch.setattr(files, "MOST_JSON", 1 << 20)
    (tmp_path / "a.json").write_bytes(b'{"a": "' + b"x" * (1 << 20) + b'"}')
    with pytest.raises(CheckpointError, match=r"a\.json: cannot be read \(larger than 1 MiB\)"):
        files.read_json(tmp_path / "a.json")


def test_lines_are_appended_and_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.csv"
    files.append_lines(path, "step,loss\n")
    files.append_lines(path, "1,0.5\n2,0.25\n")
    whole = path.read_bytes()
    for tail in (b"", b"3,0.1", b"\0" * 9, b"x" * 200_000, b"3,0.1\0\0"):
        path.write_bytes(whole + tail)
        assert files.read_lines(path).encode() == whole
        files.append_lines(path, "3,0.125\n")
        assert files.read_lines(path) == whole.decode() + "3,0.125\n"
    path.write_bytes(b"step")
    assert files.read_lines(path) == ""


@given(data=st.binary(max_size=12) | st.text("a\n", max_size=12).map(str.encode), block=st.integers(1, 5))
def test_the_end_of_the_last_whole_line_is_found_in_blocks_of_any_size(data: bytes, block: int) -> None:
    assert files._end_of_lines(io.BytesIO(data), block) == data.rfind(b"\n") + 1


def test_a_kill_while_appending_leaves_whole_lines(tmp_path: Path) -> None:
    old, new = "1\n2\n", "".join(f"{i}\n" for i in range(3, 9_000))

    def work(path: Path) -> None:
        files.append_lines(path, new)

    for moment in moments(lambda: work(tmp_path / "sample")):
        path = tmp_path / str(moment)
        path.write_text(old)
        dies_at(moment, lambda path=path: work(path))
        found = files.read_lines(path)
        assert found.startswith(old)
        assert (old + new).startswith(found)


@pytest.mark.reliability("A folder whose claim was killed can be claimed again")
def test_a_folder_whose_claim_was_killed_can_be_claimed_again(tmp_path: Path) -> None:
    wanted = {"verb": "train", "seed": 1}
    manifest.describe(wanted)  # the git revision takes a while, and many calls
    described = manifest.describe(wanted)
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "describe", lambda *_, **__: described)
        for moment in moments(lambda: manifest.claim(tmp_path / "sample", wanted)):
            out = tmp_path / str(moment)
            dies_at(moment, lambda out=out: manifest.claim(out, wanted))
            seen.add((out.exists(), (out / "manifest.json").exists()))
            manifest.claim(out, wanted)
            assert [p.name for p in out.iterdir()] == ["manifest.json"]
            assert content(out) == content(tmp_path / "sample")
    assert seen == {(False, False), (True, False), (True, True)}


def test_claims_refuse_what_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cfg_scale is nan"):
        manifest.claim(tmp_path / "run", {"cfg_scale": math.nan})
    assert not (tmp_path / "run").exists()


def test_a_free_target(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    files.check_free(tmp_path / "empty", folder=True)
    files.check_free(tmp_path / "none", folder=False)
    (tmp_path / "link").symlink_to("nowhere")
    for name, folder in (("empty", False), ("link", False), ("link", True)):
        with pytest.raises(InputError, match="nothing is overwritten"):
            files.check_free(tmp_path / name, folder=folder)
