"""`dyndit evaluate --self-check`: made pictures, the weights' hash, and torch-fidelity's own distance."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dyndit.analysis.metrics import self_check as module
from dyndit.analysis.metrics.self_check import Check, made_pictures, self_check
from dyndit.cli import main
from dyndit.errors import InputError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Inception's own architecture, with features of usual size."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    torch.save(state, path)
    return path


def test_made_pictures_are_the_same_everywhere() -> None:
    first = made_pictures("plain", 3)
    assert (first.shape, first.dtype) == ((3, 3, 64, 64), torch.uint8)
    assert hashlib.sha256(first.numpy().tobytes()).hexdigest().startswith("0aa1d590036df07b")
    assert torch.equal(made_pictures("plain", 64)[:3], first)
    assert made_pictures("dim").float().mean() < 0.8 * made_pictures("plain").float().mean()


def test_the_distance_is_torch_fidelitys_and_the_hash_tells_other_weights(weights: Path) -> None:
    checks = {check.name: check for check in self_check(weights, num=4, dims=128)}
    assert len(checks) == 3
    passed = {name: check.passed for name, check in checks.items()}
    assert not passed.pop("SHA-256 of the weights")  # random weights are not the published ones
    assert all(passed.values()), checks
    distance = checks["FID of plain and dim, 4 pictures each"]
    assert float(distance.found) > 50 * module.TOLERANCE  # otherwise agreement proves nothing


def test_cifar10_is_drawn_as_by_torch_fidelitys_test(weights: Path, tmp_path: Path, monkeypatch) -> None:
    whole = {True: np.arange(50_000), False: np.arange(10_000)}
    made = {train: np.repeat(n[:, None], 12, 1).reshape(-1, 2, 2, 3) % 251 for train, n in whole.items()}

    class Made:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root: str, train: bool) -> None:
            self.data = made[train].astype(np.uint8)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Made)
    drawn = module._of_cifar10(tmp_path, train=True)
    order = np.random.RandomState(2020).choice(50_000, 5_000, replace=False)
    assert (drawn.shape, drawn.dtype) == ((5_000, 3, 2, 2), torch.uint8)
    assert np.array_equal(drawn[:, 0, 0, 0].numpy(), order % 251)
    assert order[:5].tolist() == [24397, 39273, 6546, 13504, 49765]  # numpy keeps RandomState's numbers for good
    monkeypatch.setattr(module, "CIFAR10_NUM", 4)
    *_, last = self_check(weights, cifar10=tmp_path, num=4, dims=32)
    assert last.name.startswith("FID of CIFAR-10")
    assert not last.passed  # random weights


def test_a_folder_without_cifar10_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cifar-10-batches-py"):
        next(self_check(tmp_path / "unread", cifar10=tmp_path))


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_exits_by_the_result(tmp_path: Path, monkeypatch, capsys, passed: bool) -> None:
    monkeypatch.setattr(module, "self_check", lambda weights, device, cifar10: iter([Check("a", "1", "2", passed)]))
    (tmp_path / "w.pth").touch()
    if passed:
        main(["evaluate", "--self-check", str(tmp_path / "w.pth"), "--json"])
    else:
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "--self-check", str(tmp_path / "w.pth"), "--json"])
        assert stop.value.code == 1
    out = capsys.readouterr().out
    assert f"{'pass' if passed else 'FAIL'}  a: 1; expected 2" in out


def test_no_weights_is_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--self-check", str(tmp_path / "none.pth")])
    assert stop.value.code == 2
    assert "none.pth" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path)])
    assert stop.value.code == 2
