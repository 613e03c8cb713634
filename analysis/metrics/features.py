"""Compute features of picture sets once, and keep them by content.

The key is the pictures' bytes and the extractor's weights; the order and the names of files do not count. Rows are
sorted by the pictures' hashes, so metrics that cut a set into parts do not depend on its listing. Files lie in
`$DYNDIT_CACHE`, else `$XDG_CACHE_HOME/dyndit`, else `~/.cache/dyndit`. A damaged file is computed again.

One batch of pictures is in memory at a time. The features of a slow batch are kept at once, so a killed run goes on.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dyndit import seals
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.manifold import radii
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.analysis.metrics.statistics import INCEPTION, Statistics
from dyndit.errors import CheckpointError, InputError
from dyndit.files import read_safetensors, sweep, write_safetensors
from dyndit.pictures import as_rgb
from dyndit.progress import progress_bar
from dyndit.stats import Moments, moments

LAYOUT = 1  # raise it when the features of the same pictures change
MAIN, SPATIAL = ("features", "logits"), ("spatial",)
PARTS = "parts"  # folder of the features of single batches, until their set is done
LEAST_SECONDS = 0.5  # time of a batch that is worth a file


class Measured:
    """An extractor's features of a set: read from the cache, or computed on first use and written there."""

    def __init__(self, given: PictureSet, extractor: Extractor, spatial: bool = False, cache: Path | None = None):
        """spatial: compute the spatial features too. cache: a folder; None keeps nothing."""
        self.given, self.extractor, self.spatial, self.cache = given, extractor, spatial, cache
        self._radii: dict[int, Tensor] = {}

    @cached_property
    def features(self) -> Tensor:
        """Return the features, (N, D) float64."""
        return self._outputs["features"]

    @cached_property
    def logits(self) -> Tensor:
        """Return the logits, (N, K) float64."""
        return self._outputs["logits"]

    def members(self, num: int = 0) -> tuple[Tensor, Tensor]:
        """Return features and radii of the balls of `num` pictures, (num, D) and (num,): see `manifold`.

        num: the first ones by their hashes, which is a random choice; 0, or more than there are: all.
        """
        features = self.features[: num or None]
        if len(features) not in self._radii:
            self._radii[len(features)] = radii(features)
        return features, self._radii[len(features)]

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
        # Statistics that do not say their extractor are taken for Inception's; the row then calls it unknown.
        named = found.extractor or INCEPTION
        ours = named in (self.extractor.fingerprint, self.extractor.name)
        if not ours and self.given.source is None:
            whose = "Inception's features" if named == INCEPTION else "another extractor's features"
            which = "" if len(named) == 64 or named == INCEPTION else f"; it holds {named}'s"
            expected = f"expected those of {self.extractor.name}{which}"
            raise InputError(f"{self.given.name}: statistics of {whose}, {expected}")
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
        resize = str(self.given.account.get("resize") or "none")
        return Statistics(
            self.moments(), spatial, self.num, self.extractor.fingerprint, "dyndit", resize, self.given.name
        )

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
        return [digest for batch in self._tracked("reading pictures") for digest in _hashes(batch)]

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
        parts, hashes, files = [], [], []
        for batch in self._tracked(f"features by {self.extractor.name}"):
            mine = _hashes(batch)
            part, file = self._part(batch, mine)
            parts.append(part)
            files.append(file)
            hashes += mine
        order = sorted(range(len(hashes)), key=hashes.__getitem__)
        outputs = {k: torch.cat([part.pop(k) for part in parts])[order].double() for k in tuple(parts[0])}
        for name, names in wanted.items():
            _write(self._file(name), {k: outputs[k] for k in names})
        for file in filter(None, files):
            with suppress(OSError):
                file.unlink()
        return outputs

    def _part(self, batch: Tensor, hashes: list[bytes]) -> tuple[dict[str, Tensor], Path | None]:
        """Return the features of one batch, in the least precision that keeps them, and the file that keeps them."""
        file = None
        if self.cache is not None:
            facts = f"{LAYOUT} {self.extractor.name} {self.extractor.fingerprint} {self._set.size} {self.spatial}"
            key = hashlib.sha256(facts.encode() + b"".join(hashes)).hexdigest()[:32]
            file = self.cache / PARTS / f"{key}.safetensors"
            if (kept := _read(file, MAIN + SPATIAL * self.spatial)) is not None:
                return {k: _smallest(v) for k, v in kept.items()}, file
        began = time.perf_counter()
        found = {k: _smallest(v) for k, v in self.extractor.outputs(batch, spatial=self.spatial).items()}
        if time.perf_counter() - began >= LEAST_SECONDS:
            _write(file, found)
        return found, file

    def _tracked(self, title: str) -> Iterator[Tensor]:
        """Yield the batches of the set, and show how many pictures are done."""
        done, total = 0, len(self._set.source)
        with progress_bar(title, unit="pictures") as advance:
            advance(0, total)
            for batch in self._set.batches():
                yield batch
                done += len(batch)
                advance(done, total)


def _hashes(batch: Tensor) -> list[bytes]:
    return [hashlib.sha256(p.contiguous().numpy().tobytes()).digest() for p in as_rgb(batch)]


def _write(path: Path | None, tensors: dict[str, Tensor]) -> None:
    """Write tensors to the cache. On a full or read-only disk nothing is kept, and nothing is raised."""
    if path is None:
        return
    small = {k: _smallest(v) for k, v in tensors.items()}
    try:
        sweep(path.parent)
        write_safetensors(path, small, {seals.SEAL: seals.tensors_checksum(small, {})})
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
    whole = tensors.keys() == set(names) and metadata.get(seals.SEAL) == seals.tensors_checksum(tensors, metadata)
    return {k: v.double() for k, v in tensors.items()} if whole else None


def _smallest(values: Tensor) -> Tensor:
    """Convert to float32 if no value changes: networks compute in float32."""
    single = values.float()
    return (single if torch.equal(single.double(), values) else values).contiguous()
