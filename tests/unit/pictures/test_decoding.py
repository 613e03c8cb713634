"""One policy for a picture's pixels: training, calibration and evaluation read every kind alike."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndit.analysis.metrics.sets import read_set
from dyndit.errors import InputError
from dyndit.pictures.collection import PictureFiles, read_picture
from dyndit.pictures.resize import METHODS, Resize
from dyndit.training.data import PictureFolder
from support.pictures import digest, every_kind, noise, save

GOLDEN = {
    (): "159bd56f56fba15acedd6908b763581210c38e437c7b3a9bf4d6899386fc7bbf",
    (24, 3): "8ae614a8e00ed41f9e3ef2341b012b4ec661ee214ebe31ea0d4ccd6862fbc4c2",
    ((16, 24), 1): "9af058042f6d346fe5b800c952c4451f067a6187b2bcc8c94deb3f88e27ed2b7",
}
"""Digests of `every_kind` as the reader of training gave it before evaluation shared it."""


@pytest.mark.parametrize("options", GOLDEN)
def test_training_sees_the_pictures_that_it_always_saw(tmp_path: Path, options: tuple) -> None:
    pictures = PictureFolder(every_kind(tmp_path), *options)
    assert pictures.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert digest(pictures.uint8().numpy()) == GOLDEN[options]
    assert torch.equal(torch.cat(list(pictures.batches(4))), pictures.uint8())


def animation(path: Path) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, np.arange(128, dtype=np.uint8).reshape(8, 16).repeat(8, 0).repeat(4, 1), exif=exif, quality=95)


KINDS = {
    "turned.jpg": turned,
    "alpha.png": lambda path: save(path, noise(8, 8, 4)),
    "grey-alpha.png": lambda path: save(path, noise(8, 8, 4), "LA"),
    "deep.png": lambda path: save(path, np.full((8, 8), 40_000, np.uint16)),
    "deep.tif": lambda path: save(path, np.full((8, 8), 40_000, np.uint16)),
    "deep.pgm": lambda path: save(path, np.full((8, 8), 40_000, np.uint16)),
    "cmyk.jpg": lambda path: save(path, noise(8, 8, 3), "CMYK"),
    "cmyk.tif": lambda path: save(path, noise(8, 8, 3), "CMYK"),
    "palette.png": lambda path: save(path, noise(8, 8, 3), "P"),
    "bits.png": lambda path: save(path, noise(8, 8), "1"),
    "grey.bmp": lambda path: save(path, noise(8, 8)),
    "colour.webp": lambda path: save(path, noise(8, 8, 3), lossless=True),
    "colour.ppm": lambda path: save(path, noise(8, 8, 3)),
    "still.gif": lambda path: save(path, noise(8, 8, 3), "P"),
    "moving.gif": animation,
    "moving.webp": animation,
    "moving.png": animation,
    "one.png": lambda path: save(path, noise(1, 1, 3)),
}


@pytest.mark.reliability("Pictures of every mode, depth and format: equal in training, calibration and evaluation")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_alike_by_training_and_evaluation(tmp_path: Path, name: str) -> None:
    (tmp_path / "set" / "class").mkdir(parents=True)
    KINDS[name](tmp_path / "set" / "class" / name)
    size = np.asarray(read_picture(tmp_path / "set" / "class" / name)).shape[:2]
    trained = PictureFolder(tmp_path / "set", size).uint8()
    calibrated = PictureFolder(tmp_path / "set", size, labelled=False).uint8()
    evaluated = read_set(tmp_path / "set", "").pictures
    assert torch.equal(trained, evaluated.expand(-1, 3, -1, -1))
    assert torch.equal(trained, calibrated)
    if name.startswith("turned"):
        assert size == (64, 64)
        assert trained[0, 0, 0, 0] > trained[0, 0, 0, -1]  # a quarter turn: the ramp starts on the right
    if name.startswith("deep"):
        assert (evaluated == 156).all()
    if name.startswith("moving"):
        assert (evaluated - 10).abs().max() <= 1  # the first frame


def huge(path: Path) -> None:
    """A PNG that declares 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    chunks = (chunk, b"IDAT" + zlib.compress(b""))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.reliability("A picture that is huge, empty, text, a FIFO or of unknown levels: one line that names it")
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("huge.png", huge, "60000x60000 pixels, expected at most|3600000000 pixels"),
        ("float.tif", lambda path: save(path, np.zeros((4, 4), np.float32)), "expected 8 bits"),
        ("deep32.tif", lambda path: save(path, np.zeros((4, 4), np.int32)), "expected 8 bits"),
        ("empty.png", lambda path: path.touch(), "unreadable"),
        ("text.jpg", lambda path: path.write_text("no picture"), "unreadable"),
        ("script.png", lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "unreadable"),
        ("pipe.png", os.mkfifo, "no regular file"),
    ],
)
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])  # other code may have lifted Pillow's own
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch, limit: int | None, name: str, make, message: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    make(tmp_path / name)
    for read in (lambda: read_picture(tmp_path / name), lambda: read_set(tmp_path, "").pictures):
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_mixed_sizes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    every_kind(tmp_path)
    with pytest.raises(InputError, match="--resize-and-crop SIZE"):
        list(PictureFiles.of(tmp_path).batches())
    for method in METHODS:
        files = PictureFiles.of(tmp_path, Resize(16, method))
        assert torch.cat(list(files.batches())).shape == (9, 3, 16, 16)
        assert files.account["resize"] == f"{method} 16"


def test_adm_halves_with_a_box_and_cuts_the_centre() -> None:
    array = noise(130, 70, 3)
    picture = Image.fromarray(array)
    half = array[:, :].reshape(65, 2, 35, 2, 3).astype(float).mean((1, 3))
    expected = Image.fromarray(np.floor(half + 0.5).astype(np.uint8)).resize((30, round(65 * 30 / 35)), 3)
    expected = np.asarray(expected)[13:43]
    found = np.asarray(Resize(30, "adm")(picture)).astype(int)
    assert np.abs(found - expected).max() <= 2
    fits = Image.fromarray(noise(30, 30, 3))
    for method in METHODS:
        assert np.array_equal(np.asarray(Resize(30, method)(fits)), np.asarray(fits))
    with pytest.raises(InputError, match="expected a square"):
        Resize((30, 20), "adm")
    with pytest.raises(InputError, match="expected one of bicubic, adm, clean-fid"):
        Resize(30, "nearest")


def test_clean_fid_resizes_floats_a_channel_at_a_time() -> None:
    picture = Image.fromarray(noise(64, 96, 3))
    square = picture.crop((16, 0, 80, 64))
    channels = [np.asarray(c.convert("F").resize((20, 20), Image.Resampling.BICUBIC)) for c in square.split()]
    expected = np.stack(channels, -1).clip(0, 255)
    assert np.abs(np.asarray(Resize(20, "clean-fid")(picture)) - expected).max() <= 0.5
    assert np.abs(np.asarray(Resize(20, "bicubic")(picture)).astype(float) - expected).max() <= 1.5
