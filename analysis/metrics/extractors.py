"""Pictures to features: the networks in whose features quality is measured.

A Fréchet distance on other features than Inception's is called FD-<extractor>, never FID, and compares with
no published FID. Every extractor takes uint8 pictures and is registered with torch-fidelity, so its own
command line and `calculate_metrics` know the names `digits`, `digits-lenet`, `resnet20-cifar10` and `vgg-cifar10` once
this module is imported.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from dyndit.errors import CheckpointError, InputError, first_line

PACKAGED_WEIGHTS = {
    "digits": "digits-classifier.safetensors",
    "digits-lenet": "digits-lenet.safetensors",
    "vgg-cifar10": "cifar10-vgg.safetensors",
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPATIAL_CHANNELS = 7  # of the spatial layer, as in ADM's sFID (Nash et al. 2021)
SPATIAL_LAYERS = {
    "digits": "classifier.conv2",  # 4 x 4 x 7 = 112 features
    "digits-lenet": "classifier.conv2",  # the same
    "resnet20-cifar10": "classifier.layer3",  # 8 x 8 x 7 = 448
    "vgg-cifar10": "classifier.stages.2",  # the same
    "inception": "Mixed_6d.branch1x1",  # 17 x 17 x 7 = 2,023: TensorFlow's "mixed_6/conv", which ADM reads
}


class DigitsClassifier(nn.Module):
    """Three convolutions, two linear layers, for 8x8 grey digits; recipes/digits_classifier.py trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 2 * 2, 64)
        self.linear = nn.Linear(64, 10)
        self.drop = nn.Dropout(0.3)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 1, 8, 8) in [0, 1] -> (B, 64), the values before the last layer."""
        # SiLU, not ReLU: no unit dies, so the covariance of the features keeps its full rank.
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        return F.silu(self.hidden(self.drop(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, 8, 8) in [0, 1] -> logits (B, 10)."""
        return self.linear(self.drop(self.features(x)))


class DigitsLeNet(nn.Module):
    """After LeNet-5 (LeCun et al. 1998): wide kernels, tanh, average pooling; a second opinion on 8x8 grey digits.

    Shares neither layers, nonlinearity, split nor seed with DigitsClassifier; the same recipe trains it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 5, padding=2)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.linear = nn.Linear(64, 10)
        self.drop = nn.Dropout(0.3)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 1, 8, 8) in [0, 1] -> (B, 64), the values before the last layer."""
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = torch.tanh(self.conv2(x))
        return torch.tanh(self.hidden(self.drop(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, 8, 8) in [0, 1] -> logits (B, 10)."""
        return self.linear(self.drop(self.features(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters ("option A" of He et al. 2016)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.stride = num_out // num_in  # 2 where a stage begins and the channels double
        self.padding = (num_out - num_in) // 2
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, stride=self.stride, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. 2016, section 4.2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32), BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64), BasicBlock(64, 64), BasicBlock(64, 64))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 3, 32, 32), normalised -> (B, 64), the means before `linear`."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


class CifarVGG(nn.Module):
    """After VGG (Simonyan and Zisserman 2015): plain 3x3 convolutions and max pooling; a second opinion on CIFAR-10.

    Shares neither shortcuts, nonlinearity, scaling nor seed with ResNet20; recipes/cifar10_classifier.py trains it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_vgg_stage(3, 32, 1), _vgg_stage(32, 64, 2), _vgg_stage(64, 128, 2)])
        self.hidden = nn.Linear(128, 64)
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 3, 32, 32) in [-1, 1] -> (B, 64), the values before the last layer."""
        for index, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if index else x)
        return F.silu(self.hidden(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, 32, 32) in [-1, 1] -> logits (B, 10)."""
        return self.linear(self.features(x))


def _vgg_stage(num_in: int, num_out: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(num_convs):
        conv = nn.Conv2d(num_out if i else num_in, num_out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(num_out), nn.SiLU()]
    return nn.Sequential(*layers)


class ClassifierExtractor(FeatureExtractorBase):
    """A classifier as torch-fidelity sees it: "64" are its features, "logits" its scores for ten classes.

    Subclasses say which `size` of picture they read, how to build the classifier and how to scale a picture.
    """

    size: int

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = self.build(Path(feature_extractor_weights_path) if feature_extractor_weights_path else None)
        self.requires_grad_(False)
        self.eval()

    classifier_type: type[nn.Module]

    def build(self, weights: Path | None) -> nn.Module:
        """Return the classifier with the weights in the file, or those packaged. Raises InputError, CheckpointError."""
        if weights is not None:
            return load_strict(self.classifier_type(), weights)
        if self.name not in PACKAGED_WEIGHTS:
            raise InputError(f"--extractor-weights: missing, expected the .safetensors file of {self.name}")
        with as_file(files("dyndit.assets") / PACKAGED_WEIGHTS[self.name]) as path:
            return load_strict(self.classifier_type(), path)

    def scale(self, pictures: Tensor) -> Tensor:
        """Pictures: uint8 (B, 3, H, W) -> float32 (B, C, H, W) as the classifier was trained on."""
        raise NotImplementedError

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Pictures: uint8 (B, 3, size, size) -> one tensor for each requested feature. Raises InputError."""
        check_size(self.name, pictures, self.size)
        features = self.classifier.features(self.scale(pictures))
        outputs = {"64": features, "logits": self.classifier.linear(features)}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the outputs."""
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return which output a metric of torch-fidelity reads."""
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Say no: the size check is Python, and these networks are small."""
        return False


class DigitsExtractor(ClassifierExtractor):
    """`digits`: 8x8 grey pictures, weights in the package."""

    size = 8
    classifier_type = DigitsClassifier

    def scale(self, pictures: Tensor) -> Tensor:
        """Pictures: uint8 (B, 3, 8, 8) -> grey (B, 1, 8, 8) in [0, 1]."""
        return pictures.float().mean(1, keepdim=True) / 255


class DigitsLeNetExtractor(DigitsExtractor):
    """`digits-lenet`: the same pictures through another classifier, to judge what was calibrated on `digits`."""

    classifier_type = DigitsLeNet


class ResNet20Extractor(ClassifierExtractor):
    """`resnet20-cifar10`: 32x32 colour pictures, weights by path."""

    size = 32
    classifier_type = ResNet20

    def scale(self, pictures: Tensor) -> Tensor:
        """Pictures: uint8 (B, 3, 32, 32) -> ImageNet mean and deviation removed."""
        mean, std = (torch.tensor(c, device=pictures.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
        return (pictures / 255 - mean) / std


class CifarVGGExtractor(ClassifierExtractor):
    """`vgg-cifar10`: the same pictures through another classifier, to judge what was calibrated on the first."""

    size = 32
    classifier_type = CifarVGG

    def scale(self, pictures: Tensor) -> Tensor:
        """Pictures: uint8 (B, 3, 32, 32) -> (B, 3, 32, 32) in [-1, 1]."""
        return pictures.float() / 127.5 - 1


def load_strict(model: nn.Module, path: Path) -> nn.Module:
    """Load a .safetensors file whose names, shapes and values all must fit. Raises CheckpointError."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}; expected a readable .safetensors file") from error
    # A counter that BatchNorm keeps for training; files made for inference leave it out.
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    kind = type(model).__name__
    if odd := sorted(expected.keys() ^ state.keys()):
        found = "found" if odd[0] in state else "missing"
        raise CheckpointError(f"{path}: tensor '{odd[0]}' {found}, expected the {len(expected)} tensors of {kind}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise CheckpointError(f"{path}: tensor '{name}' is {found}, expected {wanted} ({kind})")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor '{name}' holds values that are not finite, expected numbers")
    model.load_state_dict(state, strict=False)
    return model


def check_size(name: str, pictures: Tensor, size: int) -> None:
    """Raise InputError unless the pictures are size x size."""
    if pictures.shape[-2:] != (size, size):
        height, width = pictures.shape[-2:]
        raise InputError(f"extractor {name}: pictures are {height}x{width}, expected {size}x{size}")


def as_rgb(pictures: Tensor) -> Tensor:
    """Pictures: uint8 (N, 1 or 3, H, W) -> (N, 3, H, W); grey is repeated. Raises InputError."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise InputError(
            f"pictures: {str(pictures.dtype).removeprefix('torch.')} of shape {tuple(pictures.shape)}, "
            "expected uint8 (N, 1 or 3, H, W)"
        )
    return pictures.expand(-1, 3, -1, -1)


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, so the file format does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network ready to measure with. `fingerprint`: SHA-256 of its weights, for manifests."""

    name: str
    network: FeatureExtractorBase = field(repr=False)
    fingerprint: str
    device: str = "cpu"
    spatial_layer: str = ""
    """Module of the network whose output, (B, C, H', W'), sFID reads."""
    projection: Tensor | None = field(default=None, repr=False)
    """(D, d), where features are reduced to d directions."""

    def projected(self, projection: Tensor) -> "Extractor":
        """The same network with features @ projection, float64 (D, d), under a name of its own."""
        digest = hashlib.sha256(self.fingerprint.encode() + projection.double().contiguous().numpy().tobytes())
        name = f"{self.name}-pca{projection.shape[1]}"
        return replace(self, name=name, projection=projection.double(), fingerprint=digest.hexdigest())

    @property
    def metric_name(self) -> str:
        """What a Fréchet distance on these features is called."""
        return "FID" if self.name == "inception" else f"FD-{self.name}"

    def _batches(self, pictures: Tensor, batch_size: int, spatial: bool) -> Iterator[tuple[Tensor, ...]]:
        """Yield the network's outputs on the host, batch by batch, as float64."""
        for batch in as_rgb(pictures).split(batch_size):
            layer = self.network.get_submodule(self.spatial_layer) if spatial else None
            # In single precision whatever precision the pictures were drawn in: features must not differ by it.
            with _seen_at(layer) as seen, torch.autocast(torch.device(self.device).type, enabled=False):
                outputs = self.network(batch.contiguous().to(self.device))
            outputs += tuple(_first_channels(activation) for activation in seen)
            yield tuple(out.double().cpu() for out in outputs)

    @torch.inference_mode()
    def outputs(self, pictures: Tensor, batch_size: int = 256, spatial: bool = False) -> dict[str, Tensor]:
        """Pictures: uint8 (N, 1 or 3, H, W) -> {"features": (N, D), "logits": (N, K)}, float64 on the host.

        spatial: also "spatial" (N, H' W' 7), the first seven channels of the spatial layer, for sFID. Raises InputError
        for pictures of a wrong size or type.
        """
        if len(pictures) == 0:
            raise InputError("pictures: none, expected at least one")
        names = ("features", "logits", "spatial")[: 3 if spatial else 2]
        parts = zip(*self._batches(pictures, batch_size, spatial), strict=True)
        outputs = {name: torch.cat(part) for name, part in zip(names, parts, strict=True)}
        if self.projection is not None:
            outputs["features"] = outputs["features"] @ self.projection
        return outputs

    def features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Pictures: uint8 (N, 1 or 3, H, W) -> float64 (N, D) on the host. Raises InputError."""
        return self.outputs(pictures, batch_size)["features"]


def _first_channels(activation: Tensor) -> Tensor:
    """activation: (B, C, H, W) -> (B, H W 7). ADM's order, so that its statistics can serve as reference."""
    return activation[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


@contextmanager
def _seen_at(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect what a layer puts out; nothing without a layer."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _inception(weights: Path | None) -> FeatureExtractorBase:
    """torch-fidelity's port of the original Inception; without a path it downloads the weights."""
    if weights is not None:
        try:  # torch-fidelity unpickles without restriction, so make sure first that there are only tensors
            torch.load(weights, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{weights}: {first_line(error)}; expected torch-fidelity's Inception") from error
    path = None if weights is None else str(weights)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=path,
            verbose=False,
        )
    except OSError as error:
        raise InputError(
            f"--extractor-weights: missing, and the download failed ({first_line(error)}); "
            "expected torch-fidelity's Inception weights"
        ) from error
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{weights}: {first_line(error)}; expected torch-fidelity's Inception") from error


_CLASSIFIERS = {
    "digits": DigitsExtractor,
    "digits-lenet": DigitsLeNetExtractor,
    "resnet20-cifar10": ResNet20Extractor,
    "vgg-cifar10": CifarVGGExtractor,
}
EXTRACTORS = tuple(sorted([*_CLASSIFIERS, "inception"]))

for _name, _cls in _CLASSIFIERS.items():
    if _name not in FEATURE_EXTRACTORS_REGISTRY:  # survives importlib.reload in a notebook
        register_feature_extractor(_name, _cls)


def load_extractor(name: str, weights: Path | None = None, device: str = "cpu") -> Extractor:
    """Return the extractor of that name, frozen, on the device.

    weights: a file; optional where they are in the package (all but `resnet20-cifar10`) and for `inception`, whose
    torch-fidelity downloads.
    Raises InputError for an unknown name or missing weights, CheckpointError for a file that does not fit.
    """
    if name not in EXTRACTORS:
        raise InputError(f"--extractor: '{name}', expected one of {', '.join(EXTRACTORS)}")
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"--extractor-weights: no file {weights}, expected the weights of {name}")
    if name == "inception":
        network = _inception(weights)
    else:
        path = None if weights is None else str(weights)
        network = FEATURE_EXTRACTORS_REGISTRY[name](name, ["64", "logits"], feature_extractor_weights_path=path)
    return Extractor(name, network.to(device), state_hash(network), device, SPATIAL_LAYERS[name])
