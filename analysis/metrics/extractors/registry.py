"""Register extractors, and share the code of the classifiers among them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from dyndit.errors import CheckpointError, InputError
from dyndit.files import read_safetensors

Build = Callable[[Path | None], FeatureExtractorBase]
"""Build a network from a weights file; None: packaged or downloaded weights. Outputs: features, logits."""


@dataclass(frozen=True)
class Entry:
    """An extractor to load by name. spatial_layer: the module whose output sFID reads."""

    build: Build
    spatial_layer: str


REGISTRY: dict[str, Entry] = {}


def register(name: str, *, spatial_layer: str) -> Callable[[Build], Build]:
    """Register a function that builds a network."""

    def enter(build: Build) -> Build:
        REGISTRY[name] = Entry(build, spatial_layer)
        return build

    return enter


def register_classifier(name: str) -> Callable[[type["ClassifierExtractor"]], type["ClassifierExtractor"]]:
    """Register a classifier here and with torch-fidelity."""

    def enter(classifier: type[ClassifierExtractor]) -> type[ClassifierExtractor]:
        if name not in FEATURE_EXTRACTORS_REGISTRY:  # survives importlib.reload in a notebook
            register_feature_extractor(name, classifier)

        @register(name, spatial_layer=classifier.spatial_layer)
        def build(weights: Path | None) -> FeatureExtractorBase:
            path = None if weights is None else str(weights)
            return classifier(name, ["64", "logits"], feature_extractor_weights_path=path)

        return classifier

    return enter


class ClassifierExtractor(FeatureExtractorBase):
    """A classifier for torch-fidelity: output "64" holds features, "logits" the scores of ten classes.

    A subclass sets the classifier and how to scale a picture.
    """

    size: int
    """Height and width of its input pictures."""
    classifier_type: type[nn.Module]
    packaged: str = ""
    """Weights file in `dyndit.assets`; "": the user must give a path."""
    spatial_layer: str
    """Module whose first channels sFID reads."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = self.build(Path(feature_extractor_weights_path) if feature_extractor_weights_path else None)
        self.requires_grad_(False)
        self.eval()

    def build(self, weights: Path | None) -> nn.Module:
        """Load the classifier from the file; None: packaged weights. Raises InputError, CheckpointError."""
        if weights is not None:
            return load_strict(self.classifier_type(), weights)
        if not self.packaged:
            raise InputError(f"--extractor-weights: missing, expected the .safetensors file of {self.name}")
        with as_file(files("dyndit.assets") / self.packaged) as path:
            return load_strict(self.classifier_type(), path)

    def scale(self, pictures: Tensor) -> Tensor:
        """Scale uint8 (B, 3, H, W) -> float32 (B, C, H, W), the classifier's training range."""
        raise NotImplementedError

    def check(self, pictures: Tensor) -> None:
        """Refuse pictures of another size than the classifier takes. Raises InputError."""
        if pictures.shape[2:] != (self.size, self.size):
            found = "x".join(map(str, pictures.shape[2:]))
            raise InputError(f"extractor {self.name}: pictures are {found}, expected {self.size}x{self.size}")

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Run uint8 (B, 3, size, size) -> one tensor for each requested feature. Raises InputError."""
        self.check(pictures)
        features = self.classifier.features(self.scale(pictures))
        outputs = {"64": features, "logits": self.classifier.linear(features)}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of the outputs."""
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return the name of the output that a metric of torch-fidelity reads."""
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False: the size check is Python, and these networks are small."""
        return False


def load_strict(model: nn.Module, path: Path) -> nn.Module:
    """Load a .safetensors file; all names, shapes and values must fit. Raises CheckpointError."""
    state, _ = read_safetensors(path)
    return fit_strictly(model, state, path)


def fit_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Load tensors that were read from `path`; all names, shapes and values must fit. Raises CheckpointError."""
    # BatchNorm counts batches in training; files for inference leave the counter out.
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
