"""Sets of pictures and statistics on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndit.analysis.metrics.sets import Statistics, read_pictures, read_set, save_statistics
from dyndit.errors import InputError
from dyndit.stats import moments


def save_pictures(folder: Path, num: int = 3, size: int = 8, mode: str = "RGB") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    array = np.random.default_rng(0).integers(0, 256, (num, size, size, *channels), dtype=np.uint8)
    for k, picture in enumerate(array):
        Image.fromarray(picture).save(folder / f"{k:03d}.png")
    return array


def test_folder_is_read_in_depth_and_in_order(tmp_path: Path) -> None:
    array = save_pictures(tmp_path / "a")
    save_pictures(tmp_path / "b" / "c")
    save_pictures(tmp_path, num=1)
    Image.new("RGB", (40, 40)).save(tmp_path / "grid.png")  # the overview that `dyndit sample` writes
    found = read_pictures(tmp_path)
    assert found.shape == (7, 3, 8, 8)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[1:4].permute(0, 2, 3, 1), array)


def test_grey_folder_has_one_channel(tmp_path: Path) -> None:
    array = save_pictures(tmp_path, mode="L")
    assert np.array_equal(read_pictures(tmp_path), array[:, None])


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_npz_of_either_key(tmp_path: Path, key: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", **{key: array, "labels": np.arange(5)})
    assert np.array_equal(read_pictures(tmp_path / "set.npz"), array.transpose(0, 3, 1, 2))


def damaged(path: Path) -> None:
    save_pictures(path)
    file = path / "001.png"
    file.write_bytes(file.read_bytes()[:60])


def mixed(path: Path) -> None:
    save_pictures(path)
    save_pictures(path / "z", size=9)


def floats(path: Path) -> None:
    path.mkdir()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path / "0.tif")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "no picture found"),
        (damaged, r"001\.png: unreadable"),
        (mixed, "9x9 pixels, expected 8x8"),
        (floats, "expected 8 bits a channel"),
    ],
)
def test_bad_folders_are_named_in_one_line(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(InputError, match=message) as caught:
        read_pictures(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_bad_npz_are_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    for arrays, message in (
        ({"x": np.zeros(3)}, "holds x, expected an array 'arr_0'"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, r"float64 \(2, 8, 8, 3\), expected uint8"),
        ({"arr_0": np.array([{}])}, "unreadable"),  # a pickle, never opened
    ):
        np.savez(file, **arrays)
        with pytest.raises(InputError, match=message):
            read_pictures(file)
    file.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match="unreadable"):
        read_pictures(file)
    with pytest.raises(InputError, match="unreadable"):
        read_pictures(tmp_path / "missing.npz")


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    main, spatial = (moments(torch.randn(40, d, generator=g, dtype=torch.float64) + 3) for d in (5, 7))
    save_statistics(tmp_path / "new" / "reference.npz", Statistics(main, spatial, 40, "abc"))
    found = read_set(tmp_path / "new" / "reference.npz", "reference")
    assert found.pictures is None
    assert (found.statistics.num, found.statistics.extractor) == (40, "abc")
    for ours, theirs in ((main, found.statistics.features), (spatial, found.statistics.spatial)):
        assert torch.allclose(ours.mean, theirs.mean, rtol=1e-12)
        assert torch.allclose(ours.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["reference.npz"]


def test_statistics_of_adm_hold_pictures_besides(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=pictures, mu=np.ones(4, np.float32), sigma=np.eye(4))
    found = read_set(tmp_path / "adm.npz", "reference")
    assert found.pictures.shape == (3, 3, 8, 8)
    assert (found.statistics.num, found.statistics.extractor, found.statistics.spatial) == (None, "", None)
    assert torch.allclose(found.statistics.features.covariance, torch.eye(4, dtype=torch.float64))
    assert read_pictures(tmp_path / "adm.npz").shape == (3, 3, 8, 8)


def test_bad_statistics_are_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    for arrays, message in (
        ({"mu": np.zeros(3)}, r"mu \(3,\) and sigma None, expected \(D,\) and \(D, D\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma \(4, 4\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2)}, "mu_s"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(InputError, match=message):
            read_set(file, "reference")
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="holds statistics, expected pictures"):
        read_pictures(file)
    with pytest.raises(InputError, match=r"ends in \.npz"):
        save_statistics(tmp_path / "reference.pt", Statistics(moments(torch.eye(3))))
