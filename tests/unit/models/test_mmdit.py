"""The MM-DiT: two streams, a text that the last block only reads, and the same bits however it is run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dyndit
from dyndit.models.dynamic import DynamicDepth, compile_parts
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.mmdit import MMDiT
from support.models import TINY_MMDIT, randomise


def tiny(**changes: object) -> MMDiT:
    backbone = MMDiT(replace(TINY_MMDIT, **changes)).eval()
    randomise(backbone, seed=0)
    return backbone


@pytest.fixture
def model() -> DynamicDepth:
    backbone = tiny()
    exits = Exits(backbone, ExitConfig())
    randomise(exits, seed=1)
    return DynamicDepth(backbone, exits).eval()


def test_a_new_model_is_the_identity_and_predicts_zero() -> None:
    backbone = MMDiT(TINY_MMDIT).eval()
    call = backbone.example(2)
    with torch.no_grad():
        before = backbone.embed(call.x, call.t, call.y)
        after = backbone.block(0, before)
        assert torch.equal(after.tokens, before.tokens)
        assert torch.equal(after.text, before.text)
        assert not backbone(call.x, call.t, call.y).any()


def test_the_last_block_only_reads_the_text() -> None:
    backbone = tiny()
    last, before = backbone.joint_blocks[-1].context_block, backbone.joint_blocks[-2].context_block
    assert {name for name, _ in last.named_children()} == {"norm1", "attn", "adaLN_modulation"}
    assert last.adaLN_modulation[1].out_features == 2 * backbone.width
    assert before.adaLN_modulation[1].out_features == 6 * backbone.width
    call = backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = backbone.embed(call.x, call.t, call.y)
        for index in range(backbone.num_blocks):
            assert state.text.shape == (2, TINY_MMDIT.text_length, backbone.width)
            state = backbone.block(index, state)
    assert state.text is None
    assert state.rows(0, 1).text is None


@pytest.mark.parametrize("text", [{}, {"vocabulary": (), "num_classes": 3}, {"vocabulary": ()}])
def test_streams_tell_in_both_directions(text: dict[str, object]) -> None:
    """Exits after the first block see the text, and the text of the second block has seen the picture."""
    backbone = tiny(**text)
    call = backbone.example(2, torch.Generator().manual_seed(0))
    other = backbone.example(2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = backbone.block(0, backbone.embed(call.x, call.t, call.y))
        by_text = backbone.block(0, backbone.embed(call.x, call.t, other.y))
        by_picture = backbone.block(0, backbone.embed(other.x, call.t, call.y))
    assert (by_text.tokens - state.tokens).abs().max() > 1e-2
    assert (by_picture.text - state.text).abs().max() > 1e-2


def test_rows_of_branches_at_other_depths_leave_the_rest_alone(model: DynamicDepth) -> None:
    call = model.backbone.example(3, torch.Generator().manual_seed(0))
    null = model.backbone.condition.null(call.y)
    with torch.no_grad():
        both = model.branches(call.x, call.t, [call.y, null], [4, 2])
        torch.testing.assert_close(both[0], model(call.x, call.t, call.y))
        torch.testing.assert_close(both[1], model(call.x, call.t, null, depth=2))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for saving in (False, True):
        backbone = tiny().train()
        backbone.gradient_checkpointing = saving
        call = backbone.example(2, torch.Generator().manual_seed(0))
        backbone(call.x, call.t, call.y).square().mean().backward()
        found.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert {"text_embedder.embedding_table.weight", "text_embedder.places"} <= found[0].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_blocks_and_heads_compile_as_whole_graphs(model: DynamicDepth) -> None:
    call = model.backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.every_exit(call.x, call.t, call.y)
        compile_parts(model, backend="eager")
        for depth, prediction in model.every_exit(call.x, call.t, call.y).items():
            assert torch.equal(prediction, expected[depth])


def test_its_card_shows_a_prompt(model: DynamicDepth, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "- text-to-image\n" in card
    assert "dyndit.sample(model, labels=['a three'], solver=\"flow-euler\", num_steps=20, cfg_scale=1.5)" in card
    assert dyndit.load(tmp_path).identity == model.identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_the_identity(model: DynamicDepth, dtype: torch.dtype) -> None:
    identity, call = model.identity, model.backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(call.x, call.t, call.y)
        for part in model.children():
            part.to(dtype)
        found = model(call.x.to(dtype), call.t, call.y)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    model.check_identity(identity.backbone, identity.exits, origin="here")
