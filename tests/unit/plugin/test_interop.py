"""The plug-in beside everything else that people put on a pipeline: it works, or one line refuses it.

docs/interop.md has a table with a cell per case; each cell names its test.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pandas as pd
import pytest
import torch
from benchmarks.families import GOAL, table
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelGatherHook
from diffusers.models._modeling_parallel import ContextParallelConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dyndit
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt, adapters
from dyndit.plugin.apply import DynDiTHandle
from support.models import randomise
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline, whole

ROOT = Path(__file__).parents[3]
SD3, FLUX, PIXART = "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"
SCALE, TEXTS = 4.0, ("4|4", "3|1", "2+|held")
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=sorted(TINY_PIPELINES))
def tiny(request: pytest.FixtureRequest) -> TinyPipeline:
    return tiny_pipeline(request.param)


def plug(tiny: TinyPipeline) -> DynDiTHandle:
    """The plug-in with random exits; its plan has unequal branches, held guidance and a forecast."""
    exits = Exits(adapt(tiny.transformer), ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    handle = dyndit.apply_dyndit(tiny.pipe, exits.eval(), cfg_scale=SCALE)
    tiny.run()
    handle.plan = handle.full_plan().with_steps(steps(*TEXTS))
    return handle


def expected_of(family: str, **changes: object) -> Tensor:
    """The picture under the plug-in alone."""
    tiny = tiny_pipeline(family)
    plug(tiny)
    return tiny.run(**changes)


def either_way(
    family: str, put_on: Callable[[TinyPipeline], None], *, before: bool
) -> tuple[TinyPipeline, DynDiTHandle]:
    """The plug-in and something else, in this order or the other."""
    tiny = tiny_pipeline(family)
    if before:
        put_on(tiny)
    handle = plug(tiny)
    if not before:
        put_on(tiny)
    return tiny, handle


def refused(run: Callable[[], object], match: str) -> None:
    with pytest.raises(InputError, match=match) as found:
        run()
    assert "\n" not in str(found.value)


def near(found: Tensor, expected: Tensor, room: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=room * expected.std().item(), rtol=room)


BEFORE = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


# Compilation.


@BEFORE
@pytest.mark.parametrize("family", [SD3, FLUX])
def test_blocks_compiled_one_by_one(family: str, before: bool) -> None:
    torch._dynamo.reset()

    def compile_blocks(tiny: TinyPipeline) -> None:
        for block in adapt(tiny.transformer).block_modules():
            block.compile(fullgraph=True, backend="eager")

    tiny, _ = either_way(family, compile_blocks, before=before)
    counters.clear()
    torch._dynamo.reset()
    near(tiny.run(), expected_of(family))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch._dynamo.reset()


@BEFORE
def test_repeated_blocks_compiled_by_diffusers(before: bool) -> None:
    """Of the families that name their repeated blocks."""
    torch._dynamo.reset()
    tiny, _ = either_way(
        FLUX, lambda tiny: tiny.transformer.compile_repeated_blocks(fullgraph=True, backend="eager"), before=before
    )
    near(tiny.run(), expected_of(FLUX))
    torch._dynamo.reset()


def test_compiled_as_a_whole_before_is_refused() -> None:
    tiny = tiny_pipeline(SD3)
    tiny.transformer.compile(backend="eager")
    refused(lambda: plug(tiny), "compiled as a whole")


def test_compiled_as_a_whole_after() -> None:
    """The plug-in is left out of the graph, and the picture is the same at each of several depths."""
    torch._dynamo.reset()
    tiny = tiny_pipeline(SD3)
    handle = plug(tiny)
    plans = (handle.plan, handle.plan.with_steps(steps("4|4", "2|1", "1")))
    expected = []
    for plan in plans:
        handle.plan = plan
        expected.append(tiny.run())
    tiny.transformer.compile(backend="eager")
    for plan, picture in zip(plans, expected, strict=True):
        handle.plan = plan
        near(tiny.run(), picture)
    torch._dynamo.reset()


# Precision and weights.


@BEFORE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tiny: TinyPipeline, dtype: torch.dtype, before: bool) -> None:
    """Predictions are in half precision. Some pipelines keep their latents in single precision between the steps."""
    family, predictions = type(tiny.transformer).__name__, []
    tiny, handle = either_way(family, lambda tiny: tiny.pipe.to(dtype), before=before)
    watch = tiny.transformer.register_forward_hook(lambda *parts: predictions.append(whole(parts[-1])))
    picture = tiny.run()
    watch.remove()
    assert {prediction.dtype for prediction in predictions} == {dtype}
    assert handle.stats()["step"].nunique() == len(TEXTS)
    assert torch.equal(tiny.run(), picture)
    handle.remove()
    assert tiny.run().dtype == picture.dtype


class Int8Linear(nn.Module):
    """A linear map whose weight is kept in eight bits, as quantisers put one in place of `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(tiny: TinyPipeline) -> None:
    for block in adapt(tiny.transformer).block_modules():
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))


@BEFORE
@pytest.mark.parametrize("family", [SD3, FLUX])
def test_quantised_linears(family: str, before: bool) -> None:
    """Other weights: what is bound to the whole ones is refused, what is made for them or unbound runs."""
    tiny, handle = either_way(family, quantise, before=before)
    picture, exact = tiny.run(), expected_of(family)
    assert not torch.equal(picture, exact)
    assert (picture - exact).abs().mean() < 0.1 * exact.std()
    whole = tiny_pipeline(family).transformer
    bound = replace(handle.plan, backbone=adapt(whole).identity())
    refused(lambda: setattr(handle, "plan", bound), "plan: made for backbone")
    handle.plan = replace(handle.plan, backbone=handle.model.identity.backbone)
    assert torch.equal(tiny.run(), picture)


def test_torchao_linears() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def put_on(tiny: TinyPipeline, where: str = "blocks") -> None:
        torchao.quantize_(
            tiny.transformer,
            torchao.Int8WeightOnlyConfig(),
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and where in name,
        )

    for before in (True, False):
        tiny, handle = either_way(SD3, put_on, before=before)
        picture, exact = tiny.run(), expected_of(SD3)
        assert not torch.equal(picture, exact)
        assert (picture - exact).abs().mean() < 0.1 * exact.std()
        bound = replace(handle.plan, backbone=adapt(tiny_pipeline(SD3).transformer).identity())
        refused(lambda handle=handle, bound=bound: setattr(handle, "plan", bound), "backbone")
    tiny = tiny_pipeline(SD3)
    put_on(tiny, "")
    refused(lambda: plug(tiny), "its head is quantised")


def test_a_quantised_head_has_no_copies() -> None:
    tiny = tiny_pipeline(SD3)
    tiny.transformer.proj_out.weight = nn.Parameter(tiny.transformer.proj_out.weight.char(), requires_grad=False)
    refused(lambda: plug(tiny), "its head is quantised; expected")


@BEFORE
@pytest.mark.parametrize("family", [SD3, FLUX])
def test_layerwise_casting(family: str, before: bool) -> None:
    """Weights kept in eight bits are other weights."""

    def cast(tiny: TinyPipeline) -> None:
        tiny.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    tiny, handle = either_way(family, cast, before=before)
    assert not torch.equal(tiny.run(), expected_of(family))
    bound = replace(handle.plan, backbone=adapt(tiny_pipeline(family).transformer).identity())
    refused(lambda: setattr(handle, "plan", bound), "plan: made for backbone")


@BEFORE
def test_fused_projections(before: bool) -> None:
    tiny, _ = either_way(FLUX, lambda tiny: tiny.transformer.fuse_qkv_projections(), before=before)
    near(tiny.run(), expected_of(FLUX))


@pytest.mark.parametrize("family", [SD3, FLUX])
@pytest.mark.parametrize("state", ["loaded", "scaled", "fused", "unloaded"])
def test_lora_before(family: str, state: str) -> None:
    """A plan is bound to the adapters that lay on the transformer, and runs with them."""
    tiny = tiny_pipeline(family)
    plain = tiny.run()
    tiny.transformer.add_adapter(LORA)
    if state == "scaled":
        tiny.transformer.set_adapters("default", 0.5)
    if state == "fused":
        tiny.transformer.fuse_lora()
    if state == "unloaded":
        tiny.transformer.unload_lora()
    whole = tiny.run()
    assert torch.equal(whole, plain) == (state == "unloaded")
    handle = plug(tiny)
    identity = handle.model.identity
    handle.plan = replace(handle.plan, backbone=identity.backbone, exits=identity.exits)
    tiny.run()
    handle.plan = handle.full_plan()
    assert torch.equal(tiny.run(), whole)


# Memory.


def model_offload(tiny: TinyPipeline) -> None:
    tiny.pipe.enable_model_cpu_offload(device="cpu")


def group_offload(tiny: TinyPipeline) -> None:
    cpu = torch.device("cpu")
    tiny.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def leaf_offload(tiny: TinyPipeline) -> None:
    cpu = torch.device("cpu")
    tiny.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")


@pytest.mark.parametrize("put_on", [model_offload, group_offload])
def test_offloading_before_is_refused(put_on: Callable) -> None:
    tiny = tiny_pipeline(SD3)
    put_on(tiny)
    refused(lambda: plug(tiny), "offloaded already|has the hook group_offloading|has the hook lazy")


def test_offloading_leaves_before() -> None:
    tiny, _ = either_way(SD3, leaf_offload, before=True)
    assert torch.equal(tiny.run(), expected_of(SD3))


@pytest.mark.parametrize("put_on", [model_offload, group_offload, leaf_offload])
@pytest.mark.parametrize("family", [SD3, FLUX])
def test_offloading_after(family: str, put_on: Callable) -> None:
    """A bound plan stays bound: moving weights is no change."""
    tiny, handle = tiny_pipeline(family), None
    handle = plug(tiny)
    identity = handle.model.identity
    handle.plan = replace(handle.plan, backbone=identity.backbone, exits=identity.exits)
    put_on(tiny)
    assert torch.equal(tiny.run(), expected_of(family))
    assert torch.equal(tiny.run(), expected_of(family))


# What a pipeline's call says.


@pytest.fixture
def _own_backend() -> Iterator[None]:
    """diffusers sets a backend for the whole process too: put back what other tests had."""
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


@BEFORE
@pytest.mark.parametrize("family", [SD3, FLUX, PIXART])
@pytest.mark.usefixtures("_own_backend")
def test_attention_backends(family: str, before: bool) -> None:
    def put_on(tiny: TinyPipeline) -> None:
        tiny.transformer.set_attention_backend("_native_math")

    tiny, _ = either_way(family, put_on, before=before)
    near(tiny.run(), expected_of(family))


@BEFORE
def test_vae_tiling_and_slicing(before: bool) -> None:
    def put_on(tiny: TinyPipeline) -> None:
        tiny.pipe.vae.enable_tiling()
        tiny.pipe.vae.enable_slicing()

    plain = tiny_pipeline(SD3)
    put_on(plain)
    tiny, handle = either_way(SD3, put_on, before=before)
    tiny.run()
    handle.plan = handle.full_plan()
    assert torch.equal(tiny.run(output_type="pt", count=2), plain.run(output_type="pt", count=2))


@pytest.mark.parametrize("family", [SD3, FLUX])
def test_callbacks(family: str) -> None:
    """They may look, and change latents."""
    tiny, seen = tiny_pipeline(family), []
    plug(tiny)
    plain = tiny.run()

    def look(_: object, step: int, __: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return tensors

    assert torch.equal(tiny.run(callback_on_step_end=look), plain)
    assert seen == [0, 1, 2]
    halved = tiny.run(callback_on_step_end=lambda _, __, ___, tensors: {"latents": tensors["latents"] / 2})
    assert not torch.equal(halved, plain)


@pytest.mark.parametrize("family", [SD3, FLUX, PIXART])
def test_several_pictures_of_a_prompt(family: str) -> None:
    """As many calls of one picture give the same ones."""
    tiny = tiny_pipeline(family)
    plug(tiny)
    name = "num_images_per_prompt"
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = tiny.run(count=1, generator=generators, **{name: 2})
    assert len(both) == 2
    for seed in (0, 1):
        near(both[seed : seed + 1], tiny.run(count=1, generator=[torch.Generator().manual_seed(seed)]), 1e-3)


@pytest.mark.parametrize("family", [SD3, FLUX, PIXART])
def test_negative_prompts(family: str) -> None:
    tiny = tiny_pipeline(family)
    handle = plug(tiny)
    blurry, moon = tiny.run(), tiny.run(negative_prompt=["the moon"])
    assert not torch.equal(blurry, moon)
    handle.plan = handle.plan.with_steps(steps("4", "3", "2"))  # no unconditional pass, no negative prompt
    assert torch.equal(tiny.run(), tiny.run(negative_prompt=["the moon"]))


def test_skip_layer_guidance_is_refused() -> None:
    tiny = tiny_pipeline(SD3)
    plug(tiny)
    refused(
        lambda: tiny.run(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0),
        "called with skip_layers",
    )


def test_scaled_attention_arguments_are_refused() -> None:
    tiny = tiny_pipeline(SD3)
    plug(tiny)
    refused(lambda: tiny.run(joint_attention_kwargs={"scale": 0.5}), "called with joint_attention_kwargs")


# Other hooks.


def test_context_parallelism_after_is_refused() -> None:
    tiny = tiny_pipeline(SD3)
    plug(tiny)
    registry = HookRegistry.check_if_exists_or_initialize(tiny.transformer.proj_out)
    registry.register_hook(
        ContextParallelGatherHook(None, ContextParallelConfig(ulysses_degree=2)), "cp_output---proj_out"
    )
    refused(tiny.run, "has the hook cp_output---proj_out of context parallelism")


def test_context_parallelism_before_is_refused() -> None:
    tiny = tiny_pipeline(SD3)
    registry = HookRegistry.check_if_exists_or_initialize(tiny.transformer)
    registry.register_hook(diffusers.hooks.ModelHook(), "cp_input---")
    refused(lambda: plug(tiny), "has the hook cp_input---")


def test_a_cache_before_is_refused() -> None:
    tiny = tiny_pipeline(FLUX)
    tiny.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    refused(lambda: plug(tiny), "has the cache FirstBlockCacheConfig|has the hook")


# The table.


def test_each_cell_of_the_table_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "interop.md").read_text()
    table = text.split("### Beside everything else")[1].split("\n##")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(rows) > 15
    for row in rows:
        for cell in row.strip("|").split("|")[1:]:
            named = re.findall(r"`(test_\w+)`", cell)
            assert cell.strip() == "–" or (named and re.match(r" (works|refused)", cell)), row
            assert set(named) <= known, f"{row}: no test {set(named) - known}"


def test_the_families_times_in_the_docs_are_the_recorded_ones() -> None:
    rows = pd.read_csv(ROOT / "docs" / "results" / "families" / "times.csv")
    text = (ROOT / "docs" / "interop.md").read_text()
    assert table(rows) in text
    assert set(rows["family"]) == set(adapters())
    assert set(rows["batch_size"]) == {1, 4}
    ((_, date),) = {(row["machine"], row["date"]) for _, row in rows.iterrows()}
    assert date in text
    within = rows["saved_over_promised"].round(2).between(*GOAL)
    assert f"{within.sum()} of {len(within)} lie within {GOAL[0]} to {GOAL[1]}" in text
