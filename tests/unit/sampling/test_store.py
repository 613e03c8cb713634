"""Sets of pictures on disk: killed at any moment and shared out in any way, they end as an undisturbed one."""

import io
import json
import os
import random
import resource
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.quality import evaluate
from dyndit.analysis.metrics.sets import PictureSet, read_set
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures import grid
from dyndit.sampling import sample as sampling
from dyndit.sampling.sample import Stored, draw, sample, sample_into
from dyndit.sampling.store import Store
from support.kills import dies_at, moments

CLASSES, NUM = (3, 7, 1), 11
DRAW = {"num_steps": 2, "seed": 5}
LABELS = [CLASSES[i % 3] for i in range(NUM)]

Draw = Callable[..., Stored]


@pytest.fixture(scope="module")
def tiny(make_model) -> DynamicDepth:
    return make_model((2, 4))


@pytest.fixture(scope="module")
def into(tiny: DynamicDepth) -> Draw:
    return partial(sample_into, model=tiny, classes=CLASSES, num_images=NUM, batch_size=4, **DRAW)


@pytest.fixture(scope="module")
def whole(into: Draw, tmp_path_factory) -> Path:
    """A set that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    into(out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which has times and dates in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_a_set_is_what_sample_draws(tiny: DynamicDepth, whole: Path) -> None:
    pictures = sample(tiny, LABELS, batch_size=4, **DRAW).pictures
    arrays = pictures.permute(0, 2, 3, 1).numpy()
    names = [f"{i:06d}-class{label}.png" for i, label in enumerate(LABELS)]
    assert sorted(p.name for p in whole.iterdir()) == [*names, "grid.png", "manifest.json", "samples.npz"]
    for name, array in zip(names, arrays, strict=True):
        assert np.array_equal(np.asarray(Image.open(whole / name)), array[..., 0])
    archive = io.BytesIO()
    np.savez(archive, arr_0=arrays, arr_1=np.asarray(LABELS))
    assert (whole / "samples.npz").read_bytes() == archive.getvalue()
    assert np.array_equal(np.asarray(Image.open(whole / "grid.png")), np.asarray(grid(pictures)))
    found = manifest_of(whole)
    assert found["complete"] is True
    assert found["ms_per_picture"] == pytest.approx(1e3 * found["seconds"] / NUM)
    assert found["plan"]["router"] == "full"


def test_a_batch_at_a_time_is_what_sample_collects(tiny: DynamicDepth) -> None:
    drawn = list(draw(tiny, LABELS, batch_size=4, stats=True, **DRAW))
    assert [batch.ids for batch in drawn] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]
    assert [label for batch in drawn for label in batch.labels] == LABELS
    assert torch.equal(torch.cat([batch.x for batch in drawn]), sample(tiny, LABELS, batch_size=4, **DRAW).pictures)
    assert all(0 < sum(batch.network_seconds) < sum(batch.step_seconds) < batch.seconds for batch in drawn)


@pytest.mark.parametrize("ids", [range(4, 9), [10, 2, 7], range(0, 11, 3)])
def test_pictures_are_known_by_their_numbers(tiny: DynamicDepth, ids) -> None:
    strict = {"batch_size": 4, "strict": True, **DRAW}
    every = torch.cat([batch.x for batch in draw(tiny, LABELS, **strict)])
    some = torch.cat([batch.x for batch in draw(tiny, [LABELS[i] for i in ids], ids=ids, **strict)])
    assert torch.equal(some, every[list(ids)])
    assert len(some.flatten(1).unique(dim=0)) == len(ids)


def test_bad_requests_are_refused_at_once(tiny: DynamicDepth) -> None:
    for labels, options in (([99], {}), ([], {}), ([1, 2], {"ids": [0]}), ([1], {"ids": [-1]}), ([1], {"seed": -1})):
        with pytest.raises(InputError):
            draw(tiny, labels, **options)  # not when the first batch is asked for


@pytest.mark.reliability("A sampling killed at any call, twice, ends with the same bytes")
def test_a_kill_at_any_call_ends_as_an_undisturbed_run(into: Draw, whole: Path, tmp_path: Path) -> None:
    expected, seen = content(whole), set()
    for number, moment in enumerate(moments(lambda: into(tmp_path / "sample"), 16)):
        out = tmp_path / str(number)
        for again in (moment, moment // 2):  # killed, and killed again
            dies_at(again, lambda out=out: into(out))
            pictures = {path.name: path.read_bytes() for path in out.glob("*.*") if path.name in expected}
            assert pictures == {name: expected[name] for name in pictures}  # none is torn
            seen.add(len(pictures))
        into(out)
        assert content(out) == expected
        assert manifest_of(out)["complete"] is True
    assert len(seen) > 3  # it was killed between batches


@pytest.mark.reliability("A sampling killed by SIGKILL at random moments ends with the same bytes")
def test_sigkill_at_random_moments_ends_as_an_undisturbed_run(into: Draw, whole: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    into(tmp_path / "timed")
    takes, moment = time.monotonic() - began, random.Random(0)
    num_killed = 0
    for number in range(8):
        out = tmp_path / str(number)
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    into(out)
                finally:
                    os._exit(0)
            time.sleep(moment.uniform(0, takes))
            os.kill(pid, signal.SIGKILL)
            num_killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        into(out)
        assert content(out) == content(whole)
    assert num_killed > 4


@pytest.mark.parametrize(
    "parts",
    [
        [range(4), range(4, 11)],
        [range(5), range(5, 11)],  # a batch is shared
        [range(0, 11, 2), range(1, 11, 2)],
        [[10], [3, 4], range(11)],
    ],
)
def test_processes_share_out_the_numbers(into: Draw, whole: Path, tmp_path: Path, parts: list) -> None:
    out, there = tmp_path / "set", set()
    for number, ids in enumerate(parts):
        stored = into(out, ids=ids)
        assert stored.num_drawn == len(set(ids) - there)
        there |= set(ids)
        assert stored.manifest["complete"] is (number == len(parts) - 1)
    assert content(out) == content(whole)


def test_processes_draw_at_once(into: Draw, whole: Path, tmp_path: Path) -> None:
    pids = []
    for part in range(3):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 1
            try:
                into(tmp_path / "set", ids=range(part, NUM, 3))
                status = 0
            finally:
                os._exit(status)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert content(tmp_path / "set") == content(whole)
    assert manifest_of(tmp_path / "set")["complete"] is True


def test_times_add_up_over_parts(into: Draw, tmp_path: Path, monkeypatch) -> None:
    noted = []

    def note(self: Store, part: str, drawn, machine: str, seconds: float) -> None:
        noted.append((len(drawn.ids), seconds, drawn.step_seconds, sum(drawn.network_seconds)))
        original(self, part, drawn, machine, seconds)

    original = Store.note
    monkeypatch.setattr(Store, "note", note)
    into(tmp_path, ids=range(4), stats=True)
    into(tmp_path, stats=True)
    found = manifest_of(tmp_path)
    assert len(noted) == 3
    seconds = sum(row[1] for row in noted)
    assert found["seconds"] == pytest.approx(seconds)
    assert found["ms_per_picture"] == pytest.approx(1e3 * seconds / NUM)
    assert found["step_seconds"] == pytest.approx(np.sum([row[2] for row in noted], 0))
    assert found["ms_denoiser"] == pytest.approx(1e3 * sum(row[3] for row in noted) / NUM)


@pytest.mark.reliability("A changed byte of a sampling's times is refused, or harmless")
def test_a_changed_byte_of_the_times_is_refused_or_harmless(into: Draw, tmp_path: Path) -> None:
    into(tmp_path, ids=range(4), stats=True)
    (path,) = tmp_path.glob("times-*.jsonl")
    text, store, refused = path.read_bytes(), Store(tmp_path, ()), 0
    whole = store.times()
    assert whole["seconds"] > 0
    for place in range(0, len(text) - 1, 7):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            assert store.times() == whole, place  # the last digit of 17 may give the same number
        except InputError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(text) - 1, 7))
    path.write_bytes(text)
    assert store.times() == whole


def test_times_of_two_machines_are_not_mixed(into: Draw, tmp_path: Path, monkeypatch) -> None:
    into(tmp_path, ids=range(8))
    with monkeypatch.context() as patch:
        patch.setattr(sampling.manifest, "machine", lambda *_: "another")
        into(tmp_path)
    found = manifest_of(tmp_path)
    assert found["machine"] == sampling.manifest.machine("cpu")
    assert found["ms_per_picture"] == pytest.approx(1e3 * found["seconds"] / 8)
    assert found["ms_denoiser"] is found["step_seconds"] is None  # not asked for


def never(*_: object, **__: object) -> None:
    raise AssertionError


@pytest.mark.reliability("A finished set of pictures is left alone")
def test_a_finished_set_is_left_alone(into: Draw, whole: Path, monkeypatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr(sampling.Sampling, "batches", never)
    stored = into(whole)
    assert (stored.num_drawn, stored.manifest) == (0, manifest_of(whole))
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("lost", ["000005-class1.png", "samples.npz", "grid.png"])
def test_what_a_finished_set_lost_is_made_again(into: Draw, whole: Path, tmp_path: Path, lost: str) -> None:
    into(tmp_path)
    before = manifest_of(tmp_path)
    (tmp_path / lost).unlink()
    assert into(tmp_path).num_drawn == lost.endswith("1.png")
    assert content(tmp_path) == content(whole)
    assert {name: manifest_of(tmp_path)[name] for name in sampling.TIMES} == {k: before[k] for k in sampling.TIMES}


def test_one_batch_is_in_memory(into: Draw, tmp_path: Path, monkeypatch) -> None:
    alive: list[weakref.ref] = []

    def watched(*arguments: object, **options: object) -> Iterator:
        for drawn in original(*arguments, **options):
            assert sum(ref() is not None for ref in alive) <= 1  # the one before it
            alive.append(weakref.ref(drawn))
            yield drawn

    original = sampling.Sampling.batches
    monkeypatch.setattr(sampling.Sampling, "batches", watched)
    into(tmp_path, batch_size=1)
    assert len(alive) == NUM


def test_latents_are_decoded_batch_by_batch(make_model, tmp_path: Path) -> None:
    model = make_model((2,), in_channels=4, image_size=4)
    model.pixel_space = False
    sizes = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return (3 * latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2) + 128).clamp(0, 255).byte()

    with pytest.raises(InputError, match="expected their decoder"):
        sample_into(tmp_path / "set", model, CLASSES, NUM, **DRAW)
    assert not (tmp_path / "set").exists()
    options = {"batch_size": 4, "to_pictures": decode, "autoencoder": "abc"}
    sample_into(tmp_path / "set", model, CLASSES, NUM, **DRAW, **options)
    latents = sample(model, LABELS, batch_size=4, **DRAW).latents
    assert sizes == [4, 4, 3]
    arrays = np.load(tmp_path / "set" / "samples.npz")["arr_0"]
    assert np.array_equal(arrays, decode(latents).permute(0, 2, 3, 1).numpy())
    assert len(np.unique(arrays)) > 20


def test_other_runs_and_bad_requests_leave_the_folder_as_it_is(into: Draw, whole: Path, tmp_path: Path) -> None:
    before = content(whole)
    for options, message in (
        ({"seed": 6}, "holds another run .seed 5, now 6"),
        ({"num_images": 12}, "holds another run .num_images 11, now 12"),
        ({"ids": [11]}, "ids: 11; expected 0 to 10"),
        ({"ids": [-1]}, "ids: -1"),
        ({"classes": ()}, "num-images"),
        ({"num_images": 0}, "num-images 0"),
        ({"classes": (10,)}, "class-labels 10"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
    ):
        with pytest.raises(InputError, match=message):
            into(whole, **options)
        if "holds" not in message:
            with pytest.raises(InputError, match=message):
                into(tmp_path / "new", **options)
    assert content(whole) == before
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on(into: Draw, whole: Path, tmp_path: Path) -> None:
    into(tmp_path, ids=range(4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\)"):
            into(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list(tmp_path.glob("*.png"))) == 4
    into(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_damaged_picture_is_named(into: Draw, tmp_path: Path) -> None:
    into(tmp_path, ids=range(4))
    bad = tmp_path / "000002-class1.png"
    bad.write_bytes(b"")
    with pytest.raises(InputError, match=r"000002-class1\.png: unreadable"):
        into(tmp_path)
    assert manifest_of(tmp_path)["complete"] is False


@pytest.mark.reliability("An unfinished set of pictures is refused by name, unless forced")
def test_an_unfinished_set_is_refused_by_name(into: Draw, whole: Path, tmp_path: Path) -> None:
    digits, real = load_extractor("digits"), torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8)
    out = tmp_path / "set"
    into(out, ids=range(4))
    for sets in ({"samples": out, "reference": real}, {"samples": real, "reference": out}):
        with pytest.raises(InputError, match=rf"{out}: unfinished, 4 of 11 pictures.*--force"):
            evaluate(**sets, extractor=digits, metrics=("fd",), cache=tmp_path / "cache")
        found = evaluate(**sets, extractor=digits, metrics=("fd",), force=True, cache=tmp_path / "cache")
        assert found["forced"] is True
        assert 4 in (found["num_samples"], found["num_reference"])
    into(out)
    assert evaluate(out, real, digits, ("is",))["forced"] is False
    (out / "000003-class3.png").unlink()
    with pytest.raises(InputError, match="10 of 11 pictures"):
        evaluate(out, real, digits, ("is",))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("[]")
    grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), least=1, pad=0).save(tmp_path / "foreign" / "a.png")
    assert evaluate(tmp_path / "foreign", real, digits, ("is",))["num_samples"] == 1


def test_folders_are_measured_without_stacking_their_pictures(whole: Path, monkeypatch) -> None:
    digits = load_extractor("digits")
    stacked = Measured(PictureSet("tensor", read_set(whole, "").pictures), digits)
    monkeypatch.setattr(PictureSet, "pictures", property(never))
    streamed = Measured(read_set(whole, ""), digits)
    assert torch.equal(streamed.features, stacked.features)
    assert torch.equal(streamed.logits, stacked.logits)
    assert streamed.hashes == stacked.hashes
    assert (streamed.num, stacked.num) == (NUM, NUM)


def test_drafts_are_no_pictures(whole: Path) -> None:
    draft = whole / ".writing-another-1-0"
    draft.mkdir()
    (draft / "000000-class3.png").write_bytes(b"half")
    try:
        assert len(read_set(whole, "").source) == NUM
    finally:
        (draft / "000000-class3.png").unlink()
        draft.rmdir()


def test_captions_name_files_in_plain_letters(tmp_path: Path) -> None:
    store = Store(tmp_path, ("A three, bold!", "三", "x" * 200, 7))
    names = [store.path(number).name for number in range(4)]
    assert names == ["000000-a-three-bold.png", "000001-caption.png", f"000002-{'x' * 60}.png", "000003-class7.png"]
