"""The result of a sampling: pictures to look at, to save, and to put beside others of the same seeds."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dyndit import manifest
from dyndit.errors import InputError
from dyndit.locks import locked
from dyndit.models.conditions import Value
from dyndit.pictures import as_image, grid
from dyndit.pictures.rows import COLUMNS, in_rows
from dyndit.plans.plan import DepthPlan
from dyndit.sampling.store import NUM_IN_GRID, Store

ALIKE = ("model", "labels", "num_images", "seed", "first_index")
"""Settings in which sets agree that stand side by side."""


@dataclass(frozen=True, repr=False)
class Samples:
    """Result of a sampling. A notebook shows its first pictures.

    pictures: (N, C, ...) uint8 of a pixel-space model; other models give `latents` for a decoder. labels: the class or
    the caption of each picture.
    batch_seconds: wall time from noise to uint8, per batch. step_seconds, network_seconds: per step, summed over
    batches, if `stats` is set. run: the settings that make the pictures, and facts: of the plan, both for a manifest.
    """

    pictures: Tensor
    latents: Tensor | None
    labels: tuple[Value, ...]
    plan: DepthPlan
    seed: int
    batch_seconds: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    network_seconds: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def seconds(self) -> float:
        """Return the wall time of all batches."""
        return sum(self.batch_seconds)

    @property
    def images(self) -> list[Image.Image]:
        """Return the pictures for Pillow. The frames of a clip stand side by side."""
        return list(map(as_image, self._pictures))

    def grid(self, columns: int = COLUMNS) -> Image.Image:
        """Tile the pictures row by row."""
        return grid(self._pictures, columns)

    def save(self, out: str | Path) -> Path:
        """Write a folder as `dyndit sample` does: PNG files, a grid, ADM's archive and a manifest -> the folder.

        out: a new or empty folder, or one of the same pictures.

        Raises:
            InputError: `out` holds another run or other files, or the samples are latents.
        """
        pictures, num = self._pictures, len(self.labels)
        store = Store(Path(out), self.labels, int(self.run.get("first_index", 0)))
        times = {
            "machine": manifest.machine(self.device),
            "seconds": self.seconds,
            "ms_per_picture": 1e3 * self.seconds / num,
        }
        network = 1e3 * sum(self.network_seconds) / num if self.network_seconds else None
        times |= {"ms_denoiser": network, "step_seconds": list(self.step_seconds) or None}
        with locked(store.folder):
            found = manifest.claim(store.folder, self.run, complete=False, plan=self.facts)
            if found is None or found.get("complete") is not True:
                store.add(store.numbers, pictures)
                store.finish(self.run, {"plan": self.facts} | times)
        return store.folder

    def beside(self, other: "Samples", columns: int = COLUMNS) -> Image.Image:
        """Put these pictures and others of the same seeds side by side: a row of these, the same of `other` below it.

        Example: `full.beside(dynamic).save("same-seeds.png")`.

        Raises:
            InputError: another model, other labels, or other seeds.
        """
        for name in ALIKE:
            if self.run.get(name) != other.run.get(name):
                raise InputError(f"samples: {name} {other.run.get(name)!s:.60}, expected {self.run.get(name)!s:.60}")
        names = [self.plan.short, other.plan.short]
        names = names if names[0] != names[1] else [f"{name} ({k})" for k, name in enumerate(names, 1)]
        return in_rows(dict(zip(names, (self._pictures, other._pictures), strict=True)), columns)

    @property
    def _pictures(self) -> Tensor:
        if not len(self.pictures):
            raise InputError("samples: latents; expected pictures, as `sample(..., to_pictures=decoder)` makes them")
        return self.pictures

    def __repr__(self) -> str:
        """Say what was drawn, in a line."""
        shown = self.pictures if self.latents is None or len(self.pictures) else self.latents
        kind, shape = "pictures" if len(self.pictures) else "latents", "x".join(map(str, shown.shape[1:]))
        return f"Samples({len(self.labels)} {kind} {shape}, {self.plan.short}, seed {self.seed}, {self.seconds:.2f} s)"

    def _repr_png_(self) -> bytes | None:
        """Show the first pictures in a notebook."""
        if not len(self.pictures):
            return None
        written = io.BytesIO()
        grid(self.pictures[:NUM_IN_GRID]).save(written, "PNG")
        return written.getvalue()
