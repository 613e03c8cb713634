"""Several extractors side by side, as one to calibrate by.

A plan that is chosen by one network's features fits that network: another one sees losses that it does not see.
Features of several networks leave a plan less to fit. Each network's part is reduced to its leading directions on real
pictures, and scaled so that these have a total variance of one (`of_few_features`): none outweighs the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from dyndit.analysis.metrics.extractors.extractor import Extractor, state_hash
from dyndit.calibration.extractor import SEPARATOR
from dyndit.errors import InputError

ANY = 32
"""Side of a picture for networks that take any."""


class Joined(FeatureExtractorBase):
    """The features of several networks one after the other, and so their logits."""

    def __init__(self, name: str, networks: Sequence[FeatureExtractorBase]) -> None:
        super().__init__(name, ["features", "logits"])
        self.networks = nn.ModuleList(networks)
        self.sizes = tuple(_size_of(network) for network in networks)
        """Features of each network."""
        self.eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Run uint8 (B, 3, H, W) -> features (B, sum of D), logits (B, sum of K)."""
        features, logits = zip(*(network(pictures) for network in self.networks), strict=True)
        return torch.cat(features, dim=1), torch.cat(logits, dim=1)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of the outputs."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return the name of the output that a metric of torch-fidelity reads."""
        return {"isc": "logits", "fid": "features", "kid": "features", "prc": "features"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False, as its parts do."""
        return False


@torch.inference_mode()
def _size_of(network: FeatureExtractorBase) -> int:
    """Return the number of features, from a black picture of a size that the network takes."""
    side = getattr(network, "size", ANY)
    like = next(network.parameters())
    return network(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=like.device))[0].shape[1]


def join(extractors: Sequence[Extractor]) -> Extractor:
    """Return whole extractors of one device as one, named after them: "resnet20-cifar10+vgg-cifar10".

    A single one is itself. Raises InputError: one is there twice.
    """
    if len(extractors) == 1:
        return extractors[0]
    name = SEPARATOR.join(one.name for one in extractors)
    if len({one.fingerprint for one in extractors}) < len(extractors):
        raise InputError(f"--extractor: {name} names one twice, expected different extractors")
    network = Joined(name, [one.network for one in extractors])
    return Extractor(name, network, state_hash(network), extractors[0].device)
