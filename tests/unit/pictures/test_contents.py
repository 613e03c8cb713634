"""Contents are looked at once, before a run begins, and never change unnoticed."""

import os
from pathlib import Path

import pytest

from dyndit.errors import InputError
from dyndit.pictures import check
from dyndit.pictures.check import DAMAGED, check_contents
from dyndit.pictures.collection import PictureFiles, open_source
from dyndit.training.data import PictureFolder
from support.pictures import make_zip, noise, png, save


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DYNDIT_CACHE", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        save(tmp_path / "cat" / f"{i}.bmp", noise(16, 16, 3, seed=i))
    save(tmp_path / "dog" / "0.bmp", noise(16, 16, 3, seed=9))
    return tmp_path


def replace(path: Path, data: bytes) -> None:
    """Write other contents of the same size, with the old times."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.reliability("The same names, sizes and times with other contents are another set")
def test_the_same_names_and_sizes_with_other_contents_are_another_set(root: Path) -> None:
    first = PictureFolder(root).fingerprint
    assert PictureFolder(root).fingerprint == first
    whole = (root / "cat" / "2.bmp").read_bytes()
    replace(root / "cat" / "2.bmp", (root / "cat" / "1.bmp").read_bytes())
    assert PictureFolder(root).fingerprint != first
    replace(root / "cat" / "2.bmp", whole)
    assert PictureFolder(root).fingerprint == first


@pytest.mark.reliability("A damaged record of checked pictures changes nothing: they are looked at again")
def test_the_record_saves_reading_and_never_changes_the_result(root: Path, cache: Path, monkeypatch) -> None:
    first = PictureFolder(root).fingerprint
    looked: list[str] = []
    real = check._look
    monkeypatch.setattr(check, "_look", lambda contents, name: looked.append(name) or real(contents, name))
    assert PictureFolder(root).fingerprint == first
    assert not looked
    (record,) = (cache / "checked").iterdir()
    whole = record.read_bytes()
    for place in range(0, len(whole), 97):  # a damaged line is looked at again
        data = bytearray(whole)
        data[place] ^= 1
        record.write_bytes(data)
        assert PictureFolder(root).fingerprint == first
    record.write_bytes(whole)
    looked.clear()
    save(root / "cat" / "4.bmp", noise(16, 16, 3, seed=4))
    assert PictureFolder(root).fingerprint != first
    assert [Path(name).name for name in looked] == ["4.bmp"]


def test_a_record_that_cannot_be_kept_costs_nothing(root: Path, cache: Path, caplog) -> None:
    (cache / "checked").write_text("in the way")
    assert len(PictureFolder(root).fingerprint) == 64
    assert "not kept" in caplog.text


@pytest.mark.reliability("Damaged pictures are found before a run begins: refused, or left out by a flag, and listed")
def test_damaged_pictures_are_refused_up_front_or_left_out_and_listed(root: Path) -> None:
    bad = [root / "cat" / "1.bmp", root / "cat" / "3.bmp"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"1\.bmp: unreadable.*2 of 5 pictures are damaged.*--skip-damaged"):
        PictureFolder(root).fingerprint  # noqa: B018
    pictures = PictureFolder(root, skip_damaged=True)
    assert pictures.labels == [0, 0, 1]
    assert pictures.account["skipped"][DAMAGED] == {"number": 2, "names": list(map(str, bad))}
    files = PictureFiles.of(root, skip_damaged=True)
    assert len(files) == 3
    assert next(files.batches()).shape == (3, 3, 16, 16)
    mended = pictures.fingerprint
    save(bad[0], noise(16, 16, 3, seed=1))
    assert PictureFolder(root, skip_damaged=True).fingerprint != mended  # a run that went without it is another run
    (root / "dog" / "0.bmp").write_bytes(b"")
    with pytest.raises(InputError, match="all pictures of class dog are damaged"):
        PictureFolder(root, skip_damaged=True)


def test_archives_are_looked_at_too(tmp_path: Path) -> None:
    whole = {f"cat/{i}.png": png(noise(8, 8, 3, seed=i)) for i in range(3)}
    path = make_zip(tmp_path / "a.zip", whole | {"cat/1.png": whole["cat/1.png"][:60]})
    assert [bool(one.problem) for one in check_contents(open_source(path))] == [False, True, False]
    assert len(PictureFolder(path, skip_damaged=True)) == 2


def test_several_frames_are_noted(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    save(tmp_path / "b.gif", noise(8, 8, 3), "P")
    assert [one.frames for one in check_contents(open_source(tmp_path))] == [True, False]
    noted = {check.FRAMES: {"number": 1, "names": [str(tmp_path / "a.gif")]}}
    files, pictures = PictureFiles.of(tmp_path), PictureFolder(tmp_path)
    list(files.batches())
    pictures.check()
    assert files.account["skipped"] == pictures.account["skipped"] == noted
