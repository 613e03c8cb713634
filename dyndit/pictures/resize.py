"""Cut pictures to one size: the ways of training, of ADM and of clean-fid, by name."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dyndit.errors import InputError, expected_one_of

Size = int | tuple[int, int]
"""The side of a square, or (height, width)."""


def size_pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Return (height, width). An integer size is the side of a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_text(size: tuple[int, int]) -> str:
    """Write a size: "256", or "256x128" for another shape than a square."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class Resize:
    """Crop and resize to a size by a named method (`METHODS`). Its text stands in rows: "adm 256"."""

    size: Size
    method: str = "bicubic"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--resize-method: '{self.method}', {expected_one_of(self.method, METHODS)}")
        height, width = size_pair(self.size)
        if min(height, width) < 1:
            raise InputError(f"image size: found {self.size}, expected at least 1")
        if self.method == "adm" and height != width:
            raise InputError(f"--resize-method adm: found {height}x{width}, expected a square")

    def __str__(self) -> str:
        return f"{self.method} {size_text(size_pair(self.size))}"

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the picture at this size. A picture of this size is returned unchanged."""
        return METHODS[self.method](picture, size_pair(self.size))


def _bicubic(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize the largest centred part of this shape in one step, bicubic and antialiased."""
    part = _centre(picture, size)
    return part if part.size == size[::-1] else part.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def _clean(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Do the same on floats, a channel at a time, as clean-fid does (Parmar et al. 2022); round at the end."""
    part = _centre(picture, size)
    if part.size == size[::-1]:
        return part
    channels = [
        np.asarray(Image.fromarray(np.asarray(c, np.float32)).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        for c in part.split()
    ]
    array = np.stack(channels, axis=-1).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(array[..., 0] if len(channels) == 1 else array)


def _adm(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Do as ADM's data loader does (Dhariwal and Nichol 2021).

    Halve with a box filter down to below twice the size; resize the shorter side bicubically; cut out the centre.
    """
    side = size[0]
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _centre(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    scale = min(picture.width / width, picture.height / height)
    cut_width, cut_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - cut_width) // 2, (picture.height - cut_height) // 2
    return picture.crop((left, top, left + cut_width, top + cut_height))


METHODS = {"bicubic": _bicubic, "adm": _adm, "clean-fid": _clean}
"""Ways to crop and resize, by name. Training's is bicubic."""
