"""Put sets of pictures that share seeds side by side: the same picture of every set in a column."""

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dyndit.errors import InputError
from dyndit.pictures import grid

COLUMNS = 10
_FONT = 14
"""Height of the names' letters, in pixels."""


def in_rows(sets: Mapping[str, Tensor], columns: int = COLUMNS, pad: int = 2) -> Image.Image:
    """Tile sets by their names: a row of the first set, the same pictures of the second below it, and so on.

    sets: uint8 (N, C, H, W) each, or clips (N, C, T, H, W), of which each has a row.

    Raises:
        InputError: no set, no pictures, or sets of different shapes.
    """
    names, found = list(sets), list(sets.values())
    shapes = [tuple(pictures.shape) for pictures in found]
    if not found or not len(found[0]):
        raise InputError("pictures: none; expected at least one set of them")
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(f"{name}: pictures {shape}, expected {shapes[0]} (number, channels, ...) as in {names[0]}")
    is_clips, num = found[0].ndim == 5, shapes[0][0]
    columns = 1 if is_clips else min(columns, num)
    parts = []
    for low in range(0, num, columns):
        for pictures in found:
            row = pictures[low : low + columns]
            white = row.new_full((columns - len(row), *row.shape[1:]), 255)
            parts += [row, white]
    image = grid(torch.cat(parts), columns, pad, least=480)
    num_rows = len(parts) // 2
    font = ImageFont.load_default(_FONT)
    margin = 2 * pad + int(max(font.getlength(name) for name in names))
    whole = Image.new("RGB", (margin + image.width, image.height), "white")
    whole.paste(image, (margin, 0))
    draw = ImageDraw.Draw(whole)
    for row in range(num_rows):
        middle = (row + 0.5) * image.height / num_rows
        draw.text((pad, middle), names[row % len(names)], "black", font, anchor="lm")
    return whole
