"""The cache: pictures are measured once, found again by content, and a damaged file is computed anew."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor, load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.errors import InputError
from dyndit.pictures.check import cache_folder
from dyndit.stats import moments


class Counting(torch.nn.Module):
    """A network that counts the pictures it sees."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.count = network, 0

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        self.count += len(pictures)
        return self.network(pictures)


@pytest.fixture
def extractor() -> Extractor:
    digits = load_extractor("digits")
    return replace(digits, network=Counting(digits.network), spatial_layer=f"network.{digits.spatial_layer}")


def digits(num: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, 8, 8), generator=g, dtype=torch.uint8)


def measure(pictures: Tensor, extractor: Extractor, cache: Path | None, spatial: bool = False) -> Measured:
    return Measured(PictureSet("samples", pictures), extractor, spatial, cache)


def test_a_set_is_measured_once(extractor: Extractor, tmp_path: Path) -> None:
    x = digits(12)
    first = measure(x, extractor, tmp_path)
    assert torch.equal(first.features, first.features)
    assert first.logits.shape == (12, 10)
    assert extractor.network.count == 12
    second = measure(x.repeat(1, 3, 1, 1), extractor, tmp_path)  # grey counts as repeated colour
    assert torch.equal(second.features, first.features)
    assert torch.equal(second.logits, first.logits)
    assert extractor.network.count == 12
    assert torch.equal(first.features.sort(0).values, load_extractor("digits").features(x).sort(0).values)


def test_order_and_batches_do_not_matter(extractor: Extractor, tmp_path: Path) -> None:
    x = digits(30)
    mixed = x[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert torch.allclose(measure(x, extractor, None).features, measure(mixed, extractor, None).features, atol=1e-5)
    kept = measure(x, extractor, tmp_path).features
    assert torch.equal(measure(mixed, extractor, tmp_path).features, kept)
    assert extractor.network.count == 3 * 30


@pytest.mark.parametrize("change", ["pictures", "weights", "number"])
def test_anything_else_is_measured_anew(extractor: Extractor, tmp_path: Path, change: str) -> None:
    x = digits(12)
    measure(x, extractor, tmp_path).features  # noqa: B018
    if change == "pictures":
        x[5, 0, 3, 3] ^= 1
    elif change == "number":
        x = x[:11]
    other = replace(extractor, fingerprint="another") if change == "weights" else extractor
    measure(x, other, tmp_path).features  # noqa: B018
    assert extractor.network.count == 12 + len(x)


def test_spatial_features_come_along(extractor: Extractor, tmp_path: Path) -> None:
    x = digits(12)
    for _ in range(2):
        found = measure(x, extractor, tmp_path, spatial=True)
        assert found.moments("spatial").mean.shape == (112,)
        assert found.features.shape == (12, 64)
    assert extractor.network.count == 12


def test_a_reference_needs_its_moments_only(extractor: Extractor, tmp_path: Path) -> None:
    x = digits(90)
    first = measure(x, extractor, tmp_path).moments()
    for file in tmp_path.glob("*-outputs.safetensors"):
        file.unlink()
    again = measure(x, extractor, tmp_path).moments()
    assert extractor.network.count == 90
    assert torch.equal(first.second, again.second)
    assert again.num == 90
    expected = moments(load_extractor("digits").features(x))
    assert torch.allclose(again.covariance, expected.covariance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_computed_again(extractor: Extractor, tmp_path: Path, damage: str) -> None:
    x = digits(12)
    whole = measure(x, extractor, tmp_path).features
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-9] ^= 0x40
    file.write_bytes(content if damage == "flipped" else content[:200])
    assert torch.equal(measure(x, extractor, tmp_path).features, whole)
    assert extractor.network.count == 24
    assert torch.equal(measure(x, extractor, tmp_path).features, whole)
    assert extractor.network.count == 24


def test_a_cache_that_cannot_be_written_costs_no_result(extractor: Extractor, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    assert measure(digits(12), extractor, tmp_path / "file").features.shape == (12, 64)
    assert "not kept" in caplog.text


def test_statistics_are_asked_for_pictures(extractor: Extractor) -> None:
    statistics = measure(digits(90), extractor, None, spatial=True).as_statistics()
    given = Measured(PictureSet("reference.npz", None, statistics), extractor)
    assert given.num == 90
    assert given.moments("spatial").mean.shape == (112,)
    with pytest.raises(InputError, match=r"reference\.npz: holds statistics, expected pictures"):
        given.features  # noqa: B018
    with pytest.raises(InputError, match="another extractor's features, expected those of digits"):
        Measured(PictureSet("reference.npz", None, replace(statistics, extractor="x")), extractor).moments()
    with pytest.raises(InputError, match="Inception's features, expected those of digits"):
        Measured(PictureSet("adm.npz", None, replace(statistics, extractor="")), extractor).moments()
    with pytest.raises(InputError, match="no mu_s"):
        Measured(PictureSet("reference.npz", None, replace(statistics, spatial=None)), extractor).moments("spatial")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNDIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DYNDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "all"))
    assert cache_folder() == tmp_path / "all" / "dyndit"
