"""Ablations on digits: how large a shift table is worth measuring, at two tight budgets.

    dyndit compare digits_tables --model runs/levers/model --out runs/tables   # resumable

With `--model` the exits and the table of `digits_levers` are taken; without it they are made.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.studies.digits_levers import base
from dyndit.recipes.studies.digits_levers import experiment as levers

experiment = replace(
    levers,
    variants=(
        Variant("5-bands", calibration=replace(base, num_bands=5)),
        Variant("256-seeds", calibration=replace(base, num_pictures=256)),
        Variant("4-depths", calibration=replace(base, num_depths=4)),
        Variant("forecasts", calibration=replace(base, forecast_ages=2)),
    ),
    confidence=None,
)
