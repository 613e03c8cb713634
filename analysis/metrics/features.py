"""Compute features of picture sets once, and keep them by content.

The key is the pictures' bytes and the extractor's weights; the order and the names of files do not count. Rows are
sorted by the pictures' hashes, so metrics that cut a set into parts do not depend on its listing. Files lie in
`$DYNDIT_CACHE`, else `$XDG_CACHE_HOME/dyndit`, else `~/.cache/dyndit`. A damaged file is computed again.
"""

import hashlib
import logging
import os
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.sets import PictureSet, Statistics
from dyndit.errors import CheckpointError, InputError
from dyndit.files import content_hash, read_safetensors, sweep, write_safetensors
from dyndit.pictures import as_rgb
from dyndit.stats import Moments, moments

LAYOUT = 1  # raise it when the features of the same pictures change
MAIN, SPATIAL = ("features", "logits"), ("spatial",)


def cache_folder() -> Path:
    """Return the folder that features are kept in."""
    if chosen := os.environ.get("DYNDIT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dyndit"


class Measured:
    """An extractor's features of a set: read from the cache, or computed on first use and written there."""

    def __init__(self, given: PictureSet, extractor: Extractor, spatial: bool = False, cache: Path | None = None):
        """spatial: compute the spatial features too. cache: a folder; None keeps nothing."""
        self.given, self.extractor, self.spatial, self.cache = given, extractor, spatial, cache

    @cached_property
    def features(self) -> Tensor:
        """Return the features, (N, D) float64."""
        return self._outputs["features"]

    @cached_property
    def logits(self) -> Tensor:
        """Return the logits, (N, K) float64."""
        return self._outputs["logits"]

    @cached_property
    def num(self) -> int | None:
        """Return the number of pictures; None if the statistics do not say it."""
        statistics = self.statistics
        return len(self._set.source) if statistics is None else statistics.num

    @cached_property
    def statistics(self) -> Statistics | None:
        """Return the given statistics; None if of another extractor. Raises InputError: so, and without pictures."""
        found = self.given.statistics
        if found is None:
            return None
        ours = found.extractor == self.extractor.fingerprint if found.extractor else self.extractor.name == "inception"
        if not ours and self.given.source is None:
            whose = "another extractor's features" if found.extractor else "Inception's features"
            raise InputError(f"{self.given.name}: statistics of {whose}, expected those of {self.extractor.name}")
        return found if ours else None

    def moments(self, name: str = "features") -> Moments:
        """Return the moments of "features" or "spatial". Raises InputError: given statistics lack them."""
        if self.statistics is None:
            return self._kept_moments(name)
        found = self.statistics.features if name == "features" else self.statistics.spatial
        if found is None:
            raise InputError(f"{self.given.name}: holds no mu_s, sigma_s, expected statistics of spatial features too")
        return found

    def as_statistics(self) -> Statistics:
        """Return the moments, which are enough for a reference of Fréchet distances."""
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
        """Return the SHA-256 of each picture, in order. Every picture is read, so a damaged one is found."""
        return [digest for batch in self._set.batches() for digest in _hashes(batch)]

    def check(self) -> None:
        """Read all pictures once if the cache needs their hashes, to find damaged pictures before hours of work."""
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
    """Write tensors to the cache. On a full or read-only disk nothing is kept, and nothing is raised."""
    if path is None:
        return
    small = {k: _smallest(v) for k, v in tensors.items()}
    try:
        sweep(path.parent)
        write_safetensors(path, small, {"hash": content_hash(small)})
    except InputError as error:
        logging.getLogger(__name__).warning("features not kept: %s", error)


def _read(path: Path | None, names: tuple[str, ...]) -> dict[str, Tensor] | None:
    """Read tensors as float64; None if the file is missing or damaged."""
    if path is None:
        return None
    try:
        tensors, metadata = read_safetensors(path)
    except CheckpointError:
        return None
    whole = tensors.keys() == set(names) and metadata.get("hash") == content_hash(tensors)
    return {k: v.double() for k, v in tensors.items()} if whole else None


def _smallest(values: Tensor) -> Tensor:
    """Convert to float32 if no value changes: networks compute in float32."""
    single = values.float()
    return (single if torch.equal(single.double(), values) else values).contiguous()
