"""The protocol of feature extractors. `dyndit.load_extractor` returns an extractor; your own class can serve too."""

from typing import Protocol, Self

from torch import Tensor

SEPARATOR = "+"
"""Between the names of extractors that are joined to calibrate by: "resnet20-cifar10+vgg-cifar10"."""


def first_of(name: str) -> str:
    """Return the first of the names that are joined; of a single name, the name."""
    return name.split(SEPARATOR)[0]


class FeatureExtractor(Protocol):
    """Turn pictures into features. Their Fréchet distance to the features of real pictures measures quality."""

    @property
    def name(self) -> str:
        """Return the name that tables and messages show, such as `digits`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return a hash of all that the features depend on. Tables are refused with another fingerprint."""
        ...

    @property
    def projection(self) -> Tensor | None:
        """Return (D, d) if the network's D features are reduced to d directions, else None."""

    def features(self, pictures: Tensor) -> Tensor:
        """Compute features.  pictures: (N, 1 or 3, H, W) uint8 -> (N, D) float64 on the host."""
        ...

    def projected(self, projection: Tensor) -> Self:
        """Return the same extractor with features @ projection (D, d), under another fingerprint."""
        ...
