"""Exit heads: where they stand and how they start."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters

from dyndit.cli import verbs
from dyndit.errors import InputError
from dyndit.models.dit import CARDS
from dyndit.models.dynamic import DynamicDepth, compile_parts
from dyndit.models.exits import HEADS, ExitConfig, Exits, default_layers, hidden_ratio
from dyndit.plugin.apply import USUAL_EXITS
from dyndit.recipes import finetune_exits
from dyndit.storage.native import read_exits, write_exits
from dyndit.training.distill import Distill

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


def test_there_is_one_default_head() -> None:
    """In Python, in the recipe for checkpoints, and in `dyndit info`. Exits that are never trained are plain."""
    defaults = [ExitConfig().head, Distill().exits.head, finetune_exits.distill.exits.head]
    defaults.append(inspect.signature(verbs([])["info"]).parameters["head"].default)
    assert defaults == ["wide"] * 4
    assert USUAL_EXITS.head == "adaln-linear"


@pytest.mark.parametrize("head", HEADS)
def test_a_file_of_exits_names_its_head(head: str, make_model, tmp_path: Path) -> None:
    """So another default does not change what a file means."""
    model = make_model((), head)
    write_exits(model.exits, tmp_path / "exits.safetensors", model.identity.backbone)
    with safe_open(tmp_path / "exits.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == {"layers": [1, 2, 3, 4, 5], "head": head}
    assert read_exits(tmp_path / "exits.safetensors", model.backbone).config.head == head


def test_config_is_sorted_and_filled_in() -> None:
    assert ExitConfig((4, 2, 4)).resolved(6) == ExitConfig((2, 4))
    assert ExitConfig().resolved(4) == ExitConfig((1, 2, 3))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ExitConfig((0, 2)), r"exit layers \[0, 2\]: expected depths in 1..5"),
        (ExitConfig((6,)), r"exit layers \[6\]"),
        (ExitConfig((2,), "mlp"), "exit head 'mlp': expected one of adaln-linear, wide, slim$"),
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
        assert reached == {name for name, _ in exits.named_parameters() if name.startswith(f"heads.{depth}.")}
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


@pytest.mark.parametrize("head", HEADS)
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


@pytest.mark.parametrize("num_blocks", range(2, 40))
def test_wide_exits_narrow_with_depth(num_blocks: int) -> None:
    ratios = [hidden_ratio(depth, num_blocks) for depth in range(1, num_blocks)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == 4
    assert ratios[-1] == 0 or num_blocks < 4
    assert set(ratios) <= {4, 2, 0}


def test_slim_exits_are_a_tenth_of_a_backbone() -> None:
    """The exits that plans use on CIFAR-10, against that backbone."""
    backbone = CARDS["cifar10"].build()
    num, wide, slim = (
        sum(p.numel() for p in module.parameters())
        for module in (backbone, *(Exits(backbone, ExitConfig((2, 4, 6, 8), head)) for head in ("wide", "slim")))
    )
    assert slim < 0.1 * num < wide


def test_heads_of_the_same_shapes_are_alike(make_backbone) -> None:
    for head in HEADS:
        alike = Exits(make_backbone(), ExitConfig((), head)).alike()
        assert alike == ({1: 1, 2: 1, 3: 3, 4: 3, 5: 5} if head == "wide" else dict.fromkeys(range(1, 6), 1))


def test_description_builds_the_same_exits(make_backbone) -> None:
    described = Exits(make_backbone(), ExitConfig((3, 1), "wide")).describe()
    assert described == {"layers": (1, 3), "head": "wide"}
    assert Exits(make_backbone(), ExitConfig(**described)).describe() == described
