"""Models on disk: what was saved comes back bit for bit, and what is damaged or foreign is refused in one line."""

import argparse
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dyndit
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS
from dyndit.models.identity import same as same_identity
from dyndit.plans.plan import bind
from dyndit.storage import load as checkpoints
from dyndit.storage import reading
from dyndit.storage.load import CONFIG, EXITS, WEIGHTS
from support.files import Canary, refused, same

Weights = dict[str, Tensor]


@pytest.fixture
def folder(model: DynamicDepth, tmp_path: Path) -> Path:
    """A native folder, backbone and exits."""
    checkpoints.save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("head", HEADS)
def test_native_round_trip(head: str, make_model, make_inputs, tmp_path: Path) -> None:
    model = make_model((2, 4), head, frequency_shift=1, norm_eps=1e-5, label_dropout=0.2)
    model.pixel_space = False
    checkpoints.save(model, tmp_path / "model")
    found = dyndit.load(tmp_path / "model")
    assert same(found.state_dict(), model.state_dict())
    assert found.backbone.config() == model.backbone.config()
    assert found.exits.config == model.exits.config
    assert (found.pixel_space, found.training) == (False, False)
    assert (found.identity.backbone, found.identity.exits) == (model.identity.backbone, model.identity.exits)
    x, t, y = make_inputs(model.backbone)
    for depth in model.depths:
        assert torch.equal(found(x, t, y, depth=depth), model(x, t, y, depth=depth))
    assert not list((tmp_path / "model").glob(".*"))
    checkpoints.save(found, tmp_path / "deep" / "model")
    checkpoints.save(found, tmp_path / "deep" / "model")  # over itself
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "deep" / "model" / path.name).read_bytes() == path.read_bytes()


def test_tensors_that_hold_their_own_values_repeat_nothing(
    model: DynamicDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MOST_REPEATED", 0)
    torch.save(dict(model.backbone.state_dict()), tmp_path / "dit.pt")
    assert isinstance(reading.read_pickled(tmp_path / "dit.pt"), dict)
    torch.save({"twice": torch.zeros(1).expand(2)}, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match=r"twice\.pt: a tensor of shape \(2,\) repeats 4 bytes"):
        reading.read_pickled(tmp_path / "twice.pt")


@pytest.mark.parametrize("recorded", [{}, {"kind": "A"}, {"kind": 1, "hash": "a", "source": ""}, "text", [1]])
def test_a_record_of_an_autoencoder_is_text_or_refused(recorded: object, tmp_path: Path) -> None:
    assert reading.autoencoder_record(None, tmp_path) is None
    whole = {"kind": "AutoencoderKL", "hash": "aa", "source": "org/name"}
    assert vars(reading.autoencoder_record(whole, tmp_path)) == whole
    with pytest.raises(CheckpointError, match="autoencoder is"):
        reading.autoencoder_record(recorded, tmp_path)


def test_a_model_without_exits(make_backbone, tmp_path: Path) -> None:
    checkpoints.save(DynamicDepth(make_backbone()), tmp_path)
    assert dyndit.load(tmp_path).exits is None


def test_a_trunk_in_half_precision_keeps_its_hash(model: DynamicDepth, make_inputs, tmp_path: Path) -> None:
    checkpoints.save(model, tmp_path / "half", half=True)
    stored = load_file(tmp_path / "half" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    once = dyndit.load(tmp_path / "half")
    assert {p.dtype for p in once.parameters()} == {torch.float32}
    assert once.backbone.checksum() == json.loads((tmp_path / "half" / CONFIG).read_text())["trunk"]
    assert once.backbone.checksum() != model.backbone.checksum()  # rounding changed the weights
    assert same_identity(once.identity.backbone, model.identity.backbone)  # but it is the same model
    assert same(once.exits.state_dict(), model.exits.state_dict())
    inputs = make_inputs(model.backbone)
    torch.testing.assert_close(once(*inputs), model(*inputs), atol=0.05, rtol=0)
    for half in (False, True):
        checkpoints.save(once, tmp_path / f"again-{half}", half=half)
        again = dyndit.load(tmp_path / f"again-{half}")
        assert same(again.state_dict(), once.state_dict())
        assert again.identity == once.identity
        assert again.backbone.checksum() == once.backbone.checksum()


def test_what_is_made_for_a_model_fits_it_in_half_precision(model: DynamicDepth, tmp_path: Path) -> None:
    """And the other way: exits, plans and tables move between the two folders."""
    for name, half in (("whole", False), ("half", True)):
        checkpoints.save(model, tmp_path / name, half=half)
        found = dyndit.load(tmp_path / name)
        plan = dyndit.DepthPlan.full((999, 500), 6, "ddim", cfg_scale=1.5)
        replace(plan, backbone=found.identity.backbone, exits=found.identity.exits).save(
            tmp_path / name / f"plan-{name}.json"
        )
    for source, target in (("whole", "half"), ("half", "whole")):
        for file in (EXITS, f"plan-{source}.json"):
            (tmp_path / target / file).write_bytes((tmp_path / source / file).read_bytes())
        found = dyndit.load(tmp_path / target)
        for name in ("whole", "half"):
            bind(dyndit.DepthPlan.load(tmp_path / target / f"plan-{name}.json"), found)


# The published format.


def training_checkpoint(weights: Weights) -> dict[str, object]:
    """What the published training script writes; `model` differs from `ema` on purpose."""
    return {
        "model": {name: tensor + 1 for name, tensor in weights.items()},
        "ema": weights,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="DiT-XS/4", image_size=8, data_path="somewhere", num_classes=10),
    }


@pytest.mark.parametrize("wrap", [dict, training_checkpoint])
@pytest.mark.parametrize(
    "changes",
    [
        {"width": 64, "num_heads": 1, "mlp_ratio": 2.0},
        {"width": 96, "num_heads": 3, "patch_size": 2, "in_channels": 3, "learn_variance": False},
        {"width": 128, "num_heads": 2, "in_channels": 4, "num_classes": 7, "num_blocks": 2},
    ],
)
def test_published_checkpoints_tell_their_architecture(
    changes: dict, wrap: Callable[[Weights], dict], make_backbone, make_inputs, tmp_path: Path
) -> None:
    backbone = make_backbone(**changes)
    torch.save(wrap(backbone.state_dict()), tmp_path / "dit.pt")
    loaded = checkpoints.inspect(tmp_path / "dit.pt")
    found = loaded.model
    assert found.backbone.config() == backbone.config()
    assert same(found.backbone.state_dict(), backbone.state_dict())
    assert found.pixel_space == (backbone.sample_shape[0] in (1, 3))
    inputs = make_inputs(backbone)
    assert torch.equal(found(*inputs), backbone(*inputs))
    how = "of the card of this width" if changes["width"] == 96 else "64 wide"
    assert loaded.notes[-2] == f"dit.pt: {changes['num_heads']} attention heads, {how}"
    assert (len(loaded.notes) == 3) == (wrap is training_checkpoint)
    checkpoints.save(found, tmp_path / "native")
    assert same(dyndit.load(tmp_path / "native").state_dict(), found.state_dict())


def test_a_training_checkpoint_without_average(make_backbone, tmp_path: Path) -> None:
    backbone = make_backbone(width=64, num_heads=1)
    torch.save({"model": backbone.state_dict()}, tmp_path / "dit.pt")
    loaded = checkpoints.inspect(tmp_path / "dit.pt")
    assert loaded.notes[0] == "dit.pt: training checkpoint, using 'model'"
    assert same(loaded.model.backbone.state_dict(), backbone.state_dict())


def test_heads_that_no_shape_shows(make_backbone, make_inputs, tmp_path: Path) -> None:
    backbone = make_backbone(width=24, num_heads=2)
    torch.save(backbone.state_dict(), tmp_path / "dit.pt")
    assert "--num-heads" in refused(tmp_path / "dit.pt", InputError)
    for bad in (5, 0, -2):
        assert f"--num-heads {bad}" in refused(tmp_path / "dit.pt", InputError, num_heads=bad)
    loaded = checkpoints.inspect(tmp_path / "dit.pt", num_heads=2)
    assert loaded.notes[0] == "dit.pt: 2 attention heads, as given"
    inputs = make_inputs(backbone)
    assert torch.equal(loaded.model(*inputs), backbone(*inputs))
    assert not torch.allclose(dyndit.load(tmp_path / "dit.pt", num_heads=3)(*inputs), backbone(*inputs), atol=1e-4)


@pytest.mark.shared
def test_a_real_checkpoint(cifar10_dit: Path) -> None:
    loaded = checkpoints.inspect(cifar10_dit)
    config = loaded.model.backbone.config()
    expected = {"num_heads": 3, "num_blocks": 12, "width": 192, "patch_size": 4, "num_classes": 10}
    assert {name: config[name] for name in expected} == expected
    assert config["learn_variance"]
    assert (config["in_channels"], config["image_size"]) == (3, 32)
    assert any("3 attention heads" in note for note in loaded.notes)
    with torch.inference_mode():
        prediction = loaded.model(torch.randn(2, 3, 32, 32), torch.tensor([10, 900]), torch.tensor([0, 9]))
    assert prediction.shape == (2, 6, 32, 32)
    # At t = 900 a picture is noise: a trained model sees most of it.
    with torch.inference_mode():
        eps = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        found = loaded.model(eps, torch.full((8,), 990), torch.arange(8))[:, :3]
    assert (found - eps).square().mean() < 0.1


# Bad files. Each is one line.


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_run(zipped: bool, make_backbone, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    contents = {**make_backbone().state_dict(), "more": Canary(canary)}
    if zipped:
        torch.save(contents, tmp_path / "dit.pt")
    else:
        (tmp_path / "dit.pt").write_bytes(pickle.dumps(contents, protocol=2))
    assert "dit.pt: expected a PyTorch checkpoint of tensors alone (holds " in refused(tmp_path / "dit.pt")
    assert not canary.exists()
    if zipped:
        torch.load(tmp_path / "dit.pt", weights_only=False)
        assert canary.exists()  # otherwise the canary is dead


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["dit.pt", WEIGHTS, EXITS, CONFIG])
def test_truncated_empty_and_random_files(name: str, folder: Path, model: DynamicDepth) -> None:
    target = folder if name != "dit.pt" else folder / name
    torch.save(model.backbone.state_dict(), folder / "dit.pt")
    whole = (folder / name).read_bytes()
    generator = random.Random(0)
    broken = [b"", whole[:1], whole[: len(whole) // 2], whole[:-1], b"\x00" * 500, b"PK\x03\x04" + b"\x00" * 100]
    broken += [generator.randbytes(size) for size in (1, 8, 100, 5000)]
    broken += [b"\x80\x02" + generator.randbytes(200) for _ in range(40)]
    if name == CONFIG:
        broken.remove(whole[:-1])  # only a line feed goes
    for contents in broken:
        (folder / name).write_bytes(contents)
        assert name in refused(target, num_heads=2)
    (folder / name).write_bytes(whole)
    checkpoints.load(target, num_heads=2)


@pytest.mark.parametrize("name", [WEIGHTS, EXITS])
def test_a_flipped_bit_is_found(name: str, folder: Path, model: DynamicDepth) -> None:
    """Anywhere in the file: it is refused, or (in the header) it changed nothing at all."""
    whole = (folder / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(1)
    places = [generator.randrange(header) for _ in range(60)]
    places += [header, len(whole) - 1] + [generator.randrange(header, len(whole)) for _ in range(10)]
    num_refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        (folder / name).write_bytes(changed)
        try:
            found = checkpoints.load(folder)
        except CheckpointError as error:
            num_refused += "\n" not in str(error)
        else:
            assert place < header
            assert same(found.state_dict(), model.state_dict())
    assert num_refused > len(places) // 2


def test_a_changed_weight_is_found_without_exits_too(folder: Path) -> None:
    (folder / EXITS).unlink()
    contents = bytearray((folder / WEIGHTS).read_bytes())
    contents[-1] ^= 1
    (folder / WEIGHTS).write_bytes(contents)
    assert "damaged" in refused(folder)


def without(weights: Weights) -> None:
    del weights["blocks.1.attn.qkv.weight"]


def extra(weights: Weights) -> None:
    weights["blocks.1.attn.q_norm.weight"] = torch.ones(12)


def reshaped(weights: Weights) -> None:
    weights["blocks.1.mlp.fc2.bias"] = torch.ones(25)


def other_positions(weights: Weights) -> None:
    weights["pos_embed"] = torch.ones(1, 5, 24)


def no_trunk(weights: Weights) -> None:
    weights.pop("x_embedder.proj.weight")


def scalar(weights: Weights) -> None:
    weights["pos_embed"] = torch.tensor(1.0)


def odd_name(weights: Weights) -> None:
    weights["blocks.first.bias"] = torch.ones(1)


DAMAGE = [without, extra, reshaped, other_positions, no_trunk, scalar, odd_name]


@pytest.mark.parametrize("damage", DAMAGE)
def test_missing_extra_and_reshaped_tensors(damage: Callable[[Weights], None], folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    assert WEIGHTS in refused(folder)
    torch.save(weights, folder / "dit.pt")
    assert "dit.pt" in refused(folder / "dit.pt", num_heads=2)


@pytest.mark.parametrize(
    "contents", [{}, [], None, "text", {"ema": {}}, {"a": 1}, {1: torch.ones(1)}, {"model": {"weight": torch.ones(1)}}]
)
def test_checkpoints_of_something_else(contents: object, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "other.pt")
    assert "other.pt" in refused(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 8),
        ("num_blocks", 4),
        ("num_blocks", -1),
        ("num_blocks", "6"),
        ("width", 48),
        ("width", 24.0),
        ("patch_size", 0),
        ("patch_size", 2),
        ("num_heads", 3),  # shows in no tensor
        ("num_heads", 0),
        ("norm_eps", 1e-5),  # nor this
        ("frequency_shift", 1),  # nor this
        ("num_classes", 11),
        ("learn_variance", False),
        ("depth", 6),
    ],
)
def test_an_edited_architecture_is_refused(field: str, value: object, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["backbone"][field] = value
    (folder / CONFIG).write_text(json.dumps(config))
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("family", "unheard-of"),
        ("family", []),
        ("backbone", None),
        ("backbone", []),
        ("trunk", "0123"),
        ("pixel_space", False),
    ],
)
def test_an_edited_config_is_refused(field: str, value: object, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {field: value}))
    assert str(folder) in refused(folder)
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))
    assert CONFIG in refused(folder)


def test_exits_of_another_trunk(folder: Path, make_model, tmp_path: Path) -> None:
    other = make_model(seed=7)
    checkpoints.save(other, tmp_path / "other")
    (folder / EXITS).write_bytes((tmp_path / "other" / EXITS).read_bytes())
    message = refused(folder)
    assert other.identity.backbone in message
    assert EXITS in message
    (folder / EXITS).unlink()
    assert dyndit.load(folder).exits is None


def test_plans_of_another_trunk(folder: Path, model: DynamicDepth) -> None:
    plan = dyndit.DepthPlan.full((999, 500), 6, "ddim")
    plan.save(folder / "plan-anyone.json")
    replace(plan, backbone=model.identity.backbone).save(folder / "plan-mine.json")
    replace(plan, backbone=f"v1:{model.backbone.checksum()}").save(folder / "plan-of-version-1.json")
    dyndit.load(folder)
    for other in ("0123456789abcdef", "v1:0123456789abcdef"):
        replace(plan, backbone=other).save(folder / "plan-other.json")
        assert f"plan-other.json: made for backbone {other}, but the model's is" in refused(folder)
    (folder / "plan-other.json").write_text("{")
    assert "plan-other.json" in refused(folder)


def test_files_of_another_kind(folder: Path) -> None:
    backbone, exits = (folder / WEIGHTS).read_bytes(), (folder / EXITS).read_bytes()
    (folder / EXITS).write_bytes(backbone)
    assert "expected a dyndit-exits file" in refused(folder)
    (folder / EXITS).write_bytes(exits)
    (folder / WEIGHTS).write_bytes(exits)
    assert WEIGHTS in refused(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"holds no {CONFIG}" in refused(tmp_path / "empty")
    (folder / WEIGHTS).unlink()
    assert "no such file" in refused(folder)
    (folder / WEIGHTS).mkdir()
    assert WEIGHTS in refused(folder)


def test_from_pretrained_takes_no_option_it_would_forget(make_model, tmp_path: Path) -> None:
    checkpoints.save(make_model(), tmp_path)
    dyndit.DynamicDepth.from_pretrained(tmp_path, low_cpu_mem_usage=True, variant=None)
    with pytest.raises(dyndit.InputError, match="option num_head;"):
        dyndit.DynamicDepth.from_pretrained(tmp_path, num_head=2)
