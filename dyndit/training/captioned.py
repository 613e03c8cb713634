"""Captions for scanned digits, and the real transformations that make the captions true.

A picture and its caption are a function of the picture's number alone. Styles are any of bold, tilted and small.
"""

from itertools import combinations

import numpy as np
from scipy import ndimage

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTRIBUTES = ("bold", "tilted", "small")
STYLES = tuple(style for size in range(4) for style in combinations(ATTRIBUTES, size))
"""The eight styles, from plain to all three attributes."""
TEMPLATES = ("a {}", "the digit {}", "number {}", "{}")
VOCABULARY = ("a", "the", "digit", "number", *NAMES, *ATTRIBUTES)

_SEED = 20_240_301
_FINE = 4
"""Pixels of the fine grid, on which pictures are transformed, to a pixel of the scan."""


def described(label: int, style: tuple[str, ...], template: str) -> str:
    """Write a caption: (7, ("bold", "tilted"), "number {}") -> "number seven, bold, tilted"."""
    return ", ".join([template.format(NAMES[label]), *style])


PROMPTS = tuple(
    described(label, style, TEMPLATES[(row + label) % len(TEMPLATES)])
    for row, style in enumerate(STYLES)
    for label in range(10)
)
"""A caption of every digit in every style: the captions that an evaluation takes in turn."""


def styled(levels: np.ndarray, label: int, number: int) -> tuple[np.ndarray, str]:
    """Transform scan `number` of a data set and describe it.  levels: (8, 8), ink 0 to 16 -> (8, 8), caption."""
    rng = np.random.default_rng((_SEED, number))
    style, template = STYLES[rng.integers(len(STYLES))], TEMPLATES[rng.integers(len(TEMPLATES))]
    degrees, size = rng.uniform(18, 28), rng.uniform(0.65, 0.75)
    return transformed(levels, style, degrees, size), described(label, style, template)


def transformed(levels: np.ndarray, style: tuple[str, ...], degrees: float = 23, size: float = 0.7) -> np.ndarray:
    """Transform a scan as `style` says. A plain scan is returned unchanged.  levels: (8, 8), ink 0 to 16 -> (8, 8).

    Bold thickens the strokes, tilted turns clockwise by `degrees`, small shrinks to `size` of the width.
    """
    if not style:
        return levels
    fine = np.kron(levels, np.ones((_FINE, _FINE)))
    if "bold" in style:
        fine = ndimage.grey_dilation(fine, size=(3, 3))
    angle = np.deg2rad(degrees if "tilted" in style else 0)
    back = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back /= size if "small" in style else 1
    centre = (np.array(fine.shape) - 1) / 2
    turned = ndimage.affine_transform(fine, back, centre - back @ centre, order=1)  # pyright: ignore[reportArgumentType]
    rows, columns = levels.shape
    return turned.reshape(rows, _FINE, columns, _FINE).mean((1, 3)).round().astype(levels.dtype)
