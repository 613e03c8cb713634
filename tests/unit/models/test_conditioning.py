"""What training asks of every way to condition: checkpointed gradients, adapters, and rows that do not mix."""

import pytest
import torch

from dyndit.models.conditioning import CONDITIONINGS
from dyndit.models.dit import DiTConfig
from dyndit.training.lora import with_adapters


@pytest.fixture(params=list(CONDITIONINGS))
def conditioning(request: pytest.FixtureRequest) -> str:
    return request.param


def test_gradient_checkpointing_changes_no_gradient(conditioning: str, make_backbone, make_inputs) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone(conditioning=conditioning)
        backbone.gradient_checkpointing = checkpointing
        backbone(*make_inputs(backbone)).square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name} gets no gradient"
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_adapters_are_on_every_linear_map_but_modulations(conditioning: str, make_backbone, make_inputs) -> None:
    backbone = make_backbone(conditioning=conditioning)
    call = make_inputs(backbone)
    with torch.no_grad():
        before = backbone(*call)
    linears = {name for name, m in backbone.blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    wrapped = with_adapters(backbone, rank=2)
    adapted = {name.removesuffix(".base_layer") for name, _ in backbone.blocks.named_modules() if "base_layer" in name}
    assert adapted == {name for name in linears if "adaLN_modulation" not in name}
    with torch.no_grad():
        assert torch.equal(backbone(*call), before)
    wrapped.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(backbone(*call), before)


def test_rows_leave_the_batch_with_their_own_condition(conditioning: str, make_backbone, make_inputs) -> None:
    """A state cut in the middle goes on as if its rows had been alone."""
    backbone = make_backbone(conditioning=conditioning)
    x, t, y = make_inputs(backbone, batch=4)
    with torch.no_grad():
        state = backbone.block(0, backbone.embed(x, t, y))
        alone = backbone.block(0, backbone.embed(x[1:3], t[1:3], y[1:3]))
        for rows in (state.rows(1, 3), state.take(torch.tensor([1, 2]))):
            for index in range(1, backbone.num_blocks):
                rows = backbone.block(index, rows)
            expected = alone
            for index in range(1, backbone.num_blocks):
                expected = backbone.block(index, expected)
            torch.testing.assert_close(backbone.head(rows), backbone.head(expected), atol=1e-5, rtol=0)


def test_adaln_zero_keeps_its_names_and_the_default_its_repr() -> None:
    names = {n: set(DiTConfig(8, 4, 1, 24, 2, 2, conditioning=n).build().state_dict()) for n in CONDITIONINGS}
    assert names["adaln-zero"] == names["adaln"]
    assert not any("adaLN" in name for name in names["in-context"] | names["cross-attention"])
    assert {name.split(".")[2] for name in names["cross-attention"] - names["in-context"]} == {
        "norm_cross",
        "cross_attn",
    }
    assert DiTConfig().conditioning == "adaln-zero"
