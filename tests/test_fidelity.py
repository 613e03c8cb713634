"""Quality: the Fréchet distance against closed forms and torch-fidelity, picture reading, evaluate."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dyndit.analysis.extractors import load_extractor
from dyndit.analysis.fidelity import FrechetTo, Moments, evaluate, frechet_distance, moments, read_pictures
from dyndit.errors import InputError


def features(num: int, dim: int, seed: int, rank: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or dim, dim, generator=g, dtype=torch.float64)
    centre = torch.randn(dim, generator=g, dtype=torch.float64)
    return torch.randn(num, rank or dim, generator=g, dtype=torch.float64) @ mix + centre


def gaussian(mean: Tensor, covariance: Tensor, num: int = 1000) -> Moments:
    """Moments whose unbiased covariance is exactly this one."""
    return Moments(mean, covariance * (num - 1) / num + torch.outer(mean, mean), num)


def random_covariance(dim: int, seed: int) -> Tensor:
    f = features(dim + 2, dim, seed)
    return f.T @ f / dim


def torch_fidelity_fd(a: Tensor, b: Tensor) -> float:
    stats = [fid_features_to_statistics(x) for x in (a, b)]
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def test_covariance_is_that_of_numpy() -> None:
    f = features(50, 6, seed=1)
    assert np.allclose(moments(f).covariance, np.cov(f.numpy(), rowvar=False))


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(2, 24), seed=st.integers(0, 10_000))
def test_agrees_with_torch_fidelity(dim: int, seed: int) -> None:
    a, b = features(4 * dim + 8, dim, seed), features(4 * dim + 3, dim, seed + 1)
    ours = frechet_distance(moments(a), moments(b))
    assert ours == pytest.approx(torch_fidelity_fd(a, b), rel=1e-5)
    assert FrechetTo(moments(b))(moments(a).mean, moments(a).covariance).item() == pytest.approx(ours, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(1, 16), seed=st.integers(0, 10_000))
def test_is_a_distance(dim: int, seed: int) -> None:
    a, b = (moments(features(3 * dim + 5, dim, seed + k)) for k in (0, 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0
    assert abs(frechet_distance(a, a)) <= 1e-6 * a.covariance.trace()


@pytest.mark.parametrize("rank", [5, 20, 64])
def test_distance_to_itself_is_zero_at_any_rank(rank: int) -> None:
    a = moments(features(200, 64, seed=3, rank=rank))
    assert torch.linalg.matrix_rank(a.covariance) == rank
    assert abs(frechet_distance(a, a)) <= 1e-6 * a.covariance.trace()
    assert abs(FrechetTo(a)(a.mean, a.covariance)) <= 1e-6 * a.covariance.trace()


def test_closed_form_of_commuting_gaussians() -> None:
    """Covariances Q diag(s) Qᵀ and Q diag(t) Qᵀ: FD = |Δm|² + Σ (√s - √t)²."""
    q = torch.linalg.qr(features(8, 8, seed=2)).Q
    s, t = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m, n = features(2, 8, seed=5)
    expected = (m - n).square().sum() + (s.sqrt() - t.sqrt()).square().sum()
    a, b = gaussian(m, q * s @ q.T), gaussian(n, q * t @ q.T)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_rank_deficient_against_full_rank() -> None:
    a, b = features(300, 16, seed=1, rank=4), features(300, 16, seed=2)
    expected = torch_fidelity_fd(a, b)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-5)
    assert FrechetTo(moments(b))(moments(a).mean, moments(a).covariance) == pytest.approx(expected, rel=1e-5)
    assert FrechetTo(moments(a))(moments(b).mean, moments(b).covariance) == pytest.approx(expected, rel=1e-5)


def test_batched_evaluation_is_the_single_one() -> None:
    reference = moments(features(100, 7, seed=0))
    others = [moments(features(60, 7, seed=k)) for k in range(1, 7)]
    means = torch.stack([m.mean for m in others]).view(2, 3, 7)
    covariances = torch.stack([m.covariance for m in others]).view(2, 3, 7, 7)
    batch = FrechetTo(reference)(means, covariances)
    assert batch.shape == (2, 3)
    assert batch.flatten().tolist() == pytest.approx([frechet_distance(m, reference) for m in others])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_is_that_of_finite_differences(seed: int) -> None:
    frechet = FrechetTo(gaussian(features(1, 5, seed)[0], random_covariance(5, seed)))
    mean, covariance = features(1, 5, seed + 10)[0], random_covariance(5, seed + 20)
    by_mean, by_covariance = frechet.gradient(mean, covariance)
    step = features(1, 5, seed + 30)[0]
    side = features(5, 5, seed + 40)
    bend = (side + side.T) / 2
    h = 1e-5
    along = (frechet(mean + h * step, covariance) - frechet(mean - h * step, covariance)) / (2 * h)
    assert along.item() == pytest.approx((by_mean @ step).item(), rel=1e-5)
    along = (frechet(mean, covariance + h * bend) - frechet(mean, covariance - h * bend)) / (2 * h)
    assert along.item() == pytest.approx((by_covariance * bend).sum().item(), rel=1e-5)


def test_gradient_is_finite_without_full_rank() -> None:
    reference = moments(features(50, 8, seed=0, rank=3))
    other = moments(features(50, 8, seed=1))
    slopes = FrechetTo(reference).gradient(other.mean, other.covariance)
    assert all(slope.isfinite().all() for slope in slopes)


def save_pictures(folder: Path, num: int = 3, size: int = 8, mode: str = "RGB") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    array = np.random.default_rng(0).integers(0, 256, (num, size, size, *channels), dtype=np.uint8)
    for k, picture in enumerate(array):
        Image.fromarray(picture).save(folder / f"{k:03d}.png")
    return array


def test_folder_is_read_in_depth_and_in_order(tmp_path: Path) -> None:
    array = save_pictures(tmp_path / "a")
    save_pictures(tmp_path / "b" / "c")
    save_pictures(tmp_path, num=1)
    Image.new("RGB", (40, 40)).save(tmp_path / "grid.png")  # the overview that `dyndit sample` writes
    found = read_pictures(tmp_path)
    assert found.shape == (7, 3, 8, 8)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[1:4].permute(0, 2, 3, 1), array)


def test_grey_folder_has_one_channel(tmp_path: Path) -> None:
    array = save_pictures(tmp_path, mode="L")
    assert np.array_equal(read_pictures(tmp_path), array[:, None])


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_npz_of_either_key(tmp_path: Path, key: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", **{key: array, "labels": np.arange(5)})
    assert np.array_equal(read_pictures(tmp_path / "set.npz"), array.transpose(0, 3, 1, 2))


def damaged(path: Path) -> None:
    save_pictures(path)
    file = path / "001.png"
    file.write_bytes(file.read_bytes()[:60])


def mixed(path: Path) -> None:
    save_pictures(path)
    save_pictures(path / "z", size=9)


def deep(path: Path) -> None:
    path.mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path / "0.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "no picture found"),
        (damaged, r"001\.png: unreadable"),
        (mixed, "9x9 pixels, expected 8x8"),
        (deep, "expected 8 bits a channel"),
        (lambda path: save_pictures(path, mode="RGBA"), "transparent pixels"),
    ],
)
def test_bad_folders_are_named_in_one_line(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(InputError, match=message) as caught:
        read_pictures(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_bad_npz_are_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    for arrays, message in (
        ({"x": np.zeros(3)}, "holds x, expected an array 'arr_0'"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, r"float64 \(2, 8, 8, 3\), expected uint8"),
        ({"arr_0": np.array([{}])}, "unreadable"),  # a pickle, never opened
    ):
        np.savez(file, **arrays)
        with pytest.raises(InputError, match=message):
            read_pictures(file)
    file.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match="unreadable"):
        read_pictures(file)
    with pytest.raises(InputError, match="unreadable"):
        read_pictures(tmp_path / "missing.npz")


def digits(num: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, 8, 8), generator=g, dtype=torch.uint8)


def test_evaluate_gives_every_metric() -> None:
    extractor = load_extractor("digits")
    same = evaluate(digits(90, 0), digits(90, 0), extractor)
    other = evaluate(digits(90, 0), digits(80, 1) // 2, extractor)
    keys = {"metric", "extractor", "num_samples", "num_reference", "fd", "kid", "is", "precision", "recall"}
    assert same.keys() == other.keys() == keys
    assert other["metric"] == "FD-digits"
    assert (other["num_samples"], other["num_reference"]) == (90, 80)
    assert same["fd"] == pytest.approx(0, abs=1e-6)
    assert other["fd"] > 1
    assert other["kid"] > same["kid"]
    assert (same["precision"], same["recall"]) == (1, 1)
    assert other["precision"] < 1


def test_evaluate_reads_folders_and_npz(tmp_path: Path) -> None:
    array = save_pictures(tmp_path / "set", num=70)
    np.savez(tmp_path / "set.npz", array)
    result = evaluate(tmp_path / "set", tmp_path / "set.npz", load_extractor("digits"), ["fd"])
    assert result["fd"] == pytest.approx(0, abs=1e-6)
    assert "kid" not in result


def test_evaluate_refuses_too_few_pictures_unless_forced() -> None:
    extractor = load_extractor("digits")
    with pytest.raises(InputError, match="samples: 64 pictures, expected more than the 64 features"):
        evaluate(digits(64, 0), digits(90, 1), extractor, ["fd"])
    forced = evaluate(digits(64, 0), digits(90, 1), extractor, ["fd"], force=True)
    assert forced["few_samples"] is True
    assert "few_samples" not in evaluate(digits(65, 0), digits(90, 1), extractor, ["fd"])


def test_evaluate_names_bad_arguments() -> None:
    extractor = load_extractor("digits")
    with pytest.raises(InputError, match="--metrics: 'sfid', expected some of fd, kid, is, prc"):
        evaluate(digits(70, 0), digits(70, 1), extractor, ["sfid"])
    with pytest.raises(InputError, match="samples: 9x9 pixels, expected 8x8 as in the reference"):
        evaluate(torch.zeros(70, 1, 9, 9, dtype=torch.uint8), digits(70, 1), extractor)
    with pytest.raises(InputError, match="--metrics prc: 3 pictures"):
        evaluate(digits(3, 0), digits(70, 1), extractor, ["prc"])
