"""Statistics of every program: recognised, named, and never compared with another extractor's."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dyndit.analysis import load_extractor
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.quality import evaluate, reference_statistics
from dyndit.analysis.metrics.sets import read_set, save_statistics
from dyndit.analysis.metrics.statistics import Told, read_statistics
from dyndit.errors import InputError

DIMS = 6
MU, SIGMA = np.arange(DIMS, dtype=np.float64), np.eye(DIMS)


def npz(path: Path, **more) -> Path:
    np.savez(path, mu=MU, sigma=SIGMA, **more)
    return path


def pickled(path: Path, data: object) -> Path:
    path.write_bytes(pickle.dumps(data))
    return path


def torch_file(path: Path) -> Path:
    torch.save({"mu": MU, "sigma": SIGMA}, path)
    return path


ADM = {"mu_s": MU[:3], "sigma_s": SIGMA[:3, :3]}
FILES = {
    "ADM": (lambda d: npz(d / "VIRTUAL_imagenet256.npz", **ADM), "ADM", "inception"),
    "pytorch-fid": (lambda d: npz(d / "stats.npz"), "pytorch-fid, EDM, clean-fid or another", ""),
    "clean-fid": (lambda d: npz(d / "cifar10_clean_train_32.npz"), "clean-fid (clean)", "inception-clean-resize"),
    "clean-fid, legacy": (
        lambda d: npz(d / "cifar10_legacy_tensorflow_train_32.npz"), "clean-fid (legacy_tensorflow)", "inception",
    ),
    "EDM .npz": (lambda d: npz(d / "cifar10-32x32.npz"), "EDM", "inception"),
    "EDM .pkl": (lambda d: pickled(d / "img.pkl", {"mu": MU, "sigma": SIGMA}), "EDM", "inception"),
    "EDM2 .pkl": (lambda d: pickled(d / "img512.pkl", {"fid": {"mu": MU, "sigma": SIGMA}}), "EDM", "inception"),
    "torch-fidelity": (
        lambda d: torch_file(d / "cifar10-train-inception-v3-compat-stat-fid-2048.pt"), "torch-fidelity", "inception",
    ),
    "torch-fidelity, VGG": (lambda d: torch_file(d / "x-vgg16-stat-fid-fc2.pt"), "torch-fidelity", "vgg16"),
}  # fmt: skip


def inception(name: str = "inception") -> Extractor:
    return Extractor(name, None, "f" * 64)


@pytest.mark.parametrize("kind", FILES)
def test_every_program_is_recognised_and_named(tmp_path: Path, kind: str) -> None:
    make, program, extractor = FILES[kind]
    path = make(tmp_path)
    found = read_statistics(path)
    assert program in found.program
    assert found.extractor == extractor
    assert f"extractor {extractor or 'unknown'}; pictures unknown; resize unknown; source unknown" in found.provenance
    assert np.array_equal(found.features.mean.numpy(), MU)
    assert np.allclose(found.features.covariance.numpy(), SIGMA)
    measured = Measured(read_set(path, "reference"), inception())
    if extractor in ("inception", ""):
        assert measured.moments() is found.features or np.array_equal(measured.moments().mean.numpy(), MU)
    else:
        with pytest.raises(InputError, match=f"another extractor's features, expected .*; it holds {extractor}'s"):
            measured.moments()
    with pytest.raises(InputError, match="expected those of digits"):
        Measured(read_set(path, "reference"), inception("digits")).moments()


def test_what_the_user_tells_fills_gaps_and_contradicts_nothing(tmp_path: Path) -> None:
    told = Told("inception", "adm 256", 50_000, "ImageNet train")
    found = read_statistics(npz(tmp_path / "stats.npz")).told(told, "stats.npz")
    assert (found.extractor, found.num, found.features.num) == ("inception", 50_000, 50_000)
    assert "extractor inception; pictures 50000; resize adm 256; source ImageNet train" in found.provenance
    clean = read_statistics(npz(tmp_path / "cifar10_clean_train_32.npz"))
    with pytest.raises(InputError, match="--reference-extractor inception: x says inception-clean-resize"):
        clean.told(told, "x")
    counted = read_statistics(npz(tmp_path / "counted.npz", num=100))
    with pytest.raises(InputError, match="--reference-count 50000: x says 100"):
        counted.told(told, "x")


def test_our_own_statistics_say_everything(tmp_path: Path) -> None:
    extractor, generator = load_extractor("digits"), torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (90, 1, 8, 8), dtype=torch.uint8, generator=generator)
    save_statistics(tmp_path / "ref.npz", reference_statistics(real, extractor))
    found = read_statistics(tmp_path / "ref.npz")
    assert (found.program, found.num, found.resize, found.source) == ("dyndit", 90, "none", "reference")
    figures = evaluate(real, tmp_path / "ref.npz", extractor, ["fd"])
    assert figures["reference"] == found.provenance
    with pytest.raises(InputError, match="--reference-resize: reference holds pictures"):
        evaluate(real, real, extractor, ["fd"], told=Told(resize="adm 8"))


class Evil:
    def __reduce__(self):
        return (Path("pwned").touch, ())


@pytest.mark.reliability("Statistics of other programs, damaged or malicious: one line, and nothing in them runs")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: pickled(d / "a.pkl", {"mu": Evil(), "sigma": SIGMA}), "unreadable"),
        (lambda d: pickled(d / "a.pkl", [1, 2]), "holds list, expected statistics"),
        (lambda d: pickled(d / "a.pkl", {"x": 1}), "holds x, expected statistics"),
        (lambda d: pickled(d / "a.pkl", {"mu": "text", "sigma": SIGMA}), "expected"),
        (lambda d: pickled(d / "a.pkl", {"mu": MU, "sigma": np.full((DIMS, DIMS), np.nan)}), "not finite"),
        (lambda d: npz(d / "a.npz", mu_s=np.zeros(2)), "mu_s"),
        (lambda d: d / "none.pkl", "unreadable"),
        (lambda d: (d / "a.pt").write_bytes(b"junk") and d / "a.pt", "unreadable"),
    ],
)
def test_bad_and_malicious_files_are_one_line(tmp_path: Path, monkeypatch, make, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_set(path, "reference")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
