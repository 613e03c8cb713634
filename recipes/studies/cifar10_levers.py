"""CIFAR-10: what are own guides, forecasts and refinement worth, one off at a time? UniPC-10, two tight budgets.

    dyndit compare cifar10_levers --model runs/cifar10/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10-levers     # resumable

`--model` gives the exits and the table of `cifar10_frontier`; without it the run makes them first. A variant uses
that table without the steps of its lever, so the run measures only the plans that correct predictions.

Measured (docs/results/cifar10-levers), Fréchet distance against all on, budgets 0.3 / 0.45, by resnet20 and by vgg: no
own guides +0.34 / +0.15 and +1.06 / -0.17; no forecasts +0.72 / -0.12 and +2.03 / +0.48; not refined +1.63 / -0.03 and
+3.22 / +0.66. On 2 cores of an AMD EPYC with AVX-512 BF16, 2026-11-28: 8 minutes of sampling; the searches were not
timed.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.plans.step import OwnExit
from dyndit.recipes.cifar10_frontier import experiment as frontier

table = frontier.calibration
no_own_guides = tuple(step for step in table.choices if not isinstance(step.guide, OwnExit))
no_forecasts = tuple(step for step in table.choices if not step.forecast)
experiment = replace(
    frontier,
    variants=(
        Variant("no-own-guides", calibration=replace(table, choices=no_own_guides)),
        Variant("no-forecasts", calibration=replace(table, choices=no_forecasts, forecast_ages=0)),
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
