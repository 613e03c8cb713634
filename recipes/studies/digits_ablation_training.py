"""Ablations on digits, every lever on: those of the training off, one at a time, at two tight budgets.

    dyndit compare digits_ablation_training --out runs/ablation-training   # resumable

The comparison's own arms are those of `digits_ablation`, which turns off what is calibrated. Every variant distils
exits anew, on the trunk as it was given; "plain" is the recipe of `digits_levers`, every lever off. Beside them the
peers that led on the digits.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.studies.digits_ablation import distill, plain
from dyndit.recipes.studies.digits_ablation import experiment as calibration
from dyndit.recipes.studies.digits_levers import experiment as levers

experiment = replace(
    calibration,
    variants=(
        Variant("plain", distill=plain, calibration=levers.calibration, refinements=0),
        Variant("frozen-trunk", distill=replace(distill, trunk="frozen")),
        Variant("plain-heads", distill=replace(distill, exits=plain.exits)),
        Variant("noised-states", distill=replace(distill, states="noised")),
        Variant("even-weights", distill=replace(distill, weighting="even")),
        Variant("plain-forecasts", distill=replace(distill, forecasts=False)),
    ),
    peers=levers.peers,
)
