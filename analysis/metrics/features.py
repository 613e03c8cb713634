"""Features of picture sets, computed once and kept by content.

A set is named by its pictures' bytes, whatever their order or their files' names, and an extractor by its weights.
Rows come in the order of the pictures' hashes: an order that says nothing, and the same for the same pictures, so
metrics that cut a set into parts do not depend on how it was listed. Files lie in `$DYNDIT_CACHE`, else
`$XDG_CACHE_HOME/dyndit`, else `~/.cache/dyndit`; a damaged one is computed again.
"""

import hashlib
import logging
import os
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.sets import PictureSet, Statistics
from dyndit.errors import InputError
from dyndit.files import sweep, write_safetensors
from dyndit.pictures import as_rgb
from dyndit.stats import Moments, moments

LAYOUT = 1  # raise it when what is computed from pictures changes
MAIN, SPATIAL = ("features", "logits"), ("spatial",)


def cache_folder() -> Path:
    """Where features are kept."""
    if chosen := os.environ.get("DYNDIT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dyndit"


class Measured:
    """What an extractor makes of a set: read from the cache, or computed on first use and written there."""

    def __init__(self, given: PictureSet, extractor: Extractor, spatial: bool = False, cache: Path | None = None):
        """spatial: compute the spatial features along with the others. cache: a folder, or None for none."""
        self.given, self.extractor, self.spatial, self.cache = given, extractor, spatial, cache

    @cached_property
    def features(self) -> Tensor:
        """(N, D) float64."""
        return self._outputs["features"]

    @cached_property
    def logits(self) -> Tensor:
        """(N, K) float64."""
        return self._outputs["logits"]

    @cached_property
    def num(self) -> int | None:
        """How many pictures; None for statistics that do not say."""
        statistics = self.statistics
        return len(self._set.source) if statistics is None else statistics.num

    @cached_property
    def statistics(self) -> Statistics | None:
        """The statistics that came in place of pictures, where they are this extractor's.

        Raises InputError: there are others, and no pictures.
        """
        found = self.given.statistics
        if found is None:
            return None
        ours = found.extractor == self.extractor.fingerprint if found.extractor else self.extractor.name == "inception"
        if not ours and self.given.source is None:
            whose = "another extractor's features" if found.extractor else "Inception's features"
            raise InputError(f"{self.given.name}: statistics of {whose}, expected those of {self.extractor.name}")
        return found if ours else None

    def moments(self, name: str = "features") -> Moments:
        """Moments of "features" or "spatial", given or computed. Raises InputError: the given ones lack them."""
        if self.statistics is None:
            return self._kept_moments(name)
        found = self.statistics.features if name == "features" else self.statistics.spatial
        if found is None:
            raise InputError(f"{self.given.name}: holds no mu_s, sigma_s, expected statistics of spatial features too")
        return found

    def as_statistics(self) -> Statistics:
        """Everything a reference is needed for later, where only distances of moments are asked."""
        spatial = self.moments("spatial") if self.spatial else None
        return Statistics(self.moments(), spatial, self.num, self.extractor.fingerprint)

    def _kept_moments(self, name: str) -> Moments:
        path = self._file(f"{name}-moments")
        kept = _read(path, ("mean", "second"))
        if kept is None:
            made = moments(self._outputs[name])
            _write(path, {"mean": made.mean, "second": made.second})
            return made
        return Moments(kept["mean"], kept["second"], self.num)

    @property
    def _set(self) -> PictureSet:
        if self.given.source is None:
            raise InputError(f"{self.given.name}: holds statistics, expected pictures for this metric")
        return self.given

    @cached_property
    def hashes(self) -> list[bytes]:
        """SHA-256 of each picture, in order. Reads them all, and so finds what cannot be read."""
        return [digest for batch in self._set.batches() for digest in _hashes(batch)]

    def check(self) -> None:
        """Read all pictures once where the cache asks for their hashes: nothing is refused after hours of work."""
        if self.cache is not None and self.given.source is not None and self.statistics is None:
            self.hashes  # noqa: B018

    def _file(self, name: str) -> Path | None:
        if self.cache is None:
            return None
        facts = f"{LAYOUT} {self.extractor.name} {self.extractor.fingerprint} {self._set.size}"
        key = hashlib.sha256(facts.encode() + b"".join(sorted(self.hashes))).hexdigest()[:32]
        return self.cache / f"{key}-{name}.safetensors"

    @cached_property
    def _outputs(self) -> dict[str, Tensor]:
        wanted = {"outputs": MAIN} | ({"spatial": SPATIAL} if self.spatial else {})
        kept = [_read(self._file(name), names) for name, names in wanted.items()]
        if all(part is not None for part in kept):
            return {k: v for part in kept for k, v in part.items()}
        parts, hashes = [], []
        for batch in self._set.batches():
            hashes += _hashes(batch)
            parts.append(self.extractor.outputs(batch, spatial=self.spatial))
        order = sorted(range(len(hashes)), key=hashes.__getitem__)
        outputs = {k: torch.cat([part[k] for part in parts])[order] for k in parts[0]}
        for name, names in wanted.items():
            _write(self._file(name), {k: outputs[k] for k in names})
        return outputs


def _hashes(batch: Tensor) -> list[bytes]:
    return [hashlib.sha256(p.contiguous().numpy().tobytes()).digest() for p in as_rgb(batch)]


def _write(path: Path | None, tensors: dict[str, Tensor]) -> None:
    """Keep tensors. A full or read-only disk costs the cache, not the result."""
    if path is None:
        return
    small = {k: _smallest(v) for k, v in tensors.items()}
    try:
        sweep(path.parent)
        write_safetensors(path, small, {"hash": _hash(small)})
    except InputError as error:
        logging.getLogger(__name__).warning("features not kept: %s", error)


def _read(path: Path | None, names: tuple[str, ...]) -> dict[str, Tensor] | None:
    """Tensors as float64, or None where there is no such file or a damaged one."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            whole = file.metadata()["hash"] == _hash(tensors)
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return {k: v.double() for k, v in tensors.items()} if whole else None


def _smallest(values: Tensor) -> Tensor:
    """float32 where nothing is lost: networks compute in it."""
    single = values.float()
    return (single if torch.equal(single.double(), values) else values).contiguous()


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
