"""MM-DiT against a reference written from the paper, and against diffusers' class."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import dyndit
from dyndit.cli import main
from dyndit.models.captions import POOLED, TOKENS
from dyndit.models.conditions import Conditioning
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.mmdit import MMDiT, MMDiTConfig
from dyndit.process import RectifiedFlow
from dyndit.sampling.solvers import make_scheduler
from dyndit.storage import diffusers_folder
from dyndit.storage import load as checkpoints
from dyndit.storage.diffusers_folder import from_diffusers, to_diffusers
from support.models import TINY_MMDIT, randomise
from support.reference_mmdit import Architecture, random_weights, reference_mmdit
from support.tiny_pipelines import tiny_pipeline

ARCHITECTURES = {
    "latents": Architecture(8, 8, 2, 4, width=48, num_blocks=3, num_heads=4, text_width=20, pooled_width=12),
    "not square": Architecture(2, 3, 4, 1, width=24, num_blocks=2, num_heads=2, text_width=8, pooled_width=8),
    "without qk-norm": Architecture(
        4, 4, 2, 3, width=40, num_blocks=4, num_heads=5, text_width=32, pooled_width=16, qk_norm=False
    ),
}
TOLERANCES = {torch.float64: 5e-5, torch.float32: 5e-5}
"""Of the prediction's size. Features of timesteps are computed in single precision in either case."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def config_of(arch: Architecture) -> MMDiTConfig:
    return MMDiTConfig(
        image_size=(arch.rows * arch.patch_size, arch.columns * arch.patch_size),
        patch_size=arch.patch_size,
        in_channels=arch.channels,
        width=arch.width,
        num_blocks=arch.num_blocks,
        num_heads=arch.num_heads,
        qk_norm=arch.qk_norm,
        text_width=arch.text_width,
        pooled_width=arch.pooled_width,
        text_length=7,
    )


def inputs(arch: Architecture, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (3, arch.channels, arch.rows * arch.patch_size, arch.columns * arch.patch_size)
    x = torch.randn(shape, generator=generator)
    text = torch.randn(3, 7, arch.text_width, generator=generator)
    pooled = torch.randn(3, arch.pooled_width, generator=generator)
    return x.to(dtype), torch.tensor([1000.0, 437.5, 3.0]), text.to(dtype), pooled.to(dtype)


def native(arch: Architecture, weights: dict[str, Tensor]) -> MMDiT:
    backbone = MMDiT(config_of(arch)).eval()
    backbone.load_state_dict(weights)
    return backbone


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_depth_predicts_as_the_paper(name: str, dtype: torch.dtype) -> None:
    arch = ARCHITECTURES[name]
    weights = random_weights(arch, seed=5)
    backbone = native(arch, weights)
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(head="adaln-linear"))).eval()
    for part in model.children():  # fresh exits are the model's own final layer
        part.to(dtype)
    x, t, text, pooled = inputs(arch, dtype)
    weights = {name: w.to(dtype) for name, w in weights.items()}
    y = Conditioning({TOKENS: text, POOLED: pooled})
    for depth in model.depths:
        expected = reference_mmdit(weights, arch, x, t, text, pooled, depth)
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(
            model(x, t, y, depth=depth), expected, atol=TOLERANCES[dtype] * expected.std().item(), rtol=0
        )
    assert torch.equal(backbone(x, t, y), model(x, t, y))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_reference_matters(name: str) -> None:
    """Otherwise parity would not tell a tensor put in another's place. The last text queries alone are not used."""
    arch = ARCHITECTURES[name]
    weights = {name: w.double() for name, w in random_weights(arch, seed=5).items()}
    given = inputs(arch, torch.float64)
    expected = reference_mmdit(weights, arch, *given)
    read_only = f"joint_blocks.{arch.num_blocks - 1}.context_block.attn.ln_q.weight"
    for tensor, w in weights.items():
        shuffled = weights | {tensor: w.flip(0 if len(w) > 1 else 1)}
        moved = (reference_mmdit(shuffled, arch, *given) - expected).abs().max()
        assert moved == 0 if tensor == read_only else moved > 1e-3, tensor
    heads = replace(arch, num_heads=1)
    if not arch.qk_norm:
        assert (reference_mmdit(weights, heads, *given) - expected).abs().max() > 1e-2


def theirs(arch: Architecture, seed: int = 0) -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=arch.rows * arch.patch_size,
        patch_size=arch.patch_size,
        in_channels=arch.channels,
        out_channels=arch.channels,
        num_layers=arch.num_blocks,
        attention_head_dim=arch.width // arch.num_heads,
        num_attention_heads=arch.num_heads,
        joint_attention_dim=arch.text_width,
        caption_projection_dim=arch.width,
        pooled_projection_dim=arch.pooled_width,
        pos_embed_max_size=arch.rows + 3,  # positions are cut from the middle
        qk_norm="rms_norm" if arch.qk_norm else None,
    )
    randomise(transformer, seed)
    return transformer.eval()


SQUARE = [name for name, arch in ARCHITECTURES.items() if arch.rows == arch.columns]


@pytest.mark.parametrize("name", SQUARE)
def test_diffusers_weights_give_its_own_bits_natively_and_back(name: str, tmp_path: Path) -> None:
    arch = ARCHITECTURES[name]
    transformer = theirs(arch)
    x, t, text, pooled = inputs(arch)
    expected = transformer(x, text, pooled, t, return_dict=False)[0]
    assert expected.std() > 0.1
    transformer.save_pretrained(tmp_path / "theirs")
    loaded = dyndit.load(tmp_path / "theirs")
    assert loaded.process == RectifiedFlow()
    for model in (loaded, from_diffusers(transformer)):
        assert torch.equal(model(x, t, Conditioning({TOKENS: text, POOLED: pooled})), expected)
    assert torch.equal(to_diffusers(loaded)(x, text, pooled, t, return_dict=False)[0], expected)
    diffusers_folder.write(loaded, tmp_path / "ours")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(x, text, pooled, t, return_dict=False)[0], expected)
    assert dyndit.load(tmp_path / "ours").identity == loaded.identity
    reference = reference_mmdit(loaded.backbone.state_dict(), arch, x, t, text, pooled)
    torch.testing.assert_close(expected, reference, atol=5e-5 * expected.std().item(), rtol=0)


def test_a_pipelines_scheduler_tells_the_time_shift(tmp_path: Path) -> None:
    tiny = tiny_pipeline("SD3Transformer2DModel").pipe
    tiny.scheduler.save_pretrained(tmp_path / "scheduler")
    transformer = theirs(ARCHITECTURES["latents"])
    transformer.save_pretrained(tmp_path / "transformer")
    index = {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = dyndit.load(tmp_path)
    assert (loaded.process, loaded.pixel_space) == (RectifiedFlow(time_shift=3.0), False)
    scheduler = make_scheduler("flow-euler", 5, loaded.process)
    tiny.scheduler.set_timesteps(sigmas=[1, 0.8, 0.6, 0.4, 0.2])  # as the pipeline sets them
    torch.testing.assert_close(scheduler.timesteps, tiny.scheduler.timesteps)
    assert dyndit.load(tmp_path, process="flow").process == RectifiedFlow()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": -1}))
    with pytest.raises(dyndit.InputError, match=r"scheduler_config\.json: .*time_shift -1"):
        dyndit.load(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"vocabulary": (), "num_classes": 3}], ids=["words", "labels"])
def test_our_weights_give_our_bits_in_diffusers_and_back(changes: dict[str, object], tmp_path: Path) -> None:
    backbone = MMDiT(replace(TINY_MMDIT, **changes)).eval()
    randomise(backbone, seed=1)
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(head="adaln-linear")), pixel_space=False).eval()
    call = backbone.example(3, torch.Generator().manual_seed(0))
    expected, features = model(call.x, call.t, call.y), backbone.text_of(call.y).rows
    diffusers_folder.write(model, tmp_path / "folder")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "folder").eval()
    for transformer in (loaded, to_diffusers(model)):
        assert torch.equal(transformer(call.x, **features, timestep=call.t, return_dict=False)[0], expected)
    back = dyndit.load(tmp_path / "folder")
    assert back.identity == model.identity
    assert back.backbone.config() == backbone.config()
    assert (back.pixel_space, back.exits.layers) == (False, (1, 2, 3))
    assert torch.equal(back(call.x, call.t, call.y), expected)
    (tmp_path / "folder" / "text_embedder.safetensors").unlink()
    with pytest.raises(dyndit.InputError, match="damaged"):
        dyndit.load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dual_attention_layers": [0]}, r"dual_attention_layers is \[0\], expected \[\]"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', expected 'rms_norm'"),
        ({"num_layers": 4}, "num_layers is 4, but the weights hold 3 blocks"),
        ({"caption_projection_dim": 40}, "caption_projection_dim is 40, expected 48"),
        ({"sample_size": 64}, "sample_size is 64, expected at most 11 patches"),
        ({"patch_size": 0}, "patch_size is 0, expected an integer"),
        ({"attention_head_dim": 6, "num_attention_heads": 4, "caption_projection_dim": 24}, "shape"),
    ],
)
def test_an_edited_folder_is_refused(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    theirs(ARCHITECTURES["latents"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(dyndit.InputError, match=named) as error:
        dyndit.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"), [({"image_size": (4, 8)}, "expected a square"), ({"mlp_ratio": 2.0}, "mlp_ratio 2")]
)
def test_what_the_class_cannot_express_is_refused(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    model = DynamicDepth(MMDiT(replace(TINY_MMDIT, **changes)))
    with pytest.raises(dyndit.InputError, match=named):
        diffusers_folder.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_goes_there_and_back_and_measures_no_drift(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backbone = MMDiT(TINY_MMDIT).eval()
    randomise(backbone, seed=1)
    model = DynamicDepth(backbone).eval()
    checkpoints.save(model, tmp_path / "native")
    main(["convert", str(tmp_path / "native"), str(tmp_path / "theirs"), "--to", "diffusers"])
    assert "differ by up to 0, relative RMS 0; loaded plainly it is the same" in capsys.readouterr().out
    main(["convert", str(tmp_path / "theirs"), str(tmp_path / "again")])
    assert dyndit.load(tmp_path / "again").identity == model.identity
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "native"), str(tmp_path / "out.pt"), "--to", "official"])
    assert "class-conditional DiTs, not a MMDiT" in capsys.readouterr().err
