"""Features of large sets: one batch in memory, killed runs go on, and the same bits as all at once."""

import tracemalloc
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from dyndit.analysis.metrics import features
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet, read_set
from dyndit.pictures.resize import Resize
from support.pictures import noise, save


class Means(Extractor):
    """Eight row means of each picture. Counts the batches that it sees."""

    seen: ClassVar[list[int]] = []

    def outputs(self, pictures: Tensor, batch_size: int = 256, spatial: bool = False) -> dict[str, Tensor]:
        self.seen.append(len(pictures))
        found = pictures.float().mean((1, 3))[:, :8].double()
        return {"features": found, "logits": found[:, :2]}


@pytest.fixture
def extractor() -> Means:
    Means.seen = []
    return Means("means", None, "m" * 64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_set(tmp_path: Path, extractor: Means, save) -> None:
    peaks = []
    for num in (512, 2048):
        array = np.random.default_rng(0).integers(0, 2, (num, 32, 32, 3), dtype=np.uint8)
        save(tmp_path / f"{num}.npz", arr_0=array)
        del array
        tracemalloc.start()
        given = read_set(tmp_path / f"{num}.npz", "")
        assert len(Measured(given, extractor, cache=tmp_path / "kept").features) == num
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    batch = 256 * 32 * 32 * 3
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 6 * batch < 2048 * 32 * 32 * 3


def test_a_killed_run_goes_on_with_the_batches_that_are_left(tmp_path: Path, extractor: Means, monkeypatch) -> None:
    monkeypatch.setattr(features, "LEAST_SECONDS", 0.0)
    pictures = torch.from_numpy(noise(700, 1, 16, 16))
    kept, given = tmp_path / "kept", PictureSet("x", pictures)
    whole = Measured(given, extractor).features
    real, calls = Means.outputs, []

    def until_killed(self, batch: Tensor, *arguments, **options) -> dict[str, Tensor]:
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, batch, *arguments, **options)

    monkeypatch.setattr(Means, "outputs", until_killed)
    with pytest.raises(KeyboardInterrupt):
        Measured(given, extractor, cache=kept).features  # noqa: B018
    monkeypatch.setattr(Means, "outputs", real)
    Means.seen.clear()
    assert torch.equal(Measured(given, extractor, cache=kept).features, whole)
    assert Means.seen == [700 - 512]
    assert not list((kept / "parts").glob("*.safetensors"))
    Means.seen.clear()
    assert torch.equal(Measured(given, extractor, cache=kept).features, whole)
    assert Means.seen == []


def test_sets_of_mixed_sizes_are_cut_to_one(tmp_path: Path, extractor: Means) -> None:
    for i, size in enumerate([(20, 30, 3), (40, 16, 3), (16, 16, 3)]):
        save(tmp_path / f"{i}.png", noise(*size, seed=i))
    found = read_set(tmp_path, "", Resize(16, "adm"))
    assert (found.size, found.account["resize"]) == ((16, 16), "adm 16")
    assert Measured(found, extractor).features.shape == (3, 8)
