"""Keep clips as pictures, and write clips to look at.

A clip's file is a PNG with all frames side by side. Its text entry `dyndit-frames` holds their number. GIF files are
written with Pillow, MP4 files with imageio and the FFmpeg that imageio-ffmpeg brings along.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dyndit.errors import InputError
from dyndit.pictures import as_image, grid

ENTRY = "dyndit-frames"
"""The text entry of a clip's PNG."""
FRAMES_PER_SECOND = 8
LEAST_SIDE = 128
"""Pixels of a clip's shorter side, at least. Smaller clips are enlarged without smoothing."""
NO_MP4 = "no MP4 files: imageio is not installed; expected `pip install 'dyndit[video]'`"


def as_png(picture: Tensor, path: Path) -> None:
    """Write a picture, or a clip as `cut` reads it, at a path in a draft."""
    text = PngInfo()
    if picture.ndim == 4:
        text.add_text(ENTRY, str(picture.shape[1]))
    as_image(picture).save(path, pnginfo=text if picture.ndim == 4 else None)


def cut(strip: np.ndarray, entry: object, name: str) -> np.ndarray:
    """Cut a strip of frames.  (H, T W, C) -> (T, H, W, C).  entry: of the file, which must fit; name: for messages."""
    height, width, channels = strip.shape
    num = int(entry) if isinstance(entry, str) and entry.isdecimal() else 0
    if num < 1 or width % num:
        raise InputError(f"{name}: {ENTRY} {entry!r:.20}, expected a number that divides the width, {width}")
    return strip.reshape(height, num, width // num, channels).transpose(1, 0, 2, 3)


def writes_mp4() -> bool:
    """Tell if imageio and its FFmpeg are installed."""
    return all(find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))


def side_by_side(clips: Tensor) -> list[Image.Image]:
    """Tile clips in a grid that moves.  clips: uint8 (N, C, T, H, W) -> T pictures."""
    return [grid(clips[:, :, frame], columns=8) for frame in range(clips.shape[2])]


def frames(clip: Tensor) -> list[Image.Image]:
    """Return the frames of a clip, enlarged to `LEAST_SIDE`.  clip: uint8 (C, T, H, W)."""
    factor = -(-LEAST_SIDE // min(clip.shape[-2:]))
    size = (clip.shape[3] * factor, clip.shape[2] * factor)
    return [as_image(frame).resize(size, Image.Resampling.NEAREST) for frame in clip.unbind(1)]


def write(path: Path, pictures: list[Image.Image]) -> list[Path]:
    """Write frames as a GIF, and as an MP4 if `writes_mp4`, at paths in a draft. -> the paths.

    path: without a suffix. A lone frame is a GIF that stands still.
    """
    gif, mp4 = path.with_name(f"{path.name}.gif"), path.with_name(f"{path.name}.mp4")
    milliseconds = round(1000 / FRAMES_PER_SECOND)
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    if not writes_mp4():
        return [gif]
    import imageio.v2 as imageio  # slow to import

    even = [picture.crop((0, 0, picture.width // 2 * 2, picture.height // 2 * 2)) for picture in pictures]
    options = {"fps": FRAMES_PER_SECOND, "codec": "libx264", "macro_block_size": 2, "ffmpeg_log_level": "error"}
    imageio.mimwrite(mp4, [np.asarray(picture.convert("RGB")) for picture in even], "FFMPEG", **options)
    return [gif, mp4]
