"""Define the extractors of 8x8 grey digits: two small classifiers with weights in the package."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndit.analysis.metrics.extractors.registry import ClassifierExtractor, register_classifier


class DigitsClassifier(nn.Module):
    """Three convolutions, two linear layers, for 8x8 grey digits; recipes/studies/digits_classifier.py trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 2 * 2, 64)
        self.linear = nn.Linear(64, 10)
        self.drop = nn.Dropout(0.3)

    def features(self, x: Tensor) -> Tensor:
        """Return the values before the last layer.  x: (B, 1, 8, 8) in [0, 1] -> (B, 64)."""
        # SiLU, not ReLU: no unit dies, so the covariance of the features keeps its full rank.
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        return F.silu(self.hidden(self.drop(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.  x: (B, 1, 8, 8) in [0, 1] -> (B, 10)."""
        return self.linear(self.drop(self.features(x)))


class DigitsLeNet(nn.Module):
    """Wide kernels, tanh and average pooling after LeNet-5 (LeCun et al. 1998): a second extractor of 8x8 grey digits.

    Differs from DigitsClassifier in layers, nonlinearity, split and seed; the same recipe trains it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 5, padding=2)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.linear = nn.Linear(64, 10)
        self.drop = nn.Dropout(0.3)

    def features(self, x: Tensor) -> Tensor:
        """Return the values before the last layer.  x: (B, 1, 8, 8) in [0, 1] -> (B, 64)."""
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = torch.tanh(self.conv2(x))
        return torch.tanh(self.hidden(self.drop(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.  x: (B, 1, 8, 8) in [0, 1] -> (B, 10)."""
        return self.linear(self.drop(self.features(x)))


@register_classifier("digits")
class DigitsExtractor(ClassifierExtractor):
    """`digits`: 8x8 grey pictures, weights in the package."""

    size = 8
    classifier_type = DigitsClassifier
    packaged = "digits-classifier.safetensors"
    spatial_layer = "classifier.conv2"  # 4 x 4 x 7 = 112 features

    def scale(self, pictures: Tensor) -> Tensor:
        """Scale uint8 pictures (B, 3, 8, 8) -> grey (B, 1, 8, 8) in [0, 1]."""
        return pictures.float().mean(1, keepdim=True) / 255


@register_classifier("digits-lenet")
class DigitsLeNetExtractor(DigitsExtractor):
    """`digits-lenet`: another classifier of the same pictures, to score plans calibrated on `digits`."""

    classifier_type = DigitsLeNet
    packaged = "digits-lenet.safetensors"
