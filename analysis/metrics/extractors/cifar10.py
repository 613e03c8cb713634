"""Define the extractors of 32x32 colour pictures: two classifiers of CIFAR-10."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndit.analysis.metrics.extractors.registry import ClassifierExtractor, register_classifier

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters ("option A" of He et al. 2016)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.stride = num_out // num_in  # 2 if the channels double, at the start of a stage
        self.padding = (num_out - num_in) // 2
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, stride=self.stride, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.  x: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
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
        """Return the means before `linear`.  x: (B, 3, 32, 32), normalised -> (B, 64)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


class CifarVGG(nn.Module):
    """Plain 3x3 convolutions and max pooling after VGG (Simonyan and Zisserman 2015): a second CIFAR-10 extractor.

    Differs from ResNet20 in shortcuts, nonlinearity, scaling and seed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_vgg_stage(3, 32, 1), _vgg_stage(32, 64, 2), _vgg_stage(64, 128, 2)])
        self.hidden = nn.Linear(128, 64)
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return the values before the last layer.  x: (B, 3, 32, 32) in [-1, 1] -> (B, 64)."""
        for index, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if index else x)
        return F.silu(self.hidden(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.  x: (B, 3, 32, 32) in [-1, 1] -> (B, 10)."""
        return self.linear(self.features(x))


def _vgg_stage(num_in: int, num_out: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(num_convs):
        conv = nn.Conv2d(num_out if i else num_in, num_out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(num_out), nn.SiLU()]
    return nn.Sequential(*layers)


@register_classifier("resnet20-cifar10")
class ResNet20Extractor(ClassifierExtractor):
    """`resnet20-cifar10`: 32x32 colour pictures, weights by path."""

    size = 32
    classifier_type = ResNet20
    spatial_layer = "classifier.layer3"  # 8 x 8 x 7 = 448 features

    def scale(self, pictures: Tensor) -> Tensor:
        """Remove ImageNet's mean and deviation from uint8 pictures (B, 3, 32, 32)."""
        mean, std = (torch.tensor(c, device=pictures.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
        return (pictures / 255 - mean) / std


@register_classifier("vgg-cifar10")
class CifarVGGExtractor(ClassifierExtractor):
    """`vgg-cifar10`: another classifier of the same pictures, to score plans calibrated on `resnet20-cifar10`."""

    size = 32
    classifier_type = CifarVGG
    packaged = "cifar10-vgg.safetensors"
    spatial_layer = "classifier.stages.2"  # 8 x 8 x 7 = 448 features

    def scale(self, pictures: Tensor) -> Tensor:
        """Scale uint8 pictures (B, 3, 32, 32) to [-1, 1]."""
        return pictures.float() / 127.5 - 1
