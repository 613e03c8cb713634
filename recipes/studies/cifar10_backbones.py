"""CIFAR-10: how far are a backbone's pictures from the real ones, against another backbone's of the same seeds?

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    python -m dyndit.recipes.studies.cifar10_backbones NEW OLD --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/backbones          # resumable

Full depth of every folder of weights draws the same seeds, in bf16: UniPC, 20 steps, guidance 1.5. Each extractor
scores them against all pictures of DIR. What is printed, from the blocks in `backbones.csv`, is the mean over blocks
with its 95% interval, and the paired difference to the first backbone.

Measured (recipes/weights/cifar10/README.md): 18,000 more steps bring FD-resnet20 from 9.82 to 6.13, FD-vgg from 9.40 to
3.61, FD-efficientnet-lite0 from 408 to 245. 21 minutes on 2 cores of an AMD EPYC with AVX-512 BF16, 2026-11-29, six of
them for features of the real pictures.
"""

from itertools import product
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import tyro

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.quality import score
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.pictures.check import cache_folder
from dyndit.progress import tracked
from dyndit.sampling.sample import sample
from dyndit.stats import paired_interval
from dyndit.storage import load as checkpoints
from dyndit.training.data import open_data

FIRST_SEED = 30_000
"""Of no comparison."""
EXTRACTORS = ("resnet20-cifar10", "vgg-cifar10", "efficientnet-lite0")
ROWS = "backbones.csv"


def scored(model: Path, seed: int, num_images: int, references: list[Measured], device: str) -> list[dict[str, object]]:
    """Draw a block of balanced classes at full depth, and return a row per extractor."""
    loaded = checkpoints.load(str(model)).float().to(device)
    labels = loaded.backbone.condition.in_turn(num_images)
    with torch.autocast(device, torch.bfloat16):
        drawn = sample(loaded, labels, solver="unipc", num_steps=20, cfg_scale=1.5, seed=seed, batch_size=50)
    told = {"model": str(model), "backbone": loaded.identity.backbone, "seed": seed, "pictures": num_images}
    return [told | {"extractor": one.extractor.name, "fd": score(drawn.pictures, one)["fd"]} for one in references]


def table(rows: pd.DataFrame) -> str:
    """Say each backbone's distance by each extractor, and what it has more than the first backbone, in Markdown."""
    lines = ["| backbone | metric | FD | − the first |", "|---|---|---:|---:|"]
    first = str(rows["model"].iloc[0])
    for (model, extractor), block in rows.groupby(["model", "extractor"], sort=False):
        of_first = rows[(rows["model"] == first) & (rows["extractor"] == extractor)]
        pairs = block.merge(of_first, on="seed")
        difference = "" if model == first else f"{paired_interval(pairs['fd_x'] - pairs['fd_y']):+.2f}"
        lines.append(f"| {model} | {extractor} | {paired_interval(block['fd']):.2f} | {difference} |")
    return "\n".join(lines)


def main(
    models: Annotated[tuple[Path, ...], tyro.conf.Positional],
    data: str,
    extractor_weights: Path,
    out: Path,
    num_images: int = 1_000,
    num_blocks: int = 5,
    device: str = "cpu",
) -> None:
    """Draw, score and compare."""
    real, files = PictureSet(data, open_data(data, 32, 3)), {EXTRACTORS[0]: extractor_weights}
    extractors = [load_extractor(name, files.get(name), device) for name in EXTRACTORS]
    references = [Measured(real, one, cache=cache_folder()) for one in extractors]
    out.mkdir(parents=True, exist_ok=True)
    kept, weights = out / ROWS, {str(model): checkpoints.load(str(model)).identity.backbone for model in models}
    seen = set(_of(weights, kept)[["seed", "model"]].itertuples(index=False, name=None)) if kept.exists() else set()
    wanted = product(range(FIRST_SEED, FIRST_SEED + num_blocks), models)
    missing = [(seed, model) for seed, model in wanted if (seed, str(model)) not in seen]
    for seed, model in tracked(missing, "drawing blocks", unit="blocks"):
        rows = pd.DataFrame(scored(model, seed, num_images, references, device))
        rows.to_csv(kept, mode="a", header=not kept.exists(), index=False)
    print(table(_of(weights, kept)))


def _of(weights: dict[str, str], kept: Path) -> pd.DataFrame:
    """Read the rows of these folders' present weights, which may have changed.  weights: identity by folder."""
    rows = pd.read_csv(kept)
    return rows[rows["model"].map(weights) == rows["backbone"]]


if __name__ == "__main__":
    tyro.cli(main)
