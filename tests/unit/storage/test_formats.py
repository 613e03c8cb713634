"""Foreign formats: what goes through them comes back byte for byte; what they cannot hold is refused in one line."""

import argparse
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dyndit
from dyndit.analysis.report.card import card_extras
from dyndit.cli import main
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.plans.step import steps
from dyndit.plans.table import ShiftTable
from dyndit.plugin.adapters import adapt
from dyndit.storage import card as model_card
from dyndit.storage import contents, diffusers_folder, official
from dyndit.storage import load as checkpoints
from dyndit.storage.convert import convert
from dyndit.storage.diffusers_folder import WEIGHTS, from_diffusers, to_diffusers
from dyndit.storage.names import FREQUENCY_SHIFT, frequency_shift_of, match_frequencies
from dyndit.storage.pretrained import DynamicDepth
from support.files import Canary, refused, same
from support.models import TINY, randomise
from support.tables import random_table

SAFE = f"{WEIGHTS}.safetensors"
CONFIGS = [
    {},
    {"frequency_shift": 1, "mlp_norm_eps": 1e-5},
    {"width": 48, "num_heads": 4, "in_channels": 4, "num_classes": 3, "patch_size": 2, "learn_variance": False},
]


def same_model(a: DynamicDepth, b: DynamicDepth) -> bool:
    """Tensors, whatever no tensor shows, exits and the kind of picture."""
    alike = same(a.state_dict(), b.state_dict()) and a.backbone.config() == b.backbone.config()
    return alike and (a.identity, a.pixel_space) == (b.identity, b.pixel_space)


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def fail_to_convert(source: Path, target: Path, capsys, *more: str) -> str:
    """The one line with which `dyndit convert` refuses, having written nothing."""
    beside = sorted(target.parent.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(source), str(target), *more])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sorted(target.parent.iterdir()) == beside
    return line


@pytest.fixture
def bare(make_backbone) -> Callable[..., DynamicDepth]:
    """Build a tiny model without exits: bare(seed=0, **changes)."""

    def make(seed: int = 0, **changes: object) -> DynamicDepth:
        backbone = make_backbone(seed, **changes)
        return DynamicDepth(backbone, pixel_space=backbone.sample_shape[0] in (1, 3)).eval()

    return make


@pytest.fixture
def theirs(model: DynamicDepth, tmp_path: Path) -> Path:
    """The folder of a diffusers transformer, as diffusers itself writes it: no exits, no hash."""
    to_diffusers(model).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def ours(model: DynamicDepth, tmp_path: Path) -> Path:
    """The folder of a diffusers transformer that this package wrote, exits included."""
    diffusers_folder.write(model, tmp_path / "ours")
    return tmp_path / "ours"


# Round trips.


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_through_every_format_and_back(changes: dict, bare, tmp_path: Path) -> None:
    weights = bare(**changes).backbone.state_dict()
    heads = replace(TINY, **changes).num_heads
    torch.save(weights, tmp_path / "raw.pt")
    convert(tmp_path / "raw.pt", tmp_path / "native", "native", num_heads=heads)
    convert(tmp_path / "native", tmp_path / "diffusers", "diffusers")
    convert(tmp_path / "diffusers", tmp_path / "back.pt", "official")
    convert(tmp_path / "back.pt", tmp_path / "again", "native")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert same(back["ema"], weights)
    assert list(back["ema"]) == list(weights)
    once, again = (tmp_path / folder / checkpoints.WEIGHTS for folder in ("native", "again"))
    assert same(load_file(again), load_file(once))
    assert again.with_name(checkpoints.CONFIG).read_bytes() == once.with_name(checkpoints.CONFIG).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("pixel_space", [True, False])
def test_what_no_tensor_shows_goes_along(changes: dict, pixel_space: bool, bare, make_inputs, tmp_path: Path) -> None:
    model = bare(label_dropout=0.25, **changes)
    model.pixel_space = pixel_space
    official.write(model, tmp_path / "dit.pt")
    diffusers_folder.write(model, tmp_path / "folder")
    inputs = make_inputs(model.backbone)
    for path in (tmp_path / "dit.pt", tmp_path / "folder"):
        found = dyndit.load(path)
        assert same_model(found, model), path
        assert torch.equal(found(*inputs), model(*inputs))


def test_a_trunk_without_null_class_keeps_its_last_class(bare, tmp_path: Path) -> None:
    model = bare(label_dropout=0.0)
    official.write(model, tmp_path / "ours.pt")
    weights = model.backbone.state_dict()
    args = argparse.Namespace(num_classes=10, model="DiT-XS/4")
    torch.save({"ema": weights, "args": args}, tmp_path / "theirs.pt")
    for name in ("ours.pt", "theirs.pt"):
        found = checkpoints.load(tmp_path / name, num_heads=2).backbone
        assert (found.condition.num_classes, found.condition.null_label) == (10, None)
    args.num_classes = 1000  # says nothing about a table of 10 rows: the last is the null label
    torch.save({"ema": weights, "args": args}, tmp_path / "theirs.pt")
    assert checkpoints.load(tmp_path / "theirs.pt", num_heads=2).backbone.condition.null_label == 9


def test_positions_rounded_to_half_precision_survive(bare, tmp_path: Path) -> None:
    checkpoints.save(bare(), tmp_path / "half", half=True)
    model = dyndit.load(tmp_path / "half")
    notes = convert(tmp_path / "half", tmp_path / "folder", "diffusers")
    assert "timestep frequencies and unrounded positions" in notes[-1]
    assert same_model(dyndit.load(tmp_path / "folder"), model)
    transformer = to_diffusers(model)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 9])
    torch.testing.assert_close(transformer(x, t, y).sample, model(x, t, y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_diffusers_itself_loads_the_folder(changes: dict, make_model, make_inputs, tmp_path: Path) -> None:
    model = make_model((2, 4), **changes)
    diffusers_folder.write(model, tmp_path)
    transformer, info = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert transformer.config.norm_eps == model.backbone.config()["mlp_norm_eps"]
    shift = model.backbone.config()["frequency_shift"]
    assert transformer.config[FREQUENCY_SHIFT] == shift
    x, t, y = make_inputs(model.backbone)
    plain = transformer(x, t, y).sample
    assert torch.allclose(plain, model(x, t, y), atol=1e-4) == (shift == 1)
    if shift == 0:
        with pytest.raises(CheckpointError, match="match_frequencies"):
            adapt(transformer)
        with pytest.raises(CheckpointError, match="match_frequencies"):
            from_diffusers(transformer)
    match_frequencies(transformer, shift)
    torch.testing.assert_close(transformer(x, t, y).sample, model(x, t, y), atol=1e-5, rtol=0)
    exits = checkpoints.load_exits(tmp_path / checkpoints.EXITS, adapt(transformer))
    assert same(exits.state_dict(), model.exits.state_dict())
    assert from_diffusers(transformer, pixel_space=True).identity.backbone == model.identity.backbone


def test_in_memory_and_back(make_model, make_inputs) -> None:
    model = make_model((3,))
    transformer = to_diffusers(model)
    assert frequency_shift_of(transformer) == 0
    back = from_diffusers(transformer)
    assert same(back.backbone.state_dict(), model.backbone.state_dict())
    assert back.exits is None
    inputs = make_inputs(model.backbone)
    torch.testing.assert_close(transformer(*inputs).sample, back(*inputs), atol=1e-5, rtol=0)
    half = to_diffusers(DynamicDepth(model.backbone.to(torch.bfloat16)))
    assert half.dtype == torch.bfloat16
    model.backbone.float()


# Every form that a diffusers model comes in.


def in_shards(folder: Path) -> None:
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    (folder / SAFE).unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SAFE), folder / f"{WEIGHTS}.bin")
    (folder / SAFE).unlink()


def in_old_class(folder: Path) -> None:
    edit(folder / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None, cross_attention_dim=None)


@pytest.mark.parametrize("form", [in_shards, pickled, in_old_class])
def test_forms_of_a_transformer_folder(form: Callable[[Path], None], theirs: Path, model: DynamicDepth) -> None:
    form(theirs)
    loaded = checkpoints.inspect(theirs)
    assert loaded.model.identity.backbone == model.identity.backbone
    assert "2 attention heads" in loaded.notes[0]
    assert "shift 0, as _dyndit_frequency_shift records" in loaded.notes[1]


def test_without_our_own_names_it_is_diffusers_own_model(theirs: Path, make_inputs, model: DynamicDepth) -> None:
    """A folder from anybody else: the frequencies are those with which diffusers runs it."""
    names = [name for name in json.loads((theirs / "config.json").read_text()) if name.startswith("_dyndit")]
    assert names
    edit(theirs / "config.json", norm_eps=None, **dict.fromkeys(names))
    loaded = checkpoints.inspect(theirs)
    config = loaded.model.backbone.config()
    assert (config["frequency_shift"], config["norm_eps"], config["mlp_norm_eps"]) == (1, 1e-6, 1e-5)
    assert "shift 1, diffusers' own" in loaded.notes[1]
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(theirs)
    inputs = make_inputs(model.backbone)
    torch.testing.assert_close(loaded.model(*inputs), transformer(*inputs).sample, atol=1e-5, rtol=0)
    assert not torch.allclose(loaded.model(*inputs), model(*inputs), atol=1e-4)


def tiny_autoencoder(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8,), norm_num_groups=4
    )


def test_a_pipeline_of_diffusers(model: DynamicDepth, tmp_path: Path) -> None:
    transformer, vae = to_diffusers(model), tiny_autoencoder(1)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    index = tmp_path / "pipe" / "transformer" / "config.json"
    assert dyndit.load(tmp_path / "pipe").pixel_space  # as recorded
    edit(index, _dyndit_pixel_space=None)
    found = checkpoints.inspect(tmp_path / "pipe")
    assert found.model.identity.backbone == model.identity.backbone
    assert not found.model.pixel_space  # a VAE decodes what it makes
    assert found.folder == tmp_path / "pipe" / "transformer"


def test_a_pipeline_around_a_native_folder(model: DynamicDepth, tmp_path: Path) -> None:
    checkpoints.save(model, tmp_path / "transformer")
    index = {"_class_name": "DynDiTPipeline", "transformer": ["dyndit.models.dynamic", "DynamicDepth"]}
    (tmp_path / checkpoints.PIPELINE).write_text(json.dumps(index))
    assert same_model(dyndit.load(tmp_path), model)


class Denoiser(diffusers.DiffusionPipeline):
    """The smallest pipeline with a `DynamicDepth` in it."""

    def __init__(self, transformer: DynamicDepth, scheduler: diffusers.DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


def test_a_pipeline_of_diffusers_stores_a_dynamic_model(model: DynamicDepth, tmp_path: Path) -> None:
    Denoiser(model, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    assert same_model(Denoiser.from_pretrained(tmp_path).transformer, model)
    half = Denoiser.from_pretrained(tmp_path, dtype=torch.bfloat16).transformer
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert same_model(dyndit.load(tmp_path), model)


def test_names_and_suffixes_tell_nothing(bare, tmp_path: Path) -> None:
    model = bare()
    official.write(model, tmp_path / "weights.safetensors")
    assert same_model(dyndit.load(tmp_path / "weights.safetensors"), model)


# The verb.


def test_notes_of_the_verb(model: DynamicDepth, tmp_path: Path, capsys) -> None:
    checkpoints.save(model, tmp_path / "native")
    main(["convert", str(tmp_path / "native"), str(tmp_path / "folder"), "--to", "diffusers"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "beside the backbone: exits.safetensors"
    assert lines[1].startswith("in diffusers, with matched frequencies: predictions differ by up to ")
    # The printed figures, measured another way: the class loaded plainly from the folder that was written.
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = [
            (model(x, torch.full((2,), t), torch.arange(2)), plain(x, torch.full((2,), t), torch.arange(2)).sample)
            for t in (20, 250, 500, 750, 980)
        ]
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    largest, rms = (a - b).abs().max().item(), ((a - b).square().mean() / a.square().mean()).sqrt().item()
    assert largest > 0.01
    assert lines[2] == (
        "loaded plainly (timestep frequencies of diffusers, not of this model): predictions differ by up to "
        f"{largest:.2g}, relative RMS {rms:.2g}; call dyndit.storage.names.match_frequencies(transformer, 0) after "
        "loading"
    )
    assert dyndit.load(tmp_path / "folder").identity.exits == model.identity.exits


def test_drift_the_other_way_and_none(make_model, bare, tmp_path: Path) -> None:
    checkpoints.save(make_model((2,), frequency_shift=1, mlp_norm_eps=1e-5), tmp_path / "shifted")
    notes = convert(tmp_path / "shifted", tmp_path / "shifted.pt", "official")
    assert notes[0] == "left behind: exits after 1 layers; an official .pt has no place for them"
    assert "mlp_norm_eps 1e-06, not 1e-05, frequency_shift 0, not 1" in notes[1]
    assert re.search(r"predictions differ by up to [\d.]+, relative RMS [\d.]+; dyndit.load honours", notes[1])
    assert "nothing is unmatched" in convert(tmp_path / "shifted", tmp_path / "d", "diffusers")[-1]
    checkpoints.save(bare(), tmp_path / "plain")
    assert convert(tmp_path / "plain", tmp_path / "plain.pt", "official") == (
        "the published code runs it as it is: nothing is unmatched",
    )
    assert convert(tmp_path / "plain.pt", tmp_path / "plain-native", "native") == (
        "plain.pt: training checkpoint, using 'ema'",
        "plain.pt: 2 attention heads, as its args record",
    )


@pytest.mark.parametrize("to", ["native", "official", "diffusers"])
def test_nothing_is_overwritten(to: str, model: DynamicDepth, tmp_path: Path, capsys) -> None:
    checkpoints.save(model, tmp_path / "native")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file", "native", *(["empty"] if to == "official" else [])):
        assert f"{name}: already there" in fail_to_convert(tmp_path / "native", tmp_path / name, capsys, "--to", to)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    if to != "official":
        convert(tmp_path / "native", tmp_path / "empty", to)
        assert dyndit.load(tmp_path / "empty").identity.backbone == model.identity.backbone


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mlp_ratio": 2.0}, "mlp_ratio 2"),
        ({"label_dropout": 0.0}, "without null class"),
        ({"norm_eps": 1e-5}, "norm_eps 1e-05"),
    ],
)
def test_what_the_class_cannot_express(changes: dict, expected: str, bare, tmp_path: Path, capsys) -> None:
    model = bare(**changes)
    checkpoints.save(model, tmp_path / "native")
    assert expected in fail_to_convert(tmp_path / "native", tmp_path / "out", capsys, "--to", "diffusers")
    with pytest.raises(InputError, match=expected):
        to_diffusers(model)
    official.write(model, tmp_path / "dit.pt")  # the other format has room for it
    assert same_model(dyndit.load(tmp_path / "dit.pt"), model)


def test_learned_positions_are_not_diffusers(bare, tmp_path: Path, capsys) -> None:
    model = bare()
    model.backbone.pos_embed.data += 0.1
    checkpoints.save(model, tmp_path / "native")
    assert "pos_embed" in fail_to_convert(tmp_path / "native", tmp_path / "out", capsys, "--to", "diffusers")


def test_what_a_native_folder_says_of_itself(model: DynamicDepth, tmp_path: Path) -> None:
    """Files of these versions are out there: a number changes with its format alone."""
    checkpoints.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["version"]) == ("dyndit-model", 1)
    assert config["family"] == "class_conditional"
    assert "class" not in config  # of models of one's own alone
    with safe_open(tmp_path / "exits.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("dyndit-exits", "2")


def test_a_foreign_trunk_is_saved_by_its_own_library(model: DynamicDepth, tmp_path: Path) -> None:
    foreign = DynamicDepth(adapt(to_diffusers(model)))
    for save in (checkpoints.save, diffusers_folder.write, official.write):
        with pytest.raises(InputError, match="DiTAdapter"):
            save(foreign, tmp_path / "out")


def test_what_others_write_half_is_not_there(model: DynamicDepth, tmp_path: Path, monkeypatch) -> None:
    """A full disk in the middle: nothing appears, nothing stays behind."""
    checkpoints.save(model, tmp_path / "native")
    for to, function in (
        ("native", "dyndit.storage.card.write"),
        ("diffusers", "dyndit.storage.diffusers_folder.write_exits"),
        ("official", "torch.save"),
    ):

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            with pytest.raises(InputError, match="No space"):
                convert(tmp_path / "native", tmp_path / "new", to)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["native"]


# Bad files. Each is one line, for `load` and for the verb.


def other_class(folder: Path) -> None:
    edit(folder / "config.json", _class_name="UNet2DConditionModel")


def pixart(folder: Path) -> None:
    edit(folder / "config.json", _class_name="PixArtTransformer2DModel")


def another_kind_of_old_class(folder: Path) -> None:
    edit(folder / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_single")


def deeper(folder: Path) -> None:
    edit(folder / "config.json", num_layers=8)


def shallower(folder: Path) -> None:
    edit(folder / "config.json", num_layers=4)


def endless(folder: Path) -> None:
    edit(folder / "config.json", num_layers=10**9)


def other_heads(folder: Path) -> None:
    edit(folder / "config.json", num_attention_heads=3)


def huge(folder: Path) -> None:
    edit(folder / "config.json", sample_size=10**6)


def oblong(folder: Path) -> None:
    edit(folder / "config.json", sample_size=[8, 16])


def more_classes(folder: Path) -> None:
    edit(folder / "config.json", num_embeds_ada_norm=11)


def other_activation(folder: Path) -> None:
    edit(folder / "config.json", activation_fn="geglu")


def affine(folder: Path) -> None:
    edit(folder / "config.json", norm_elementwise_affine=True)


def no_variance(folder: Path) -> None:
    edit(folder / "config.json", out_channels=1)


def three_channels(folder: Path) -> None:
    edit(folder / "config.json", out_channels=3)


def shift_of_two(folder: Path) -> None:
    edit(folder / "config.json", _dyndit_frequency_shift=2)


def negative_eps(folder: Path) -> None:
    edit(folder / "config.json", norm_eps=-1.0)


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def no_weights(folder: Path) -> None:
    (folder / SAFE).unlink()


def empty_weights(folder: Path) -> None:
    (folder / SAFE).write_bytes(b"")


def cut_weights(folder: Path) -> None:
    (folder / SAFE).write_bytes((folder / SAFE).read_bytes()[:-7])


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SAFE)
    change(tensors)
    save_file(tensors, folder / SAFE, metadata={"format": "pt"})


def missing_tensor(folder: Path) -> None:
    rewritten(folder, lambda t: t.pop("proj_out_1.bias"))


def extra_tensor(folder: Path) -> None:
    rewritten(folder, lambda t: t.update({"caption.weight": torch.ones(2)}))


def reshaped_tensor(folder: Path) -> None:
    rewritten(folder, lambda t: t.update({"transformer_blocks.1.attn1.to_q.weight": torch.ones(24, 25)}))


def own_embedder(folder: Path) -> None:
    name = "transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.bias"
    rewritten(folder, lambda t: t.update({name: t[name] + 1}))


def learned_positions(folder: Path) -> None:
    rewritten(folder, lambda t: t.update({"pos_embed.pos_embed": torch.ones(1, 4, 24)}))


def odd_block(folder: Path) -> None:
    rewritten(folder, lambda t: t.update({"transformer_blocks.first.bias": torch.ones(1)}))


def another_model(folder: Path) -> None:
    save_file({"conv_in.weight": torch.ones(3, 3)}, folder / SAFE)


def missing_shard(folder: Path) -> None:
    in_shards(folder)
    sorted(folder.glob("*-of-*.safetensors"))[1].unlink()


def shard_elsewhere(folder: Path) -> None:
    in_shards(folder)
    index = folder / f"{SAFE}.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=names | {"proj_out_1.bias": "../../other.safetensors"})


def shard_of_others(folder: Path) -> None:
    in_shards(folder)
    index = folder / f"{SAFE}.index.json"
    names = json.loads(index.read_text())["weight_map"]
    del names["proj_out_1.bias"]
    edit(index, weight_map=names)


def no_map(folder: Path) -> None:
    in_shards(folder)
    (folder / f"{SAFE}.index.json").write_text("{}")


def list_in_bin(folder: Path) -> None:
    pickled(folder)
    torch.save([torch.ones(2)], folder / f"{WEIGHTS}.bin")


def empty_bin(folder: Path) -> None:
    pickled(folder)
    (folder / f"{WEIGHTS}.bin").write_bytes(b"")


def edited_pickle(folder: Path) -> None:
    pickled(folder)
    deeper(folder)


def other_plans(folder: Path) -> None:
    plan = dyndit.DepthPlan.full((999, 500), 6, "ddim")
    replace(plan, backbone="0123456789abcdef").save(folder / "plan-other.json")


def broken_plan(folder: Path) -> None:
    (folder / "plan-broken.json").write_text("{}")


BAD = [
    (other_class, "UNet2DConditionModel"),
    (pixart, "PixArtTransformer2DModel"),
    (another_kind_of_old_class, "Transformer2DModel"),
    (deeper, "num_layers is 8, but the weights hold 6 blocks"),
    (shallower, "num_layers is 4, but the weights hold 6 blocks"),
    (endless, "num_layers"),
    (other_heads, "36 wide in all, but the weights are 24"),
    (huge, "sample_size"),
    (oblong, "sample_size is [8, 16]"),
    (more_classes, "embedding_table"),
    (other_activation, "activation_fn is 'geglu'"),
    (affine, "norm_elementwise_affine"),
    (no_variance, "final_layer.linear"),
    (three_channels, "out_channels is 3"),
    (shift_of_two, "_dyndit_frequency_shift is 2"),
    (negative_eps, "norm_eps is -1.0"),
    (no_json, "config.json: not JSON"),
    (no_object, "config.json"),
    (no_weights, "holds no weights"),
    (empty_weights, SAFE),
    (cut_weights, SAFE),
    (missing_tensor, "proj_out_1.bias"),
    (extra_tensor, "caption.weight"),
    (reshaped_tensor, "weights"),
    (own_embedder, "differs from block 0's"),
    (learned_positions, "pos_embed"),
    (odd_block, "first"),
    (another_model, "num_layers"),
    (missing_shard, "which is missing"),
    (shard_elsewhere, "expected a file of this folder"),
    (shard_of_others, "does not hold"),
    (no_map, "weight_map"),
    (list_in_bin, ".bin"),
    (empty_bin, ".bin"),
    (edited_pickle, "num_layers is 8"),
    (other_plans, "plan-other.json: made for backbone"),
    (broken_plan, "plan-broken.json"),
]


@pytest.mark.parametrize(("damage", "expected"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_transformer_folders(damage: Callable[[Path], None], expected: str, theirs: Path, tmp_path: Path, capsys):
    dyndit.load(theirs)
    damage(theirs)
    message = refused(theirs)
    assert expected in message
    assert "theirs" in message
    capsys.readouterr()
    assert expected in fail_to_convert(theirs, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "attention_head_dim": 6},  # shows in no tensor
        {"norm_eps": 1e-5},  # nor this
        {"norm_eps": None},
        {"_dyndit_frequency_shift": 1},  # nor this
        {"_dyndit_frequency_shift": None},
        {"sample_size": 16},  # positions are not stored
        {"_dyndit_pixel_space": False},
        {"_dyndit_label_dropout": 0.3},
    ],
    ids=str,
)
def test_an_edited_config_beside_our_own_weights(changes: dict, ours: Path, tmp_path: Path, capsys) -> None:
    dyndit.load(ours)
    edit(ours / "config.json", **changes)
    assert "config.json edited" in refused(ours)
    assert "config.json edited" in fail_to_convert(ours, tmp_path / "out", capsys)


def test_exits_of_another_trunk_in_a_foreign_folder(theirs: Path, make_model, tmp_path: Path) -> None:
    checkpoints.save(make_model(seed=7), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / checkpoints.EXITS, theirs / checkpoints.EXITS)
    assert "exits of backbone" in refused(theirs)


@pytest.mark.parametrize("where", ["bin", "shard", "pt"])
def test_a_malicious_pickle_is_not_run(where: str, theirs: Path, tmp_path: Path, capsys) -> None:
    canary, path = tmp_path / "canary", theirs / f"{WEIGHTS}.bin"
    contents = {**load_file(theirs / SAFE), "more": Canary(canary)}
    (theirs / SAFE).unlink()
    source = theirs
    if where == "shard":
        path = theirs / f"{WEIGHTS}-00001-of-00001.bin"
        names = dict.fromkeys(contents, path.name)
        (theirs / f"{WEIGHTS}.bin.index.json").write_text(json.dumps({"weight_map": names}))
    elif where == "pt":
        source = path = tmp_path / "dit.pt"
    torch.save(contents, path)
    assert "of tensors alone (holds " in refused(source)
    assert "of tensors alone (holds " in fail_to_convert(source, tmp_path / "out", capsys)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # otherwise the canary is dead


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 3),
        ("num_heads", 5),
        ("num_heads", "2"),
        ("num_heads", True),
        ("norm_eps", 1e-5),
        ("norm_eps", "small"),
        ("mlp_norm_eps", 1e-5),
        ("frequency_shift", 1),
        ("frequency_shift", 7),
        ("num_classes", 11),
        ("pixel_space", "yes"),
        ("trunk", "0123"),
    ],
)
def test_edited_args(name: str, value: object, bare, tmp_path: Path, capsys) -> None:
    official.write(bare(), tmp_path / "dit.pt")
    data = torch.load(tmp_path / "dit.pt", weights_only=True)
    data["args"][name] = value
    torch.save(data, tmp_path / "dit.pt")
    assert "dit.pt" in refused(tmp_path / "dit.pt")
    assert "dit.pt" in fail_to_convert(tmp_path / "dit.pt", tmp_path / "out", capsys)


def integers(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.mlp.fc2.bias"] = weights["blocks.1.mlp.fc2.bias"].int()


def sparse(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.mlp.fc2.bias"] = weights["blocks.1.mlp.fc2.bias"].to_sparse()


def without_values(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.mlp.fc2.bias"] = weights["blocks.1.mlp.fc2.bias"].to("meta")


def immense(weights: dict[str, Tensor]) -> None:
    weights["pos_embed"] = torch.zeros(1).expand(1, 10**12, 24)


def empty(weights: dict[str, Tensor]) -> None:
    weights["x_embedder.proj.weight"] = torch.ones(0, 1, 4, 4)


@pytest.mark.parametrize("damage", [integers, sparse, without_values, immense, empty])
def test_tensors_that_are_no_weights(damage: Callable, bare, tmp_path: Path) -> None:
    weights = bare().backbone.state_dict()
    damage(weights)
    torch.save(weights, tmp_path / "dit.pt")
    assert "dit.pt" in refused(tmp_path / "dit.pt", num_heads=2)


def test_heads_given_against_heads_recorded(model: DynamicDepth, bare, tmp_path: Path, ours: Path) -> None:
    official.write(bare(), tmp_path / "dit.pt")
    checkpoints.save(model, tmp_path / "native")
    for path in (tmp_path / "dit.pt", tmp_path / "native", ours):
        assert "records 2" in refused(path, InputError, num_heads=3)
        dyndit.load(path, num_heads=2)


def test_pipelines_of_another_kind(theirs: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    pipe.mkdir()
    (pipe / checkpoints.PIPELINE).write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert "StableDiffusionPipeline" in refused(pipe)
    (pipe / "transformer").mkdir()
    assert "config.json" in refused(pipe)
    (pipe / "transformer").rmdir()
    shutil.copytree(theirs, pipe / "transformer")
    assert dyndit.load(pipe).num_blocks == 6
    pixart(pipe / "transformer")
    assert "PixArtTransformer2DModel" in refused(pipe)
    (pipe / checkpoints.PIPELINE).write_text("{")
    assert checkpoints.PIPELINE in refused(pipe)


@pytest.fixture(scope="module")
def library(tmp_path_factory, make_model) -> Path:
    """One tiny model in every format, and a raw state dict."""
    root = tmp_path_factory.mktemp("library")
    model = make_model((2,), num_blocks=3, width=16)
    checkpoints.save(model, root / "native")
    diffusers_folder.write(model, root / "diffusers")
    official.write(model, root / "ours.pt")
    torch.save({"ema": model.backbone.state_dict(), "args": argparse.Namespace(lr=1)}, root / "theirs.pt")
    return root


FILES = ["native/model.safetensors", "native/exits.safetensors", "native/config.json"]
FILES += ["diffusers/diffusion_pytorch_model.safetensors", "diffusers/exits.safetensors", "diffusers/config.json"]
FILES += ["ours.pt", "theirs.pt"]


def loaded_or_refused(source: Path) -> DynamicDepth | None:
    """The model, or None where it is refused in one line."""
    message = ""
    try:
        return checkpoints.load(source, num_heads=2)
    except CheckpointError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file", FILES)
@settings(max_examples=40)
@given(data=st.data())
def test_damage_is_refused_or_harmless(file: str, library: Path, data: st.DataObject) -> None:
    path = library / file
    source = path if file.endswith(".pt") else path.parent
    contents = path.read_bytes()
    expected = checkpoints.load(source, num_heads=2)
    if data.draw(st.booleans(), "truncate"):
        damaged = contents[: data.draw(st.integers(0, len(contents) - 1), "length")]
    else:
        damaged = bytearray(contents)
        for place in data.draw(st.lists(st.integers(0, len(contents) - 1), min_size=1, max_size=4), "places"):
            damaged[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
    try:
        path.write_bytes(damaged)
        found = loaded_or_refused(source)
        if found is not None:
            assert same(found.state_dict(), expected.state_dict())
            inputs = torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1])
            assert torch.equal(found(*inputs), expected(*inputs))
    finally:
        path.write_bytes(contents)


def test_a_flipped_weight_in_a_checkpoint_is_found(library: Path, tmp_path: Path) -> None:
    """torch.load does not look at checksums; the guard of the test above."""
    contents = bytearray((library / "theirs.pt").read_bytes())
    generator, num_refused = random.Random(0), 0
    for _ in range(20):
        changed = bytearray(contents)
        changed[generator.randrange(len(contents) // 4, len(contents) // 2)] ^= 64
        (tmp_path / "dit.pt").write_bytes(changed)
        try:
            checkpoints.load(tmp_path / "dit.pt", num_heads=2)
        except CheckpointError as error:
            num_refused += "checksum" in str(error)
    assert num_refused > 10


def test_files_without_checksums_load(bare, tmp_path: Path) -> None:
    model, kept = bare(), torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(model.backbone.state_dict(), tmp_path / "dit.pt")
    finally:
        torch.serialization.set_crc32_options(kept)
    assert same_model(checkpoints.load(tmp_path / "dit.pt", num_heads=2), model)
    torch.save(model.backbone.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same_model(checkpoints.load(tmp_path / "old.pt", num_heads=2), model)


# What travels with a model.


@pytest.fixture
def furnished(make_model, tmp_path: Path) -> Path:
    """A native folder of 4 blocks with a calibrated plan, a fixed schedule and a shift table."""
    model, folder = make_model(num_blocks=4), tmp_path / "furnished"
    checkpoints.save(model, folder)
    bound = {"backbone": model.identity.backbone, "exits": model.identity.exits}
    replace(random_table(2, 4, seed=0), **bound).save(folder / checkpoints.TABLE)
    full = dyndit.DepthPlan.full((999, 500), 4, "ddim", cfg_scale=1.5)
    figures = {"predicted_fd": 1.375, "measured_fd": 1.25, "measured_fd_full": 2.125, "predicted_share_of_time": 0.59}
    plan = full.with_steps(steps("2", "4|1"), router="searched", budget=0.6, figures=figures, **bound)
    plan.save(folder / "plan-ddim-2-b0.6.json")
    full.with_steps(steps("1|1", "4|4"), router="ramp").save(folder / "plan-ramp.json")
    return folder


COMPANIONS = ("plan-ddim-2-b0.6.json", "plan-ramp.json", checkpoints.TABLE)


def test_plans_and_table_travel_between_folders(furnished: Path, tmp_path: Path) -> None:
    notes = convert(furnished, tmp_path / "native", "native")
    assert notes == (f"beside the backbone: exits.safetensors, {', '.join(COMPANIONS)}",)
    convert(tmp_path / "native", tmp_path / "diffusers", "diffusers")
    convert(tmp_path / "diffusers", tmp_path / "again", "native")
    for folder in ("native", "diffusers", "again"):
        for name in COMPANIONS:
            assert (tmp_path / folder / name).read_bytes() == (furnished / name).read_bytes()
        assert same_model(dyndit.load(tmp_path / folder), dyndit.load(furnished))
    notes = convert(furnished, tmp_path / "dit.pt", "official")
    assert notes[0].startswith(f"left behind: exits after 3 layers, {', '.join(COMPANIONS)};")


@pytest.mark.parametrize("what", ["plan", "table", "exits"])
def test_companions_of_another_model_do_not_travel(what: str, furnished: Path, tmp_path: Path, capsys) -> None:
    if what == "plan":
        path = furnished / COMPANIONS[0]
        replace(dyndit.DepthPlan.load(path), exits="0123").save(path)
    elif what == "table":
        path = furnished / checkpoints.TABLE
        replace(ShiftTable.load(path), exits="0123").save(path)
    else:
        path = furnished / COMPANIONS[0]
        (furnished / checkpoints.EXITS).unlink()
    dyndit.load(furnished)
    assert path.name in fail_to_convert(furnished, tmp_path / "out", capsys)


def test_the_card_says_what_the_files_say(furnished: Path, tmp_path: Path) -> None:
    convert(furnished, tmp_path / "out", "native", card_extras=card_extras)
    text = (tmp_path / "out" / model_card.CARD).read_text()
    front = text.split("---\n")[1]
    assert "library_name: dyndit\n" in front
    assert "license" not in front
    model = dyndit.load(furnished)
    assert f"| hash | `{model.identity.backbone}` |" in text
    assert "| num_blocks | 4 |" in text
    assert (
        f"`adaln-linear` heads after layers 1, 2, 3 of 4; {sum(p.numel() for p in model.exits.parameters()):,}" in text
    )
    row = "| `plan-ddim-2-b0.6.json` | searched | ddim | 2 | 1.5 | 0.6 | 44% | 0.59 | 1.38 | 1.25 | 2.12 |"
    assert row in text
    assert "| `plan-ramp.json` | ramp | ddim | 2 | 1.5 | – | 62% | – | – | – | – |" in text
    assert "features of `toy`, predicted from 64 pictures" in text
    assert f"]({model_card.PICTURE})" in text
    assert (tmp_path / "out" / model_card.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "Measured" not in text
    # The three lines of code run.
    code = text.split("```python\n")[1].split("```")[0].replace("PATH_OR_HUB_ID", str(tmp_path / "out"))
    code = code.replace('"plan-', f'"{tmp_path}/out/plan-').replace("(999, 500)", "")
    plan = dyndit.DepthPlan.load(tmp_path / "out" / COMPANIONS[0])
    from dyndit.sampling.solvers import timesteps_of

    replace(plan, timesteps=timesteps_of("ddim", 2)).save(tmp_path / "out" / COMPANIONS[0])
    found: dict = {}
    exec(code, found)
    assert found["pictures"].shape == (1, 1, 8, 8)


def test_the_card_has_the_measured_table(furnished: Path, tmp_path: Path) -> None:
    from dyndit.analysis.report.runs import COLUMNS, append_run

    common = dict.fromkeys(COLUMNS, "") | {"run": "r", "machine": "a machine", "extractor": "toy", "metric": "FD-toy"}
    common |= {"model": "m", "solver": "ddim", "steps": 2, "cfg_scale": 1.5, "num_images": 50, "role": "score"}
    for arm, share, ms, fd in (("full", 1.0, 20.0, 2.0), ("searched", 0.4, 8.0, 1.5)):
        for block in (0, 1):
            row = common | {"arm": f"{arm}-ddim-2", "family": arm, "block": block, "seed": block}
            row |= {"share_of_blocks": share, "ms_per_picture": ms + block, "fd": fd + 0.1 * block}
            append_run(furnished / "runs.csv", row | dict.fromkeys(("budget", "predicted_fd"), None))
    convert(furnished, tmp_path / "out", "native", card_extras=card_extras)
    text = (tmp_path / "out" / model_card.CARD).read_text()
    assert "a machine; FD-toy, guidance 1.5, 2 seed blocks of 50 pictures" in text
    assert "| searched-ddim-2 | ddim | 2 | 40% | 8.50 | 1.55" in text
    assert "| 59% |" in text  # time saved against full depth


def test_a_card_without_extras_prints_the_plans(furnished: Path, tmp_path: Path) -> None:
    (furnished / "runs.csv").write_text("not read")
    convert(furnished, tmp_path / "out", "native")
    text = (tmp_path / "out" / model_card.CARD).read_text()
    for name in COMPANIONS[:2]:
        assert f"{name}: {dyndit.DepthPlan.load(furnished / name)}" in text.split("```text\n")[1].split("```")[0]
    assert "| `plan-ramp.json` | ramp |" in text
    assert "Measured" not in text
    assert model_card.PICTURE not in text
    assert not (tmp_path / "out" / model_card.PICTURE).exists()


def test_the_verb_draws_and_tabulates_for_the_card(furnished: Path, tmp_path: Path) -> None:

    main(["convert", str(furnished), str(tmp_path / "out")])
    text = (tmp_path / "out" / model_card.CARD).read_text()
    assert f"]({model_card.PICTURE})" in text
    assert (tmp_path / "out" / model_card.PICTURE).read_bytes() == card_extras(furnished).picture


def test_a_card_of_ones_own_is_left_alone(furnished: Path, model: DynamicDepth, tmp_path: Path) -> None:
    (furnished / model_card.CARD).write_text("mine")
    (furnished / "runs.csv").write_text("not read")
    convert(furnished, tmp_path / "out", "native", card_extras=card_extras)
    assert not (tmp_path / "out" / model_card.PICTURE).exists()
    assert (tmp_path / "out" / model_card.CARD).read_text() == "mine"
    dyndit.load(furnished).save_pretrained(furnished)
    assert (furnished / model_card.CARD).read_text() == "mine"
    assert not (furnished / model_card.PICTURE).exists()


def test_a_licence_stays(furnished: Path, tmp_path: Path) -> None:
    model = dyndit.load(furnished)
    model.save_pretrained(furnished, license="cc-by-nc-4.0")
    model.save_pretrained(furnished)
    convert(furnished, tmp_path / "out", "native")
    for folder in (furnished, tmp_path / "out"):
        assert "\nlicense: cc-by-nc-4.0\n" in (folder / model_card.CARD).read_text()
    with pytest.raises(InputError, match="license"):
        model.save_pretrained(furnished, license="a\nb: c")


def test_save_pretrained_and_from_pretrained(model: DynamicDepth, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    found = DynamicDepth.from_pretrained(tmp_path / "model", low_cpu_mem_usage=True, variant=None, torch_dtype=None)
    assert same_model(found, model)
    assert not found.training
    half = DynamicDepth.from_pretrained(tmp_path / "model", torch_dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same_model(DynamicDepth.from_pretrained(tmp_path / "model", dtype=torch.float32), model)


# A real one, and pictures.


def random_checkpoint(path: Path) -> Path:
    """A published checkpoint with random weights, 16 x 16 x 3, as the training script writes it."""
    backbone = ClassConditionalDiT(DiTConfig(16, 4, 3, width=64, num_blocks=3, num_heads=1, num_classes=5))
    randomise(backbone, 0)
    args = argparse.Namespace(model="DiT-XS/4", num_classes=5)
    torch.save({"model": {}, "ema": backbone.state_dict(), "opt": {"lr": 1e-4}, "args": args}, path)
    return path


def check_every_backend(source: Path, folder: Path, batch: int, steps: int) -> None:
    """Byte-equal tensors after the round trip, and the same pictures from each backend."""
    weights = contents.read(source).tensors
    convert(source, folder / "native", "native")
    convert(folder / "native", folder / "diffusers", "diffusers")
    convert(folder / "diffusers", folder / "back.pt", "official")
    back = torch.load(folder / "back.pt", weights_only=True)["ema"]
    assert weights.keys() == back.keys()
    assert all(back[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in weights.items())

    def draw(model: nn.Module) -> Tensor:
        return dyndit.sample(model, list(range(batch)), num_steps=steps, seed=3).pictures.int()

    expected = draw(dyndit.load(folder / "native"))
    assert expected.float().std() > 10  # not one grey
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder / "diffusers")
    transformer.register_to_config(**{FREQUENCY_SHIFT: 1})  # or nothing of ours would take it as it is
    plain = draw(DynamicDepth(adapt(transformer), pixel_space=True))
    transformer.register_to_config(**{FREQUENCY_SHIFT: 0})
    match_frequencies(transformer, 0)
    matched = draw(DynamicDepth(adapt(transformer), pixel_space=True))
    for pictures in (matched, draw(dyndit.load(folder / "diffusers")), draw(dyndit.load(folder / "back.pt"))):
        assert (pictures - expected).abs().max() <= 1
    assert (plain - expected).abs().max() > 1  # otherwise matching proves nothing


def test_every_backend_draws_the_same_pictures(tmp_path: Path) -> None:
    check_every_backend(random_checkpoint(tmp_path / "dit.pt"), tmp_path, batch=4, steps=6)


@pytest.mark.shared
def test_every_backend_draws_the_same_pictures_of_a_real_model(cifar10_dit: Path, tmp_path: Path) -> None:
    check_every_backend(cifar10_dit, tmp_path, batch=6, steps=8)
