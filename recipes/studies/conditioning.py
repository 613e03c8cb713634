"""Four ways to condition one DiT, trained with the same budget: is adaLN-Zero the best, as published?

    python -m dyndit.recipes.studies.conditioning digits OUT           # resumable
    python -m dyndit.recipes.studies.conditioning cifar10 OUT DIR      # DIR: CIFAR-10, a subfolder per class

Each is trained from three seeds, on all digits or on 5,000 pictures of CIFAR-10, and samples at full depth. Differences
to adaLN-Zero are paired by seed. OUT becomes a run with its report. OUT/models holds every backbone: the study
`conditioning_exits` gives them exits and plans. On CIFAR-10 the budget is small (1,000 updates): who learns fast?

Measured: docs/family.md has the distances, the order found and the minutes of each training.
"""

import sys
from dataclasses import replace
from pathlib import Path

from dyndit.analysis.compare.trainings import Trainings, run
from dyndit.models.conditioning import CONDITIONINGS
from dyndit.models.dit import DiTConfig
from dyndit.training.config import FitConfig
from dyndit.training.train import Train

NAMES = ("adaln-zero", *(name for name in CONDITIONINGS if name != "adaln-zero"))
"""The published choice first: the others are compared with it."""

FIT = FitConfig(
    steps=1_500,
    batch_size=128,
    learning_rate=1e-3,
    warmup_steps=100,
    schedule="cosine",
    ema_decay=0.998,
    checkpoint_every=250,
)
DIGITS = DiTConfig(8, 2, 1, width=96, num_blocks=6, num_heads=3, num_classes=10)
CIFAR10 = DiTConfig(32, 4, 3, width=96, num_blocks=6, num_heads=3, num_classes=10)


def alike(backbone: DiTConfig, fit: FitConfig) -> dict[str, Train]:
    """Return a recipe per conditioning that differs in nothing else."""
    return {name: Train(replace(backbone, conditioning=name), fit) for name in NAMES}


STUDIES = {
    "digits": Trainings(alike(DIGITS, FIT), "digits", "digits"),
    "cifar10": Trainings(
        alike(CIFAR10, replace(FIT, steps=1_000, batch_size=64)), "", "vgg-cifar10", num_pictures=5_000
    ),
}


def main(name: str, out: str, data: str = "") -> None:
    """Run one of the studies."""
    print(f"report: {run(STUDIES[name], Path(out), data) / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
