"""Ablations on CIFAR-10: own guides, forecasts, refinement off, one at a time, at UniPC-10 and two tight budgets.

    dyndit compare cifar10_levers --model runs/cifar10/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10-levers     # resumable

With `--model` the exits and the table of `cifar10_frontier` are taken; without it they are made. A variant's table is
the part of that one without its lever's pairs, so nothing is measured again but the plans that correct predictions.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.plans.plan import REUSED
from dyndit.recipes.cifar10_frontier import PAIRS
from dyndit.recipes.cifar10_frontier import experiment as frontier

table = frontier.calibration
experiment = replace(
    frontier,
    variants=(
        Variant("no-own-guides", calibration=replace(table, pairs=tuple(pair for pair in PAIRS if pair[1] >= REUSED))),
        Variant(
            "no-forecasts",
            calibration=replace(table, pairs=tuple(pair for pair in PAIRS if pair[0] > 0), forecast_ages=0),
        ),
        Variant("not-refined", refinements=0),
    ),
    points=(("unipc", 10),),
    budgets=(0.3, 0.45),
    full_points=(("unipc", 5), ("unipc", 10)),
    unguided_points=(("unipc", 10),),
    peers=(),
    num_blocks=5,
    num_images=400,
)
