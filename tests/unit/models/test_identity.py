"""Identities: one name for a model in any precision, another for other weights, computed once."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndit.errors import CheckpointError, InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import VERSION_1, Identity, check, identity_of, same, tensors_hash
from support.models import MakeModel

HALVES = {
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16 to float32": lambda t: t.half().float(),
    "bfloat16 to float32": lambda t: t.bfloat16().float(),
    "float16 to bfloat16": lambda t: t.half().bfloat16(),
}
"""By name, what half precision makes of a weight."""


def weights(seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(40, 7, generator=generator) for name in ("a", "b")}


@pytest.mark.parametrize("half", HALVES)
@given(seed=st.integers(0, 9999), scale=st.floats(0.01, 10))
def test_weights_in_half_precision_keep_their_name(half: str, seed: int, scale: float) -> None:
    whole = weights(seed, scale)
    rounded = {name: HALVES[half](tensor) for name, tensor in whole.items()}
    assert same(identity_of(whole), identity_of(rounded))
    assert same(identity_of(rounded), identity_of(whole))


@given(seed=st.integers(0, 9999), scale=st.floats(0.01, 10))
def test_float16_of_bfloat16_is_what_was_bfloat16(seed: int, scale: float) -> None:
    """But need not be what was float32: float16 has fewer bits for the smallest values, so this rounds twice."""
    stored = {name: tensor.bfloat16() for name, tensor in weights(seed, scale).items()}
    assert same(identity_of(stored), identity_of({name: tensor.half() for name, tensor in stored.items()}))


def test_the_two_roundings_are_worth_two_names() -> None:
    """Guard of the test above: one rounding alone would not do."""
    whole = weights()
    both = identity_of(whole).split("+")
    assert len(set(both)) == 2
    straight, through_half = both
    assert identity_of({name: tensor.half() for name, tensor in whole.items()}) == through_half
    assert identity_of({name: tensor.half().float() for name, tensor in whole.items()}) == through_half
    assert identity_of({name: tensor.bfloat16() for name, tensor in whole.items()}) == straight
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in both)


def test_identities_tell_names_shapes_and_values() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2)}
    base = identity_of(tensors)
    assert "+" not in base  # both roundings are exact
    assert base == identity_of(dict(reversed(tensors.items())))
    others = [
        identity_of({"a": tensors["a"].view(2, 3), "b": tensors["b"]}),
        identity_of({"a": tensors["a"], "c": tensors["b"]}),
        identity_of({"a": tensors["a"]}),
        identity_of({"a": tensors["a"] + 0.1, "b": tensors["b"]}),
        identity_of({"a": tensors["a"].flip(0), "b": tensors["b"]}),
        identity_of(tensors, more="{}"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_weights_that_are_not_contiguous_or_need_gradients_are_read() -> None:
    plain = weights()["a"]
    turned = torch.nn.Parameter(plain.T.contiguous().T)
    assert not turned.is_contiguous()
    assert identity_of({"a": turned}) == identity_of({"a": plain})


@given(names=st.lists(st.sampled_from("abcdef"), min_size=2, max_size=4))
def test_two_identities_are_the_same_if_they_share_a_name(names: list[str]) -> None:
    mine, theirs = names[:2], names[2:] or names[:1]
    assert same("+".join(mine), "+".join(theirs)) == bool(set(mine) & set(theirs))


# Of a model.


@pytest.fixture
def counted(model: DynamicDepth, monkeypatch: pytest.MonkeyPatch) -> tuple[DynamicDepth, list[str]]:
    """A model, and a list that grows by each time its backbone's weights are hashed."""
    calls: list[str] = []
    identity: Callable[..., str] = type(model.backbone).identity

    def count(self: object, *args: object, **process: object) -> str:
        calls.append("backbone")
        return identity(self, *args, **process)

    monkeypatch.setattr(type(model.backbone), "identity", count)
    return model, calls


def one_name(one: Identity, other: Identity) -> bool:
    return same(one.backbone, other.backbone) and same(one.exits, other.exits)


def test_a_model_in_half_precision_is_the_same_model(make_model: MakeModel) -> None:
    whole, other = make_model().identity, make_model(seed=1).identity
    for dtype in (torch.bfloat16, torch.float16):
        half = make_model().to(dtype)
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        assert one_name(half.identity, whole)
        assert one_name(half.float().identity, whole)
        assert not same(half.identity.backbone, other.backbone)
        assert not same(half.identity.exits, other.exits)
        half.check_identity(whole.backbone, whole.exits, origin="plan")


def test_a_changed_weight_is_another_model(make_model: MakeModel) -> None:
    whole = make_model().identity
    for part in ("backbone", "exits"):
        model = make_model()
        for parameter in getattr(model, part).parameters():
            was = parameter.data.flatten()[-1].clone()
            parameter.data.flatten()[-1] += 0.5
            found = DynamicDepth(model.backbone, model.exits).identity
            assert not same(getattr(found, part), getattr(whole, part))
            parameter.data.flatten()[-1] = was
        assert one_name(DynamicDepth(model.backbone, model.exits).identity, whole)


def test_what_no_tensor_shows_is_part_of_the_identity(make_model: MakeModel) -> None:
    plain = make_model().identity
    for changes in ({"num_heads": 4}, {"norm_eps": 1e-5}, {"frequency_shift": 1}):
        assert not same(make_model(**changes).identity.backbone, plain.backbone)


def test_an_identity_is_computed_once(counted: tuple[DynamicDepth, list[str]], make_inputs) -> None:
    model, calls = counted
    first = model.identity
    with torch.no_grad():
        model(*make_inputs(model.backbone))
    model(*make_inputs(model.backbone)).sum().backward()
    model.zero_grad()
    model.train().eval().requires_grad_(False).requires_grad_(True)
    model.check_identity(first.backbone, first.exits, origin="plan")
    with torch.inference_mode():
        assert model.identity == first
    assert model.identity == first
    assert calls == ["backbone"]


def in_place(model: DynamicDepth) -> None:
    with torch.no_grad():
        model.backbone.blocks[3].mlp.fc1.weight.mul_(1.5)


def one_value(model: DynamicDepth) -> None:
    with torch.no_grad():
        model.backbone.blocks[3].mlp.fc1.weight[5, 3] += 1


def through_data(model: DynamicDepth) -> None:
    model.backbone.blocks[2].attn.qkv.weight.data += 0.25


def an_optimizers_step(model: DynamicDepth) -> None:
    for parameter in model.backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.backbone.parameters(), lr=0.1).step()


def loaded(model: DynamicDepth) -> None:
    model.backbone.load_state_dict({name: 2 * tensor for name, tensor in model.backbone.state_dict().items()})


def replaced(model: DynamicDepth) -> None:
    model.backbone.final_layer.linear.bias = torch.nn.Parameter(model.backbone.final_layer.linear.bias + 1)


@pytest.mark.parametrize("change", [in_place, one_value, through_data, an_optimizers_step, loaded, replaced])
def test_an_identity_is_computed_again_after_weights_change(
    change: Callable[[DynamicDepth], None], counted: tuple[DynamicDepth, list[str]]
) -> None:
    model, calls = counted
    before = model.identity
    change(model)
    after = model.identity
    assert not same(after.backbone, before.backbone)
    assert same(after.exits, before.exits)
    assert after == DynamicDepth(model.backbone, model.exits).identity
    assert model.identity == after
    assert len(calls) == 3  # before, after, and the fresh model's


def test_exits_that_come_go_and_change_are_seen(make_model: MakeModel) -> None:
    model = make_model()
    before = model.identity
    model.exits.heads["2"].final.linear.weight.data += 1
    changed = model.identity
    assert changed.backbone == before.backbone
    assert not same(changed.exits, before.exits)
    model.exits = None
    assert model.identity == Identity(before.backbone, "")
    model.exits = make_model().exits
    assert model.identity == before


# The check.

OWN = Identity("aa+bb", "cc")


@pytest.mark.parametrize("backbone", ["", "aa", "bb", "aa+bb", "bb+zz"])
@pytest.mark.parametrize("exits", ["", "cc"])
def test_what_is_of_this_model_passes(backbone: str, exits: str) -> None:
    check(OWN, backbone, exits, origin="plan")


@pytest.mark.parametrize(
    ("backbone", "exits", "own", "message"),
    [
        ("zz", "cc", OWN, "plan: made for backbone zz, but the model's is aa+bb"),
        ("aa", "zz", OWN, "plan: made for exits zz, but the model's is cc"),
        ("", "cc", Identity("aa", ""), "plan: made for exits cc, but the model's is absent"),
        ("v1:aa", "", OWN, "plan: made for backbone v1:aa, but the model's is aa+bb"),
    ],
)
def test_what_is_of_another_model_is_refused(backbone: str, exits: str, own: Identity, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check(own, backbone, exits, origin="plan")
    assert str(caught.value) == message


def test_hashes_of_version_1_are_compared_with_exact_checksums(model: DynamicDepth) -> None:
    backbone = f"{VERSION_1}{model.backbone.checksum()}"
    exits = f"{VERSION_1}{tensors_hash(model.exits.state_dict())}"
    for mine in ((backbone, exits), (backbone, ""), ("", exits), (backbone, model.identity.exits)):
        model.check_identity(*mine, origin="plan")
    other = f"{VERSION_1}0123456789abcdef"
    for mine, named in (((other, exits), "backbone"), ((backbone, other), "exits")):
        with pytest.raises(CheckpointError, match=f"^p.json: made for {named} {other}, but the model's is "):
            model.check_identity(*mine, origin="p.json", error=CheckpointError)
    model.check_identity("", "", origin="plan")
    model.exits = None
    with pytest.raises(InputError, match=f"made for exits {exits}, but the model's is absent"):
        model.check_identity(backbone, exits, origin="plan")


def test_a_checksum_sees_what_an_identity_rounds_off(model: DynamicDepth) -> None:
    identity, checksum = model.identity, model.backbone.checksum()
    weight = model.backbone.blocks[0].attn.qkv.weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(10.0))
    assert model.backbone.checksum() != checksum
    assert same(DynamicDepth(model.backbone).identity.backbone, identity.backbone)
