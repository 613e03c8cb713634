"""How do loss and FD fall with a DiT's size, and what does a finer patch cost? Tiny sizes, really trained.

    python -m dyndit.recipes.studies.ladder sizes OUT        # resumable
    python -m dyndit.recipes.studies.ladder patches OUT      # resumable

sizes: four widths and depths on equal data. patches: one backbone on patches of 4, 2 and 1 pixels, so on 4, 16 and 64
tokens. Digits, three seeds each. trainings.png in OUT shows loss and FD over training compute and over sampling time,
trainings.csv has the figures.

Measured: docs/family.md has both figures, and the minutes of each training.
"""

import sys
from dataclasses import replace
from pathlib import Path

from dyndit.analysis.compare.trainings import Trainings, run
from dyndit.models.dit import DiTConfig
from dyndit.training.config import FitConfig
from dyndit.training.train import Train

FIT = FitConfig(
    steps=1_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=100,
    schedule="cosine",
    ema_decay=0.998,
    checkpoint_every=250,
)
LARGEST = DiTConfig(8, 2, 1, width=96, num_blocks=12, num_heads=3, num_classes=10)
SIZES = {"large": (96, 12, 3), "medium": (64, 8, 2), "small": (48, 6, 2), "tiny": (32, 4, 1)}
"""Width, blocks and heads; the largest is the preset "digits"."""

STUDIES = {
    "sizes": Trainings(
        {
            name: Train(replace(LARGEST, width=width, num_blocks=blocks, num_heads=heads), FIT)
            for name, (width, blocks, heads) in SIZES.items()
        },
        "digits",
        "digits",
    ),
    "patches": Trainings(
        {f"patch {p}": Train(replace(LARGEST, num_blocks=6, patch_size=p), FIT) for p in (2, 1, 4)}, "digits", "digits"
    ),
}


def main(name: str, out: str) -> None:
    """Run one of the studies."""
    print(f"report: {run(STUDIES[name], Path(out)) / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
