"""Layers: an MLP's activation may be part of its product, and nobody who watches or replaces a layer is passed by."""

from contextlib import nullcontext

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyndit.analysis.metrics.macs import count_macs
from dyndit.models import layers
from dyndit.models.layers import Mlp, linear_gelu

X, WEIGHT, BIAS = (torch.randn(size, generator=torch.Generator().manual_seed(3)) for size in ((5, 7, 16), (48, 16), 48))
HALVED = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(1)
    return Mlp(16, 48)


def apart(x: torch.Tensor) -> torch.Tensor:
    """The two operations one after the other."""
    return F.gelu(F.linear(x, WEIGHT, BIAS), approximate="tanh")


def test_bits_stay_in_fp32_and_in_training() -> None:
    with torch.no_grad():
        assert torch.equal(linear_gelu(X, WEIGHT, BIAS), apart(X))
    with HALVED:
        assert torch.equal(linear_gelu(X, WEIGHT, BIAS), apart(X))
        weight = WEIGHT.clone().requires_grad_()
        linear_gelu(X, weight, BIAS).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0


def test_bf16_differs_by_rounding_alone() -> None:
    """No further from fp64 than the two operations are, which round once more."""
    exact = F.gelu(F.linear(*(tensor.bfloat16().double() for tensor in (X, WEIGHT, BIAS))), approximate="tanh")
    with torch.inference_mode(), HALVED:
        fused, two = linear_gelu(X, WEIGHT, BIAS), apart(X)
    assert fused.dtype == two.dtype == torch.bfloat16
    error, of_two = ((got.double() - exact).abs() / exact.abs().clamp_min(1) for got in (fused, two))
    assert error.max() <= of_two.max() <= 2**-7
    assert (fused == two).float().mean() > 0.6


@pytest.mark.parametrize("halved", [False, True], ids=["fp32", "bf16"])
def test_rows_do_not_know_their_batch_mates(mlp: Mlp, halved: bool) -> None:
    with torch.inference_mode(), HALVED if halved else nullcontext():
        assert torch.equal(mlp(X)[:2], mlp(X[:2].contiguous()))


def test_a_build_without_the_product_takes_two_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_fuses_bf16", lambda: False)
    with torch.inference_mode(), HALVED:
        assert torch.equal(linear_gelu(X, WEIGHT, BIAS), apart(X))


def test_whoever_watches_the_first_layer_sees_it(mlp: Mlp) -> None:
    seen = []
    with torch.inference_mode(), HALVED:
        before = mlp(X)
        hook = mlp.fc1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
        after = mlp(X)
        hook.remove()
    assert seen == [(5, 7, 48)]
    assert torch.allclose(before, after, atol=0.05)


def test_adapters_are_not_passed_by(mlp: Mlp) -> None:
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False), mlp)
    assert isinstance(adapted, nn.Module)
    with torch.inference_mode(), HALVED:
        assert (adapted(X) - adapted.fc2(linear_gelu(X, adapted.fc1.weight, adapted.fc1.bias))).abs().max() > 0.01


def test_arithmetic_is_counted_in_either_precision(mlp: Mlp) -> None:
    with torch.inference_mode():
        whole = count_macs(lambda: mlp(X))
        with HALVED:
            assert count_macs(lambda: mlp(X)) == whole == 5 * 7 * 2 * 16 * 48
