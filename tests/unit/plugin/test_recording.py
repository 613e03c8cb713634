"""Recording the calls that pipelines make of their transformers, and distilling exits on them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dyndit
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.conditions import Conditioning
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plugin.adapters import adapt
from dyndit.plugin.recording import record_calls
from dyndit.sampling.loop import noise
from dyndit.sampling.sample import sample
from dyndit.sampling.solvers import timesteps_of
from dyndit.storage import load as checkpoints
from dyndit.training.borrowed import borrowed
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.losses import exit_errors
from dyndit.training.recorded import RecordedCalls, Recording, record_sampling
from support import tiny_pipelines
from support.tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline

FAMILIES = sorted(TINY_PIPELINES)
SHORT = FitConfig(steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, seed=1, flip=False)
DIT = "DiTTransformer2DModel"


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def condition(module: nn.Module) -> tuple:
    """All of a borrowed module that is to come back."""
    flags = [p.requires_grad for p in module.parameters()]
    modes = [m.training for m in module.modules()]
    devices = [t.device for t in (*module.parameters(), *module.buffers())]
    attributes = [sorted(m.__dict__) for m in module.modules()]
    return flags, modes, devices, attributes


def recorded(tiny: TinyPipeline, out: Path, **changes: object) -> RecordedCalls:
    with record_calls(tiny.pipe, out):
        tiny.run(**{"count": 2} | changes)
    return RecordedCalls(out)


def whole(calls: RecordedCalls) -> Inputs:
    """All rows as one batch, as a loader makes it."""
    rows = [calls[i] for i in range(len(calls))]
    return calls.inputs(
        torch.stack([x for x, _ in rows]), {n: torch.stack([row[n] for _, row in rows]) for n in rows[0][1]}
    )


def mean_errors(transformer: nn.Module, exits: Exits, calls: RecordedCalls) -> Tensor:
    """Mean error of each exit on the noise over all rows."""
    inputs = whole(calls)
    with torch.no_grad():
        errors = exit_errors(DynamicDepth(adapt(transformer), exits), inputs.x, inputs.t, inputs.y)
    return torch.stack([error[:, 0].mean() for error in errors.values()])


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_is_recorded_as_it_was_made(family: str, guided: bool, tmp_path: Path) -> None:
    """The recorded rows give the very predictions that the transformer gave, and nothing else is changed."""
    tiny = tiny_pipeline(family)
    predictions: list[Tensor] = []
    watch = tiny.transformer.register_forward_hook(
        lambda *parts: predictions.append(tiny_pipelines.whole(parts[-1]).clone())
    )
    before, state = weights(tiny.transformer), condition(tiny.transformer)
    plain = tiny.run(guided=guided, count=2)
    predictions.clear()
    attributes = set(tiny.transformer.__dict__)
    with record_calls(tiny.pipe, tmp_path) as recording:
        assert torch.equal(tiny.run(guided=guided, count=2), plain)
    watch.remove()
    state_after = condition(tiny.transformer)
    assert state_after[:3] == state[:3]
    assert same(weights(tiny.transformer), before)
    assert set(tiny.transformer.__dict__) == attributes
    assert not tiny.transformer._forward_pre_hooks
    assert not tiny.transformer._forward_hooks

    separate = guided and adapt(tiny.transformer).guidance == "calls"
    num_calls, rows = (2 if separate else 1) * tiny.num_steps, 4 if guided and not separate else 2
    assert (recording.num_calls, recording.num_rows) == (num_calls, num_calls * rows)
    assert len(list(tmp_path.iterdir())) == num_calls == len(predictions)

    calls = RecordedCalls(tmp_path)
    assert len(calls) == num_calls * rows
    inputs, adapter = whole(calls), adapt(tiny.transformer)
    assert len(inputs.t.unique()) == tiny.num_steps
    with torch.no_grad():
        for number, prediction in enumerate(predictions):
            part = inputs.rows(number * rows, (number + 1) * rows)
            assert torch.equal(adapter(part.x, part.t, part.y), prediction)
    assert not torch.allclose(predictions[0], predictions[-1])


def test_a_folder_is_added_to(tmp_path: Path) -> None:
    tiny = tiny_pipeline(DIT)
    first = recorded(tiny, tmp_path)
    (tmp_path / ".writing-call-000003.safetensors").write_bytes(b"half a file")
    again = recorded(tiny, tmp_path, seed=5)
    assert len(again) == 2 * len(first) == 2 * 3 * 4
    assert not list(tmp_path.glob(".writing*"))
    assert again.fingerprint != first.fingerprint
    assert torch.equal(again[0][0], first[0][0])
    assert not torch.equal(again[len(first)][0], first[0][0])


def test_the_fingerprint_is_the_content_s(tmp_path: Path) -> None:
    tiny = tiny_pipeline(DIT)
    one, other = recorded(tiny, tmp_path / "a"), recorded(tiny, tmp_path / "b")
    assert one.fingerprint == other.fingerprint
    assert recorded(tiny, tmp_path / "c", seed=1).fingerprint != one.fingerprint
    assert not one.can_flip


def test_rows_beyond_the_last_are_refused(tmp_path: Path) -> None:
    calls = recorded(tiny_pipeline(DIT), tmp_path)
    for index in (-1, len(calls)):
        with pytest.raises(IndexError):
            calls[index]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    tiny = tiny_pipeline(DIT)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"), record_calls(tiny.pipe, tmp_path):
        pass
    assert (tmp_path / "notes.txt").exists()
    assert not tiny.transformer._forward_pre_hooks
    with pytest.raises(InputError, match="no recorded call"):
        RecordedCalls(tmp_path / "nowhere")


def test_another_trunk_s_folder_is_refused(tmp_path: Path) -> None:
    recorded(tiny_pipeline(DIT), tmp_path)
    for other in (tiny_pipeline(DIT, 1), tiny_pipeline("SD3Transformer2DModel")):
        with pytest.raises(InputError, match="expected another folder"), record_calls(other.pipe, tmp_path):
            pass


def test_hooks_come_off_when_the_pipeline_fails(tmp_path: Path) -> None:
    tiny = tiny_pipeline(DIT)
    with pytest.raises(IndexError), record_calls(tiny.pipe, tmp_path):
        tiny.run(class_labels=[5000])
    assert not tiny.transformer._forward_pre_hooks


def test_every_call_of_an_offloaded_pipeline_is_recorded(tmp_path: Path) -> None:
    """Such a pipeline takes hooks on its models' forward off, and puts its own on again, after every call."""
    tiny = tiny_pipeline(DIT)
    tiny.pipe.enable_model_cpu_offload(device="cpu")
    with record_calls(tiny.pipe, tmp_path) as recording:
        for seed in range(3):
            tiny.run(seed=seed)
    assert recording.num_calls == 3 * tiny.num_steps
    plain = tiny.run()
    assert recording.num_calls == 3 * tiny.num_steps
    tiny.pipe.remove_all_hooks()
    assert torch.equal(tiny.run(), plain)


def test_recording_twice_at_once_is_refused(tmp_path: Path) -> None:
    tiny = tiny_pipeline(DIT)
    nested = record_calls(tiny.pipe, tmp_path / "b")
    with record_calls(tiny.pipe, tmp_path / "a") as recording:
        with pytest.raises(InputError, match="already"), nested:
            pass
        tiny.run()
    assert recording.num_calls == tiny.num_steps


def test_calls_of_another_resolution_are_refused(tmp_path: Path) -> None:
    tiny = tiny_pipeline("SD3Transformer2DModel")
    recorded(tiny, tmp_path)
    with pytest.raises(InputError, match=r"call-000003\.safetensors: x F32 \[4, 8, 8\], but F32 \[4, 8, 12\]") as found:
        recorded(tiny, tmp_path, width=16)
    assert "\n" not in str(found.value)


def test_calls_with_other_shared_arguments_are_refused(tmp_path: Path) -> None:
    """Packed tokens of 8 x 12 and of 12 x 8 latents have one shape; only the shared positions tell them apart."""
    tiny = tiny_pipeline("FluxTransformer2DModel")
    recorded(tiny, tmp_path)
    with pytest.raises(InputError, match="img_ids tensor") as found:
        recorded(tiny, tmp_path, height=24, width=16)
    assert "\n" not in str(found.value)


def test_calls_with_and_without_an_argument_are_refused(tmp_path: Path) -> None:
    tiny = tiny_pipeline("PixArtTransformer2DModel")
    recorded(tiny, tmp_path)
    path = sorted(tmp_path.iterdir())[1]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["rows.resolution"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match="resolution absent"):
        RecordedCalls(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "foreign", "unnamed"])
def test_a_damaged_call_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    recorded(tiny_pipeline(DIT), tmp_path)
    path = tmp_path / "call-000001.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "foreign":
        save_file({"x": torch.zeros(2, 4)}, path)
    else:
        metadata = {"format": "dyndit-call", "version": "1", "call": json.dumps({"family": "?"})}
        save_file({"x": torch.zeros(2, 4)}, path, metadata=metadata)
    with pytest.raises(InputError, match=r"call-000001\.safetensors") as found:
        RecordedCalls(tmp_path)
    assert "\n" not in str(found.value)


def test_what_no_file_holds_is_refused(tmp_path: Path) -> None:
    recording = Recording.open(tmp_path, adapt(tiny_pipeline(DIT).transformer))
    x, rows = torch.zeros(2, 4), {"prompt": torch.zeros(2, 3)}
    good = Inputs(x, torch.zeros(2), Conditioning(rows, {"flag": True, "ids": torch.arange(3)}))
    recording.write(good)
    calls = RecordedCalls(tmp_path)
    assert whole(calls).y["flag"] is True
    assert torch.equal(whole(calls).y["ids"], torch.arange(3))
    with pytest.raises(InputError, match="called with flag of type object"):
        recording.write(replace(good, y=Conditioning(rows, {"flag": object()})))
    with pytest.raises(InputError, match="3 rows of prompt, expected 2"):
        recording.write(replace(good, y=Conditioning({"prompt": torch.zeros(3, 3)})))
    assert recording.num_calls == len(list(tmp_path.iterdir())) == 1


def test_our_own_sampling_is_recorded(make_model, tmp_path: Path) -> None:
    """States from the sampler itself: the noise to begin with, both branches' labels, every timestep."""
    model, labels = make_model(layers=(2,)), [1, 4, 4]
    options = {"num_steps": 3, "cfg_scale": 2.0, "batch_size": 2, "seed": 7}
    drawn = record_sampling(model, labels, tmp_path, **options)
    assert torch.equal(drawn.pictures, sample(model, labels, **options).pictures)
    calls = RecordedCalls(tmp_path)
    inputs = whole(calls)
    assert len(calls) == 3 * 4 + 3 * 2
    assert sorted(inputs.t.unique().tolist()) == sorted(timesteps_of("ddim", 3))
    assert torch.equal(inputs.x[:2], noise(7, [0, 1], (1, 8, 8)))
    assert torch.equal(inputs.x[:2], inputs.x[2:4])
    null = model.backbone.condition.null_label
    assert inputs.y.tolist() == [1, 4, null, null] * 3 + [4, null] * 3
    assert (calls.family, calls.backbone) == ("class_conditional", model.identity.backbone)


def test_exits_of_our_own_models_are_distilled_on_recorded_calls(make_model, tmp_path: Path) -> None:
    model = DynamicDepth(make_model(width=48, num_blocks=4).backbone)
    record_sampling(model, list(range(10)) * 2, tmp_path / "calls", num_steps=5)
    calls = RecordedCalls(tmp_path / "calls")
    recipe = Distill(ExitConfig(), replace(SHORT, steps=150, batch_size=32))
    fresh = Exits(model.backbone, ExitConfig())
    trained, _ = recipe.run(model, calls, tmp_path / "exits")
    inputs = whole(calls)
    with torch.no_grad():
        before, after = (
            torch.stack([e[:, 0].mean() for e in exit_errors(m, inputs.x, inputs.t, inputs.y).values()])
            for m in (DynamicDepth(model.backbone, fresh), trained)
        )
    assert (after < 0.5 * before).all()


@pytest.mark.parametrize("training", [True, False])
def test_distillation_borrows_the_transformer(training: bool, tmp_path: Path) -> None:
    """The errors fall by half, and the transformer is in every way what it was."""
    tiny = tiny_pipeline(DIT)
    calls = recorded(tiny, tmp_path / "calls", count=8)
    tiny.transformer.train(training)
    tiny.transformer.transformer_blocks[1].train(not training)
    tiny.transformer.proj_out_2.requires_grad_(False)
    before, state = weights(tiny.transformer), condition(tiny.transformer)
    assert {*state[0]} == {True, False}

    recipe = Distill(ExitConfig(), replace(SHORT, steps=150, batch_size=16))
    exits = dyndit.distill_exits(tiny.pipe, tmp_path / "calls", recipe, tmp_path / "exits")
    assert condition(tiny.transformer) == state
    assert same(weights(tiny.transformer), before)
    assert all(p.grad is None for p in tiny.transformer.parameters())

    with borrowed(tiny.transformer):
        fresh = Exits(adapt(tiny.transformer), ExitConfig())
        assert (mean_errors(tiny.transformer, exits, calls) < 0.5 * mean_errors(tiny.transformer, fresh, calls)).all()
    path = tmp_path / "exits" / checkpoints.EXITS
    assert same(weights(checkpoints.load_exits(path, adapt(tiny.transformer))), weights(exits))
    with pytest.raises(InputError, match="exits of backbone"):
        checkpoints.load_exits(path, adapt(tiny_pipeline(DIT, 1).transformer))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != DIT])
def test_every_family_is_distilled(family: str, tmp_path: Path) -> None:
    tiny = tiny_pipeline(family)
    calls = recorded(tiny, tmp_path / "calls")
    state = condition(tiny.transformer)
    exits = dyndit.distill_exits(tiny.transformer, calls, Distill(fit=SHORT), tmp_path / "exits")
    assert condition(tiny.transformer) == state
    fresh = Exits(adapt(tiny.transformer), ExitConfig())
    after, before = (mean_errors(tiny.transformer, e, calls) for e in (exits, fresh))
    assert (after < 0.8 * before).all()


def test_a_transformer_in_half_precision_gets_exits_in_single(tmp_path: Path) -> None:
    """Small steps of the optimiser would be lost in half precision."""
    tiny = tiny_pipeline(DIT)
    tiny.pipe.to(torch.bfloat16)
    calls = recorded(tiny, tmp_path / "calls", count=4)
    assert calls[0][0].dtype == torch.bfloat16
    exits = dyndit.distill_exits(tiny.pipe, calls, Distill(fit=replace(SHORT, steps=100)), tmp_path / "exits")
    assert {p.dtype for p in exits.parameters()} == {torch.float32}
    assert {p.dtype for p in tiny.transformer.parameters()} == {torch.bfloat16}
    fresh = Exits(adapt(tiny.transformer), ExitConfig())
    after, before = (mean_errors(tiny.transformer, e.bfloat16(), calls) for e in (exits, fresh))
    assert (after < 0.5 * before).all()


def test_distillation_goes_on_on_the_same_calls_only(tmp_path: Path) -> None:
    tiny, recipe = tiny_pipeline(DIT), Distill(fit=replace(SHORT, steps=3))
    calls = recorded(tiny, tmp_path / "calls")
    first = dyndit.distill_exits(tiny.pipe, calls, recipe, tmp_path / "exits")
    again = dyndit.distill_exits(tiny.pipe, calls, recipe, tmp_path / "exits")
    assert same(weights(first), weights(again))
    more = recorded(tiny, tmp_path / "calls", seed=9)
    with pytest.raises(InputError, match="made with the data"):
        dyndit.distill_exits(tiny.pipe, more, recipe, tmp_path / "exits")


def test_another_trunk_s_calls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(tiny_pipeline(DIT), tmp_path / "calls")
    with pytest.raises(InputError, match="calls of"):
        dyndit.distill_exits(tiny_pipeline(DIT, 1).pipe, calls, out=tmp_path / "exits")
    # Of a backbone too large to be hashed at each recording the family alone is known.
    monkeypatch.setattr("dyndit.training.recorded.MOST_HASHED", 10)
    calls = recorded(tiny_pipeline(DIT), tmp_path / "large")
    assert calls.backbone == ""
    calls.check(DynamicDepth(adapt(tiny_pipeline(DIT, 1).transformer)))
    with pytest.raises(InputError, match="calls of DiTTransformer2DModel, but the model is SD3"):
        calls.check(DynamicDepth(adapt(tiny_pipeline("SD3Transformer2DModel").transformer)))
    assert not (tmp_path / "exits").exists()


def test_a_trunk_comes_back_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module[1].eval()
    module[0].bias.requires_grad_(False)
    state = condition(module)

    def fail() -> None:
        with borrowed(module):
            assert not any(p.requires_grad for p in module.parameters())
            assert not module.training
            module(torch.zeros(1, 3))

    with pytest.raises(RuntimeError, match="shapes"):
        fail()
    assert condition(module) == state


def test_a_copied_folder_is_the_same_data(tmp_path: Path) -> None:
    calls = recorded(tiny_pipeline(DIT), tmp_path / "calls")
    shutil.copytree(tmp_path / "calls", tmp_path / "copy")
    assert RecordedCalls(tmp_path / "copy").fingerprint == calls.fingerprint
