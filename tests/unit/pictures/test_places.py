"""Places that pictures lie in: folders, archives, arrays and tables, and what is skipped in them."""

import builtins
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dyndit.errors import InputError
from dyndit.pictures.collection import PictureFiles, open_source, said_of
from dyndit.training.data import BESIDE, PictureFolder
from support.pictures import make_tar, make_zip, noise, png, save, skipped

CATS, DOGS = [noise(8, 8, 3, seed=i) for i in range(2)], [noise(8, 8, 3, seed=9 + i) for i in range(3)]
MEMBERS = {f"cat/{i}.png": png(a) for i, a in enumerate(CATS)} | {f"dog/{i}.png": png(a) for i, a in enumerate(DOGS)}
ALL = torch.from_numpy(np.stack(CATS + DOGS)).permute(0, 3, 1, 2)
LABELS = [0, 0, 1, 1, 1]


def as_folder(root: Path) -> Path:
    for name, data in MEMBERS.items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(data)
    return root / "set"


def edm_zip(root: Path) -> Path:
    names = [f"00000/img{i:08d}.png" for i in range(5)]
    pictures = dict(zip(names, MEMBERS.values(), strict=True))
    labels = {"labels": [[name, label] for name, label in zip(names, LABELS, strict=True)]}
    return make_zip(root / "edm.zip", pictures | {"dataset.json": json.dumps(labels).encode()})


def webdataset(prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{i:04d}.{end}": data
        for i, (picture, label) in enumerate(zip(MEMBERS.values(), LABELS, strict=True))
        for end, data in (("png", picture), ("cls", str(label).encode()))
    }


def shards(root: Path) -> Path:
    (root / "shards").mkdir()
    members = list(webdataset().items())
    make_tar(root / "shards" / "train-000.tar", dict(members[:4]))
    make_tar(root / "shards" / "train-001.tar", dict(members[4:]))
    return root / "shards"


def npz(root: Path, save=np.savez, layout: str = "NHWC", key: str = "arr_0") -> Path:
    array = np.stack(CATS + DOGS)
    save(root / "set.npz", **{key: array if layout == "NHWC" else array.transpose(0, 3, 1, 2), "labels": LABELS})
    return root / "set.npz"


PLACES = {
    "folder": as_folder,
    "zip": lambda root: make_zip(root / "set.zip", MEMBERS),
    "zip in a folder": lambda root: make_zip(root / "set.zip", {f"set/train/{k}": v for k, v in MEMBERS.items()}),
    "zip of EDM": edm_zip,
    "tar by folders": lambda root: make_tar(root / "set.tar", {f"./{k}": v for k, v in MEMBERS.items()}),
    "tar of WebDataset": lambda root: make_tar(root / "set.tar", webdataset("x/")),
    "shards": shards,
    "pattern": lambda root: shards(root) / "train-*.tar",
    "npz": npz,
    "npz deflated": lambda root: npz(root, np.savez_compressed),
    "npz NCHW": lambda root: npz(root, layout="NCHW"),
    "npz of another key": lambda root: npz(root, key="faces"),
}


@pytest.mark.parametrize("place", PLACES)
def test_pictures_and_classes_are_the_same_wherever_they_lie(tmp_path: Path, place: str) -> None:
    path = PLACES[place](tmp_path)
    trained = PictureFolder(path)
    assert trained.labels == LABELS
    assert trained.num_classes == 2
    order = [0, 1, 4, 2, 3]
    assert torch.equal(trained.uint8(order), ALL[order])
    assert torch.equal(torch.cat(list(PictureFiles.of(path).batches(2))), ALL)
    again = pickle.loads(pickle.dumps(trained))  # as a worker process gets it
    assert torch.equal(again.uint8([4, 0]), ALL[[4, 0]])
    assert len(trained.fingerprint) == 64
    assert PictureFolder(path).fingerprint == trained.fingerprint


def hugging_face(root: Path, kind: str) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow reads data sets of Hugging Face, and is optional")
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": data, "path": None} for data in MEMBERS.values()]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, image), "label": pa.array(LABELS, pa.int64())})
    table = table.replace_schema_metadata(meta)
    if kind == "parquet":
        (root / "data").mkdir()
        pq.write_table(table, root / "data" / "train-00000-of-00001.parquet", row_group_size=2)
        return root
    (root / "state.json").write_text("{}")
    with pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    return root


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_data_sets_of_hugging_face_are_read(tmp_path: Path, kind: str) -> None:
    trained = PictureFolder(hugging_face(tmp_path, kind))
    assert (trained.class_names, trained.labels) == (("cat", "dog"), LABELS)
    assert torch.equal(trained.uint8([4, 0, 2]), ALL[[4, 0, 2]])
    assert torch.equal(torch.cat(list(PictureFiles.of(tmp_path).batches(2))), ALL)
    assert torch.equal(pickle.loads(pickle.dumps(trained)).uint8([1]), ALL[[1]])


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    real = builtins.__import__

    def without(name: str, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install pyarrow"):
        open_source(tmp_path)


def test_several_splits_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"splits test, train, expected one: .*/test"):
        open_source(tmp_path)
    for split in ("test", "train"):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="splits test, train, expected one"):
        open_source(tmp_path / "hub")


@pytest.mark.reliability("Hidden and foreign files, loops, dead links, loose pictures: left out, counted, listed")
def test_what_a_folder_holds_besides_is_counted_and_listed(tmp_path: Path) -> None:
    root = as_folder(tmp_path)
    for name in ("._0.png", ".DS_Store", "dog/._1.png", "cat/.thumbs/a.png", "__MACOSX/x/a.png", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no picture")
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)  # a loop
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dog" / "self.png").symlink_to(root / "dog" / "self.png")
    (root / "dog" / "3.png").symlink_to(root / "dog" / "0.png")  # another name of a picture is a picture
    save(root / "loose.png", noise(8, 8, 3))
    save(root / "grid.png", noise(50, 50, 3))
    trained, evaluated = PictureFolder(root), PictureFiles.of(root)
    found = {
        "hidden files": 5,
        "links to folders, not followed": 2,
        "links to nothing": 2,
        "files that are no pictures": 1,
        "files that go with pictures": 1,
    }
    assert skipped(evaluated.source) == found
    assert trained.labels == [*LABELS, 1]
    assert (len(trained), len(evaluated)) == (6, 7)  # without classes, a loose picture counts
    counts = {reason: entry["number"] for reason, entry in trained.account["skipped"].items()}
    assert counts == found | {BESIDE: 1}
    said = said_of(trained.account)
    assert f"{root}: skipped 1 pictures beside class folders (loose.png)" in said
    assert not any("go with pictures" in line for line in said)


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    root = as_folder(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bird").symlink_to(root / "cat", target_is_directory=True)
    pictures = PictureFolder(tmp_path / "mine")
    assert (pictures.class_names, len(pictures)) == (("bird",), 2)


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    for i, array in enumerate(CATS):
        save(tmp_path / "bedroom" / f"{i}.png", array)
    pictures = PictureFolder(tmp_path / "bedroom")
    assert (pictures.class_names, pictures.labels) == (("bedroom",), [0, 0])


@pytest.mark.reliability("An empty class, an empty folder, a FIFO among the pictures: one line")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: os.mkfifo(as_folder(root) / "cat" / "x.png"), "no regular file"),
        (lambda root: (as_folder(root) / "bird").mkdir(), "bird: found no picture"),
        (lambda root: make_zip(root / "set", MEMBERS), "a file of no known kind"),
        (lambda root: (root / "set").mkdir(), "no picture found"),
        (lambda root: None, "no such folder"),
    ],
)
def test_bad_folders_are_one_line(tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        PictureFolder(tmp_path / "set")
    assert "\n" not in str(caught.value)


def declared(path: Path, size: int) -> Path:
    """A .zip whose directory declares more bytes than it holds."""
    make_zip(path, {"a.png": png(CATS[0])})
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02") + 24
    data[start : start + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def bomb(path: Path, shape: tuple[int, ...], kind: str = "|u1") -> Path:
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        file.write(b"few")
    return path


@pytest.mark.reliability("Archives that lack classes, or declare more than they hold: one line, in bounded memory")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: make_tar(root / "set.tar", MEMBERS, "w:gz"), "a whole .tar without compression"),
        (lambda root: make_tar(root / "set.tar", webdataset() | {"9.png": png(CATS[0])}), "9.png has no .cls"),
        (lambda root: make_tar(root / "set.tar", webdataset() | {"0000.cls": b"cat"}), "holds no class"),
        (lambda root: make_zip(root / "set.zip", {"a.txt": b""}), "no picture found"),
        (lambda root: declared(root / "set.zip", 2_000_000_000), "declares 2,000,000,000 bytes"),
        (lambda root: bomb(root / "set.npz", (9, 800_000, 800_000, 3)), "its file holds"),
        (lambda root: bomb(root / "set.npz", (2**60, 2**60, 1, 1)), "its file holds"),
        (lambda root: bomb(root / "set.npz", (-1, 8, 8, 3)), "its file holds"),
        (lambda root: bomb(root / "set.npz", (2, 8, 8, 3), "|O"), "pickled objects"),
    ],
)
def test_bad_archives_are_one_line(tmp_path: Path, make, message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        PictureFolder(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_cut_archive_is_one_line(tmp_path: Path) -> None:
    for path in (npz(tmp_path, np.savez_compressed), make_tar(tmp_path / "set.tar", MEMBERS)):
        whole = path.read_bytes()
        for share in (0.2, 0.5, 0.9):
            path.write_bytes(whole[: int(share * len(whole))])
            try:
                found = torch.cat(list(PictureFiles.of(path).batches()))
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert torch.equal(found, ALL)  # only padding was lost
