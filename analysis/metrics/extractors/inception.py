"""Build Inception v3. A Fréchet distance on its features is called FID."""

from pathlib import Path

from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dyndit.analysis.metrics.extractors.registry import register
from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.storage.reading import read_pickled


# sFID on 17 x 17 x 7 = 2,023 features: TensorFlow's "mixed_6/conv", which ADM reads.
@register("inception", spatial_layer="Mixed_6d.branch1x1")
def inception(weights: Path | None) -> FeatureExtractorBase:
    """Build torch-fidelity's port of the original Inception. Without a path torch-fidelity downloads the weights.

    Raises:
        CheckpointError: the file is damaged or belongs to another network.
        InputError: the download failed.
    """
    if weights is not None:
        read_pickled(weights)  # torch-fidelity unpickles without restriction: the file must hold tensors alone
    path = None if weights is None else str(weights)
    try:
        options = {"feature_extractor_weights_path": path, "verbose": False}
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    except OSError as error:
        raise InputError(
            f"--extractor-weights: missing, and the download failed ({first_line(error)}); "
            "expected torch-fidelity's Inception weights"
        ) from error
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{weights}: {first_line(error)}; expected torch-fidelity's Inception") from error
