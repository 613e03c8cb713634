"""Store sets of pictures on disk, as `dyndit sample` writes them.

A folder holds a PNG for each picture, `000123-class7.png`, or `000123-a-three.png` if it has a caption, and a
`manifest.json`. A finished folder also holds all pictures for ADM's evaluator, `samples.npz`, and the first pictures
side by side, `grid.png`. A clip's PNG has all its frames side by side; a finished folder also holds a GIF and an MP4 of
each of the first clips, and of their grid.

Every file is written whole. Batches are always cut from the whole set. A resumed run, or a run shared by processes,
therefore draws the same batches as an undisturbed run. One batch is in memory at a time.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dyndit import files, manifest, seals
from dyndit.errors import CheckpointError, InputError
from dyndit.models.conditions import Value
from dyndit.pictures import clips, grid, write_png
from dyndit.pictures.collection import PictureFiles
from dyndit.progress import progress_bar

ARCHIVE, GRID = "samples.npz", "grid.png"
NUM_IN_GRID = 64
TIMES = ("machine", "ms_per_picture", "ms_denoiser", "seconds", "step_seconds")
"""Entries of a finished set's manifest about time. `seconds` and `step_seconds` are sums over batches."""


@dataclass(frozen=True)
class Drawn:
    """One batch of a sampling.

    ids: numbers of the pictures. labels: their classes or captions. x: (B, C, ...) on the host, uint8 of a pixel-space
    model, else latents. seconds: wall time from noise to x. step_seconds, network_seconds: per step, empty without
    `stats`.
    """

    ids: tuple[int, ...]
    labels: tuple[Value, ...]
    x: Tensor
    seconds: float
    step_seconds: tuple[float, ...] = ()
    network_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Store:
    """The folder of a set.  labels: the class or the caption of each picture. first: number of the first picture."""

    folder: Path
    labels: tuple[Value, ...]
    first: int = 0

    @property
    def numbers(self) -> range:
        """Return the numbers of all pictures."""
        return range(self.first, self.first + len(self.labels))

    def path(self, number: int) -> Path:
        """Return the path of a picture."""
        return self.folder / f"{number:06d}-{_word(self.labels[number - self.first])}.png"

    def missing(self) -> set[int]:
        """Return the numbers of the missing pictures."""
        there = {path.name for path in self.folder.iterdir()}
        return {number for number in self.numbers if self.path(number).name not in there}

    def add(self, numbers: Sequence[int], pictures: Tensor) -> None:
        """Write pictures.  pictures: uint8 (B, 1 or 3, H, W), or clips (B, 1 or 3, T, H, W)."""
        with files.written_together(self.folder) as draft:
            for number, picture in zip(numbers, pictures, strict=True):
                clips.as_png(picture, draft / self.path(number).name)

    def note(self, part: str, drawn: Drawn, machine: str, seconds: float) -> None:
        """Keep the times of a batch until the set is finished.  seconds: its wall time, decoding included."""
        row = {"first": drawn.ids[0], "num": len(drawn.ids), "machine": machine, "seconds": seconds}
        row |= {"step_seconds": drawn.step_seconds, "network_seconds": drawn.network_seconds}
        files.append_lines(self.folder / f"times-{part}.jsonl", json.dumps(seals.sealed(row)) + "\n")

    def times(self) -> dict[str, Any]:
        """Return the times named in `TIMES`, over the batches of the machine that drew most pictures.

        Raises InputError if a file of times is damaged.
        """
        rows = []
        for path in sorted(self.folder.glob("times-*.jsonl")):
            try:
                found = [dict(json.loads(line)) for line in files.read_lines(path).splitlines()]
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}: damaged ({error}); expected it whole, or deleted") from error
            rows += [seals.unsealed(path, row, InputError) for row in found]
        if not rows:
            return {}
        nums: Counter[str] = Counter()
        for row in rows:
            nums[row["machine"]] += row["num"]
        ((machine, num),) = nums.most_common(1)
        rows = [row for row in rows if row["machine"] == machine]
        seconds, timed = sum(row["seconds"] for row in rows), all(row["step_seconds"] for row in rows)
        network = sum(added(row["network_seconds"] for row in rows)) if timed else None
        return {
            "machine": machine,
            "ms_per_picture": 1e3 * seconds / num,
            "ms_denoiser": None if network is None else 1e3 * network / num,
            "seconds": seconds,
            "step_seconds": added(row["step_seconds"] for row in rows) if timed else None,
        }

    def drop_times(self) -> None:
        """Remove the files of times. The manifest holds their sums."""
        for path in self.folder.glob("times-*.jsonl"):
            files.remove(path)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the folder's manifest."""
        return manifest.read(self.folder / manifest.MANIFEST)

    def describe(self, settings: dict[str, Any], **facts: Any) -> None:
        """Write the manifest."""
        files.write_json(self.folder / manifest.MANIFEST, manifest.describe(settings, **facts))

    @property
    def has_overviews(self) -> bool:
        """Tell if the archive and the grid exist."""
        return all((self.folder / name).is_file() for name in (ARCHIVE, GRID))

    def finish(self, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write the archive, the grid and the manifest of a set. Raises InputError if a picture cannot be read."""
        times = self.times()
        if self.manifest.get("complete") is True:  # another process finished first, and may have dropped the times
            return
        pictures = PictureFiles.at(tuple(map(self.path, self.numbers)))
        _write_archive(self.folder / ARCHIVE, pictures, self.labels)
        first = pictures.read(range(min(NUM_IN_GRID, len(pictures))))
        write_png(self.folder / GRID, grid(first))
        if first.ndim == 5:
            self._write_clips(first)
        self.describe(settings, complete=True, **times | facts)
        self.drop_times()

    def _write_clips(self, first: Tensor) -> None:
        """Write a GIF and an MP4 of each of these clips, and of their grid.  first: uint8 (N, C, T, H, W)."""
        with files.written_together(self.folder) as draft:
            clips.write(draft / Path(GRID).stem, clips.side_by_side(first))
            for number, clip in enumerate(first, self.first):
                clips.write(draft / self.path(number).stem, clips.frames(clip))


def _word(label: Value) -> str:
    """Write a label for a file's name: 7 -> "class7", "A three, bold" -> "a-three-bold"."""
    if not isinstance(label, str):
        return f"class{label}"
    return "-".join(re.findall(r"[a-z0-9]+", label.lower()))[:60] or "caption"


def _write_archive(path: Path, pictures: PictureFiles, labels: Sequence[Value], batch_size: int = 256) -> None:
    """Write `np.savez(path, arr_0=pictures, arr_1=labels)`, batch by batch.  arr_0: uint8 (N, H, W, C).

    Clips are (N, T, H, W, C).
    """
    parts, done = pictures.batches(batch_size), 0
    first = next(parts)
    shape = (len(pictures), *first.shape[2:], first.shape[1])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        progress_bar(f"writing {path.name}", unit="pictures") as advance,
        files.written_whole(path) as draft,
        zipfile.ZipFile(draft, "w", allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in (first, *parts):
                file.write(part.movedim(1, -1).contiguous().numpy().tobytes())
                done += len(part)
                advance(done, len(pictures))
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.asarray(labels))


def problem_of(source: object) -> str | None:
    """Say why a folder of `dyndit sample` is no whole set. Return None for a finished set and for any other source."""
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is None or not (folder / manifest.MANIFEST).is_file():
        return None
    try:
        found = manifest.read(folder / manifest.MANIFEST)
        settings = dict(found["settings"])
    except CheckpointError as error:  # damaged, or of another program
        return str(error) if next(folder.glob("[0-9]*-*.png"), None) else None
    except (KeyError, TypeError, ValueError):
        return None
    if settings.get("verb") != "sample":
        return None
    if not manifest.is_sealed(found):
        return f"{folder / manifest.MANIFEST}: edited (it has no checksum); expected it as `dyndit sample` wrote it"
    num, expected = sum(1 for _ in folder.glob("[0-9]*-*.png")), settings.get("num_images")
    if found.get("complete") is True and num == expected:
        return None
    return f"{folder}: unfinished, {num} of {expected} pictures; expected that `dyndit sample` had come to its end"


def added(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Sum each column: seconds per step, over batches."""
    return tuple(map(sum, zip(*rows, strict=True)))
