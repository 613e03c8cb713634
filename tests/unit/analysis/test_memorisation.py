"""The memorisation check: copies are found, new pictures pass, and the limits hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndit.analysis.metrics.memorisation import check_memorisation, nearest_distances
from dyndit.errors import InputError


def features(num: int, seed: int, dim: int = 6) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nearest_distance_is_the_least_of_all() -> None:
    a, b = features(70, 0), features(40, 1)
    expected = (a[:, None] - b).norm(dim=2).amin(1)
    assert torch.allclose(nearest_distances(a, b, chunk=16), expected, rtol=1e-12)
    assert torch.equal(nearest_distances(b[:5], b), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_copies_are_counted(share: float) -> None:
    train, copies = features(300, 0), round(400 * share)
    samples = torch.cat([train[torch.arange(copies) % 300], features(400 - copies, 1)])
    found = check_memorisation(samples, train, features(500, 2))
    assert share <= found.share.mean <= share + 0.03 * (1 - share)
    assert 0 <= found.share.low <= found.share.mean <= found.share.high <= 1
    assert found.share.excludes(0.01) == (share > 0)


def test_near_copies_are_found() -> None:
    train = features(300, 0)
    found = check_memorisation(train + 1e-3 * features(300, 9), train, features(500, 2))
    assert found.share.mean == 1
    assert found.median_sample < found.threshold < found.median_held_out


def test_limits_hold_the_share_of_new_pictures() -> None:
    """Samples like the held-out pictures: their true share is 0.01; at least 95% of the limits hold it."""
    train = features(100, 0)
    found = [check_memorisation(features(200, 2 * k + 1), train, features(300, 2 * k + 2)) for k in range(200)]
    held = sum(not f.share.excludes(0.01) for f in found)
    assert held >= 0.93 * 200
    assert len({f.share.mean for f in found}) > 3  # the share does vary


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_order_does_not_matter(seed: int) -> None:
    samples, train, held_out = features(60, seed), features(50, seed + 1), features(120, seed + 2)
    g = torch.Generator().manual_seed(seed)
    mixed = [x[torch.randperm(len(x), generator=g)] for x in (samples, train, held_out)]
    a, b = check_memorisation(samples, train, held_out), check_memorisation(*mixed)
    assert a.share == b.share
    assert a.threshold == pytest.approx(b.threshold, rel=1e-12)


def test_held_out_pictures_must_be_enough_and_new() -> None:
    train = features(300, 0)
    with pytest.raises(InputError, match="--held-out: 99 pictures, expected at least 100"):
        check_memorisation(features(50, 1), train, features(99, 2))
    with pytest.raises(InputError, match="--held-out: training pictures are among them"):
        check_memorisation(features(50, 1), train, train[:200])
