"""Paired distances against closed forms and a direct sum; seeds that do not match are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dyndit.analysis.metrics.paired import MAX_PSNR, Lpips, check_same_seeds, paired_distances, paired_sets, psnr, ssim
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.errors import CheckpointError, InputError
from dyndit.pictures import as_rgb


def pictures(num: int, seed: int = 0, size: int = 12, channels: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, size, size), generator=g, dtype=torch.uint8)


def level(value: int, size: int = 12) -> Tensor:
    return torch.full((1, 1, size, size), value, dtype=torch.uint8)


def test_equal_pictures() -> None:
    a = pictures(3)
    assert psnr(a, a).tolist() == [MAX_PSNR] * 3
    assert torch.allclose(ssim(a, a), torch.ones(3, dtype=torch.float64))


@given(a=st.integers(0, 255), b=st.integers(0, 255))
def test_closed_form_of_plain_pictures(a: int, b: int) -> None:
    x, y = a / 255, b / 255
    assert ssim(level(a), level(b)).item() == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), abs=1e-9)
    expected = MAX_PSNR if a == b else -20 * np.log10(abs(x - y))
    assert psnr(level(a), level(b)).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_the_sum_over_windows() -> None:
    """Wang et al. 2004, eq. 13, at each of the 2 x 2 places where an 11x11 window fits."""
    a, b = pictures(1, 0, channels=1), pictures(1, 1, channels=1)
    x, y = (v[0, 0].numpy() / 255 for v in (a, b))
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = np.outer(line, line) / line.sum() ** 2
    found = []
    for i in range(2):
        for j in range(2):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + 1e-4) * (2 * c + 9e-4)
            found.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(a, b).item() == pytest.approx(np.mean(found), rel=1e-9)


@pytest.mark.parametrize("size", [5, 8, 40])
def test_more_noise_is_further_at_any_size(size: int) -> None:
    a = pictures(4, size=size)
    for score in (psnr, ssim):
        little, much = (score(a, (a.float() * (1 - m) + 128 * m).byte()) for m in (0.05, 0.6))
        assert (little > much).all()
        assert torch.allclose(score(a, a.flip(0)), score(a.flip(0), a))


def test_spread_is_the_median_and_the_worse_end() -> None:
    full = pictures(101)
    noise = torch.arange(101).view(-1, 1, 1, 1)
    found = paired_distances((full.int() + noise).clamp(0, 255).byte(), full)
    assert found.keys() == {"psnr", "ssim"}
    assert all(spread.worst < spread.median for spread in found.values())
    assert found["psnr"].worst == pytest.approx(
        psnr(full[95:96], (full[95:96].int() + 95).clamp(0, 255).byte()).item(), rel=0.05
    )


def test_sets_of_other_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"--full: pictures \(3, 3, 12, 12\), expected \(4, 3, 12, 12\)"):
        paired_distances(pictures(4), pictures(3))


def test_grey_and_coloured_sets_are_compared_in_colour() -> None:
    grey, coloured = pictures(4, channels=1), PictureSet("full", pictures(4, 1))
    found = paired_sets(PictureSet("samples", grey), coloured)
    assert found == paired_sets(PictureSet("samples", as_rgb(grey)), coloured)
    with pytest.raises(InputError, match=r"--full: pictures \(4, 12, 12\), expected \(3, 12, 12\)"):
        paired_sets(PictureSet("samples", grey[:3]), coloured)


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    state = {k: v.abs() if k.startswith("lin") else v for k, v in Lpips().state_dict().items()}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(state, path)
    return path


def test_lpips_on_given_weights(lpips_weights: Path) -> None:
    network = Lpips.load(lpips_weights)
    a, b = pictures(3, 0, size=16), pictures(3, 1, size=16)
    found = network(a, b)
    assert (found > 0).all()
    assert torch.allclose(found, network(b, a))
    assert torch.allclose(found, network(a, b, batch_size=1), rtol=1e-4)
    assert torch.equal(network(a, a), torch.zeros(3, dtype=torch.float64))
    assert paired_distances(a, b, network)["lpips"].worst > paired_distances(a, b, network)["lpips"].median
    with pytest.raises(InputError, match="pictures of 8x8, expected at least 16x16"):
        network(pictures(1, size=8), pictures(1, size=8))


def test_lpips_agrees_with_torch_fidelity(lpips_weights: Path) -> None:
    """Theirs loads from the network only, so its parts are put together here."""
    from torch_fidelity import sample_similarity_lpips as theirs

    network = Lpips.load(lpips_weights)
    a, b = pictures(2, 0, size=32), pictures(2, 1, size=32)
    expected, x, y = 0, *(theirs.SampleSimilarityLPIPS.normalize(v) for v in (a, b))
    number = 0
    for k, end in enumerate((4, 9, 16, 23, 30)):
        x, y = network.features[number:end](x), network.features[number:end](y)
        diff = (theirs.normalize_tensor(x) - theirs.normalize_tensor(y)) ** 2
        expected = expected + theirs.spatial_average(network.get_submodule(f"lin{k}.model")(diff))
        number = end
    assert torch.allclose(network(a, b), expected.double(), rtol=1e-4)


def test_bad_lpips_weights_are_named(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "wrong.safetensors")
    (tmp_path / "wrong.pth").write_bytes(b"no checkpoint")
    for name in ("wrong.safetensors", "wrong.pth", "none.safetensors"):
        with pytest.raises(CheckpointError, match=rf"--lpips-weights .*{name}") as caught:
            Lpips.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_other_seeds_are_refused(tmp_path: Path) -> None:
    settings = {"model": "m", "labels": [0, 1], "num_images": 4, "seed": 3, "pairs": "deep"}
    for name, change in (("a", {}), ("b", {"pairs": "shallow"}), ("c", {"seed": 4}), ("d", {"labels": [1]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"settings": settings | change}))
    (tmp_path / "foreign").mkdir()
    check_same_seeds(tmp_path / "a", tmp_path / "b")
    check_same_seeds(tmp_path / "a", tmp_path / "foreign")
    with pytest.raises(InputError, match="c: seed 4, expected 3 as the samples have"):
        check_same_seeds(tmp_path / "a", tmp_path / "c")
    with pytest.raises(InputError, match="labels"):
        check_same_seeds(tmp_path / "a", tmp_path / "d")
