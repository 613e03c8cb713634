"""Exit heads: where they stand and how they start."""

import pytest
import torch
from torch._dynamo.utils import counters

from dyndit.errors import InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth, compile_parts
from dyndit.models.exits import HEADS, ExitConfig, Exits, default_layers, hidden_ratio

LAYERS = (1, 3, 5)
"""Of 6 blocks: a wide exit, a narrower one, and one without a hidden layer."""


def test_default_layers() -> None:
    assert default_layers(12) == tuple(range(1, 12))
    assert default_layers(16) == tuple(range(1, 16))
    assert default_layers(28) == (4, 8, 12, 16, 20, 24)
    for num_blocks in range(1, 60):
        layers = default_layers(num_blocks)
        assert all(1 <= layer < num_blocks for layer in layers)
        assert len(layers) > 0 or num_blocks == 1


def test_config_is_sorted_and_filled_in() -> None:
    assert ExitConfig((4, 2, 4)).resolved(6) == ExitConfig((2, 4))
    assert ExitConfig().resolved(4) == ExitConfig((1, 2, 3))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ExitConfig((0, 2)), r"exit layers \[0, 2\]: expected depths in 1..5"),
        (ExitConfig((6,)), r"exit layers \[6\]"),
        (ExitConfig((2,), "mlp"), "exit head 'mlp': expected one of adaln-linear, block"),
    ],
)
def test_bad_exits_are_refused(config: ExitConfig, named: str, make_backbone) -> None:
    with pytest.raises(InputError, match=named):
        Exits(make_backbone(), config)


@pytest.mark.parametrize("head", HEADS)
def test_a_fresh_exit_is_the_models_own_final_layer(head: str, make_backbone, make_inputs) -> None:
    backbone = make_backbone()
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(LAYERS, head)))
    assert model.exits.layers == LAYERS
    state = backbone.embed(*make_inputs(backbone))
    with torch.no_grad():
        for depth in range(1, 6):
            state = backbone.block(depth - 1, state)
            if depth in LAYERS:
                assert torch.equal(model.leave(state, depth), backbone.head(state))
                assert model.leave(state, depth).abs().max() > 0.1


@pytest.mark.parametrize("head", HEADS)
def test_training_an_exit_leaves_the_others_alone(head: str, make_model, make_inputs) -> None:
    model = make_model(LAYERS, head)
    model.backbone.requires_grad_(False)
    exits = model.exits
    for depth in LAYERS:
        exits.zero_grad()
        model(*make_inputs(model.backbone), depth=depth).square().sum().backward()
        reached = {name for name, p in exits.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        own = (f"heads.{depth}.", "projection.")  # a shared projection is each exit's own
        assert reached == {name for name, _ in exits.named_parameters() if name.startswith(own)}
        assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_all_of_an_exit_learns(head: str, make_backbone, make_inputs) -> None:
    """Gates and outputs start at zero: the first gradient opens them, the second reaches what is behind."""
    backbone = make_backbone()
    exits = Exits(backbone, ExitConfig(LAYERS, head))
    model, optimizer = DynamicDepth(backbone, exits), torch.optim.SGD(exits.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in exits.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(*make_inputs(backbone), depth=depth).square().mean() for depth in LAYERS).backward()
        optimizer.step()
    assert [name for name, p in exits.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("head", ["shared", "wide"])
def test_exits_compile_by_themselves_at_every_size_of_batch(head: str, make_model, make_inputs) -> None:
    plain, compiled = make_model((), head), make_model((), head)
    torch._dynamo.reset()
    counters.clear()
    compile_parts(compiled, backend="eager")
    with torch.no_grad():
        for batch in (3, 6, 1):
            inputs = make_inputs(plain.backbone, batch)
            for depth in plain.depths:
                found = compiled(*inputs, depth=depth)
                torch.testing.assert_close(found, plain(*inputs, depth=depth), atol=1e-5, rtol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] < 4 * plain.num_blocks
    torch._dynamo.reset()


def test_all_exits_share_one_projection(make_model, make_inputs) -> None:
    model = make_model(LAYERS, "shared")
    names = [name for name in model.exits.state_dict() if ".linear." in name or name.startswith("projection")]
    assert names == ["projection.weight", "projection.bias"]
    inputs = make_inputs(model.backbone)
    with torch.no_grad():
        before = [model(*inputs, depth=depth) for depth in model.depths]
        model.exits.projection.bias.add_(1)
        after = [model(*inputs, depth=depth) for depth in model.depths]
    for old, new in zip(before[:-1], after[:-1], strict=True):
        torch.testing.assert_close(new, old + 1)
    assert torch.equal(after[-1], before[-1])  # the exits', not the model's


@pytest.mark.parametrize("num_blocks", range(2, 40))
def test_wide_exits_narrow_with_depth(num_blocks: int) -> None:
    ratios = [hidden_ratio(depth, num_blocks) for depth in range(1, num_blocks)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == 4
    assert ratios[-1] == 0 or num_blocks < 4
    assert set(ratios) <= {4, 2, 0}


def test_heads_of_the_same_shapes_are_alike(make_backbone) -> None:
    for head in HEADS:
        alike = Exits(make_backbone(), ExitConfig((), head)).alike()
        assert alike == ({1: 1, 2: 1, 3: 3, 4: 3, 5: 5} if head == "wide" else dict.fromkeys(range(1, 6), 1))


class Plain(ClassConditionalDiT):
    """A trunk as a user writes one, with no more than has to be there."""

    exit_projection = None

    def new_exit_block(self):
        raise NotImplementedError


@pytest.mark.parametrize(("head", "named"), [("block", "`new_exit_block`"), ("shared", "`exit_projection`")])
def test_a_backbone_without_the_parts_of_a_head_is_refused(head: str, named: str, make_backbone) -> None:
    backbone = Plain(make_backbone()._config)
    with pytest.raises(InputError, match=f"^exit head '{head}': Plain .*expected {named}$"):
        Exits(backbone, ExitConfig(head=head))
    for other in ("adaln-linear", "wide"):
        assert Exits(backbone, ExitConfig(head=other)).layers == (1, 2, 3, 4, 5)


def test_description_builds_the_same_exits(make_backbone) -> None:
    described = Exits(make_backbone(), ExitConfig((3, 1), "block")).describe()
    assert described == {"layers": (1, 3), "head": "block"}
    assert Exits(make_backbone(), ExitConfig(**described)).describe() == described


def test_the_light_block_is_lighter_than_a_block_of_the_trunk(make_backbone) -> None:
    backbone = make_backbone()
    light, full = backbone.new_exit_block(), backbone.blocks[0]
    weights = [sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (light, full)]
    assert weights == [12 * backbone.width**2, 18 * backbone.width**2]
