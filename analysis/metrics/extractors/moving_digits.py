"""Define the extractor of moving digits: a small classifier of clips with weights in the package."""

import torch.nn.functional as F
from torch import Tensor, nn

from dyndit.analysis.metrics.extractors.registry import ClassifierExtractor, register_classifier
from dyndit.errors import InputError


class ClipClassifier(nn.Module):
    """Three 3-D convolutions, means over all places, two linear layers, for grey clips of any shape.

    It tells the class of a clip, and whether its frames are in order: features of the class alone would not see motion.
    recipes/studies/moving_digits_classifier.py trains it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 16, 3, padding=1, stride=(1, 2, 2))
        self.conv2 = nn.Conv3d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv3d(32, 48, 3, padding=1, stride=(1, 2, 2))
        self.hidden = nn.Linear(48, 64)
        self.linear = nn.Linear(64, 10)
        self.order = nn.Linear(64, 1)

    def features(self, x: Tensor) -> Tensor:
        """Return the values before the last layers.  x: (B, 1, T, H, W) in [0, 1] -> (B, 64)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.mean((2, 3, 4))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the classes, (B, 10), and of frames in order, (B,).  x: (B, 1, T, H, W) in [0, 1]."""
        features = self.features(x)
        return self.linear(features), self.order(features).squeeze(1)


@register_classifier("moving-digits")
class MovingDigitsExtractor(ClassifierExtractor):
    """`moving-digits`: grey clips of at least 8 x 8 pixels, weights in the package."""

    size = 8
    classifier_type = ClipClassifier
    packaged = "moving-digits.safetensors"
    spatial_layer = "classifier.conv3"  # 8 x 4 x 4 x 7 = 896 features of a clip of 8 x 16 x 16

    def check(self, pictures: Tensor) -> None:
        """Refuse pictures, and clips smaller than a scan. Raises InputError."""
        if pictures.ndim != 5 or min(pictures.shape[-2:]) < self.size:
            found, least = "x".join(map(str, pictures.shape[2:])), f"{self.size}x{self.size}"
            raise InputError(f"extractor {self.name}: pictures are {found}, expected clips, frames of {least} or more")

    def scale(self, pictures: Tensor) -> Tensor:
        """Scale uint8 clips (B, 3, T, H, W) -> grey (B, 1, T, H, W) in [0, 1]."""
        return pictures.float().mean(1, keepdim=True) / 255
