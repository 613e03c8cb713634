"""The Fréchet distance against closed forms and torch-fidelity, and extrapolated to infinitely many samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dyndit.analysis.metrics.fidelity import FrechetTo, Moments, distance_at_infinity, frechet_distance, moments
from dyndit.errors import InputError


def features(num: int, dim: int, seed: int, rank: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or dim, dim, generator=g, dtype=torch.float64)
    centre = torch.randn(dim, generator=g, dtype=torch.float64)
    return torch.randn(num, rank or dim, generator=g, dtype=torch.float64) @ mix + centre


def gaussian(mean: Tensor, covariance: Tensor, num: int = 1000) -> Moments:
    """Moments whose unbiased covariance is exactly this one."""
    return Moments.of_covariance(mean, covariance, num)


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


def test_a_negative_variance_counts_against_a_prediction() -> None:
    """Counted as none it would lower the trace: the more impossible, the better."""
    reference = gaussian(torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0]).double()))
    frechet, mean = FrechetTo(reference), torch.zeros(2, dtype=torch.float64)
    variances = [1.0, 0.5, 0.1, 0.0, -0.1, -0.5, -1.0]
    distances = [frechet(mean, torch.diag(torch.tensor([s, 4.0]).double())).item() for s in variances]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0, abs=1e-9)
    assert distances[3] == pytest.approx(1)
    assert distances[-1] == pytest.approx(-1 + 1 + 2)  # s + t + 2 sqrt(t |s|)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("impossible", [False, True])
def test_gradient_is_that_of_finite_differences(seed: int, impossible: bool) -> None:
    frechet = FrechetTo(gaussian(features(1, 5, seed)[0], random_covariance(5, seed)))
    mean, covariance = features(1, 5, seed + 10)[0], random_covariance(5, seed + 20)
    if impossible:
        covariance = covariance - torch.linalg.eigvalsh(covariance)[2] * 1.1 * torch.eye(5, dtype=torch.float64)
        assert torch.linalg.eigvalsh(covariance)[2] < 0
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


NUM_REPEATS = {1_000: 24, 5_000: 8, 20_000: 3}  # of the fits below; larger sets have less noise


@pytest.mark.parametrize("num", NUM_REPEATS)
def test_extrapolation_removes_the_bias_between_equal_gaussians(num: int) -> None:
    covariance = random_covariance(64, seed=1) / 64 + torch.eye(64, dtype=torch.float64)
    reference = gaussian(torch.zeros(64, dtype=torch.float64), covariance)
    root = torch.linalg.cholesky(covariance)
    biases, rests = [], []
    for seed in range(NUM_REPEATS[num]):
        g = torch.Generator().manual_seed(seed)
        f = torch.randn(num, 64, generator=g, dtype=torch.float64) @ root.T
        biases.append(frechet_distance(moments(f), reference))
        rests.append(distance_at_infinity(f, reference))
    assert np.mean(biases) > 0.1 * 1_000 / num  # there was a bias to remove
    assert abs(np.mean(rests)) <= 0.1 * np.mean(biases)


def test_extrapolation_removes_the_bias_of_a_true_distance() -> None:
    """Between Gaussians that differ; the closed form is that of commuting covariances."""
    scale = torch.linspace(0.8, 1.3, 48, dtype=torch.float64)
    reference = gaussian(torch.zeros(48, dtype=torch.float64), torch.eye(48, dtype=torch.float64))
    truth = (scale - 1).square().sum().item() + 0.1
    plain, extrapolated = [], []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        f = torch.randn(1_000, 48, generator=g, dtype=torch.float64) * scale
        f[:, 0] += 0.1**0.5
        plain.append(frechet_distance(moments(f), reference))
        extrapolated.append(distance_at_infinity(f, reference))
    bias = np.mean(plain) - truth
    assert bias > 0.3
    assert abs(np.mean(extrapolated) - truth) <= 0.1 * bias


def test_extrapolation_is_the_line_through_the_five_sizes() -> None:
    """Against np.polyfit, whose weights multiply residuals before they are squared."""
    f, reference = features(203, 5, seed=4), gaussian(torch.zeros(5, dtype=torch.float64), random_covariance(5, 7))
    sizes = [np.array_split(f.numpy(), k) for k in range(1, 6)]
    means = [np.mean([frechet_distance(moments(torch.tensor(p)), reference) for p in parts]) for parts in sizes]
    line = np.polyfit(np.arange(1, 6) / 203, means, 1, w=np.arange(1, 6) ** -0.5)
    assert distance_at_infinity(f, reference) == pytest.approx(line[1], rel=1e-9)


def test_extrapolation_needs_ten_pictures() -> None:
    with pytest.raises(InputError, match="9 pictures, expected at least 10"):
        distance_at_infinity(features(9, 2, seed=0), moments(features(9, 2, seed=1)))
