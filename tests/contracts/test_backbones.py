"""What every native backbone must do, asked of the backbone itself: it makes its own example call.

Families are found by themselves: a new file in dyndit/models is tested once it has a tiny config in tests/support.
"""

import pytest
import torch

from dyndit.models import families
from dyndit.models.base import Inputs
from dyndit.models.conditions import Condition
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS, ExitConfig, Exits
from support.models import TINY_CONFIGS, randomise, tiny


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def as_tuple(call: Inputs) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    return call.x, call.t, call.y


@pytest.mark.parametrize("family", families())
def test_every_family_has_a_tiny_config(family: str) -> None:
    known = {name.partition("/")[0] for name in TINY_CONFIGS}
    assert family in known, f"add a tiny config of {family} to TINY_CONFIGS"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_contract(name: str, head: str) -> None:
    """Every family and every head does this; both are found by their registries."""
    backbone = tiny(name)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    x, t, y = as_tuple(backbone.example(3, torch.Generator().manual_seed(0)))
    assert x.shape == (3, *backbone.sample_shape)
    expected = backbone(x, t, y)
    assert expected.shape == (len(x), backbone.out_channels, *x.shape[2:])
    assert expected.std() > 0.1

    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(head=head))).eval()
    after = backbone.state_dict()
    assert after.keys() == before.keys()  # exits are beside the backbone, not in it
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not {p.data_ptr() for p in backbone.parameters()} & {p.data_ptr() for p in model.exits.parameters()}
    assert torch.equal(model(x, t, y), expected)

    state = backbone.embed(x, t, y)
    assert len(state.tokens) == len(state.cond) == len(x)
    for index in range(backbone.num_blocks - 1):
        state = backbone.block(index, state)
        own = backbone.head(state)  # fresh exits are the model's own final layer
        assert torch.equal(model(x, t, y, depth=index + 1), own)
    randomise(model.exits, seed=1)
    for depth, prediction in model.every_exit(x, t, y).items():
        assert prediction.shape == expected.shape
        assert depth == backbone.num_blocks or not torch.allclose(prediction, own_head(model, x, t, y, depth))

    twin = type(backbone).from_config(backbone.config()).eval()
    twin.load_state_dict(before)
    assert torch.equal(twin(x, t, y), expected)


def own_head(model: DynamicDepth, x, t, y, depth: int) -> torch.Tensor:
    """The model's own head after `depth` blocks."""
    state = model.backbone.embed(x, t, y)
    for index in range(depth):
        state = model.backbone.block(index, state)
    return model.backbone.head(state)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_conditions_know_their_null_and_their_example(name: str) -> None:
    backbone = tiny(name)
    call = backbone.example(3, torch.Generator().manual_seed(0))
    again = backbone.example(3, torch.Generator().manual_seed(0))
    assert torch.equal(backbone(*as_tuple(call)), backbone(*as_tuple(again)))
    if backbone.condition.guided:
        null = backbone(call.x, call.t, backbone.condition.null(call.y))
        assert not torch.allclose(null, backbone(*as_tuple(call)), atol=1e-3)
        never = backbone.condition.dropped(call.y, torch.Generator().manual_seed(0), share=0.0)
        always = backbone.condition.dropped(call.y, torch.Generator().manual_seed(0), share=1.0)
        assert torch.equal(backbone(call.x, call.t, never), backbone(*as_tuple(call)))
        assert torch.equal(backbone(call.x, call.t, always), null)
