"""Read and write pictures, and tile them in a grid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyndit.errors import InputError
from dyndit.files import is_draft, opened, written_whole

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
OVERVIEWS = {"grid.png", "samples.png"}
"""Names of the overviews that `dyndit sample` and the reports write beside single pictures."""


@dataclass(frozen=True)
class PictureFiles:
    """Pictures of one size, read from disk on demand."""

    paths: tuple[Path, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> "PictureFiles":
        """List the pictures in a folder, searched in depth and sorted. `OVERVIEWS` are skipped.

        Raises InputError if there is no folder, or no picture.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected a folder of pictures or an .npz file")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name not in OVERVIEWS)
        if not (paths := tuple(sorted(p for p in found if not is_draft(p.relative_to(folder))))):
            raise InputError(f"{folder}: no picture found, expected PNG, JPEG or WEBP files")
        return cls(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of the first picture. All pictures have this size."""
        return read_picture(self.paths[0]).shape[:2]

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Read the pictures in order, as uint8 (B, C, H, W). C is 3 if a picture of the batch has colour, else 1.

        Raises:
            InputError: a picture is unreadable, or of another size than the first.
        """
        for low in range(0, len(self), batch_size):
            yield as_nchw(self.read(range(low, min(low + batch_size, len(self)))))

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Read some pictures, as uint8 (B, H, W, C). Raises InputError as `batches`."""
        pictures = [read_picture(self.paths[number]) for number in numbers]
        for number, picture in zip(numbers, pictures, strict=True):
            if picture.shape[:2] != self.size:
                (h, w), (height, width) = picture.shape[:2], self.size
                raise InputError(
                    f"{self.paths[number]}: {h}x{w} pixels, expected {height}x{width} as in {self.paths[0].name}"
                )
        channels = max(picture.shape[2] for picture in pictures)
        return np.stack([np.broadcast_to(picture, (*self.size, channels)) for picture in pictures])


def read_picture(path: Path) -> np.ndarray:
    """Read one picture as uint8 (H, W, 1 or 3). Raises InputError."""
    try:
        with opened(path) as file, Image.open(file) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255
                raise InputError(f"{path}: {image.mode} pixels, expected 8 bits a channel")
            if image.has_transparency_data:
                if image.convert("RGBA").getextrema()[3][0] < 255:  # transparent pixels have hidden colours
                    raise InputError(f"{path}: transparent pixels, expected an opaque picture")
                image = image.convert("RGBA")
            array = np.asarray(image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        raise InputError(f"{path}: unreadable ({error}), expected a whole picture") from error
    return array if array.ndim == 3 else array[..., None]


def as_nchw(array: np.ndarray) -> Tensor:
    """Transpose (N, H, W, C) -> a contiguous tensor (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def as_image(picture: Tensor) -> Image.Image:
    """Convert a picture, uint8 (1 or 3, H, W), for Pillow."""
    array = picture.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def as_rgb(pictures: Tensor) -> Tensor:
    """Repeat grey as colour.  pictures: (N, 1 or 3, H, W) uint8, else InputError -> (N, 3, H, W) uint8."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise InputError(
            f"pictures: {str(pictures.dtype).removeprefix('torch.')} of shape {tuple(pictures.shape)}, "
            "expected uint8 (N, 1 or 3, H, W)"
        )
    return pictures.expand(-1, 3, -1, -1)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture whole."""
    with written_whole(path) as draft:
        picture.save(draft, "PNG")


def grid(pictures: Tensor, columns: int = 10, pad: int = 2, least: int = 320) -> Image.Image:
    """Tile pictures row by row on white, enlarged without smoothing to at least `least` pixels across.

    pictures: (N, C, H, W) uint8, C 1 or 3.
    """
    count, channels, height, width = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures.cpu()):
        top, left = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        canvas[:, top : top + height, left : left + width] = picture
    image = as_image(canvas)
    factor = max(1, least // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
