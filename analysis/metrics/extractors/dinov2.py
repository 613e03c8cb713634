"""Build DINOv2 from its published weights. Stein et al. 2023 (arXiv:2306.04675) measure FD-DINOv2 on ViT-L/14.

Oquab et al. 2023 (arXiv:2304.07193). Pictures are resized to 224 as Pillow does it, bicubic with rounded bytes between
both passes; features are the class token after the last norm. The published files hold positions of 37 x 37 patches.
At 16 x 16 the published code interpolates them, bicubic at a scale of 16.1 / 37, and so does this module, once.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from dyndit.analysis.metrics.extractors.cifar10 import IMAGENET_MEAN, IMAGENET_STD
from dyndit.analysis.metrics.extractors.registry import fit_strictly, register
from dyndit.errors import CheckpointError, InputError
from dyndit.storage.reading import read_pickled

ARCHITECTURES = {
    "dinov2-vit-s-14": "vit_small_patch14_dinov2",
    "dinov2-vit-b-14": "vit_base_patch14_dinov2",
    "dinov2-vit-l-14": "vit_large_patch14_dinov2",
}
"""Names of the extractors, as torch-fidelity's, and of timm's architectures."""
SIDE, PATCH = 224, 14
OFFSET = 0.1
"""Added to the number of patches before the scale of their positions is computed."""


class DINOv2(FeatureExtractorBase):
    """The network for torch-fidelity: output "cls" holds the class token, "logits" nothing, as it knows no classes."""

    def __init__(self, name: str, features_list: list[str], weights: Path) -> None:
        import timm  # slow to import

        super().__init__(name, features_list)
        self.network = timm.create_model(ARCHITECTURES[name], pretrained=False, img_size=SIDE, num_classes=0)
        state = read_pickled(weights)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{weights}: found no dict of tensors, expected the published weights of {name}")
        state = {key: tensor for key, tensor in state.items() if key != "mask_token"}  # of its training
        if "pos_embed" in state:
            state["pos_embed"] = positions(state["pos_embed"], SIDE // PATCH, weights)
        fit_strictly(self.network, state, weights)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Run uint8 (B, 3, H, W) of any size -> one tensor for each requested feature."""
        small = pictures.cpu()  # bytes are resized on the CPU alone
        if small.shape[2:] != (SIDE, SIDE):
            small = F.interpolate(small, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        x = small.to(pictures.device) / 255
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = self.network((x - mean) / std)
        outputs = {"cls": features, "logits": features[:, :0]}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of the outputs."""
        return "cls", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return the name of the output that a metric of torch-fidelity reads."""
        return {"fid": "cls", "kid": "cls", "prc": "cls"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False: bytes are resized on the CPU."""
        return False


def positions(embedded: Tensor, side: int, origin: Path) -> Tensor:
    """Interpolate the positions of a square of patches.  (1, 1 + n * n, D) -> (1, 1 + side * side, D).

    Raises CheckpointError: the patches are no square.
    """
    of_class, of_patches = embedded[:, :1].float(), embedded[:, 1:].float()
    n = round(of_patches.shape[1] ** 0.5)
    if n * n != of_patches.shape[1]:
        raise CheckpointError(f"{origin}: positions of {of_patches.shape[1]} patches, expected a square of them")
    if n == side:
        return embedded
    grid = of_patches.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + OFFSET) / n, mode="bicubic")
    return torch.cat([of_class, grid.flatten(2).transpose(1, 2)], dim=1)


def _builder(name: str) -> Callable[[Path | None], FeatureExtractorBase]:
    """Return the function that builds one of `ARCHITECTURES`. It needs a file: nothing is downloaded."""

    def build(weights: Path | None) -> FeatureExtractorBase:
        if weights is None:
            file = f"dinov2_{name.removeprefix('dinov2-').replace('-', '')}_pretrain.pth"
            raise InputError(f"--extractor-weights: missing, expected {file} as published for {name}")
        return DINOv2(name, ["cls", "logits"], weights)

    return build


for _name in ARCHITECTURES:
    register(_name, spatial_layer="")(_builder(_name))
