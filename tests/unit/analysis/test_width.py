"""Width by timestep: fewer heads and channels at the noisier steps, really gathered."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.analysis.compare.peers import PeerContext
from dyndit.analysis.compare.peers.width import HALF, ByNoise, FewerHeads, Narrowed, Width, importance, narrowed, ranked
from dyndit.analysis.metrics.macs import count_macs
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits

LABELS, STEPS = [3, 1, 4, 1, 5], 6
FIT = FitConfig(steps=3, batch_size=8, learning_rate=1e-3, ema_decay=0.5)
HEADS, CHANNELS = 4, 96


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    return make_model(num_heads=HEADS)


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> PeerContext:
    return PeerContext(tmp_path_factory.mktemp("peers"), load_digits(), FIT)


def draw(runs: DynamicDepth, batch_size: int = 5) -> torch.Tensor:
    plan = full_plan(runs, "unipc", STEPS, 1.5)
    return sample(runs, LABELS, plan=plan, solver="unipc", num_steps=STEPS, batch_size=batch_size).pictures


def test_all_heads_and_channels_are_the_model_bit_for_bit(model, make_inputs) -> None:
    assert torch.equal(draw(Width(1.0).model(model)), draw(model))
    x, t, y = make_inputs(model.backbone)
    with torch.no_grad():
        whole = model(x, t, y)
        assert torch.equal(narrowed(model.backbone, 1.0)(x, t, y), whole)
        torch.testing.assert_close(ByNoise(model.backbone, 1.0).eval()(x, t, y), whole)  # rows run in two batches
        assert not torch.equal(narrowed(model.backbone, 0.5)(x, t, y), whole)


def test_attention_is_written_out_where_the_model_writes_it_out(model, make_inputs) -> None:
    """The switch is timm's: all heads in order are then the model's own attention, bit for bit."""
    backbone, inputs = copy.deepcopy(model.backbone), make_inputs(model.backbone)
    with torch.no_grad():
        fused = narrowed(backbone, 0.5)(*inputs)
        for block in backbone.blocks:
            block.attn.fused_attn = False
        assert torch.equal(narrowed(backbone, 1.0)(*inputs), backbone(*inputs))
        written_out = narrowed(backbone, 0.5)(*inputs)
    assert not torch.equal(written_out, fused)
    torch.testing.assert_close(written_out, fused)


@settings(max_examples=12)
@given(share=st.floats(0.01, 1.0))
def test_what_is_left_out_does_not_matter(model, make_inputs, share: float) -> None:
    """Zeroing the weights of the heads and channels that do not run changes no bit; of those that run, it does."""
    narrow = narrowed(model.backbone, share)
    attn, mlp = narrow.blocks[0].attn, narrow.blocks[0].mlp
    assert (attn.num, mlp.num) == (max(1, round(share * HEADS)), max(1, round(share * CHANNELS)))
    inputs = make_inputs(model.backbone)
    with torch.no_grad():
        before = narrow(*inputs)
        copied = narrowed(DynamicDepth(_copy(model)).backbone, share)
        for block in copied.blocks:
            _zero(block, slice(block.attn.num, None), slice(block.mlp.num, None))
        assert torch.equal(copied(*inputs), before)
        _zero(copied.blocks[2], slice(0, 1), slice(0, 1))
        assert not torch.equal(copied(*inputs), before)


def _copy(model: DynamicDepth):
    copy = type(model.backbone).from_config(model.backbone.config()).eval()
    copy.load_state_dict(model.backbone.state_dict())
    return copy


def _zero(block, heads: slice, channels: slice) -> None:
    attn, mlp = block.attn.whole, block.mlp.whole
    shape = (attn.num_heads, attn.head_dim)
    attn.qkv.weight.unflatten(0, (3, *shape))[:, heads] = 0
    attn.qkv.bias.unflatten(0, (3, *shape))[:, heads] = 0
    attn.proj.weight.unflatten(1, shape)[:, heads] = 0
    mlp.fc1.weight[channels], mlp.fc1.bias[channels], mlp.fc2.weight[:, channels] = 0, 0, 0


def test_ranking_changes_the_order_alone(model, make_inputs) -> None:
    """The same function, with rising losses: what is ranked first adds most, and dropping the last hurts least."""
    data = load_digits()
    backbone = ranked(model, data, num_pictures=64)
    inputs = make_inputs(model.backbone)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    again = DynamicDepth(backbone)
    heads, channels = importance(again, data, num_pictures=64, seed=0)
    assert all((a[:-1] >= a[1:] * (1 - 1e-3)).all() for a in (*heads, *channels))
    assert {len(a) for a in heads} == {HEADS}
    assert {len(a) for a in channels} == {CHANNELS}
    plain, _ = importance(model, data, num_pictures=64, seed=0)
    assert any((a[:-1] < a[1:]).any() for a in plain)  # otherwise nothing was put in order
    assert ranked(model, data, num_pictures=64).identity() == backbone.identity()


def test_it_is_narrow_at_the_noisier_steps_alone(model, context) -> None:
    runs, widths = Width(0.5).model(model, context), []
    assert isinstance(runs, Narrowed)
    handles = [m.register_forward_hook(lambda *_: widths.append("whole")) for m in [runs.backbone.blocks[0].attn]]
    handles += [m.register_forward_hook(lambda *_: widths.append("narrow")) for m in [runs.small.backbone.blocks[0]]]
    plan = full_plan(runs, "unipc", STEPS, 1.5)
    first = draw(runs)
    for handle in handles:
        handle.remove()
    assert widths == ["narrow" if t > HALF else "whole" for t in plan.timesteps]
    assert {"narrow", "whole"} == set(widths)
    assert widths.count("narrow") == STEPS // 2
    assert (draw(runs, batch_size=2).int() - first.int()).abs().max() <= 1
    assert not torch.equal(first, draw(model))


def test_arithmetic_falls_as_the_share_does(model) -> None:
    counted = [count_macs(lambda m=m: draw(m)) for m in (model, *(Narrowed(model, Width(s)) for s in (0.75, 0.5)))]
    assert counted[0] > counted[1] > counted[2]
    # Half of the steps at half of the width: the blocks' products shrink, embedding and head do not.
    assert 0.7 < counted[2] / counted[0] < 0.85


def test_it_is_trained_once_and_heals(model, context, monkeypatch, make_inputs) -> None:
    longer = replace(context, fit=replace(FIT, steps=30, batch_size=32))
    x, t, y = make_inputs(model.backbone, batch=64)
    healed = Width(0.5).model(model, longer)
    raw = Narrowed(DynamicDepth(ranked(model, context.data)), Width(0.5))
    noisier = t > HALF
    with torch.no_grad():
        full = model(x, t, y)[noisier]
        error = [(m.small(x, t, y)[noisier] - full).square().mean() for m in (raw, healed)]
    assert error[1] < error[0]
    monkeypatch.setattr("dyndit.training.match.fit", None)
    assert torch.equal(draw(Width(0.5).model(model, longer)), draw(healed))
    with pytest.raises(TypeError):
        Width(0.75).model(model, longer)


def test_parameters_are_shared_not_copied(model) -> None:
    narrow = narrowed(model.backbone, 0.5)
    assert {id(p) for p in narrow.parameters()} == {id(p) for p in model.backbone.parameters()}
    assert isinstance(narrow.blocks[0].attn, FewerHeads)
    assert not isinstance(model.backbone.blocks[0].attn, FewerHeads)
    assert ByNoise(model.backbone, 0.5).state_dict().keys() == {f"whole.{k}" for k in model.backbone.state_dict()}


def test_settings_round_trip() -> None:
    for share in (0.5, 0.6, 0.75):
        assert Width(**vars(Width(share))) == Width(share)
    assert [peer.label for peer in map(Width, (0.5, 0.75))] == ["share0.5", "share0.75"]
    plan = DepthPlan.full((999, 499), 6, "ddim", 1.5)
    assert (Width(0.5).share_of_blocks(plan), Width(1.0).share_of_blocks(plan)) == (None, 1.0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_bad_shares_are_one_line(share: float) -> None:
    with pytest.raises(InputError, match=r"width share .*: expected above 0 and at most 1"):
        Width(share)


def test_it_needs_a_context(model) -> None:
    with pytest.raises(InputError, match="peer width: needs a context to train in"):
        Width(0.5).model(model)
