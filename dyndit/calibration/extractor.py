"""What calibration needs of a network that judges pictures. `dyndit.load_extractor` gives one; any other serves too."""

from typing import Protocol, Self

from torch import Tensor


class FeatureExtractor(Protocol):
    """Turn pictures into features, whose Fréchet distance to real pictures' features is the quality."""

    @property
    def name(self) -> str:
        """The name that tables and messages show, such as `digits`."""

    @property
    def fingerprint(self) -> str:
        """A hash of all that the features depend on. A table is refused with an extractor of another fingerprint."""

    @property
    def projection(self) -> Tensor | None:
        """(D, d), if the network's D features are reduced to d directions."""

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures: (N, 1 or 3, H, W) uint8 -> (N, D) float64 on the host."""

    def projected(self, projection: Tensor) -> Self:
        """Return the same extractor with features @ projection (D, d), under another fingerprint."""
