"""Measure how far pictures moved from the full model's pictures of the same seeds. This is not a measure of quality.

An error at high noise gives another picture, maybe as good; the same error at low noise is visible. Paired distances
count both equally.
"""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dyndit import manifest
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.pictures import as_rgb, frames_of
from dyndit.storage.reading import read_pickled

MAX_PSNR = 100.0  # dB; equal pictures have no finite PSNR
MIN_LPIPS_SIZE = 16  # VGG halves pictures four times
LPIPS_LAYERS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # layer of torchvision's VGG16 -> channels
PAIRED_SETTINGS = ("model", "labels", "num_images", "seed", "autoencoder")


@dataclass(frozen=True)
class Spread:
    """The median over pairs, and the 5th percentile from the worse end."""

    median: float
    worst: float


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of pairs, dB, at most MAX_PSNR. a, b: uint8 (N, C, H, W) -> (N,)."""
    errors = (a.double() - b.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / errors)).clamp(max=MAX_PSNR)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Compute the structural similarity of pairs (Wang et al. 2004). a, b: uint8 (N, C, H, W) -> (N,), mean over C.

    Window: 11x11, a Gaussian of 1.5 pixels, without padding; on pictures below 11 pixels the largest odd window.
    """
    window = _window(min(11, *a.shape[-2:])).expand(a.shape[1], 1, -1, -1)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=x.shape[1])

    x, y = a.double() / 255, b.double() / 255
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _window(size: int) -> Tensor:
    """Return a Gaussian window (1, 1, S, S) that sums to 1. S is `size`, less one if `size` is even."""
    size -= 1 - size % 2
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * 1.5**2))
    line /= line.sum()
    return torch.outer(line, line)[None, None]


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) on VGG16's features.

    The weights file (.safetensors, or .pth with only tensors) joins two sources. torchvision's VGG16 gives
    `features.N.weight` and `features.N.bias`. The LPIPS authors' `weights/v0.1/vgg.pth` gives five
    `linK.model.1.weight` (1, C, 1, 1).
    """

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16  # slow to import

        self.features = vgg16(weights=None).features[:30]
        for k, channels in enumerate(LPIPS_LAYERS.values()):
            conv = nn.Conv2d(channels, 1, 1, bias=False)
            self.add_module(f"lin{k}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), conv)}))
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path) -> "Lpips":
        """Read the weights. Raises CheckpointError."""
        model = cls()
        try:
            state = load_file(path) if Path(path).suffix == ".safetensors" else read_pickled(Path(path))
            model.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.")})
        except CheckpointError as error:
            raise CheckpointError(f"--lpips-weights {error}") from error
        except (OSError, RuntimeError, EOFError, AttributeError, SafetensorError, UnpicklingError) as error:
            found = first_line(error)
            raise CheckpointError(f"--lpips-weights {path}: {found}; expected VGG16 and five lin") from error
        return model

    @torch.inference_mode()
    def forward(self, a: Tensor, b: Tensor, batch_size: int = 32) -> Tensor:
        """Compare pairs.  a, b: uint8 (N, 1 or 3, H, W), H and W at least 16 -> (N,). Raises InputError."""
        if min(a.shape[-2:]) < MIN_LPIPS_SIZE:
            raise InputError(f"--lpips-weights: pictures of {a.shape[-2]}x{a.shape[-1]}, expected at least 16x16")
        pairs = zip(as_rgb(a).split(batch_size), as_rgb(b).split(batch_size), strict=True)
        return torch.cat([self._distances(*pair) for pair in pairs]).double()

    def _distances(self, a: Tensor, b: Tensor) -> Tensor:
        maps = zip(self._maps(a), self._maps(b), strict=True)
        lins = [self.get_submodule(f"lin{k}.model") for k in range(len(LPIPS_LAYERS))]
        return sum(lin((x - y) ** 2).mean((1, 2, 3)) for lin, (x, y) in zip(lins, maps, strict=True))

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the activations of LPIPS_LAYERS, normalised to length 1 at every place."""
        shift, scale = (torch.tensor(c).view(3, 1, 1) for c in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, maps = (pictures / 127.5 - 1 - shift) / scale, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in LPIPS_LAYERS:
                maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps


def paired_distances(pictures: Tensor, full: Tensor, lpips: Lpips | None = None) -> dict[str, Spread]:
    """Compare each picture with the full model's, uint8 (N, C, H, W): "psnr" (dB), "ssim", and "lpips" if given.

    Raises InputError: the sets differ in number or size.
    """
    if pictures.shape != full.shape:
        raise InputError(f"--full: pictures {tuple(full.shape)}, expected {tuple(pictures.shape)} as the samples")
    return paired_sets(PictureSet("samples", pictures), PictureSet("full", full), lpips)


def paired_sets(samples: PictureSet, full: PictureSet, lpips: Lpips | None = None) -> dict[str, Spread]:
    """Do the same for sets, a batch of each at a time. Of clips compare the frames."""
    ours, theirs = ((len(s.source), *s.size) for s in (samples, full))
    if ours != theirs:
        raise InputError(f"--full: pictures {theirs}, expected {ours} (number, height, width) as the samples")
    scores = {"psnr": psnr, "ssim": ssim} | ({} if lpips is None else {"lpips": lpips})
    found: dict[str, list[Tensor]] = {name: [] for name in scores}
    for a, b in zip(samples.batches(), full.batches(), strict=True):
        a, b = frames_of(a), frames_of(b)
        pair = (a, b) if a.shape == b.shape else (as_rgb(a), as_rgb(b))
        for name, score in scores.items():
            found[name].append(score(*pair))
    return {name: _spread(torch.cat(parts), 0.95 if name == "lpips" else 0.05) for name, parts in found.items()}


def _spread(values: Tensor, worse: float = 0.05) -> Spread:
    return Spread(values.quantile(0.5).item(), values.quantile(worse).item())


def check_same_seeds(samples: Path, full: Path) -> None:
    """Raise InputError if two folders of `dyndit sample` differ in PAIRED_SETTINGS. Other folders pass."""
    ours, theirs = (_settings(Path(path)) for path in (samples, full))
    if ours is None or theirs is None:
        return
    for name in PAIRED_SETTINGS:
        if ours.get(name) != theirs.get(name):
            raise InputError(f"--full {full}: {name} {theirs.get(name)}, expected {ours.get(name)} as the samples have")


def _settings(folder: Path) -> dict[str, object] | None:
    if not (path := folder / manifest.MANIFEST).is_file():
        return None
    found = manifest.read(path).get("settings")
    return found if isinstance(found, dict) else None
