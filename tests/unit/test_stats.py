"""The Fréchet distance against closed forms and torch-fidelity; intervals, and how often they hold the truth."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dyndit.errors import InputError
from dyndit.stats import (
    FrechetTo,
    Interval,
    bootstrap_interval,
    frechet_distance,
    holm,
    median_interval,
    moments,
    non_inferior,
    over_calibrations,
    paired_interval,
    relative_width,
)
from support.gaussians import features, gaussian, random_covariance


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


def test_interval_is_student_t_of_the_differences() -> None:
    a, b = [3.0, 5.0, 4.0, 6.0], [1.0, 2.0, 3.0, 2.0]
    interval = paired_interval(a, b)
    half = 3.182446305 * np.std([2, 3, 1, 4], ddof=1) / 2  # t quantile .975 with 3 degrees of freedom
    assert interval.mean == pytest.approx(2.5)
    assert (interval.low, interval.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))
    assert interval.excludes(0)
    assert not interval.excludes(2)
    assert not interval.excludes(interval.low)  # the limits belong to it
    assert not interval.excludes(interval.high)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [not paired_interval(rng.normal(1, 2, 5)).excludes(1) for _ in range(2000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_pairing_cancels_what_the_seeds_do() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 5, 6)
    full, arm = seeds + rng.normal(0, 0.1, 6), seeds + 0.5 + rng.normal(0, 0.1, 6)
    assert paired_interval(arm, full).excludes(0)
    assert not paired_interval(arm - full.mean()).excludes(0)  # unpaired, the same difference drowns


def test_one_block_has_no_limits_and_proves_nothing() -> None:
    single = paired_interval([1.0])
    assert single.mean == 1
    assert math.isnan(single.low)
    assert not single.excludes(0)
    assert not non_inferior(single, 100, 0.05)
    assert math.isnan(paired_interval([]).mean)


def test_interval_text() -> None:
    assert str(Interval(8.41, 8.19, 8.63)) == "8.41 ± 0.22"
    assert f"{Interval(-0.5, -0.75, -0.25):+.1f}" == "-0.5 ± 0.2"
    assert f"{Interval(1, math.nan, math.nan):.1f}" == "1.0"
    assert str(Interval(math.nan, math.nan, math.nan)) == "–"


def test_unchanged_quality_needs_the_whole_interval() -> None:
    assert non_inferior(Interval(0.2, 0.0, 0.4), reference=10, margin=0.05)
    assert not non_inferior(Interval(0.2, -0.2, 0.6), reference=10, margin=0.05)


def test_median_interval_is_made_of_order_statistics() -> None:
    values = [float(v) for v in range(1, 10)]
    interval = median_interval(values[::-1])
    assert (interval.mean, interval.low, interval.high) == (5, 2, 8)
    interval = median_interval(list(range(1, 61)))
    assert (interval.mean, interval.low, interval.high) == (30.5, 22, 39)
    assert math.isnan(median_interval(values[:5]).low)  # 5 values hold the median in 94% of cases at most
    assert median_interval(values[:6]).low == 1
    assert math.isnan(median_interval([math.nan]).mean)


def test_the_width_is_relative_to_the_middle() -> None:
    for scale in (1e-3, 1.0, -7.0):
        limits = sorted((3 * scale, 5 * scale))
        assert relative_width(Interval(4 * scale, *limits)) == pytest.approx(0.5)
    assert relative_width(Interval(0.0, -1.0, 1.0)) == math.inf
    assert relative_width(Interval(1.0, math.nan, math.nan)) == math.inf


@pytest.mark.parametrize("count", [6, 9, 20, 41])
def test_median_interval_covers_the_median_of_a_skewed_distribution(count: int) -> None:
    """Times are skewed: nothing is faster than the work, much is slower. The distribution's median is log 2."""
    rng = np.random.default_rng(count)
    covered = np.mean([not median_interval(rng.exponential(size=count)).excludes(math.log(2)) for _ in range(1500)])
    assert 0.935 <= covered <= 0.985


@pytest.mark.parametrize("num_blocks", [2, 3, 5, 8, 9])
def test_the_bootstrap_of_a_mean_is_student_s_interval(num_blocks: int) -> None:
    """Exactly where every resample is counted, and nearly where they are drawn."""
    values = np.random.default_rng(0).normal(size=num_blocks)
    found, known = bootstrap_interval(lambda w: w @ values, num_blocks), paired_interval(values)
    close = {"rel": 1e-9} if num_blocks <= 8 else {"rel": 0.03}
    assert found.mean == pytest.approx(known.mean)
    assert found.half == pytest.approx(known.half, **close)


def test_the_bootstrap_covers_a_curved_statistic() -> None:
    """exp of the mean of five normal values: between 88 and 99% of 200 intervals hold the truth."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        values = 0.3 * rng.normal(size=5)
        found = bootstrap_interval(lambda w, v=values: np.exp(w @ v), 5)
        covered += found.low <= 1 <= found.high
    assert 176 <= covered <= 198


def test_limits_beyond_what_was_measured_are_infinite() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = bootstrap_interval(lambda w: np.where(w @ values > 4, np.inf, w @ values), 5)
    assert found.mean == 3
    assert 1 < found.low < 2
    assert found.high == math.inf
    mirrored = bootstrap_interval(lambda w: -np.where(w @ values > 4, np.inf, w @ values), 5)
    assert (mirrored.mean, mirrored.low, mirrored.high) == (-found.mean, -found.high, -found.low)


def test_the_bootstrap_of_one_block_or_of_nothing_has_no_limits() -> None:
    assert math.isnan(bootstrap_interval(lambda w: w @ np.ones(1), 1).low)
    assert math.isnan(bootstrap_interval(lambda w: np.where(w[:, 0] > 0.5, np.nan, 1.0), 3).low)
    same = bootstrap_interval(lambda w: w @ np.full(5, 2.0), 5)
    assert (same.mean, same.low, same.high) == pytest.approx((2, 2, 2))


def rejected_step_by_step(p_values: list[float], alpha: float) -> set[int]:
    """Holm's procedure as he states it: reject the least p while it is at most α / (number of those left)."""
    left, rejected = dict(enumerate(p_values)), set()
    while left:
        least = min(left, key=lambda i: left[i])
        if left[least] * len(left) > alpha:
            break
        rejected.add(least)
        del left[least]
    return rejected


def closed_test(p_values: list[float], alpha: float) -> set[int]:
    """Reject i if Bonferroni rejects every set of hypotheses with i in it: the closure of Bonferroni is Holm."""
    every = [[i for i in range(len(p_values)) if mask >> i & 1] for mask in range(1, 2 ** len(p_values))]
    kept = {i for some in every if min(p_values[i] for i in some) * len(some) > alpha for i in some}
    return set(range(len(p_values))) - kept


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=7), alpha=st.floats(0.001, 0.5))
def test_holm_rejects_what_its_definition_rejects(p: list[float], alpha: float) -> None:
    corrected = holm({str(i): value for i, value in enumerate(p)})
    rejected = {int(name) for name, value in corrected.items() if value <= alpha}
    assert rejected == rejected_step_by_step(p, alpha) == closed_test(p, alpha)


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=9), data=st.data())
def test_holm_corrects_upwards_in_order_and_whatever_the_order_of_names(p: list[float], data) -> None:
    values = {str(i): value for i, value in enumerate(p)}
    corrected = holm(values)
    assert list(corrected) == list(values)
    assert all(values[name] <= corrected[name] <= 1 for name in values)
    assert all(corrected[name] <= min(1.0, len(p) * values[name]) for name in values)  # never past Bonferroni's
    for one in values:
        assert all(corrected[one] <= corrected[other] for other in values if values[one] <= values[other])
    shuffled = data.draw(st.permutations(list(values)))
    assert holm({name: values[name] for name in shuffled}) == corrected


def test_holm_by_hand_and_with_a_comparison_that_is_missing() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    with_gap = holm({"a": 0.01, "b": math.nan, "c": 0.03})
    assert with_gap["a"] == pytest.approx(0.03)
    assert with_gap["c"] == pytest.approx(0.06)
    assert math.isnan(with_gap["b"])
    assert holm({}) == {}
    with pytest.raises(InputError, match="p value of b"):
        holm({"a": 0.1, "b": 1.5})


@given(
    a=st.lists(st.floats(-50, 50), min_size=2, max_size=8),
    shift=st.floats(-5, 5),
    seed=st.integers(0, 1000),
)
def test_the_interval_over_calibrations_is_students(a: list[float], shift: float, seed: int) -> None:
    b = [x + shift + float(noise) for x, noise in zip(a, np.random.default_rng(seed).normal(size=len(a)), strict=True)]
    found, p = over_calibrations(dict(enumerate(a)), dict(enumerate(b)))
    expected = scipy.stats.ttest_rel(a, b)
    limits = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high), abs=1e-9)
    assert p == pytest.approx(expected.pvalue, abs=1e-9)
    assert found.excludes(0) == (p < 0.05)


def test_calibrations_are_paired_by_number_and_need_two() -> None:
    a, b = {0: 5.0, 1: 6.0, 2: 9.0}, {2: 8.5, 1: 5.0, 7: 1.0}
    found, p = over_calibrations(a, b)
    assert found.mean == pytest.approx(0.75)  # of calibrations 1 and 2
    assert 0 < p < 1
    assert over_calibrations(a | {3: math.nan}, b | {3: 4.0}) == (found, p)
    alone, undecided = over_calibrations({0: 5.0}, {0: 4.0})
    assert alone.mean == 1
    assert math.isnan(alone.low)
    assert math.isnan(undecided)
    assert over_calibrations({0: 2.0, 1: 2.0})[1] == 0
    assert over_calibrations({0: 2.0, 1: 3.0})[0].mean == 2.5
    assert over_calibrations({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0})[1] == 1
