"""The class-conditional DiT: its published figures, its parts, its training aids. Parity is in `test_parity.py`."""

import math
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyndit.errors import InputError
from dyndit.models import families
from dyndit.models.base import State
from dyndit.models.dit import CARDS, ClassConditionalDiT, DiTConfig
from dyndit.models.identity import tensors_hash
from dyndit.models.layers import position_features, timestep_features
from support.reference_dit import positions

PARAMETERS = {"S": 33, "B": 130, "L": 458, "XL": 675}  # millions, patch 2
GMACS = {
    ("S", 2): 6.06,
    ("B", 2): 23.01,
    ("L", 2): 80.71,
    ("XL", 2): 118.64,
    ("S", 4): 1.41,
    ("B", 4): 5.56,
    ("L", 4): 19.70,
    ("XL", 4): 29.05,
    ("S", 8): 0.36,
    ("B", 8): 1.42,
    ("L", 8): 5.01,
    ("XL", 8): 7.39,
}


@pytest.mark.parametrize(("size", "patch"), GMACS)
def test_cards_have_the_published_size_and_cost(size: str, patch: int) -> None:
    with torch.device("meta"):
        backbone = ClassConditionalDiT(CARDS[f"DiT-{size}/{patch}"])
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        prediction = backbone(x, t, y)
    assert prediction.shape == (1, 8, 32, 32)
    gmacs = counter.get_total_flops() / 2e9
    assert gmacs == pytest.approx(GMACS[size, patch], rel=0.01, abs=0.01)
    if patch == 2:
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        assert millions == pytest.approx(PARAMETERS[size], rel=0.01, abs=1)


def test_tokens_lie_in_memory_one_after_another(make_inputs) -> None:
    """Blocks keep the order they are given. Another one is slower, and compiled blocks gave NaN for it (torch 2.14)."""
    backbone = ClassConditionalDiT(DiTConfig(8, 2, 1, width=24, num_blocks=1, num_heads=2, num_classes=10))
    state = backbone.embed(*make_inputs(backbone))
    assert state.tokens.is_contiguous()
    assert backbone.block(0, state).tokens.is_contiguous()


def test_a_fresh_model_is_zero_and_its_blocks_are_the_identity(make_inputs) -> None:
    backbone = ClassConditionalDiT(DiTConfig(8, 2, 1, width=24, num_blocks=3, num_heads=2, num_classes=10))
    x, t, y = make_inputs(backbone)
    with torch.no_grad():
        state = backbone.embed(x, t, y)
        for index in range(backbone.num_blocks):
            assert torch.equal(backbone.block(index, state).tokens, state.tokens)
        assert torch.equal(backbone(x, t, y), torch.zeros(3, 2, 8, 8))
    assert state.tokens.std() > 0.1
    assert backbone.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert backbone.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_forward_is_embed_blocks_head(make_backbone, make_inputs) -> None:
    backbone = make_backbone()
    x, t, y = make_inputs(backbone)
    with torch.no_grad():
        state = backbone.embed(x, t, y)
        assert state.tokens.shape == (3, 4, backbone.width)
        assert state.cond.shape == (3, backbone.width)
        for index in range(backbone.num_blocks):
            state = backbone.block(index, state)
        assert torch.equal(backbone.head(state), backbone(x, t, y))


def test_parameter_names_are_the_published_ones(make_backbone) -> None:
    def both(name: str) -> set[str]:
        return {f"{name}.weight", f"{name}.bias"}

    expected = {"pos_embed", "y_embedder.embedding_table.weight"} | both("x_embedder.proj")
    expected |= both("t_embedder.mlp.0") | both("t_embedder.mlp.2")
    expected |= both("final_layer.adaLN_modulation.1") | both("final_layer.linear")
    for i in range(2):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            expected |= both(f"blocks.{i}.{part}")
    assert make_backbone(num_blocks=2).state_dict().keys() == expected


@pytest.mark.parametrize(("side", "width"), [(1, 8), (3, 12), (4, 24)])
def test_positions(side: int, width: int) -> None:
    torch.testing.assert_close(position_features(side, side, width), positions(side, width).float())


def test_positions_of_a_rectangle_are_those_of_its_rows_and_columns() -> None:
    square = position_features(5, 5, 8).view(5, 5, 8)
    assert torch.equal(position_features(3, 5, 8).view(3, 5, 8), square[:3])
    assert torch.equal(position_features(5, 2, 8).view(5, 2, 8), square[:, :2])


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_features(shift: int) -> None:
    t = torch.tensor([0, 1, 17, 500, 999])
    found = timestep_features(t, 256, shift)
    for row, time in enumerate(t.tolist()):
        angles = [time * 10000 ** (-i / (128 - shift)) for i in range(128)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(found[row], expected, atol=3e-4, rtol=0)  # single precision at angles near 1000


def test_timestep_features_are_the_bits_of_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.arange(1000)
    for shift in (0, 1):
        theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
        assert torch.equal(timestep_features(t, 256, shift), theirs)
    assert not torch.equal(timestep_features(t, 256, 0), timestep_features(t, 256, 1))


def test_the_null_label_has_its_own_row(make_backbone, make_inputs) -> None:
    backbone = make_backbone()
    assert len(backbone.y_embedder.embedding_table.weight) == backbone.condition.num_classes + 1
    x, t, y = make_inputs(backbone)
    with torch.no_grad():
        null = backbone(x, t, torch.full_like(y, backbone.condition.null_label))
        assert not torch.allclose(null, backbone(x, t, y), atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient(make_backbone, make_inputs) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone()
        backbone.gradient_checkpointing = checkpointing
        backbone(*make_inputs(backbone)).square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.requires_grad})
    assert gradients[0]["blocks.0.attn.qkv.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gradient_checkpointing_recomputes_the_blocks(make_backbone, make_inputs) -> None:
    backbone = make_backbone()
    calls = []
    backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        backbone.gradient_checkpointing = checkpointing
        calls.clear()
        backbone(*make_inputs(backbone)).sum().backward()
        assert len(calls) == expected


def test_config_builds_the_same_architecture(make_backbone, make_inputs) -> None:
    for name, family in families().items():
        assert family.family == name
    backbone = make_backbone(frequency_shift=1, norm_eps=1e-5, mlp_ratio=2.0)
    twin = type(backbone).from_config(backbone.config())
    twin.load_state_dict(backbone.state_dict())
    inputs = make_inputs(backbone)
    with torch.no_grad():
        assert torch.equal(twin(*inputs), backbone(*inputs))
    assert backbone.config() == asdict(DiTConfig(**backbone.config()))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 9}, "image_size 9"),
        ({"width": 26}, "width 26"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"num_blocks": 0}, "num_blocks 0"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"num_heads": -1}, "num_heads -1"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        DiTConfig(**{"image_size": 8, "width": 24, "num_heads": 2} | changes)


def test_state_rows() -> None:
    state = State(torch.randn(4, 2, 3), torch.randn(4, 3))
    assert state.rows(0, 4) is state
    assert state.rows(0, None) is state
    part = state.rows(1, 3)
    assert torch.equal(part.tokens, state.tokens[1:3])
    assert torch.equal(part.cond, state.cond[1:3])


def test_hash_tells_names_shapes_and_values() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2)}
    base = tensors_hash(tensors)
    assert base == tensors_hash(dict(reversed(tensors.items())))
    assert base == tensors_hash({k: v.half() for k, v in tensors.items()})
    others = [
        {"a": tensors["a"].view(2, 3), "b": tensors["b"]},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
        {"a": tensors["a"] + 1e-6, "b": tensors["b"]},
        {"a": tensors["a"].flip(0), "b": tensors["b"]},
    ]
    assert len({base, *map(tensors_hash, others)}) == 1 + len(others)
