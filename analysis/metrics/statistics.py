"""Read statistics of features, by the programs that write them, and say where they come from.

| program | file | extractor |
|---|---|---|
| dyndit | .npz: mu, sigma, extractor, num | its fingerprint |
| ADM | .npz: mu, sigma, mu_s, sigma_s, often with pictures | Inception |
| torch-fidelity | .pt, NAME-inception-v3-compat-stat-fid-2048.pt: mu, sigma | in the name |
| EDM | .npz or .pkl, cifar10-32x32.npz: mu, sigma; or a table of them with "fid" | Inception |
| clean-fid | .npz, cifar10_clean_train_32.npz: mu, sigma | in the name: "clean" resizes to Inception in its own way |
| pytorch-fid, and others | .npz: mu, sigma | not said |

Pickled files are read without running anything: only arrays of numbers are let in.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from dyndit.errors import InputError, first_line
from dyndit.files import write_npz
from dyndit.pictures.arrays import headers_of, read_array
from dyndit.pictures.sources import read_bytes
from dyndit.stats import Moments

INCEPTION = "inception"
UNKNOWN = "unknown"
SUFFIXES = (".npz", ".pkl", ".pt", ".pth")
MOST = 1 << 30
"""Most bytes of a pickled file. Inception's statistics have 34 MB."""
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "num", "extractor", "resize", "source")

_CLEAN = re.compile(r".+_(clean|legacy_pytorch|legacy_tensorflow)(_clip_vit_b_32)?_[a-z0-9]+_(\d+|na)")
_EDM = re.compile(r".+-\d+x\d+")
_FIDELITY = re.compile(r"(?:.+?-)??(inception-v3-compat|vgg16|clip-.+|dinov2-.+|[a-z0-9]+)-stat-fid-(\w+)")
_NUMPY = {
    (f"numpy.{core}.{module}", name): (f"numpy._core.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", name): ("numpy", name) for name in ("ndarray", "dtype")}


@dataclass(frozen=True)
class Told:
    """What the user says about a reference of statistics. Empty: nothing, the file has to say it.

    extractor: name of the extractor. resize: how the pictures came to their size. num: how many. source: of what.
    """

    extractor: str = ""
    resize: str = ""
    num: int | None = None
    source: str = ""


NOTHING_TOLD = Told()


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a set's features, in place of its pictures.

    spatial: moments of the spatial features, if there are any. num: number of pictures; None if nothing says it.
    extractor: fingerprint or name of the network; empty if nothing says it. program, resize, source: who wrote the
    file, how the pictures came to their size, and what they are; empty if nothing says it.
    """

    features: Moments
    spatial: Moments | None = None
    num: int | None = None
    extractor: str = ""
    program: str = ""
    resize: str = ""
    source: str = ""

    @property
    def provenance(self) -> str:
        """Say where the statistics come from: "ADM; extractor inception; pictures unknown; ..."."""
        extractor = self.extractor[:12] if self._has_fingerprint else self.extractor
        parts = {"extractor": extractor, "pictures": self.num, "resize": self.resize, "source": self.source}
        told = [f"{name} {UNKNOWN if value in ('', None) else value}" for name, value in parts.items()]
        return "; ".join([f"statistics of {self.program or 'an unknown program'}", *told])

    @property
    def _has_fingerprint(self) -> bool:
        return re.fullmatch("[0-9a-f]{64}", self.extractor) is not None

    def told(self, told: Told, name: str) -> "Statistics":
        """Add what the user says. Raises InputError: the file says otherwise.  name: of the file, for messages."""
        for field, value in vars(told).items():
            own = getattr(self, field)
            if value and own and value != own and not (field == "extractor" and self._has_fingerprint):
                flag = "count" if field == "num" else field
                raise InputError(f"--reference-{flag} {value}: {name} says {own}; expected the same, or no flag")
        added = {k: v for k, v in vars(told).items() if v and not getattr(self, k)}
        if told.num and self.num is None:
            added["features"] = replace(self.features, num=told.num)
        return replace(self, **added)


def has_statistics(path: Path) -> bool:
    """Tell if a file holds statistics, perhaps beside pictures. Raises InputError: unreadable."""
    return path.suffix in SUFFIXES[1:] or (path.suffix == ".npz" and "mu" in headers_of(path))


def is_of_fidelity(path: Path) -> bool:
    """Tell if a file has the name that torch-fidelity gives to a cache of statistics."""
    return path.suffix in (".pt", ".pth") and _FIDELITY.fullmatch(path.stem) is not None


def read_statistics(path: Path) -> Statistics:
    """Read statistics, and recognise the program that wrote them. Raises InputError."""
    if path.suffix == ".npz":
        headers = headers_of(path)
        arrays = {key: read_array(path, key) for key in ARRAYS if key in headers}
        program, extractor = _npz_program(path, headers)
    elif path.suffix == ".pkl":
        arrays, program, extractor = _pickled(path), "EDM", INCEPTION
    else:
        arrays = _torch_file(path)
        match = _FIDELITY.fullmatch(path.stem)
        program, extractor = ("torch-fidelity", _fidelity_name(*match.groups())) if match else ("", "")
    num = _number(path, arrays.get("num"))
    main = _moments(path, arrays, "mu", "sigma", num)
    spatial = _moments(path, arrays, "mu_s", "sigma_s", num) if "mu_s" in arrays else None
    texts = {name: str(arrays[name]) for name in ("resize", "source") if name in arrays}
    return Statistics(main, spatial, num, str(arrays.get("extractor", extractor)), program, **texts)


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write ADM's .npz: `mu`, `sigma`, and `mu_s`, `sigma_s` if given. Add what is known of their origin."""
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path}: expected a name that ends in .npz")
    m, s = statistics.features, statistics.spatial
    arrays = {"mu": m.mean.numpy(), "sigma": m.covariance.numpy()}
    arrays |= {name: np.array(getattr(statistics, name)) for name in ("extractor", "resize", "source")}
    if s is not None:
        arrays |= {"mu_s": s.mean.numpy(), "sigma_s": s.covariance.numpy()}
    if statistics.num is not None:
        arrays["num"] = np.array(statistics.num)
    write_npz(path, arrays)


def _number(path: Path, num: np.ndarray | None) -> int | None:
    if num is None:
        return None
    if num.shape != () or num.dtype.kind not in "iu" or not 2 <= num <= 2**53:
        raise InputError(f"{path}: num is {num!s:.40}, expected a number of pictures")
    return int(num)


def _npz_program(path: Path, keys: Mapping[str, object]) -> tuple[str, str]:
    """Return the program that wrote an .npz and its extractor, as far as arrays and name tell."""
    if "extractor" in keys:
        return "dyndit", ""
    if "mu_s" in keys:
        return "ADM", INCEPTION
    if match := _CLEAN.fullmatch(path.stem.lower()):
        mode, clip = match[1], match[2]
        network = "inception-clean-resize" if mode == "clean" else INCEPTION
        return f"clean-fid ({mode}), by its name", "clip" if clip else network
    if _EDM.fullmatch(path.stem.lower()):
        return "EDM, by its name", INCEPTION
    return "pytorch-fid, EDM, clean-fid or another (mu and sigma alone)", ""


def _fidelity_name(network: str, layer: str) -> str:
    """Return our name of torch-fidelity's network and layer."""
    return INCEPTION if (network, layer) == ("inception-v3-compat", "2048") else network


def _moments(path: Path, arrays: Mapping[str, np.ndarray], mean: str, covariance: str, num: int | None) -> Moments:
    mu, sigma = arrays.get(mean), arrays.get(covariance)
    shapes = [None if a is None else a.shape for a in (mu, sigma)]
    if mu is None or mu.ndim != 1 or shapes[1] != (len(mu), len(mu)):
        raise InputError(f"{path}: {mean} {shapes[0]} and {covariance} {shapes[1]}, expected (D,) and (D, D)")
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: {mean}, {covariance} hold values that are not finite, expected numbers")
    known = {} if num is None else {"num": num}
    return Moments.of_covariance(torch.from_numpy(mu), torch.from_numpy(sigma), **known)


class _Unpickler(pickle.Unpickler):
    """Unpickle arrays of numbers and plain containers. Anything else is refused before it is called."""

    def find_class(self, module: str, name: str) -> object:
        """Return one of numpy's makers of arrays."""
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        return super().find_class(*_NUMPY[module, name])


def _pickled(path: Path) -> Mapping[str, np.ndarray]:
    try:
        found = _Unpickler(BytesIO(read_bytes(path, MOST))).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(f"{path}: unreadable ({first_line(error)}), expected statistics 'mu', 'sigma'") from error
    if isinstance(found, dict) and isinstance(found.get("fid"), dict):
        found = found["fid"]
    return _arrays_of(path, found)


def _torch_file(path: Path) -> Mapping[str, np.ndarray]:
    core = np._core.multiarray
    allowed = [
        np.ndarray, np.dtype, type(np.dtype("f8")), type(np.dtype("f4")),
        *((core._reconstruct, f"numpy.{name}.multiarray._reconstruct") for name in ("core", "_core")),
        *((core.scalar, f"numpy.{name}.multiarray.scalar") for name in ("core", "_core")),
    ]  # fmt: skip
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(BytesIO(read_bytes(path, MOST)), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged or foreign file raises anything
        raise InputError(f"{path}: unreadable ({first_line(error)}), expected statistics 'mu', 'sigma'") from error
    return _arrays_of(path, found)


def _arrays_of(path: Path, found: object) -> Mapping[str, np.ndarray]:
    if not isinstance(found, dict) or "mu" not in found:
        kind = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}: holds {kind:.80}, expected statistics 'mu', 'sigma'")
    arrays = {key: value for key, value in found.items() if key in ("mu", "sigma")}
    return {k: v.numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in arrays.items()}
