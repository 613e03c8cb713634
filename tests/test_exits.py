"""Exit heads: where they stand and how they start."""

import pytest
import torch

from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError
from dyndit.exits import HEADS, ExitConfig, Exits, default_layers


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
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig((2, 4), head)))
    assert model.exits.layers == (2, 4)
    state = backbone.embed(*make_inputs(backbone))
    with torch.no_grad():
        for depth in range(1, 5):
            state = backbone.block(depth - 1, state)
            if depth in (2, 4):
                assert torch.equal(model.leave(state, depth), backbone.head(state))
        assert not torch.equal(model.leave(state, 2), torch.zeros(1))


def test_training_an_exit_leaves_the_others_alone(make_backbone, make_inputs) -> None:
    backbone = make_backbone().requires_grad_(False)
    exits = Exits(backbone, ExitConfig((2, 4)))
    model = DynamicDepth(backbone, exits)
    model(*make_inputs(backbone), depth=2).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in exits.heads["2"].parameters())
    assert all(p.grad is None for p in exits.heads["4"].parameters())
    assert all(p.grad is None for p in backbone.parameters())


def test_the_light_block_learns(make_backbone, make_inputs) -> None:
    """Its gates start at zero: the first gradient opens them, the second reaches what is behind."""
    backbone = make_backbone()
    exits = Exits(backbone, ExitConfig((2,), "block"))
    model, optimizer = DynamicDepth(backbone, exits), torch.optim.SGD(exits.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in exits.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(*make_inputs(backbone), depth=2).square().mean().backward()
        optimizer.step()
    assert [name for name, p in exits.named_parameters() if torch.equal(p, before[name])] == []


def test_description_builds_the_same_exits(make_backbone) -> None:
    described = Exits(make_backbone(), ExitConfig((3, 1), "block")).describe()
    assert described == {"layers": (1, 3), "head": "block"}
    assert Exits(make_backbone(), ExitConfig(**described)).describe() == described


def test_the_light_block_is_lighter_than_a_block_of_the_trunk(make_backbone) -> None:
    backbone = make_backbone()
    light, full = backbone.new_exit_block(), backbone.blocks[0]
    weights = [sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (light, full)]
    assert weights == [12 * backbone.width**2, 18 * backbone.width**2]
