"""Digits: how large a shift table is worth measuring?

    dyndit compare digits_tables --model runs/levers/model --out runs/tables   # resumable

`--model` gives the exits and the table of `digits_levers`; without it the run makes them first. The comparison's own
arms (`searched`) have that table: 128 seeds, a band for each of 10 steps, up to 5 conditional depths.

Measured (docs/results/tables), Fréchet distance against that table's plans, budgets 0.3 / 0.45, by the extractor that
plans are calibrated on, and seconds of table: 5 bands +0.47 / +0.36 (52 s), 256 seeds -0.09 / -0.07 (218 s), 4 depths
-0.22 / +0.01 (50 s), forecasts -0.09 / +0.01 (179 s); the table itself took 121 s. So keep a band for
each step. 13 minutes on 2 cores of an AMD EPYC, 2026-11-28.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.digits import study

table = study.calibration
experiment = replace(
    study,
    variants=(
        Variant("5-bands", calibration=replace(table, num_bands=5)),
        Variant("256-seeds", calibration=replace(table, num_pictures=256)),
        Variant("4-depths", calibration=replace(table, num_depths=4)),
        Variant("forecasts", calibration=replace(table, forecast_ages=2)),
    ),
)
