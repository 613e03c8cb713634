"""Read sets of pictures: folders, also of `dyndit sample`, and ADM's .npz files (pictures, statistics or both)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.files import write_npz
from dyndit.pictures import PictureFiles, as_nchw
from dyndit.stats import Moments
from dyndit.untrusted import read_npz


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a set's features, in place of its pictures.

    spatial: moments of the spatial features, if there are any. num: number of pictures; None if the file does not say
    it. extractor: fingerprint of the network; empty in ADM's files, which use Inception.
    """

    features: Moments
    spatial: Moments | None = None
    num: int | None = None
    extractor: str = ""


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Pictures, or statistics of their features, or both.  name: for messages.

    source: uint8 (N, C, H, W), or files that are read batch by batch.
    """

    name: str
    source: Tensor | PictureFiles | None = None
    statistics: Statistics | None = None

    @cached_property
    def pictures(self) -> Tensor | None:
        """Return all pictures in memory, uint8 (N, C, H, W)."""
        if not isinstance(self.source, PictureFiles):
            return self.source
        parts = list(self.source.batches())
        channels = max(part.shape[1] for part in parts)
        return torch.cat([part.expand(-1, channels, -1, -1) for part in parts])

    @property
    def size(self) -> tuple[int, ...]:
        """Return the pictures' size, (H, W)."""
        return self.source.size if isinstance(self.source, PictureFiles) else tuple(self.source.shape[2:])

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Yield the pictures in order, uint8 (B, 1 or 3, H, W). Files are read one batch at a time."""
        if isinstance(self.source, PictureFiles):
            return self.source.batches(batch_size)
        return iter(self.source.split(batch_size))


def read_set(source: Path | Tensor, name: str) -> PictureSet:
    """Read an .npz file or a folder, or wrap a tensor. Raises InputError as `read_pictures`."""
    if isinstance(source, Tensor):
        return PictureSet(name, source)
    path = Path(source)
    if path.suffix != ".npz":
        return PictureSet(str(path), PictureFiles.of_folder(path))
    arrays = _read_arrays(path)
    statistics = _statistics(path, arrays) if "mu" in arrays else None
    if statistics is not None and not {"arr_0", "images"} & arrays.keys():
        return PictureSet(str(path), None, statistics)
    return PictureSet(str(path), _pictures(path, arrays), statistics)


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write ADM's .npz: `mu`, `sigma`, and `mu_s`, `sigma_s` if given. Add `num` and `extractor`."""
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path}: expected a name that ends in .npz")
    m, s = statistics.features, statistics.spatial
    arrays = {"mu": m.mean.numpy(), "sigma": m.covariance.numpy(), "extractor": np.array(statistics.extractor)}
    if s is not None:
        arrays |= {"mu_s": s.mean.numpy(), "sigma_s": s.covariance.numpy()}
    if statistics.num is not None:
        arrays["num"] = np.array(statistics.num)
    write_npz(path, arrays)


def _statistics(path: Path, arrays: Mapping[str, np.ndarray]) -> Statistics:
    num = arrays.get("num")
    if num is not None:
        if num.shape != () or num.dtype.kind not in "iu" or not 2 <= num <= 2**53:
            raise InputError(f"{path}: num is {num!s:.40}, expected a number of pictures")
        num = int(num)
    main = _moments(path, arrays, "mu", "sigma", num)
    spatial = _moments(path, arrays, "mu_s", "sigma_s", num) if "mu_s" in arrays else None
    return Statistics(main, spatial, num, str(arrays.get("extractor", "")))


def _moments(path: Path, arrays: Mapping[str, np.ndarray], mean: str, covariance: str, num: int | None) -> Moments:
    mu, sigma = arrays[mean], arrays.get(covariance)
    shape = None if sigma is None else sigma.shape
    if {mu.dtype.kind, "f" if sigma is None else sigma.dtype.kind} != {"f"}:
        raise InputError(f"{path}: {mean}, {covariance} are no floating-point numbers, expected them")
    if mu.ndim != 1 or shape != (len(mu), len(mu)):
        raise InputError(f"{path}: {mean} {mu.shape} and {covariance} {shape}, expected (D,) and (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: {mean}, {covariance} hold values that are not finite, expected numbers")
    known = {} if num is None else {"num": num}
    return Moments.of_covariance(torch.from_numpy(mu), torch.from_numpy(sigma), **known)


def read_pictures(path: Path) -> Tensor:
    """Return the pictures of a folder (searched in depth, sorted) or an .npz file: uint8 (N, C, H, W).

    An .npz holds them as ADM's sample sets do: `arr_0` or `images`, uint8 (N, H, W, C). Overview pictures
    (grid.png, samples.png) are skipped. Raises InputError: missing, unreadable, or of different sizes.
    """
    return _pictures(path, _read_arrays(path)) if path.suffix == ".npz" else read_set(path, "").pictures


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    wanted = ("arr_0", "images", "mu", "sigma", "mu_s", "sigma_s", "num", "extractor")
    arrays, names = read_npz(path, wanted)
    found = ", ".join(names)[:200] or "nothing"
    if not {"arr_0", "images", "mu"} & arrays.keys():
        raise InputError(f"{path}: holds {found}, expected an array 'arr_0' or 'images', or statistics 'mu', 'sigma'")
    return arrays


def _pictures(path: Path, arrays: Mapping[str, np.ndarray]) -> Tensor:
    key = next((k for k in ("arr_0", "images") if k in arrays), None)
    if key is None:
        raise InputError(f"{path}: holds statistics, expected pictures, an array 'arr_0' or 'images'")
    array = arrays[key]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise InputError(f"{path}: {key} is {array.dtype} {array.shape}, expected uint8 (N, H, W, 1 or 3)")
    return as_nchw(array)
