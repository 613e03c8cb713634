"""One loop, any depth: full depth is the original model, branches and batch mates do not touch each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dyndit.errors import InputError
from dyndit.models.base import Backbone
from dyndit.models.dynamic import DynamicDepth

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


def by_hand(model: DynamicDepth, x, t, y, depth: int) -> torch.Tensor:
    """Run `depth` blocks one after the other, then the head that stands there."""
    state = model.backbone.embed(x, t, y)
    for index in range(depth):
        state = model.backbone.block(index, state)
    if depth == model.num_blocks:
        return model.backbone.head(state)
    return model.backbone.unpatchify(model.exits.heads[str(depth)](state.tokens, state.cond), state)


def test_full_depth_is_the_backbone_bit_for_bit(model: DynamicDepth, make_inputs) -> None:
    x, t, y = make_inputs(model.backbone)
    expected = model.backbone(x, t, y)
    assert expected.std() > 0.1
    assert torch.equal(model(x, t, y), expected)
    assert torch.equal(model(x, t, y, depth=model.num_blocks), expected)
    assert torch.equal(DynamicDepth(model.backbone)(x, t, y), expected)


def test_every_depth_is_its_blocks_and_its_head(model: DynamicDepth, make_inputs) -> None:
    x, t, y = make_inputs(model.backbone)
    predictions = model.every_exit(x, t, y)
    assert tuple(predictions) == model.depths == (1, 2, 3, 4, 5, 6)
    for depth in model.depths:
        expected = by_hand(model, x, t, y, depth)
        assert torch.equal(model(x, t, y, depth=depth), expected)
        assert torch.equal(predictions[depth], expected)
    flat = torch.stack(list(predictions.values())).flatten(1)
    assert torch.pdist(flat).min() > 0.1  # depths differ, or the equalities above prove nothing


def test_a_depth_runs_that_many_blocks(model: DynamicDepth, make_inputs) -> None:
    calls = []
    for index, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda _, inputs, __, index=index: calls.append((index, len(inputs[0]))))
    x, t, y = make_inputs(model.backbone)
    for depth in model.depths:
        calls.clear()
        model(x, t, y, depth=depth)
        assert calls == [(index, 3) for index in range(depth)]
    calls.clear()
    model.branches(x, t, [y, y], [5, 2])
    assert calls == [(0, 6), (1, 6), (2, 3), (3, 3), (4, 3)]  # one batch as deep as both go
    calls.clear()
    model.every_exit(x, t, y)
    assert calls == [(index, 3) for index in range(6)]


@given(depths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=30)
def test_branches_equal_separate_calls(make_model, make_inputs, depths: list[int]) -> None:
    model = make_model()
    x, t, y = make_inputs(model.backbone)
    labels = [(y + branch) % (model.backbone.condition.num_classes + 1) for branch in range(len(depths))]
    with torch.no_grad():
        together = model.branches(x, t, labels, depths)
        for found, mine, depth in zip(together, labels, depths, strict=True):
            torch.testing.assert_close(found, model(x, t, mine, depth=depth), atol=1e-5, rtol=1e-5)


def test_equal_branches_are_one_batch_bit_for_bit(model: DynamicDepth, make_inputs) -> None:
    x, t, y = make_inputs(model.backbone)
    null = torch.full_like(y, model.backbone.condition.null_label)
    double = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    for depth in model.depths:
        cond, uncond = model.branches(x, t, [y, null], [depth, depth])
        assert torch.equal(torch.cat([cond, uncond]), model(*double, depth=depth))
        assert not torch.allclose(cond, uncond, atol=1e-3)


def test_rows_do_not_depend_on_their_batch_mates(model: DynamicDepth, make_inputs) -> None:
    x, t, y = make_inputs(model.backbone, batch=4)
    others = make_inputs(model.backbone, batch=4, seed=9)
    mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip((x, t, y), others, strict=True)]
    for depth in model.depths:
        whole = model(x, t, y, depth=depth)
        assert torch.equal(whole[:1], model(*mixed, depth=depth)[:1])
        torch.testing.assert_close(whole[:1], model(x[:1], t[:1], y[:1], depth=depth), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[1:], model(*mixed)[1:], atol=1e-3)


@pytest.mark.parametrize("depth", [0, -1, 3, 7])
def test_an_unknown_depth_is_refused(depth: int, make_model, make_inputs) -> None:
    model = make_model(layers=(2, 4))
    with pytest.raises(InputError, match=rf"depth {depth}: expected one of \[2, 4, 6\]"):
        model(*make_inputs(model.backbone), depth=depth)


def test_a_model_without_exits_has_one_depth(make_backbone, make_inputs) -> None:
    model = DynamicDepth(make_backbone())
    assert model.depths == (6,)
    assert model.identity.exits == ""
    assert list(model.every_exit(*make_inputs(model.backbone))) == [6]
    with pytest.raises(InputError, match="depth 3"):
        model(*make_inputs(model.backbone), depth=3)


def test_hashes_bind_trunk_and_exits(make_model) -> None:
    model, same, other = make_model(), make_model(), make_model(seed=1)
    assert (model.identity.backbone, model.identity.exits) == (same.identity.backbone, same.identity.exits)
    assert model.identity.backbone != other.identity.backbone
    assert model.identity.exits != other.identity.exits
    backbone = model.identity.backbone
    next(model.exits.parameters()).data[0] += 1
    assert model.identity.backbone == backbone
    assert model.identity.exits != same.identity.exits


def test_backbone_says_what_is_missing() -> None:
    bare = Backbone()
    assert isinstance(bare, nn.Module)
    for call in (bare.config, bare.new_exit_head, lambda: Backbone.from_config({})):
        with pytest.raises(NotImplementedError):
            call()
