"""Keep the first pictures of evaluated sets in a run, so that its report shows sets of the same seed side by side."""

from pathlib import Path

import pandas as pd
from torch import Tensor

from dyndit import seals
from dyndit.errors import CheckpointError
from dyndit.files import read_safetensors, write_safetensors
from dyndit.pictures import as_rgb, frames_of

FOLDER = "strips"
MOST = 16
"""Pictures in a strip."""
MOST_SETS = 12
"""Sets that are shown side by side."""


def save(run: Path, arm: str, seed: object, pictures: Tensor) -> None:
    """Keep the first pictures of a set.  pictures: uint8 (N, C, H, W), or clips (N, C, T, H, W)."""
    few = as_rgb(frames_of(pictures)[:MOST]).cpu().contiguous()
    strip = {"pictures": few}
    write_safetensors(_file(run, arm, seed), strip, {seals.SEAL: seals.tensors_checksum(strip, {})})


def shared(run: Path, scored: pd.DataFrame) -> dict[str, Tensor]:
    """Return the pictures of sets that share a seed and classes, by arm; of several seeds the first with most sets."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for _, row in scored.drop_duplicates(["arm", "seed"]).iterrows():
        if (pictures := _read(_file(run, row["arm"], row["seed"]))) is not None:
            found.setdefault((str(row["seed"]), str(row["labels"])), {})[row["arm"]] = pictures
    best: dict[str, Tensor] = max(found.values(), key=len, default={})
    shape = next(iter(best.values())).shape if best else None
    alike = {arm: pictures for arm, pictures in best.items() if pictures.shape == shape}
    return dict(list(alike.items())[:MOST_SETS])


def _file(run: Path, arm: str, seed: object) -> Path:
    return run / FOLDER / f"{arm.replace('/', '_')}-s{int(float(str(seed)))}.safetensors"


def _read(path: Path) -> Tensor | None:
    """Return the pictures of a file; None without a file, or of a damaged one: strips are only looked at."""
    try:
        strip, metadata = read_safetensors(path)
        seals.check_tensors(path, strip, metadata)
        return strip["pictures"]
    except (CheckpointError, KeyError):
        return None
