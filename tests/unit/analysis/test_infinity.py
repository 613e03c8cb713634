"""The Fréchet distance extrapolated to infinitely many samples."""

import numpy as np
import pytest
import torch

from dyndit.analysis.metrics.infinity import distance_at_infinity
from dyndit.errors import InputError
from dyndit.stats import frechet_distance, moments
from support.gaussians import features, gaussian, random_covariance

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
