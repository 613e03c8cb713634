"""Pictures and batches: formats that PIL gets wrong in silence, folders that are not what they seem."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dyndit.errors import InputError
from dyndit.pictures.collection import read_picture
from dyndit.training.batches import StepBatches
from dyndit.training.data import PictureFolder, load_digits, open_data


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        save(tmp_path / "dog" / f"{i}.png", noise(32, 32, 3, seed=i))
    save(tmp_path / "cat" / "deep" / "er" / "a.PNG", noise(32, 32, 3, seed=9))
    (tmp_path / "cat" / ".a.png").write_bytes(b"left by a file manager")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_digits_are_the_scans_in_minus_one_to_one() -> None:
    digits = load_digits()
    x, label = digits[3]
    assert (len(digits), x.shape, x.dtype, label) == (1797, (1, 8, 8), torch.float32, 3)
    everything = torch.stack([digits[i][0] for i in range(len(digits))])
    assert (everything.min(), everything.max()) == (-1, 1)
    assert torch.equal(((everything + 1) * 127.5).round().to(torch.uint8), digits.uint8())
    assert torch.equal(digits.uint8([5, 3]), digits.uint8()[[5, 3]])
    assert digits.fingerprint == load_digits().fingerprint
    assert not digits.can_flip


def test_a_folder_has_its_classes_in_sorted_order_and_its_pictures_in_depth(folder: Path) -> None:
    pictures = PictureFolder(folder)
    assert (pictures.class_names, pictures.num_classes, len(pictures)) == (("cat", "dog"), 2, 4)
    assert [pictures[i][1] for i in range(4)] == [0, 1, 1, 1]
    expected = torch.from_numpy(noise(32, 32, 3, seed=9)).permute(2, 0, 1)
    assert torch.equal(pictures.uint8([0])[0], expected)  # a picture that fits is not resampled
    x, _ = pictures[0]
    assert torch.equal(x, expected.float() / 127.5 - 1)
    assert torch.equal(pictures.uint8(), torch.stack([pictures.uint8([i])[0] for i in range(4)]))


def test_the_fingerprint_knows_names_sizes_and_shape(folder: Path) -> None:
    first = PictureFolder(folder).fingerprint
    assert PictureFolder(folder).fingerprint == first
    assert PictureFolder(folder, channels=1).fingerprint != first
    assert PictureFolder(folder, image_size=16).fingerprint != first
    (folder / "dog" / "2.png").rename(folder / "dog" / "3.png")
    renamed = PictureFolder(folder).fingerprint
    assert renamed != first
    save(folder / "dog" / "1.png", noise(40, 40, 3))
    assert PictureFolder(folder).fingerprint not in (first, renamed)


def test_the_centre_square_is_cut_out_and_resized(tmp_path: Path) -> None:
    array = np.zeros((40, 120, 3), dtype=np.uint8)
    array[:, 40:80] = (200, 100, 50)
    save(tmp_path / "a" / "wide.png", array)
    pictures = PictureFolder(tmp_path, image_size=32).uint8()
    assert pictures.shape == (1, 3, 32, 32)
    assert (pictures == torch.tensor([200, 100, 50]).view(3, 1, 1)).all()
    assert PictureFolder(tmp_path).image_size == 40


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, channels: int) -> None:
    levels = np.array([[0, 255, 256, 32768], [40000, 65000, 65534, 65535]], dtype=np.uint16)
    path = save(tmp_path / "16.png", levels)
    assert np.asarray(Image.open(path).convert("L"))[0, 2] == 255  # what PIL makes of 256 of 65535
    expected = np.array([[0, 1, 1, 128], [156, 253, 255, 255]])
    found = np.asarray(read_picture(path, channels)).reshape(2, 4, -1)
    assert found.shape[2] == channels
    assert (found == expected[:, :, None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white_and_their_hidden_colour_does_not_show(tmp_path: Path, mode: str) -> None:
    array = noise(4, 4, 4)
    array[..., 3] = 255
    array[0, :, 3] = 0
    array[1, :, 3] = 128
    path = save(tmp_path / "a.png", array, mode)
    opaque = np.asarray(Image.open(path).convert("RGBA"))[..., :3].astype(float)
    found = np.asarray(read_picture(path)).astype(float)
    assert (found[0] == 255).all()
    assert np.abs(found[1] - (opaque[1] * 128 / 255 + 127)).max() <= 1
    assert (found[2:] == opaque[2:]).all()
    assert (opaque[0] != 255).any()  # there was something to hide


def test_a_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 1), 1)
    picture.save(tmp_path / "a.gif", transparency=0)
    found = read_picture(tmp_path / "a.gif")
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 1)) == (200, 100, 50)


def test_cmyk_grey_and_turned_pictures_are_converted(tmp_path: Path) -> None:
    red = np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8)
    path = save(tmp_path / "cmyk.jpg", red, "CMYK", quality=100)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(np.asarray(read_picture(path)).astype(int) - red).max() <= 3

    path = save(tmp_path / "grey.png", noise(8, 8))
    assert (np.asarray(read_picture(path)) == noise(8, 8)[:, :, None]).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    array = np.zeros((4, 8, 3), dtype=np.uint8)
    path = save(tmp_path / "turned.png", array, exif=exif)
    assert read_picture(path).size == (4, 8)


def truncated(path: Path) -> None:
    save(path, noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[:3000])


def floats(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cut.png", truncated),
        ("cut.jpg", truncated),
        ("text.png", lambda path: path.write_text("no picture")),
        ("empty.jpg", lambda path: path.touch()),
        ("float.tif", floats),
    ],
)
def test_an_unreadable_picture_is_named_in_one_line(tmp_path: Path, name: str, write) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=name) as caught:
        read_picture(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        open_data(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no picture found"):
        open_data(str(tmp_path))
    save(tmp_path / "loose.png", noise(8, 8, 3))
    flat = open_data(str(tmp_path))
    assert (flat.class_names, flat.labels) == ((tmp_path.name,), [0])
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"cat: found no picture"):
        open_data(str(tmp_path))


def test_open_data_takes_digits_and_folders(folder: Path) -> None:
    assert len(open_data("digits")) == 1797
    with pytest.raises(InputError, match="digits"):
        open_data("digits", image_size=32)
    grey = open_data(str(folder), image_size=16, channels=1)
    assert grey[0][0].shape == (1, 16, 16)


@given(
    num_pictures=st.integers(1, 40),
    num_slices=st.integers(1, 3),
    world=st.integers(1, 3),
    per_slice=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 30),
    num_steps=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_batches_are_a_pure_function_of_seed_and_step(
    num_pictures: int, num_slices: int, world: int, per_slice: int, seed: int, start: int, num_steps: int
) -> None:
    batch_size, stop = num_slices * world * per_slice, start + num_steps
    whole = [StepBatches(num_pictures, batch_size, seed).batch(s).tolist() for s in range(start, stop)]

    # From whatever step one starts, and however it is cut up, a step sees the same pictures.
    parts = [
        list(StepBatches(num_pictures, batch_size, seed, start, stop, num_slices, rank, world)) for rank in range(world)
    ]
    assert all(len(part) == num_steps * num_slices for part in parts)
    assert len(StepBatches(num_pictures, batch_size, seed, start, stop, num_slices)) == num_steps * num_slices
    joined = [i for micro in zip(*parts, strict=True) for part in micro for i in part]
    assert joined == [i for batch in whole for i in batch]

    # Every epoch of the stream holds every picture once.
    stream = np.concatenate([StepBatches(num_pictures, batch_size, seed).batch(s) for s in range(stop)])
    epochs = stream[: len(stream) // num_pictures * num_pictures].reshape(-1, num_pictures)
    assert (np.sort(epochs, axis=1) == np.arange(num_pictures)).all()


def test_batches_differ_by_seed_and_by_epoch() -> None:
    first, second = StepBatches(100, 100, seed=0), StepBatches(100, 100, seed=1)
    assert first.batch(0).tolist() != second.batch(0).tolist()
    assert first.batch(0).tolist() != first.batch(1).tolist()


def test_a_batch_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size: found 10"):
        StepBatches(100, 10, 0, num_slices=2, world=2)
