"""Pictures as bytes: colour for the networks that judge them, a grid for the eye."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dyndit.errors import InputError
from dyndit.files import written_whole


def as_rgb(pictures: Tensor) -> Tensor:
    """Repeat grey as colour.  pictures: (N, 1 or 3, H, W) uint8 -> (N, 3, H, W) uint8.

    Raises:
        InputError: pictures of another type or shape.
    """
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
    array = canvas.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    factor = max(1, least // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
