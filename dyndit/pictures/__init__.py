"""Convert and write pictures and clips, and tile them in a grid. The files beside read them.

decode.py holds the policy for one picture, resize.py the ways to one size; sources.py, archives.py, arrays.py and
tables.py say where pictures lie, collection.py opens any of them, and check.py looks at all contents once. clips.py
says how a clip is a file.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyndit.errors import InputError
from dyndit.files import written_whole


def as_nchw(array: np.ndarray) -> Tensor:
    """Transpose (N, H, W, C) -> a contiguous tensor (N, C, H, W); of clips (N, T, H, W, C) -> (N, C, T, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def as_image(picture: Tensor) -> Image.Image:
    """Convert a picture, uint8 (1 or 3, H, W), for Pillow. Frames of a clip stand side by side."""
    if picture.ndim == 4:
        picture = picture.transpose(1, 2).flatten(2)
    array = picture.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def frames_of(pictures: Tensor) -> Tensor:
    """Return the frames of clips as pictures.  (N, C, T, H, W) -> (N T, C, H, W). Pictures are returned unchanged."""
    return pictures.transpose(1, 2).flatten(0, 1) if pictures.ndim == 5 else pictures


def as_rgb(pictures: Tensor) -> Tensor:
    """Repeat grey as colour.  pictures: (N, 1 or 3, H, W) uint8, or clips, else InputError -> (N, 3, H, W) uint8."""
    if pictures.dtype != torch.uint8 or pictures.ndim not in (4, 5) or pictures.shape[1] not in (1, 3):
        raise InputError(
            f"pictures: {str(pictures.dtype).removeprefix('torch.')} of shape {tuple(pictures.shape)}, "
            "expected uint8 (N, 1 or 3, H, W)"
        )
    return pictures.expand(-1, 3, *pictures.shape[2:])


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture whole."""
    with written_whole(path) as draft:
        picture.save(draft, "PNG")


def grid(pictures: Tensor, columns: int = 10, pad: int = 2, least: int = 320) -> Image.Image:
    """Tile pictures row by row on white, enlarged without smoothing to at least `least` pixels across.

    pictures: (N, C, H, W) uint8, C 1 or 3. A clip has a row of its own, a frame a column.
    """
    if pictures.ndim == 5:
        columns, pictures = pictures.shape[2], frames_of(pictures)
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
