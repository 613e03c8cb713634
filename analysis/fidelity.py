"""Quality: how far one set of pictures is from another.

The Fréchet distance between Gaussians N(m, S) and N(μ, Σ) (Heusel et al. 2017, after Fréchet 1957):

    FD = |m - μ|² + tr S + tr Σ - 2 tr (Σ^½ S Σ^½)^½

Its bias falls as 1/N: compare only sets of equal size, scored against the same reference pictures.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyndit.analysis.extractors import Extractor, as_rgb
from dyndit.errors import InputError

METRICS = ("fd", "kid", "is", "prc")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
OVERVIEWS = {"grid.png", "samples.png"}  # what `dyndit sample` and the reports lay beside single pictures


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of features, float64. mean: (D,), second: (D, D), raw E[f fᵀ]; num: how many."""

    mean: Tensor
    second: Tensor
    num: int

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D), as np.cov gives it."""
        return (self.second - torch.outer(self.mean, self.mean)) * (self.num / (self.num - 1))


def moments(features: Tensor) -> Moments:
    """Features: (N, D), N ≥ 2 -> their moments in float64."""
    features = features.double()
    return Moments(features.mean(0), features.T @ features / len(features), len(features))


def square_root(covariance: Tensor) -> Tensor:
    """Covariance: (D, D), symmetric -> R (D, D) with R Rᵀ = covariance; negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance between the Gaussians with these moments.

    The last trace is the sum of the singular values of A^½ B^½: unlike the square roots of eigenvalues of A B
    these keep full precision where the covariances have no full rank.
    """
    root = square_root(a.covariance).T @ square_root(b.covariance)
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * torch.linalg.svdvals(root).sum()
    return distance.item()


class FrechetTo:
    """The Fréchet distance to one fixed reference, for many Gaussians at once: the search's inner loop."""

    def __init__(self, reference: Moments) -> None:
        self.mean = reference.mean
        self.trace = reference.covariance.trace()
        self.root = square_root(reference.covariance)

    def __call__(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """mean: (..., D), covariance: (..., D, D), float64 -> (...,)."""
        values = torch.linalg.eigvalsh(self._product(covariance)).clamp(min=0)
        traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self.trace
        return (mean - self.mean).square().sum(-1) + traces - 2 * values.sqrt().sum(-1)

    def gradient(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """mean: (..., D), covariance: (..., D, D) -> (dFD/dmean (..., D), dFD/dcovariance (..., D, D)).

        With R Rᵀ = Σ and M = Rᵀ S R: dFD/dm = 2 (m - μ), dFD/dS = 1 - R M^-½ Rᵀ. Directions in which M
        vanishes have no finite slope; they count as flat (pseudo-inverse).
        """
        values, vectors = torch.linalg.eigh(self._product(covariance))
        floor = values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
        inverse = torch.where(values > floor, values.clamp(min=1e-300).rsqrt(), 0.0)
        side = self.root @ vectors
        slope = torch.eye(mean.shape[-1], dtype=mean.dtype) - (side * inverse[..., None, :]) @ side.mT
        return 2 * (mean - self.mean), slope

    def _product(self, covariance: Tensor) -> Tensor:
        """Rᵀ S R, made exactly symmetric: it has the eigenvalues of Σ^½ S Σ^½."""
        product = self.root.T @ covariance @ self.root
        return (product + product.mT) / 2


def read_pictures(path: Path) -> Tensor:
    """Return the pictures of a folder (searched in depth, sorted) or an .npz file: uint8 (N, C, H, W).

    An .npz holds them as ADM's sample sets do: `arr_0` or `images`, uint8 (N, H, W, C). Overview pictures
    (grid.png, samples.png) are passed over. Raises InputError: nothing there, unreadable, or sizes that
    differ.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder, expected a folder of pictures or an .npz file")
    names = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.name not in OVERVIEWS)
    if not names:
        raise InputError(f"{path}: no picture found, expected PNG, JPEG or WEBP files")
    pictures = [_read_picture(name) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        if picture.shape[:2] != pictures[0].shape[:2]:
            (h, w), (height, width) = picture.shape[:2], pictures[0].shape[:2]
            raise InputError(f"{name}: {h}x{w} pixels, expected {height}x{width} as in {names[0].name}")
    channels = max(picture.shape[2] for picture in pictures)
    return _as_nchw(np.stack([np.broadcast_to(p, (*p.shape[:2], channels)) for p in pictures]))


def _read_npz(path: Path) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as archive:
            key = next((k for k in ("arr_0", "images") if k in archive.files), None)
            array = None if key is None else archive[key]
            found = ", ".join(archive.files) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: unreadable ({error}), expected an .npz file of pictures") from error
    if array is None:
        raise InputError(f"{path}: holds {found}, expected an array 'arr_0' or 'images'")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise InputError(f"{path}: {key} is {array.dtype} {array.shape}, expected uint8 (N, H, W, 1 or 3)")
    return _as_nchw(array)


def _read_picture(path: Path) -> np.ndarray:
    """Return one picture as uint8 (H, W, 1 or 3). Raises InputError."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255
                raise InputError(f"{path}: {image.mode} pixels, expected 8 bits a channel")
            if image.has_transparency_data:
                if image.convert("RGBA").getextrema()[3][0] < 255:  # hidden colours would count
                    raise InputError(f"{path}: transparent pixels, expected an opaque picture")
                image = image.convert("RGBA")
            array = np.asarray(image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        raise InputError(f"{path}: unreadable ({error}), expected a whole picture") from error
    return array if array.ndim == 3 else array[..., None]


def _as_nchw(array: np.ndarray) -> Tensor:
    """(N, H, W, C) -> a contiguous tensor (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def evaluate(
    samples: Path | Tensor,
    reference: Path | Tensor,
    extractor: Extractor,
    metrics: Sequence[str] = METRICS,
    force: bool = False,
) -> dict[str, float | int | str]:
    """Compare two sets of pictures, folders, .npz files or uint8 (N, C, H, W), on the extractor's features.

    Returns "metric" (FID for Inception, else FD-<extractor>), "extractor", "num_samples", "num_reference",
    and for each metric: fd -> "fd"; kid -> "kid" (mean over subsets; their spread is no confidence
    interval, so it is left out); is -> "is" (exp of the mean KL of the classifier's own classes, 10
    splits); prc -> "precision", "recall" (Kynkäänniemi et al. 2019, k = 3, on the same features rather than
    VGG's).

    Compare results of equal N only: a Gaussian of 256 features scores 37 against itself at N = 500, 3.7 at
    5,000. With as few pictures as features FD has no meaning: InputError, unless `force`, which marks the
    result with "few_samples". Raises InputError also for unknown metrics and pictures that do not fit.
    """
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"--metrics: '{name}', expected some of {', '.join(METRICS)}")
    sets = {"samples": samples, "reference": reference}
    pictures = {k: v if isinstance(v, Tensor) else read_pictures(v) for k, v in sets.items()}
    sizes = {k: f"{v.shape[-2]}x{v.shape[-1]}" for k, v in pictures.items()}
    if sizes["samples"] != sizes["reference"]:
        raise InputError(f"samples: {sizes['samples']} pixels, expected {sizes['reference']} as in the reference")
    outputs = {k: extractor.outputs(as_rgb(v)) for k, v in pictures.items()}
    ours, theirs = outputs["samples"]["features"], outputs["reference"]["features"]
    result: dict[str, float | int | str] = {
        "metric": extractor.metric_name,
        "extractor": extractor.name,
        "num_samples": len(ours),
        "num_reference": len(theirs),
    }
    if "fd" in metrics:
        few = [name for name, out in outputs.items() if len(out["features"]) <= ours.shape[1]]
        if few and not force:
            raise InputError(
                f"{few[0]}: {len(outputs[few[0]]['features'])} pictures, expected more than the "
                f"{ours.shape[1]} features of {extractor.name} (--force computes it all the same)"
            )
        if few:
            result["few_samples"] = True
        result["fd"] = frechet_distance(moments(ours), moments(theirs))
    # The rest is torch-fidelity's, from features to number; imported late, as it is slow to import.
    if "kid" in metrics:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        size = min(1000, len(ours), len(theirs))
        result["kid"] = kid_features_to_metric(ours, theirs, kid_subset_size=size, verbose=False)[KEY_METRIC_KID_MEAN]
    if "is" in metrics:
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

        logits = outputs["samples"]["logits"]
        result["is"] = isc_features_to_metric(logits, splits=min(10, len(logits)))[KEY_METRIC_ISC_MEAN]
    if "prc" in metrics:
        if min(len(ours), len(theirs)) < 5:
            raise InputError(f"--metrics prc: {min(len(ours), len(theirs))} pictures, expected at least 5")
        from torch_fidelity.metric_prc import prc_features_to_metric

        found = prc_features_to_metric(ours, theirs, verbose=False)
        result |= {"precision": found["precision"], "recall": found["recall"]}
    return result
