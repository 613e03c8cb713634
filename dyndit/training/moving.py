"""Draw clips of moving digits from real scans: one or two scans of a class that bounce off the edges.

A clip is a function of its number and its shape alone. Scans move in whole pixels, so they keep their levels of ink.
"""

from typing import Any

import numpy as np

NUM_CLIPS = 4_800
SHAPES = ((8, 16, 16), (8, 16, 24), (8, 24, 16), (4, 16, 16), (1, 16, 16))
"""Frames, height and width of the clips to train on. The first is the usual shape; the last are pictures."""
_TURNS = (0, 0, 0, 0, 1, 2, 3, 4)
"""Shapes of clips in turn, a turn for every ten clips (one of each class). Half of all clips have the usual shape."""

_SEED = 20_261_128
_SPEEDS = (0.75, 2.0)
"""Slowest and fastest motion along an axis, in pixels a frame."""


def shape_number(number: int) -> int:
    """Return the position in `SHAPES` of a clip's shape."""
    return _TURNS[number // 10 % len(_TURNS)]


def clip(scans: np.ndarray, choices: Any, number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw clip `number`.  scans: (N, h, w) levels, choices: the scans of its class, shape: (T, H, W) -> (T, H, W)."""
    rng = np.random.default_rng((_SEED, number))
    drawn = np.zeros(shape, scans.dtype)
    for _ in range(1 + rng.integers(2)):
        scan = scans[choices[rng.integers(len(choices))]]
        start, signs = rng.random(2), rng.choice((-1, 1), 2)
        speed = signs * rng.uniform(*_SPEEDS, 2)
        height, width = scan.shape
        tracks = [
            bounced(start[axis], speed[axis], shape[1 + axis] - side, shape[0])
            for axis, side in enumerate((height, width))
        ]
        for frame, top, left in zip(drawn, *tracks, strict=True):
            place = frame[top : top + height, left : left + width]
            np.maximum(place, scan, out=place)
    return drawn


def bounced(start: float, speed: float, room: int, num_frames: int) -> np.ndarray:
    """Return whole positions 0 to `room` of a point that starts at a share of the room and bounces off both ends."""
    path = np.abs(start * room + speed * np.arange(num_frames))
    if room == 0:
        return np.zeros(num_frames, int)
    return np.rint(room - np.abs(path % (2 * room) - room)).astype(int)
