"""Other people's checkpoints: every way that training code wraps, names and stores the tensors of a DiT."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dyndit
from dyndit.cli import main
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import RectifiedFlow
from dyndit.storage import load as checkpoints
from dyndit.storage.diffusers_folder import to_diffusers
from support.files import refused, same
from support.models import TINY, randomise

Weights = dict[str, Tensor]
WIDE = replace(TINY, width=64, num_heads=1, in_channels=4, num_blocks=3)


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The tensors of a tiny latent DiT whose width tells its heads."""
    backbone = ClassConditionalDiT(WIDE)
    randomise(backbone, 0)
    return backbone.state_dict()


def other(weights: Weights) -> Weights:
    """Weights that differ: what must not be taken by mistake."""
    return {name: tensor + 1 for name, tensor in weights.items()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def saved(data: object, path: Path) -> Path:
    torch.save(data, path)
    return path


def taken(path: Path, expected: Weights, **told: object) -> tuple[str, ...]:
    """The notes of a load that took exactly these weights."""
    loaded = checkpoints.inspect(path, **told)
    assert same(loaded.model.backbone.state_dict(), expected)
    assert loaded.model.num_blocks == WIDE.num_blocks
    return loaded.notes


# Names.


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "ema_model.module."),
        *("model.diffusion_model.", "_orig_mod._fsdp_wrapped_module.", "denoiser.dit."),
    ],
)
def test_prefixes_of_wrappers(prefix: str, weights: Weights, tmp_path: Path) -> None:
    notes = taken(saved(prefixed(weights, prefix), tmp_path / "dit.pt"), weights)
    stripped = next(note for note in notes if "stripped" in note)
    assert all(f"{part}." in stripped for part in prefix.strip(".").split("."))


def test_blocks_compiled_or_wrapped_one_by_one(weights: Weights, tmp_path: Path) -> None:
    renamed = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in weights.items()}
    renamed["x_embedder.module.proj.weight"] = renamed.pop("x_embedder.proj.weight")
    notes = taken(saved(renamed, tmp_path / "dit.pt"), weights)
    assert "dit.pt: stripped _orig_mod. and module. from the names of tensors" in notes
    renamed["blocks.1.attn.qkv.weight"] = weights["blocks.1.attn.qkv.weight"]
    assert "holds blocks.1.attn.qkv.weight twice" in refused(saved(renamed, tmp_path / "dit.pt"))


@pytest.mark.parametrize(
    "place", ["ema", "model_ema", "ema_model", "state_dict", "net", "model", "model_state_dict", "module", "my_network"]
)
def test_nested_state_dicts(place: str, weights: Weights, tmp_path: Path) -> None:
    """Any name of a dict will do, and any depth: the tensors tell."""
    notes = taken(saved({place: weights, "step": 3, "opt": {"state": {}}}, tmp_path / "dit.pt"), weights)
    assert notes[0] == f"dit.pt: training checkpoint, using '{place}'"
    notes = taken(saved({"state": {place: prefixed(weights, "module.")}}, tmp_path / "dit.pt"), weights)
    assert notes[0] == f"dit.pt: training checkpoint, using 'state.{place}.module'" or "stripped" in notes[1]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": other(w), "ema": w},
        lambda w: {"state_dict": other(w), "model_ema": prefixed(w, "module.")},
        lambda w: {"state_dict": prefixed(other(w), "model.") | prefixed(w, "ema_model.")},
        lambda w: prefixed(other(w), "online_model.") | prefixed(w, "ema_model.") | {"initted": torch.ones(1)},
        lambda w: other(w) | {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in w.items()},
    ],
    ids=["published", "average in a wrapper", "lightning", "one flat dict", "an average without dots"],
)
def test_the_average_is_taken_and_the_other_can_be_asked_for(wrap: Callable, weights: Weights, tmp_path: Path) -> None:
    path = saved(wrap(weights), tmp_path / "dit.pt")
    note = taken(path, weights)[0]
    assert "using " in note
    assert "differs, --weights model takes it" in note
    assert same(dyndit.load(path, weights="ema").backbone.state_dict(), weights)
    note = taken(path, other(weights), weights="model")[0]
    assert "differs, --weights ema takes it" in note


def test_several_averages_or_networks(weights: Weights, tmp_path: Path) -> None:
    """The first average is taken; the output says how to ask for each other one, by its key."""
    third = {name: tensor - 1 for name, tensor in weights.items()}
    path = saved({"ema_0.9999": weights, "ema_0.5": third, "student": other(weights)}, tmp_path / "dit.pt")
    (note, *_) = taken(path, weights)
    assert note.split("; ") == [
        "dit.pt: training checkpoint, using 'ema_0.9999'",
        "'ema_0.5' differs, --weights ema_0.5 takes it",
        "'student' differs, --weights model takes it",
    ]
    taken(path, third, weights="ema_0.5")
    taken(path, other(weights), weights="student")
    assert "holds only ema_0.9999, ema_0.5, student; expected" in refused(path, InputError, weights="teacher")


def test_weights_that_are_not_there(weights: Weights, tmp_path: Path) -> None:
    equal = saved({"model": weights, "ema": dict(weights)}, tmp_path / "equal.pt")
    assert "--weights" not in taken(equal, weights)[0]  # it does not matter
    raw = saved(weights, tmp_path / "raw.pt")
    assert "--weights ema" in refused(raw, InputError, weights="ema")
    assert "holds only the tensors without prefix" in refused(raw, InputError, weights="best")
    checkpoints.save(dyndit.load(raw), tmp_path / "native")
    for path in (tmp_path / "native", Path("digits")):
        assert "holds one model" in refused(path, InputError, weights="model")


# Files.


def in_shards(weights: Weights, folder: Path, suffix: str) -> Path:
    folder.mkdir()
    names, stem = sorted(weights), "pytorch_model" if suffix == "bin" else "model"
    weight_map = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: weights[name] for name in names if weight_map[name] == shard}
        torch.save(part, folder / shard) if suffix == "bin" else save_file(part, folder / shard)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix: str, weights: Weights, tmp_path: Path) -> None:
    index = in_shards(prefixed(weights, "module."), tmp_path / "dit", suffix)
    for path in (index, index.parent):  # the index, or the folder that holds nothing else
        assert any("stripped module." in note for note in taken(path, weights))
    shard = next(path for path in index.parent.iterdir() if "-00002-of" in path.name)
    shard.unlink()
    assert f"names '{shard.name}', which is missing" in refused(index)


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.pt", "dit"])
def test_bare_safetensors(name: str, weights: Weights, tmp_path: Path) -> None:
    save_file(prefixed(weights, "ema."), tmp_path / name)
    assert f"{name}: training checkpoint, using 'ema'" in taken(tmp_path / name, weights)


def test_a_folder_with_one_file_of_weights(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "README.md").write_text("A model.")
    assert "holds no config.json" in refused(tmp_path / "dit")
    saved({"ema": weights}, tmp_path / "dit" / "last.ckpt")
    taken(tmp_path / "dit", weights)
    saved({"ema": weights}, tmp_path / "dit" / "best.ckpt")
    assert "holds 2 files of weights, first best.ckpt; expected one" in refused(tmp_path / "dit")


def test_weights_beside_their_config_are_read_as_the_folder(model: DynamicDepth, tmp_path: Path) -> None:
    checkpoints.save(model, tmp_path / "native")
    to_diffusers(model).save_pretrained(tmp_path / "theirs")
    for folder, name in (("native", "model"), ("theirs", "diffusion_pytorch_model")):
        path = tmp_path / folder / f"{name}.safetensors"
        assert checkpoints.load(path).identity.backbone == checkpoints.load(tmp_path / folder).identity.backbone
        path = path.rename(tmp_path / path.name)  # alone, what only the config tells is lost
        assert "expected " in refused(path)
        assert "folder" in refused(path)


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors", "native", "theirs", "index"])
def test_git_lfs_pointers(name: str, weights: Weights, model: DynamicDepth, tmp_path: Path) -> None:
    pointer, path = tmp_path / name, tmp_path / name
    if name == "native":
        checkpoints.save(model, path)
        pointer = path / "model.safetensors"
    elif name == "theirs":
        to_diffusers(model).save_pretrained(path)
        pointer = path / "diffusion_pytorch_model.safetensors"
    elif name == "index":
        path = in_shards(weights, tmp_path / "shards", "safetensors")
        pointer = path.parent / "model-00002-of-00002.safetensors"
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2700000000\n")
    message = refused(path)
    assert f"{pointer}: a Git LFS pointer to 2,700,000,000 bytes, not the weights" in message
    assert "git lfs pull" in message


def test_checkpoints_of_parallel_frameworks_name_the_remedy(tmp_path: Path) -> None:
    for mark, remedy in ((".metadata", "dcp_to_torch_save"), ("latest", "zero_to_fp32.py")):
        folder = tmp_path / remedy
        folder.mkdir()
        (folder / mark).write_bytes(b"global_step3")
        assert remedy in refused(folder)


def test_plain_settings_beside_the_weights(weights: Weights, tmp_path: Path) -> None:
    """Paths, numpy's numbers and namespaces are data; nothing else is unpickled."""
    args = argparse.Namespace(data=Path("data"), more=argparse.Namespace(lr=np.float64(1e-4)))
    taken(saved({"ema": weights, "args": args, "best": np.float64(2.3)}, tmp_path / "dit.pt"), weights)
    assert "of tensors alone (holds " in refused(saved({"ema": weights, "f": ClassConditionalDiT}, tmp_path / "no.pt"))


# Tensors.


def halved(weights: Weights) -> Weights:
    return {name: tensor.half() for name, tensor in weights.items()}


def mixed(weights: Weights) -> Weights:
    return {name: tensor.bfloat16() if "blocks" in name else tensor for name, tensor in weights.items()}


def doubled(weights: Weights) -> Weights:
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (halved, "weights in float16, held in float32"),
        (mixed, "weights in bfloat16, held in float32"),
        (doubled, "weights in float64, rounded to float32"),
    ],
)
def test_precisions(stored: Callable[[Weights], Weights], said: str, weights: Weights, tmp_path: Path) -> None:
    expected = {name: tensor.float() for name, tensor in stored(weights).items()}
    assert f"dit.pt: {said}" in taken(saved(stored(weights), tmp_path / "dit.pt"), expected)


def test_tied_strided_and_expanded_tensors(weights: Weights, tmp_path: Path) -> None:
    """Weights that share memory, are transposed views or repeat one value come in as what they hold."""
    tied = dict(weights)
    tied["blocks.1.attn.qkv.weight"] = tied["blocks.0.attn.qkv.weight"]
    tied["blocks.2.mlp.fc1.weight"] = tied["blocks.2.mlp.fc1.weight"].T.contiguous().T
    tied["blocks.0.attn.proj.bias"] = torch.tensor(0.5).expand(64)
    path = saved({"model": tied, "ema": tied}, tmp_path / "dit.pt")
    taken(path, tied)
    checkpoints.save(dyndit.load(path), tmp_path / "native")
    assert same(dyndit.load(tmp_path / "native").backbone.state_dict(), tied)


# Modules beside the model's own.


def test_heads_of_a_training_trick_are_listed(weights: Weights, tmp_path: Path, capsys) -> None:
    extra = {
        "projectors.0.0.weight": torch.ones(3, 3),
        "projectors.0.2.bias": torch.ones(3),
        "probe.bias": torch.ones(1),
    }
    notes = taken(path := saved({"ema": weights | extra, "vae": {"conv": torch.ones(1)}}, tmp_path / "dit.pt"), weights)
    for line in (
        "projectors.* (2 tensors), no part of a DiT's prediction",
        "probe.* (1 tensors), no part",
        "ignored vae",
    ):
        assert any(line in note for note in notes), line
    main(["convert", str(path), str(tmp_path / "native")])
    assert "ignored projectors.* (2 tensors)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.attn.q_norm.weight", "blocks.0.attn.qkv.weight"),
        ("final_layer.norm.weight", "final_layer.linear.weight"),
        ("decoder_blocks.0.bias", "blocks.0"),
        ("cap_embedder.weight", "embedder"),
        ("mask_token", ""),
        ("feat_rope.freqs_cos", ""),
    ],
)
def test_tensors_that_take_part_in_the_prediction_are_refused(
    name: str, expected: str, weights: Weights, tmp_path: Path
) -> None:
    message = refused(saved(weights | {name: torch.ones(64)}, tmp_path / "dit.pt"))
    assert f"has extra 1 tensors, first {name}; the closest expected is " in message
    assert expected in message.partition("closest expected is ")[2]


def test_a_mismatch_names_the_key_found_and_the_key_expected(weights: Weights, tmp_path: Path) -> None:
    renamed = dict(weights)
    renamed["final_layer.proj.weight"] = renamed.pop("final_layer.linear.weight")
    message = refused(saved(renamed, tmp_path / "dit.pt"))
    assert "missing 'final_layer.linear.weight', the closest found is final_layer.proj.weight" in message
    renamed = dict(weights)
    renamed["blocks.1.attn.to_qkv.bias"] = renamed.pop("blocks.1.attn.qkv.bias")
    message = refused(saved(renamed, tmp_path / "dit.pt"))
    assert "lacks 1 tensors, first blocks.1.attn.qkv.bias; the closest found is blocks.1.attn.to_qkv.bias" in message
    theirs = to_diffusers(DynamicDepth(ClassConditionalDiT(WIDE))).state_dict()
    message = refused(saved(theirs, tmp_path / "dit.pt"))
    assert "has diffusers' names (found pos_embed.proj." in message
    assert "expected x_embedder.proj.weight" in message
    assert "missing 'x_embedder.proj.weight'" in refused(saved({"conv_in.weight": torch.ones(1)}, tmp_path / "unet.pt"))


# Architectures.


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 1},
        {"patch_size": 8, "image_size": 16},
        {"image_size": (8, 16)},
        {"image_size": (16, 4), "patch_size": 4},
        {"learn_variance": False},
        {"in_channels": 16},
        {"mlp_ratio": 2.5},
    ],
    ids=str,
)
def test_shapes_tell_the_architecture(changes: dict, make_inputs, tmp_path: Path) -> None:
    backbone = ClassConditionalDiT(replace(WIDE, **changes)).eval()
    randomise(backbone, 3)
    loaded = checkpoints.load(saved(backbone.state_dict(), tmp_path / "dit.pt"))
    assert loaded.backbone.config() == backbone.config()
    inputs = make_inputs(backbone)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), backbone(*inputs))


def test_learned_positions_are_kept(weights: Weights, tmp_path: Path) -> None:
    learned = weights | {"pos_embed": torch.randn(weights["pos_embed"].shape)}
    path = saved(learned, tmp_path / "dit.pt")
    taken(path, learned)
    with pytest.raises(SystemExit):  # diffusers' class has fixed positions alone
        main(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers"])
    odd = weights | {"pos_embed": torch.randn(1, 5, 64)}
    assert "pos_embed has shape (1, 5, 64), expected (1, 4, 64)" in refused(saved(odd, tmp_path / "odd.pt"))


def test_positions_that_are_not_stored(weights: Weights, tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in weights.items() if name != "pos_embed"}
    assert "lacks the tensor pos_embed" in refused(saved({"ema": without}, tmp_path / "dit.pt"))
    data = {"ema": without, "args": argparse.Namespace(image_size=64, num_classes=10)}  # 8 pixels a latent
    notes = taken(saved(data, tmp_path / "dit.pt"), weights)
    assert any("pos_embed is missing; computed for 2 x 2 patches" in note for note in notes)
    data["args"] = argparse.Namespace(image_size=3, num_classes=10)
    assert "image_size 3" in refused(saved(data, tmp_path / "dit.pt"))


@pytest.mark.parametrize(("classes", "dropout", "told"), [(10, 0.0, False), (10, 0.1, False), (9, 0.1, True)])
def test_with_and_without_a_null_class(classes: int, dropout: float, told: bool, tmp_path: Path) -> None:
    """10 rows of labels are 10 classes, 11 rows are 10 and a null class; `num_classes` says another."""
    backbone = ClassConditionalDiT(replace(WIDE, num_classes=classes, label_dropout=dropout))
    path = saved(backbone.state_dict(), tmp_path / "dit.pt")
    loaded = checkpoints.inspect(path, num_classes=classes if told else None)
    assert loaded.model.backbone.condition.num_classes == classes
    assert loaded.model.backbone.condition.guided == (dropout > 0)
    says = "dit.pt: 10 labels are taken for 10 classes without a null class; --num-classes 9"
    assert any(says in note for note in loaded.notes) == (dropout == 0)
    assert "--num-classes 4" in refused(path, InputError, num_classes=4)
    args = argparse.Namespace(num_classes=classes)
    assert dyndit.load(saved({"ema": backbone.state_dict(), "args": args}, path)).backbone.config() == (
        backbone.config() | {"label_dropout": dropout}
    )


# Processes.


@pytest.mark.parametrize(
    ("scheduler", "process"),
    [
        (diffusers.DDIMScheduler(), "ddpm"),
        (diffusers.DDPMScheduler(beta_end=0.01), "ddpm beta_end=0.01"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "flow time_shift=3.0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), "flow"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0), "flow time_shift=2.0"),
        (diffusers.DDIMScheduler(prediction_type="v_prediction"), "prediction_type 'v_prediction'; expected 'epsilon'"),
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), "beta_schedule 'scaled_linear'; expected 'linear'"),
    ],
)
def test_the_scheduler_of_a_pipeline_tells_its_process(scheduler, process: str, model: DynamicDepth, tmp_path: Path):
    """A transformer that records no process is sampled as its pipeline's scheduler steps; --process says another."""
    to_diffusers(model).save_pretrained(tmp_path / "pipe" / "transformer")
    scheduler.save_pretrained(tmp_path / "pipe" / "scheduler")
    (tmp_path / "pipe" / checkpoints.PIPELINE).write_text(json.dumps({"_class_name": "DiTPipeline"}))
    recorded = dyndit.load(tmp_path / "pipe")
    assert recorded.process == model.process  # what the transformer itself records wins
    config = tmp_path / "pipe" / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({name: v for name, v in settings.items() if name != "_dyndit_process"}))
    if "expected" in process:
        assert process in refused(tmp_path / "pipe")
    else:
        loaded = checkpoints.inspect(tmp_path / "pipe")
        assert str(loaded.model.process) == process
        assert (
            loaded.notes[-1]
            == f"pipe: process {process}, as its {type(scheduler).__name__} says; --process says another"
        )
    assert dyndit.load(tmp_path / "pipe", process="flow").process == RectifiedFlow()


def repa(weights: Weights) -> dict[str, object]:
    """What REPA's training script writes."""
    extra = {"projectors.0.0.weight": torch.ones(3, 64)}
    args = argparse.Namespace(path_type="linear", prediction="v", weighting="uniform", num_classes=10)
    return {"model": weights | extra, "ema": weights | extra, "opt": {}, "args": args, "steps": 400_000}


def test_a_repa_checkpoint_is_a_rectified_flow_in_its_time_and_direction(
    weights: Weights, make_inputs, tmp_path: Path
) -> None:
    network = ClassConditionalDiT(WIDE).eval()
    network.load_state_dict(weights)
    loaded = checkpoints.inspect(saved(repa(weights), tmp_path / "repa.pt"))
    model, (x, t, y) = loaded.model, make_inputs(network)
    assert model.process == RectifiedFlow()
    assert any("REPA's (t / 1000, eps - x_0)" in note for note in loaded.notes)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), network(x, t / 1000, y))
        assert not torch.allclose(model(x, t, y), network(x, t, y), atol=0.1)
    checkpoints.save(model, tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(dyndit.load(tmp_path / "native")(x, t, y), model(x, t, y))
    assert "made for the process flow, but --process ddpm" in refused(tmp_path / "repa.pt", process="ddpm")


@pytest.mark.parametrize(
    "asked", [("flow", "sit"), ("flow:sit", "sit"), ("flow:repa", "repa"), ("flow:timesteps", "timesteps")]
)
def test_raw_weights_say_no_convention(asked: tuple[str, str], weights: Weights, tmp_path: Path) -> None:
    path = saved(weights, tmp_path / "raw.pt")
    notes = checkpoints.inspect(path).notes
    assert notes[-1] == "raw.pt: says no process; ddpm is assumed, --process (or process=) says another"
    loaded = checkpoints.inspect(path, process=asked[0])
    assert loaded.model.backbone.config()["convention"] == asked[1]
    assert ("--process flow:repa or flow:timesteps says another" in loaded.notes[-1]) == (asked[0] == "flow")
    with_projectors = saved(weights | {"projectors.0.weight": torch.ones(1)}, tmp_path / "projectors.pt")
    if asked[0] == "flow":
        assert dyndit.load(with_projectors, process="flow").backbone.config()["convention"] == "repa"


def test_conventions_that_contradict(weights: Weights, model: DynamicDepth, tmp_path: Path) -> None:
    path = saved(repa(weights), tmp_path / "repa.pt")
    assert "args record the convention repa, not sit" in refused(path, process="flow:sit")
    dyndit.load(path, process="flow:repa")
    assert "flow:edm: expected one of flow:timesteps" in refused(path, InputError, process="flow:edm")
    assert "ddpm:sit" in refused(path, InputError, process="ddpm:sit")
    flow = DynamicDepth(model.backbone, process=RectifiedFlow())
    checkpoints.save(flow, tmp_path / "native")
    assert "records timesteps" in refused(tmp_path / "native", InputError, process="flow:sit")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("predict_xstart", True),
        ("noise_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "v_prediction"),
        ("diffusion_steps", 4000),
        ("path_type", "GVP"),
    ],
)
def test_settings_of_another_process_are_refused(option: str, value: object, weights: Weights, tmp_path: Path) -> None:
    for args in (argparse.Namespace(**{option: value}), argparse.Namespace(diffusion={option: value})):
        message = refused(saved({"ema": weights, "args": args}, tmp_path / "dit.pt"))
        assert f"{option} {value!r}" in message
        assert "expected" in message


@pytest.mark.parametrize("key", ["config", "hyper_parameters", "cfg"])
def test_settings_under_other_keys_are_read(key: str, weights: Weights, tmp_path: Path) -> None:
    """The process and the heads, but no type or name is trusted: mlp_ratio may be text there."""
    options = {"transport": {"path_type": "Linear", "prediction": "velocity"}, "mlp_ratio": "4", "num_heads": 2}
    model = dyndit.load(saved({"model": weights, key: options}, tmp_path / "dit.pt"))
    assert (model.process, model.backbone.config()["num_heads"]) == (RectifiedFlow(), 2)
    assert "records 2" in refused(tmp_path / "dit.pt", InputError, num_heads=4)


def test_dicts_that_hold_themselves(weights: Weights, tmp_path: Path) -> None:
    data = {"ema": weights}
    data["self"] = data
    taken(saved(data, tmp_path / "dit.pt"), weights)


def test_settings_of_the_usual_process_pass(weights: Weights, tmp_path: Path) -> None:
    args = {"noise_schedule": "linear", "predict_xstart": False, "prediction_type": "epsilon", "diffusion_steps": 1000}
    data = {"ema": weights, "args": argparse.Namespace(**args, num_classes=10)}
    taken(saved(data, tmp_path / "dit.pt"), weights)
    with pytest.raises(CheckpointError, match="made for"):
        dyndit.load(saved(repa(weights), tmp_path / "repa.pt"), process="ddpm")
