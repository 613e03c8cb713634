"""The ways to condition against references written from the paper, and against the paper's figures and first weights.

adaLN-Zero has its own file, `test_dit.py`. Tolerances are a little above the worst error found.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dyndit.analysis.metrics.macs import full_macs, model_macs
from dyndit.models.conditioning import CONDITIONINGS
from dyndit.models.dit import CARDS, ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS, ExitConfig, Exits
from support.models import randomise
from support.reference_conditioning import REFERENCES

pytestmark = pytest.mark.usefixtures("_no_grad")

CONFIGS = {
    "latents": DiTConfig(16, 2, 4, width=48, num_blocks=3, num_heads=4, num_classes=7),
    "grey": DiTConfig(8, 4, 1, width=32, num_blocks=2, num_heads=1, mlp_ratio=2, num_classes=2, learn_variance=False),
    "one patch": DiTConfig(8, 8, 1, width=24, num_blocks=2, num_heads=2, num_classes=3),
}
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-7}

# Peebles and Xie 2022, XL/2 at 256 px: "Gflops" (multiply-accumulates) and millions of parameters of Table 4.
GMACS = {"in-context": 119.37, "cross-attention": 137.62, "adaln": 118.56, "adaln-zero": 118.64}
MILLIONS = {"in-context": 449, "cross-attention": 598, "adaln": 600, "adaln-zero": 675}


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


def make(conditioning: str, config: DiTConfig, dtype: torch.dtype) -> tuple[DynamicDepth, dict[str, Tensor]]:
    """A random model whose predictions are of order 1, and its call."""
    backbone = replace(config, conditioning=conditioning).build().eval()
    randomise(backbone, seed=3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, *backbone.sample_shape, generator=generator).to(dtype)
    t, y = torch.tensor([0, 999, 500, 37]), torch.tensor([0, 1, config.num_classes, config.num_classes - 1])
    return DynamicDepth(backbone.to(dtype)), {"x": x, "t": t, "y": y}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("conditioning", REFERENCES)
def test_it_predicts_as_the_paper_says(conditioning: str, name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    model, call = make(conditioning, config, dtype)
    found = model(**call)
    expected = REFERENCES[conditioning](
        model.backbone.state_dict(), **call, num_heads=config.num_heads, depth=config.num_blocks
    )
    assert 0.1 < expected.std() < 3
    torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype] * expected.abs().max().item(), rtol=0)
    for i in range(4):  # every row has a prediction of its own: timestep and label reach the picture
        assert (found[i] - found[(i + 1) % 4]).abs().max() > 0.05


@pytest.mark.parametrize("conditioning", REFERENCES)
def test_every_tensor_of_the_reference_matters(conditioning: str) -> None:
    config = CONFIGS["latents"]
    model, call = make(conditioning, config, torch.float64)
    weights = model.backbone.state_dict()
    arguments = {**call, "num_heads": config.num_heads, "depth": config.num_blocks}
    expected = REFERENCES[conditioning](weights, **arguments)
    for tensor, w in weights.items():
        if tensor.endswith("cross_attn.kv.bias"):  # a bias of all keys alike moves no share; the values' half does
            w = w.chunk(2)[1]
        shuffled = weights[tensor].clone()
        shuffled[-len(w) :] = w.flip(0 if len(w) > 1 else -1)
        assert (REFERENCES[conditioning](weights | {tensor: shuffled}, **arguments) - expected).abs().max() > 1e-4, (
            tensor
        )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("conditioning", REFERENCES)
def test_fresh_exits_predict_as_the_reference_cut_there(conditioning: str, head: str) -> None:
    config = CONFIGS["latents"]
    model, call = make(conditioning, config, torch.float32)
    weights = model.backbone.state_dict()
    dynamic = DynamicDepth(model.backbone, Exits(model.backbone, ExitConfig(head=head))).eval()
    for depth in dynamic.depths:
        expected = REFERENCES[conditioning](weights, **call, num_heads=config.num_heads, depth=depth)
        torch.testing.assert_close(
            dynamic(**call, depth=depth), expected, atol=2e-6 * expected.abs().max().item(), rtol=0
        )


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_largest_costs_what_the_paper_says(conditioning: str) -> None:
    with torch.device("meta"):
        model = DynamicDepth(ClassConditionalDiT(replace(CARDS["DiT-XL/2"], conditioning=conditioning)))
    assert full_macs(model) / 1e9 == pytest.approx(GMACS[conditioning], rel=0.01)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[conditioning], rel=0.01)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_first_weights_are_the_papers(conditioning: str) -> None:
    """The prediction starts at zero; only blocks of adaLN-Zero start as the identity."""
    backbone = DiTConfig(
        8, 2, 1, width=48, num_blocks=3, num_heads=2, num_classes=10, conditioning=conditioning
    ).build()
    call = backbone.example(3, torch.Generator().manual_seed(0))
    state = backbone.embed(call.x, call.t, call.y)
    after = backbone.block(0, state)
    assert torch.equal(after.tokens, state.tokens) == (conditioning == "adaln-zero")
    assert torch.equal(backbone(call.x, call.t, call.y), torch.zeros(3, 2, 8, 8))
    assert backbone.blocks[0].attn.qkv.weight.std().item() == pytest.approx((2 / (48 + 144)) ** 0.5, rel=0.1)  # Xavier
    if conditioning == "adaln":
        assert backbone.blocks[0].adaLN_modulation[1].weight.std() > 0.05
    if conditioning == "cross-attention":
        assert backbone.blocks[0].cross_attn.kv.weight.std() > 0.05


def test_in_context_tokens_are_two_and_leave_before_the_head() -> None:
    config = replace(CONFIGS["latents"], conditioning="in-context")
    backbone = config.build().eval()
    randomise(backbone, seed=0)
    call = backbone.example(2, torch.Generator().manual_seed(0))
    state = backbone.embed(call.x, call.t, call.y)
    assert state.tokens.shape == (2, 64 + 2, 48)
    assert backbone.final_layer(state.tokens, state.cond).shape == (2, 64, 2 * 2 * 8)
    plain = model_macs(DynamicDepth(replace(config, conditioning="adaln").build()))
    assert model_macs(DynamicDepth(backbone)).embed == plain.embed
