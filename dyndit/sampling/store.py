"""Sets of pictures on disk, drawn by their numbers: what `dyndit sample` writes.

A folder holds a PNG for each picture, `000123-class7.png`, and a `manifest.json`. Once all pictures are there it also
holds all of them as ADM's evaluator takes them, `samples.npz`, and the first of them side by side, `grid.png`.

Every file lands whole. Batches are cut from the whole set, whatever numbers are asked for: a run that was killed and
goes on, or one that is shared out over processes, draws the very batches of an undisturbed one. One batch is in memory
at a time.
"""

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dyndit import files, manifest
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures import PictureFiles, as_image, as_nchw, grid, write_png
from dyndit.plans.plan import DepthPlan, Router
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.sample import Drawn, added, batches, check_request, resolve_plan
from dyndit.sampling.solvers import AnySolver

ARCHIVE, GRID = "samples.npz", "grid.png"
NUM_IN_GRID = 64
TIMES = ("machine", "ms_per_picture", "ms_denoiser", "seconds", "step_seconds")
"""What the manifest of a finished set says of its times. `seconds` and `step_seconds` are sums over batches."""


@dataclass(frozen=True)
class Stored:
    """A set of pictures on disk, as far as it is drawn.

    manifest: as the folder holds it. Its "complete" says whether all pictures are there; then it has their times too.
    num_drawn: pictures that this call added.
    """

    folder: Path
    plan: DepthPlan
    manifest: dict[str, object]
    num_drawn: int


def sample_into(
    out: Path,
    model: DynamicDepth,
    classes: Sequence[int] | None,
    num_images: int,
    *,
    ids: Sequence[int] | None = None,
    plan: DepthPlan | Router | None = None,
    solver: AnySolver = "ddim",
    num_steps: int = 20,
    cfg_scale: float = 1.5,
    guided_channels: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    strict: bool = False,
    stats: bool = False,
    to_pictures: Callable[[Tensor], Tensor] | None = None,
    autoencoder: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Stored:
    """Draw a set of pictures into the folder `out`. Pictures that are there stay; a finished set is left alone.

    Picture i has class classes[i % len(classes)] and is a function of (seed, class, i) alone. classes: None takes every
    class in turn.
    ids: the numbers to draw, of 0 to num_images - 1 (default: all). Processes may share them out and draw into one
    folder: `ids=range(0, 25_000)`, `ids=range(25_000, 50_000)`. Whoever adds the last picture finishes the set. A batch
    that two processes share is drawn by both: cut at multiples of batch_size.
    to_pictures: the decoder of latents, (B, C, h, w) -> uint8 (B, 3, H, W). autoencoder: its hash, for the manifest.
    on_progress(done, all) counts pictures. Other options: as of `sample`.

    Raises:
        InputError: before anything is written: as `sample`, or `out` holds another run or other files. Later: the disk
            is full, or a picture of the folder is damaged.
    """
    labels = model.backbone.condition.in_turn(num_images) if classes is None else classes
    labels = [int(labels[i % len(labels)]) for i in range(num_images)] if labels else []
    check_request(model, labels, batch_size, seed)
    if not model.pixel_space and to_pictures is None:
        raise InputError("to_pictures: missing; the model makes latents, expected their decoder")
    wanted = set(range(num_images) if ids is None else ids)
    if odd := sorted(wanted - set(range(num_images))):
        raise InputError(f"ids: {odd[0]}; expected 0 to {num_images - 1}")
    plan = resolve_plan(model, plan, solver, num_steps, cfg_scale)
    settings = {
        "verb": "sample",
        "model": model.identity.backbone,
        "exits": model.identity.exits,
        "solver": plan.solver,
        "steps": num_steps,
        "cfg_scale": cfg_scale,
        "guided_channels": guided_channels,
        "labels": "in turn" if classes is None else tuple(classes),
        "num_images": num_images,
        "seed": seed,
        "plan_steps": list(map(str, plan.steps)),
        "autoencoder": autoencoder,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    store, facts = Store(Path(out), tuple(labels)), {"plan": _facts(plan)}
    found = manifest.claim(store.folder, settings, complete=False, **facts)
    missing = store.missing()
    if found is not None and found.get("complete") is True:
        if not missing and store.has_overviews:
            store.drop_times()
            return Stored(store.folder, plan, found, 0)
        facts |= {name: found[name] for name in TIMES if name in found}
        store.describe(settings, complete=False, **facts)
    todo = [batch for batch in store.batches(batch_size) if not missing.isdisjoint(wanted.intersection(batch))]
    numbers = [i for batch in todo for i in batch]  # whole batches, but for the set's last
    guidance, device = Guidance(cfg_scale, guided_channels), str(next(model.parameters()).device)
    options = {"batch_size": batch_size, "strict": strict, "stats": stats}
    drawing = batches(model, [labels[i] for i in numbers], numbers, plan, guidance, solver, seed, **options)
    machine, part, done = manifest.machine(device), _name(wanted), num_images - len(missing)
    for drawn in drawing:
        began = time.perf_counter()
        pictures = drawn.x if model.pixel_space else to_pictures(drawn.x)
        # Its times come first: a batch that is there has been timed.
        store.note(part, drawn, machine, drawn.seconds + time.perf_counter() - began)
        rows = [row for row, i in enumerate(drawn.ids) if i in wanted and i in missing]
        store.add([drawn.ids[row] for row in rows], pictures[rows])
        done += len(rows)
        if on_progress is not None:
            on_progress(done, num_images)
    if not store.missing():
        store.finish(settings, facts)
    return Stored(store.folder, plan, store.manifest, done - num_images + len(missing))


def _facts(plan: DepthPlan) -> dict[str, object]:
    """What a manifest says of a plan."""
    return {
        "router": plan.router,
        "settings": plan.settings_text,
        "budget": plan.budget,
        "predicted_fd": plan.figures.get("predicted_fd"),
        "share_of_blocks": plan.share_of_blocks,
        "mean_depth": plan.mean_depth,
    }


def _name(ids: set[int]) -> str:
    """A name for some of a set's numbers: each process notes its times in a file of its own."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Store:
    """The folder of a set. labels: the class of each picture."""

    folder: Path
    labels: tuple[int, ...]

    def path(self, number: int) -> Path:
        """Where a picture lies."""
        return self.folder / f"{number:06d}-class{self.labels[number]}.png"

    def missing(self) -> set[int]:
        """The numbers of the pictures that are not there."""
        there = {path.name for path in self.folder.iterdir()}
        return {number for number in range(len(self.labels)) if self.path(number).name not in there}

    def batches(self, batch_size: int) -> Iterator[range]:
        """The numbers of each batch of the whole set."""
        num = len(self.labels)
        return (range(low, min(low + batch_size, num)) for low in range(0, num, batch_size))

    def add(self, numbers: Sequence[int], pictures: Tensor) -> None:
        """Write pictures, uint8 (B, 1 or 3, H, W)."""
        with files.written_together(self.folder) as draft:
            for number, picture in zip(numbers, pictures, strict=True):
                as_image(picture).save(draft / self.path(number).name)

    def note(self, part: str, drawn: Drawn, machine: str, seconds: float) -> None:
        """Keep the times of a batch until the set is finished. seconds: its wall time, decoding included."""
        row = {"first": drawn.ids[0], "num": len(drawn.ids), "machine": machine, "seconds": seconds}
        row |= {"step_seconds": drawn.step_seconds, "network_seconds": drawn.network_seconds}
        files.append_lines(self.folder / f"times-{part}.jsonl", json.dumps(row) + "\n")

    @property
    def _noted(self) -> list[Path]:
        return sorted(self.folder.glob("times-*.jsonl"))

    def times(self) -> dict[str, object]:
        """The times of the batches drawn so far, on the machine that drew most pictures: what `TIMES` names.

        Raises:
            InputError: a file of times is damaged.
        """
        rows = []
        for path in self._noted:
            try:
                rows += [json.loads(line) for line in files.read_lines(path).splitlines()]
            except ValueError as error:
                raise InputError(f"{path}: damaged ({error}); expected it whole, or deleted") from error
        nums: dict[str, int] = {}
        for row in rows:
            nums[row["machine"]] = nums.get(row["machine"], 0) + row["num"]
        if not nums:
            return {}
        machine = max(nums, key=nums.__getitem__)
        rows = [row for row in rows if row["machine"] == machine]
        seconds, timed = sum(row["seconds"] for row in rows), all(row["step_seconds"] for row in rows)
        network = sum(added(row["network_seconds"] for row in rows)) if timed else None
        return {
            "machine": machine,
            "ms_per_picture": 1e3 * seconds / nums[machine],
            "ms_denoiser": None if network is None else 1e3 * network / nums[machine],
            "seconds": seconds,
            "step_seconds": added(row["step_seconds"] for row in rows) if timed else None,
        }

    def drop_times(self) -> None:
        """Remove the files of times: the manifest has their sum."""
        for path in self._noted:
            path.unlink(missing_ok=True)

    @property
    def manifest(self) -> dict[str, object]:
        """What the folder says of itself."""
        return files.read_json(self.folder / manifest.MANIFEST)

    def describe(self, settings: dict[str, object], **facts: object) -> None:
        """Write the manifest."""
        files.write_json(self.folder / manifest.MANIFEST, manifest.describe(settings, **facts))

    @property
    def has_overviews(self) -> bool:
        """Whether the archive and the grid are there."""
        return all((self.folder / name).is_file() for name in (ARCHIVE, GRID))

    def finish(self, settings: dict[str, object], facts: dict[str, object]) -> None:
        """Write the archive, the grid and the manifest of a set whose pictures are all there.

        Raises:
            InputError: a picture cannot be read.
        """
        times = self.times()
        if self.manifest.get("complete") is True:  # another process was quicker, and may have dropped the times
            return
        pictures = PictureFiles(tuple(map(self.path, range(len(self.labels)))))
        _write_archive(self.folder / ARCHIVE, pictures, self.labels)
        first = pictures.read(range(min(NUM_IN_GRID, len(pictures))))
        write_png(self.folder / GRID, grid(as_nchw(first)))
        self.describe(settings, complete=True, **times | facts)
        self.drop_times()


def _write_archive(path: Path, pictures: PictureFiles, labels: Sequence[int], batch_size: int = 256) -> None:
    """Write the file of `np.savez(path, arr_0=pictures, arr_1=labels)` by batches.  arr_0: uint8 (N, H, W, C)."""
    parts = pictures.batches(batch_size)
    first = next(parts)
    shape = (len(pictures), *first.shape[2:], first.shape[1])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with files.written_whole(path) as draft, zipfile.ZipFile(draft, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in (first, *parts):
                file.write(part.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.asarray(labels))


def problem_of(source: object) -> str | None:
    """Say why a folder of `dyndit sample` is no whole set. None for a finished one, and for any other source."""
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is None or not (folder / manifest.MANIFEST).is_file():
        return None
    try:
        found = files.read_json(folder / manifest.MANIFEST)
        settings = dict(found["settings"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None  # another's
    if settings.get("verb") != "sample":
        return None
    num, expected = sum(1 for _ in folder.glob("*-class*.png")), settings.get("num_images")
    if found.get("complete") is True and num == expected:
        return None
    return f"{folder}: unfinished, {num} of {expected} pictures; expected that `dyndit sample` had come to its end"
