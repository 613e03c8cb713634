"""Decode one picture under the one policy of training, calibration and evaluation.

Upright by its EXIF mark, on white where it is transparent, 16 bits scaled to 8, the first frame of several, colours
converted to RGB without their ICC profile. What has no known range of levels (32 bits, floats) is refused.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin  # noqa: F401  # pyright: ignore[reportUnusedImport]  the last two register formats

from dyndit.errors import InputError, first_line
from dyndit.pictures.clips import ENTRY

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
"""Formats that are decoded, by content. Pillow knows others too, some of which run programs (EPS)."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names of pictures. Files of other names are skipped and counted."""
MOST_PIXELS = 178_956_970
"""Most pixels of a picture, 512 MiB of RGB. A larger picture is refused before its pixels are decoded."""
MOST_BYTES = 1 << 30
"""Most bytes of a picture's file, also of the size that an archive declares."""


def is_picture(name: str) -> bool:
    """Tell if a file's name ends as those of pictures do."""
    return name.lower().endswith(SUFFIXES)


def decode(data: bytes, name: str, channels: int | None = None) -> Image.Image:
    """Decode a picture file to 8-bit grey (1 channel) or RGB (3).  name: for messages.

    channels: None keeps a grey picture grey. A clip is its strip of frames, with its `ENTRY` in the picture's `info`.

    Raises InputError if the file is truncated, no picture, too large, or of a pixel depth without a known range.
    """
    try:
        with _opened(data) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(f"{name}: {width}x{height} pixels, expected at most {MOST_PIXELS:,} in all")
            image.load()
            found = _eight_bits(ImageOps.exif_transpose(image), image.format, name, channels)
            found.info = {key: value for key, value in image.info.items() if key == ENTRY}
            return found
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... for damaged files
        raise InputError(f"{name}: unreadable ({first_line(error)}), expected a whole picture") from error


def has_frames(data: bytes) -> bool:
    """Tell if a file holds several frames. Only the first is decoded."""
    with _opened(data) as image:
        return image.format in ("GIF", "PNG", "WEBP", "TIFF") and getattr(image, "is_animated", False)


def _opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data), formats=FORMATS)


def _eight_bits(picture: Image.Image, form: str | None, name: str, channels: int | None) -> Image.Image:
    clear = picture.info.get("transparency")
    if picture.mode.startswith("I;16") or (picture.mode == "I" and form in ("PNG", "PPM")):
        # Pillow's convert("L") clips 16-bit levels at 255 and so turns most pictures white.
        levels = np.asarray(picture, dtype=np.float64)
        if isinstance(clear, int):
            levels = np.where(levels == clear, 65535, levels)
        picture = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise InputError(f"{name}: {picture.mode} pixels, expected 8 bits a channel, or 16 without a sign")
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:  # dropping alpha would show the colours of transparent pixels
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if channels is None:
        channels = 1 if grey else 3
    return picture.convert("L" if channels == 1 else "RGB")
