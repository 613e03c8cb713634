"""Transformers that no adapter knows, described in a few lines: AuraFlow of diffusers, and a user's own module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dyndit
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS, ExitConfig, Exits
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt
from dyndit.plugin.generic import BlockAdapter
from support.aura_flow import aura_flow, one_sequence
from support.models import randomise
from support.tiny_pipelines import TinyPipeline, seeded

SHORT = dyndit.Distill(fit=dyndit.FitConfig(steps=8, batch_size=8, warmup_steps=1))


DESCRIPTION = {
    "blocks": {
        "joint_transformer_blocks": ("encoder_hidden_states", "hidden_states"),
        "single_transformer_blocks": ("hidden_states",),
    },
    "enter": {"single_transformer_blocks": one_sequence},
    "head": ("norm_out", "proj_out"),
    "rows": ("encoder_hidden_states",),
    "timestep_scale": 1000.0,
}


def described(tiny: TinyPipeline, **changes: object) -> BlockAdapter:
    return BlockAdapter(tiny.transformer, **DESCRIPTION | changes)


def random_exits(adapter: BlockAdapter, head: str = "adaln-linear") -> Exits:
    exits = Exits(adapter, ExitConfig(head=head))
    randomise(exits, 3)
    return exits.eval()


@pytest.fixture
def tiny() -> Iterator[TinyPipeline]:
    with torch.no_grad():
        yield aura_flow()


def test_no_adapter_knows_it(tiny: TinyPipeline) -> None:
    with pytest.raises(InputError, match="transformer AuraFlowTransformer2DModel: expected one of"):
        adapt(tiny.transformer)


def test_plans_run_in_its_pipeline(tiny: TinyPipeline) -> None:
    weights = {name: value.clone() for name, value in tiny.transformer.state_dict().items()}
    expected, plain = tiny.run(count=2), tiny.run(count=2, guided=False)
    adapter = described(tiny)
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(adapter), cfg_scale=4.0, adapter=adapter)
    assert torch.equal(tiny.run(count=2), expected)
    assert handle.model.depths == (1, 2, 3, 4)
    handle.plan = full = handle.full_plan()
    assert torch.equal(tiny.run(count=2), expected)
    handle.plan = full.with_steps(steps("1|1", "3|1", "2|4"))
    shallow = tiny.run(count=2)
    assert (shallow - expected).abs().max() > 0.05 * expected.std()
    depths = handle.stats().groupby("branch")["depth"].apply(tuple).to_dict()
    assert depths == {"cond": (1, 3, 2), "uncond": (1, 1, 4)}
    handle.plan = full.with_steps(steps("4") * 3)
    torch.testing.assert_close(tiny.run(count=2), plain, atol=1e-4 * plain.std().item(), rtol=1e-4)
    handle.remove()
    assert torch.equal(tiny.run(count=2), expected)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.transformer.state_dict().items())


def test_branches_of_any_two_depths_equal_separate_calls(tiny: TinyPipeline) -> None:
    adapter, calls = described(tiny), []
    watch = tiny.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny.run(count=2)
    watch.remove()
    inputs = adapter.read(*calls[0][0], **calls[0][1])
    branches = inputs.rows(0, 2), inputs.rows(2, None)
    model = DynamicDepth(adapter, random_exits(adapter)).eval()
    for depths in ((1, 4), (2, 3), (4, 1), (3, 3)):
        for found, branch, depth in zip(model.run(branches, depths), branches, depths, strict=True):
            alone = model.run([branch], [depth])[0]
            torch.testing.assert_close(found, alone, atol=2e-5 * alone.std().item(), rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_new_exits_start_as_the_models_head(tiny: TinyPipeline, head: str) -> None:
    adapter = described(tiny)
    exits = Exits(adapter, ExitConfig(head=head))
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([0.5, 0.5])
    inputs = adapter.read(x, encoder_hidden_states=torch.randn(2, 5, 32), timestep=t)
    state = adapter.embed(inputs.x, inputs.t, inputs.y)
    for index in range(4):
        state = adapter.block(index, state)
    expected = adapter.head(state)
    for depth in exits.layers:
        found = adapter.unpatchify(exits.patches(state, depth), state)
        torch.testing.assert_close(found, expected, atol=1e-6 * expected.std().item(), rtol=1e-6)


def test_exits_are_recorded_and_distilled(tmp_path: Path) -> None:
    tiny = aura_flow()
    adapter = described(tiny)
    with torch.no_grad(), dyndit.record_calls(tiny.pipe, tmp_path / "calls", adapter=adapter) as recording:
        tiny.run(count=2)
    assert (recording.num_calls, recording.num_rows) == (3, 12)
    exits = dyndit.distill_exits(tiny.pipe, tmp_path / "calls", SHORT, tmp_path / "exits", adapter=adapter)
    handle = dyndit.apply_dyndit(tiny.pipe, tmp_path / "exits", cfg_scale=4.0, adapter=adapter)
    assert handle.model.exits.layers == exits.layers == (1, 2, 3)


def test_blocks_may_be_compiled(tiny: TinyPipeline) -> None:
    torch._dynamo.reset()
    expected = tiny.run()
    adapter = described(tiny)
    for block in adapter.block_modules():
        block.compile(backend="eager")
    handle = dyndit.apply_dyndit(tiny.pipe, random_exits(adapter), cfg_scale=4.0, adapter=adapter)
    torch.testing.assert_close(tiny.run(), expected, atol=1e-4 * expected.std().item(), rtol=1e-4)
    handle.plan = handle.full_plan().with_steps(steps("2|1") * 3)
    assert tiny.run().isfinite().all()
    torch._dynamo.reset()


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "a list left out": (
        {"blocks": {"joint_transformer_blocks": ("encoder_hidden_states", "hidden_states")}},
        "do not predict what its own forward does",
    ),
    "returned values in another order": (
        {"blocks": DESCRIPTION["blocks"] | {"joint_transformer_blocks": ("hidden_states", "encoder_hidden_states")}},
        "the described blocks fail",
    ),
    "a value too few": (
        {"blocks": DESCRIPTION["blocks"] | {"joint_transformer_blocks": ("hidden_states",)}},
        "returns 2 values; expected hidden_states",
    ),
    "a part of the head left out": ({"head": ("proj_out",)}, "do not predict what its own forward does"),
    "no way into the second list": ({"enter": {}}, "do not predict what its own forward does"),
    "the list that runs second": (
        {"blocks": {"single_transformer_blocks": ("hidden_states",)}},
        r"the described blocks fail \(KeyError: 'encoder_hidden_states'\)",
    ),
    "another conditioning": ({"cond": "time"}, "blocks get no time with the batch first; expected one of .*temb"),
    "an unknown argument": ({"rows": ()}, "called with encoder_hidden_states, which cannot be combined"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_description_is_refused_at_the_first_call(tiny: TinyPipeline, mistake: str) -> None:
    changes, message = WRONG[mistake]
    adapter = described(tiny, **changes)
    handle = dyndit.apply_dyndit(tiny.pipe, None, adapter=adapter)
    with pytest.raises(InputError, match=message) as found:
        tiny.run()
    assert "\n" not in str(found.value)
    handle.remove()
    tiny.run()


def test_names_that_are_not_there_are_refused(tiny: TinyPipeline) -> None:
    with pytest.raises(InputError, match="has no attribute 'blocks'; expected the names of its block lists and head"):
        described(tiny, blocks={"blocks": ("hidden_states",)})
    with pytest.raises(InputError, match=r"head pos_embed\.proj\.bias: holds no nn\.Linear"):
        described(tiny, head=("pos_embed.proj.bias",))
    with pytest.raises(InputError, match="describes another AuraFlowTransformer2DModel"):
        dyndit.apply_dyndit(aura_flow().transformer, None, adapter=described(tiny))


class Mixer(nn.Module):
    """Somebody's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, tokens: Tensor, cond: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
        return tokens + torch.tanh(self.map(tokens * waves[0] + tokens.mean(1, keepdim=True) + cond[:, None]))


class Mine(nn.Module):
    """Somebody's transformer on packed tokens: no configuration, no text, a table in its head, a plain output."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(4, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Mixer(width) for _ in range(5))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.table = nn.Parameter(torch.zeros(2, width))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        cond = self.time(sigma[:, None])
        tokens, waves = self.enter(x), (torch.ones(x.shape[1], 1), torch.zeros(x.shape[1], 1))
        for block in self.blocks:
            tokens = block(tokens, cond, waves)
        shift, scale = (self.table[None] + cond[:, None]).chunk(2, dim=1)
        return self.out(self.norm(tokens) * (1 + scale) + shift)


def mine(**changes: object) -> tuple[Mine, BlockAdapter]:
    net = seeded(Mine())
    options = {"latents": "x", "timestep": "sigma", "tokens": "tokens", "cond": "cond", "timestep_scale": 1000.0}
    return net, BlockAdapter(net, blocks={"blocks": ("tokens",)}, head=("norm", "table", "out"), **options | changes)


@torch.no_grad()
def test_a_module_of_ones_own() -> None:
    net, adapter = mine()
    x, sigma = torch.randn(3, 6, 4), torch.full((3,), 0.5)
    expected = net(x, sigma)
    handle = dyndit.apply_dyndit(net, random_exits(adapter), adapter=adapter)
    assert torch.equal(net(x, sigma), expected)
    handle.plan = dyndit.DepthPlan.full((500.0,), 5, "", 1.0).with_steps(steps("2"))
    shallow = net(x, sigma)
    assert shallow.shape == expected.shape
    assert not torch.allclose(shallow, expected, atol=1e-2)
    handle.remove()
    assert torch.equal(net(x, sigma), expected)
    assert "forward" not in vars(net)


@torch.no_grad()
def test_rows_inside_other_objects_are_refused() -> None:
    """The positions of every row in a tuple could not lose rows."""
    net, adapter = mine()
    forward = Mine.forward

    class Rowwise(Mine):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            cond, tokens = self.time(sigma[:, None]), self.enter(x)
            waves = (torch.ones(len(x), x.shape[1], 1), torch.zeros(1))
            for block in self.blocks:
                tokens = block(tokens, cond, waves)
            return tokens

    net.__class__ = Rowwise
    assert Mine.forward is forward
    with pytest.raises(InputError, match="block argument waves holds rows in a tuple"):
        adapter.read(torch.randn(2, 6, 4), torch.full((2,), 0.5))
