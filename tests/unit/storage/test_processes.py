"""A model's process in every format: a recorded one comes back, a contradiction is refused, an assumption is said."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

import dyndit
from dyndit.cli import main
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.identity import identity_of
from dyndit.plugin.adapters import adapt
from dyndit.plugin.pipeline import DynDiTPipeline
from dyndit.process import DDPM, Process, RectifiedFlow
from dyndit.sampling.loop import noise
from dyndit.sampling.sample import sample
from dyndit.storage import diffusers_folder, official
from dyndit.storage import load as checkpoints
from dyndit.storage.convert import convert
from dyndit.storage.names import match_frequencies
from support.models import TINY, randomise

FLOW = RectifiedFlow()
Write = Callable[[DynamicDepth, Path], Path]


@pytest.fixture
def flow(make_model) -> DynamicDepth:
    """A tiny model of a rectified flow, with exits."""
    model = make_model(layers=(2, 4), learn_variance=False)
    return DynamicDepth(model.backbone, model.exits, process=FLOW).eval()


def native(model: DynamicDepth, out: Path) -> Path:
    checkpoints.save(model, out / "native")
    return out / "native"


def published(model: DynamicDepth, out: Path) -> Path:
    official.write(model, out / "model.pt")
    return out / "model.pt"


def in_diffusers(model: DynamicDepth, out: Path) -> Path:
    diffusers_folder.write(model, out / "transformer")
    return out / "transformer"


def pipeline(model: DynamicDepth, out: Path) -> Path:
    DynDiTPipeline.from_model(model).save_pretrained(out / "pipe")
    return out / "pipe"


FORMATS = pytest.mark.parametrize("write", [native, published, in_diffusers, pipeline])
PROCESSES = pytest.mark.parametrize("process", [DDPM(), DDPM(beta_end=0.01), FLOW], ids=str)


@FORMATS
@PROCESSES
def test_every_format_keeps_the_process(flow: DynamicDepth, tmp_path: Path, write: Write, process: Process) -> None:
    model = DynamicDepth(flow.backbone, flow.exits, process=process).eval()
    path = write(model, tmp_path)
    loaded = checkpoints.inspect(path)
    assert loaded.model.process == process
    assert loaded.model.identity.backbone == model.identity.backbone
    assert not any("process" in note for note in loaded.notes)
    for asked in (process, process.name):
        assert dyndit.load(path, process=asked).process == process
    draw = {"solver": process.usual_solver, "num_steps": 3}
    assert torch.equal(sample(loaded.model, [1, 2], **draw).pictures, sample(model, [1, 2], **draw).pictures)


@FORMATS
@pytest.mark.parametrize(("process", "other"), [(DDPM(), FLOW), (FLOW, DDPM()), (DDPM(), DDPM(beta_end=0.01))], ids=str)
def test_another_process_than_the_recorded_one_is_refused(
    flow: DynamicDepth, tmp_path: Path, write: Write, process: Process, other: Process
) -> None:
    path = write(DynamicDepth(flow.backbone, flow.exits, process=process).eval(), tmp_path)
    with pytest.raises(
        CheckpointError, match=f"made for the process {process}, but --process {other} is asked for"
    ) as e:
        dyndit.load(path, process=other)
    assert path.name in str(e.value)


def test_the_identity_of_ddpm_is_the_trunks_alone_and_others_have_their_own(flow: DynamicDepth) -> None:
    backbone = flow.backbone
    plain = identity_of(backbone.tensors(), json.dumps(backbone.unseen(), sort_keys=True))
    hashes = {p: DynamicDepth(backbone, process=p).identity.backbone for p in (DDPM(), DDPM(beta_end=0.01), FLOW)}
    assert hashes[DDPM()] == plain == backbone.identity()
    assert len(set(hashes.values())) == 3


def test_exits_and_plans_of_one_process_are_not_anothers(flow: DynamicDepth, tmp_path: Path) -> None:
    folder = native(flow, tmp_path)
    assert checkpoints.load_exits(folder / checkpoints.EXITS, flow.backbone, process=FLOW).layers == (2, 4)
    with pytest.raises(CheckpointError, match="exits of backbone"):
        checkpoints.load_exits(folder / checkpoints.EXITS, flow.backbone)


def test_a_transformer_of_a_flow_is_known_in_place(flow: DynamicDepth, tmp_path: Path) -> None:
    """The adapter over the plainly loaded class has the model's process and its identity; exits fit it."""
    folder = in_diffusers(flow, tmp_path)
    transformer = DiTTransformer2DModel.from_pretrained(folder)
    match_frequencies(transformer, 0)
    assert adapt(transformer).usual_process == FLOW
    handle = dyndit.apply_dyndit(transformer, folder, None)
    assert handle.model.process == FLOW
    assert handle.model.identity.backbone == flow.identity.backbone
    assert diffusers_folder.from_diffusers(transformer).process == FLOW
    with pytest.raises(CheckpointError, match="made for the process flow, but --process ddpm"):
        diffusers_folder.from_diffusers(transformer, process="ddpm")


@pytest.mark.parametrize("change", [{"process": {"name": "ddpm"}}, {"process": None}])
def test_an_edited_process_is_refused(flow: DynamicDepth, tmp_path: Path, change: dict[str, object]) -> None:
    path = native(flow, tmp_path) / checkpoints.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="edited"):
        dyndit.load(tmp_path / "native")
    path = in_diffusers(flow, tmp_path) / checkpoints.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_dyndit_process": change["process"]}))
    with pytest.raises(CheckpointError, match="edited"):
        dyndit.load(tmp_path / "transformer")


@pytest.mark.parametrize("found", [{"name": "edm"}, "flow", {"name": "ddpm", "beta_end": 3}, ["flow"]])
def test_an_unknown_process_is_refused(make_backbone, tmp_path: Path, found: object) -> None:
    path = tmp_path / "model.pt"
    torch.save({"ema": make_backbone().state_dict(), "args": {"process": found}}, path)
    with pytest.raises(CheckpointError, match=r"model\.pt: "):
        dyndit.load(path, num_heads=2)
    with pytest.raises(InputError, match="--process edm: expected one of ddpm, flow"):
        dyndit.load(path, num_heads=2, process="edm")


def test_what_says_nothing_is_taken_for_ddpm_and_the_output_says_so(make_backbone, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(make_backbone().state_dict(), path)
    loaded = checkpoints.inspect(path, num_heads=2)
    assert loaded.model.process == DDPM()
    assert loaded.notes[-1] == "model.pt: says no process; ddpm is assumed, --process (or process=) says another"
    asked = checkpoints.inspect(path, num_heads=2, process="ddpm")
    assert not any("process" in note for note in asked.notes)


def test_the_packaged_model_is_ddpms() -> None:
    assert dyndit.load("digits").process == DDPM()
    with pytest.raises(CheckpointError, match=r"digits.*made for the process ddpm, but --process flow is asked for"):
        dyndit.load("digits", process="flow")


# SiT's training script: the tensors of a DiT, a velocity, time from the noise (0) to the picture (1).


@pytest.fixture
def sit() -> ClassConditionalDiT:
    """Its network: ours, called as SiT's code calls its own. Half of the output channels mean nothing."""
    backbone = ClassConditionalDiT(replace(TINY, width=64, num_heads=1, in_channels=4))
    randomise(backbone, 0)
    return backbone.eval()


def saved(backbone: ClassConditionalDiT, path: Path, **args: object) -> Path:
    """A checkpoint as SiT's training script writes it."""
    state = backbone.state_dict()
    torch.save({"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(num_classes=10, **args)}, path)
    return path


SIT = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None}


def test_a_sit_checkpoint_is_a_rectified_flow_in_our_time_and_direction(sit, make_inputs, tmp_path: Path) -> None:
    loaded = checkpoints.inspect(saved(sit, tmp_path / "sit.pt", **SIT))
    model, (x, t, y) = loaded.model, make_inputs(sit)
    assert model.process == FLOW
    assert any("SiT" in note for note in loaded.notes)
    assert not any("assumed" in note for note in loaded.notes)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), -sit(x, 1 - t / 1000, y))
        assert not torch.allclose(model(x, t, y), sit(x, t, y), atol=0.1)
    assert model.identity.backbone != DynamicDepth(sit, process=FLOW).identity.backbone


def test_it_is_sampled_as_sits_own_code_does(sit, tmp_path: Path) -> None:
    """Euler on dx/dt = v(x, t) from t = 0 (noise) to 1, against our flow-euler; exits leave in the same direction."""
    model = dyndit.load(saved(sit, tmp_path / "sit.pt", **SIT))
    steps, labels = 5, torch.tensor([1, 2, 3])
    ours = sample(model, labels.tolist(), solver="flow-euler", num_steps=steps, cfg_scale=1).latents
    x = noise(0, range(3), (4, 8, 8))
    with torch.no_grad():
        for k in range(steps):
            x = x + sit(x, torch.full((3,), k / steps), labels)[:, :4] / steps
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    exits = Exits(model.backbone, ExitConfig((model.num_blocks - 1,)))
    for block in model.backbone.blocks[-1:]:
        block.reset()  # the identity: the exit before it, a copy of the head, is the model
    leaving = DynamicDepth(model.backbone, exits, pixel_space=False, process=FLOW)
    inputs = (x, torch.tensor([10, 500, 900]), labels)
    with torch.no_grad():
        assert torch.equal(leaving(*inputs, depth=model.num_blocks - 1), leaving(*inputs))


def test_raw_weights_are_sits_where_a_flow_is_asked_for(sit, make_inputs, tmp_path: Path) -> None:
    path = tmp_path / "raw.pt"
    torch.save(sit.state_dict(), path)
    loaded = checkpoints.inspect(path, process="flow")
    inputs = make_inputs(sit)
    recorded = dyndit.load(saved(sit, tmp_path / "sit.pt", **SIT))
    with torch.no_grad():
        assert torch.equal(loaded.model(*inputs), recorded(*inputs))
    assert any("SiT's (1 - t / 1000, x_0 - eps)" in note for note in loaded.notes)


@pytest.mark.parametrize("write", [native, published])
def test_its_time_and_direction_travel(sit, make_inputs, tmp_path: Path, write: Write) -> None:
    model, inputs = dyndit.load(saved(sit, tmp_path / "sit.pt", **SIT)), make_inputs(sit)
    again = dyndit.load(write(model, tmp_path))
    assert (again.process, again.identity.backbone) == (FLOW, model.identity.backbone)
    with torch.no_grad():
        assert torch.equal(again(*inputs), model(*inputs))
    with pytest.raises(InputError, match="cannot hold the time and velocity of sit"):
        convert(tmp_path / "sit.pt", tmp_path / "out", "diffusers")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"path_type": "GVP", "prediction": "velocity"}, "path_type 'GVP', prediction 'velocity'; expected 'Linear'"),
        ({"path_type": "Linear", "prediction": "score"}, "prediction 'score'"),
        ({"path_type": "cosine", "prediction": "v"}, "path_type 'cosine', prediction 'v'"),
        ({"path_type": "Linear"}, "prediction None"),
    ],
)
def test_other_interpolants_are_refused(sit, tmp_path: Path, args: dict[str, str], named: str) -> None:
    path = saved(sit, tmp_path / "sit.pt", **args)
    for asked in (None, "flow"):
        with pytest.raises(CheckpointError, match=rf"sit\.pt: args say .*{named}"):
            dyndit.load(path, process=asked)


def test_a_recorded_flow_is_not_sampled_as_noise(sit, tmp_path: Path, capsys) -> None:
    path = saved(sit, tmp_path / "sit.pt", **SIT)
    with pytest.raises(CheckpointError, match=r"sit\.pt: made for the process flow, but --process ddpm is asked for"):
        dyndit.load(path, process="ddpm")
    with pytest.raises(InputError, match="--solver ddim: steps the process ddpm, but this model's is flow"):
        sample(dyndit.load(path), [1], solver="ddim", num_steps=2)
    for verb in ("sample", "convert"):
        target = ["--out", str(tmp_path / "out")] if verb == "sample" else [str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            main([verb, str(path), *target, "--process", "ddpm"])
        assert "made for the process flow, but --process ddpm is asked for" in capsys.readouterr().err
    main(["convert", str(path), str(tmp_path / "out.pt"), "--to", "official", "--process", "flow"])
    assert "the published code would sample its flow as ddpm" in capsys.readouterr().out
