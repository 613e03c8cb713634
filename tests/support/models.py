"""Tiny models, random all through, so that depth, labels and exits matter."""

from collections.abc import Callable

import torch
from torch import nn

from dyndit.models import families
from dyndit.models.base import Backbone
from dyndit.models.conditioning import CONDITIONINGS
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.mmdit import MMDiTConfig
from dyndit.models.video import VideoConfig
from dyndit.process import processes

TINY = DiTConfig(image_size=8, patch_size=4, in_channels=1, width=24, num_blocks=6, num_heads=2, num_classes=10)

TINY_MMDIT = MMDiTConfig(
    image_size=8,
    patch_size=4,
    in_channels=1,
    width=24,
    num_blocks=4,
    num_heads=2,
    text_width=16,
    pooled_width=16,
    text_length=5,
    vocabulary=("a", "number", "three", "seven", "bold", "tilted"),
    prompts=("a three", "number seven, bold"),
)

TINY_VIDEO = VideoConfig(
    num_frames=3, image_size=(8, 12), patch_size=4, in_channels=1, width=24, num_blocks=6, num_heads=2, num_classes=10
)

TINY_CONFIGS: dict[str, dict[str, object]] = {
    "class_conditional": vars(TINY),
    **{f"class_conditional/{name}": vars(TINY) | {"conditioning": name} for name in CONDITIONINGS},
    "mmdit": vars(TINY_MMDIT),
    "video": vars(TINY_VIDEO),
}
"""Tiny configs of every backbone family: "family", or "family/what is special". The contract tests run each of them."""


def tiny(name: str, process: str = "") -> Backbone:
    """The backbone of a tiny config, random all through; under a process without a variance it predicts none."""
    config = dict(TINY_CONFIGS[name])
    if process and config.get("learn_variance") and not processes()[process].has_variance:
        config["learn_variance"] = False
    backbone = families()[name.partition("/")[0]].from_config(config).eval()
    randomise(backbone, seed=0)
    return backbone


MakeBackbone = Callable[..., ClassConditionalDiT]


MakeModel = Callable[..., DynamicDepth]


def randomise(module: nn.Module, seed: int) -> None:
    """Random values in every trained parameter, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def balanced_labels(num_images: int, num_classes: int) -> list[int]:
    """Every class in turn."""
    return [i % num_classes for i in range(num_images)]
