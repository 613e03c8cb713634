"""KID: the estimate against its closed form and torch-fidelity, and how often its interval holds the true value."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from dyndit.analysis.metrics.kid import kernel_distance, mmd2
from dyndit.errors import InputError
from dyndit.recipes.studies import kid_coverage
from dyndit.recipes.studies.kid_coverage import CASES, Case, Gaussian, coverage, expected_kernel, pair, true_distance


def features(num: int, dim: int, seed: int) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(num=st.integers(2, 30), dim=st.integers(1, 12), seed=st.integers(0, 1000))
def test_estimate_is_that_of_torch_fidelity(num: int, dim: int, seed: int) -> None:
    """On one subset that is the whole set; theirs takes sets of equal size alone."""
    a, b = features(num, dim, seed), features(num, dim, seed + 1) * 1.3 + 0.2
    theirs = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=num, verbose=False)[KEY_METRIC_KID_MEAN]
    assert mmd2(a, b).item() == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 1000), order=st.randoms(use_true_random=False))
def test_estimate_does_not_depend_on_order(seed: int, order) -> None:
    a, b = features(14, 5, seed), features(9, 5, seed + 1)
    mixed = order.sample(range(14), 14)
    assert mmd2(a[mixed], b).item() == pytest.approx(mmd2(a, b).item(), rel=1e-9, abs=1e-12)


def test_closed_form_of_the_kernel_in_one_dimension() -> None:
    """E[(xy + 1)³] by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    x, y = 0.3 + 1.5**0.5 * nodes, -0.7 + 0.4**0.5 * nodes
    expected = (weights[:, None] * weights * (np.outer(x, y) + 1) ** 3).sum()
    a, b = (
        Gaussian(torch.tensor([m], dtype=torch.float64), torch.tensor([[v]], dtype=torch.float64))
        for m, v in ((0.3, 1.5), (-0.7, 0.4))
    )
    assert expected_kernel(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "case", [Case("shifted", 0, 0, shift=0.3), Case("wider", 0, 0, scale=1.4)], ids=lambda c: c.name
)
def test_estimate_is_unbiased(case: Case) -> None:
    a, b = pair(case, num_features=6)
    truth = true_distance(a, b)
    g = torch.Generator().manual_seed(0)
    each = np.array([mmd2(a.sample(20, g), b.sample(30, g)).item() for _ in range(1500)])
    error = each.std() / 1500**0.5
    assert truth > 5 * error  # else the next line proves nothing
    assert abs(each.mean() - truth) < 3.5 * error


def test_equal_gaussians_have_distance_zero() -> None:
    assert true_distance(*pair(Case("equal", 0, 0))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda c: c.name)
def test_interval_holds_the_true_distance(case: Case) -> None:
    """Lightly: 200 draws know the share to ±1.5%. The recipe measures it on 2,000."""
    assert 0.90 <= coverage(case, num_simulations=200, num_features=16) <= 0.99


def test_interval_narrows_and_tells_sets_apart() -> None:
    few, many = (kernel_distance(features(n, 8, 0), features(n, 8, 1) + 0.5) for n in (100, 2500))
    assert many.half < few.half
    assert many.excludes(0)
    assert not kernel_distance(features(2500, 8, 0), features(2500, 8, 1)).excludes(0)


def test_sets_of_any_sizes() -> None:
    for num, other in ((20, 20), (20, 3000), (1001, 21)):
        found = kernel_distance(features(num, 4, 0), features(other, 4, 1))
        assert found.low < found.mean < found.high
    with pytest.raises(InputError, match="--metrics kid: 19 pictures, expected at least 20"):
        kernel_distance(features(19, 4, 0), features(30, 4, 1))


def test_recipe_states_every_case_it_measured() -> None:
    assert all(f"{case.name} " in kid_coverage.__doc__ for case in CASES)
