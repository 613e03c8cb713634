"""Pictures on disk, of every kind that people bring."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dyndit.pictures.sources import Source


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def png(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    return data.getvalue()


def make_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def every_kind(root: Path) -> Path:
    """Make a folder of three classes, of sizes and depths of every kind, all without loss."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)  # noqa: E731
    save(root / "b" / "wide.png", draw(40, 97, 3))
    save(root / "b" / "fits.png", draw(32, 32, 3))
    save(root / "b" / "deep" / "tall.bmp", draw(130, 33, 3))
    save(root / "b-2" / "grey.png", draw(64, 64))
    save(root / "b-2" / "alpha.png", draw(48, 48, 4))
    save(root / "b-2" / "deep16.png", rng.integers(0, 65536, (36, 32), dtype=np.uint16))
    save(root / "a" / "palette.gif", draw(32, 40, 3), "P")
    save(root / "a" / "two.ppm", draw(32, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "a" / "turned.png", draw(32, 50, 3), exif=exif)
    return root


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def skipped(source: Source) -> dict[str, int]:
    return {reason: len(names) for reason, names in source.skipped.items()}
