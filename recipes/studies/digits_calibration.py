"""Ablations on digits: what a shift table is worth elsewhere, and what corrects it, at two tight budgets.

    dyndit compare digits_calibration --model runs/levers/model --out runs/calibration   # resumable

With `--model` the exits and the table of `digits_levers` are taken; without it they are made. "ddim-20" and "cfg-3" are
tables of another solver and step count, and of another guidance scale, used for UniPC at 10 steps and scale 1.5: beside
`searched`, whose table is of those very steps, they tell what a fresh calibration is worth. Measured: 25 minutes on 2
cores of an AMD EPYC, exits and tables included, 2026-11-24 (docs/results/calibration).
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.studies.digits_levers import experiment as levers

experiment = replace(
    levers,
    variants=(
        Variant("ddim-20", calibration_solver="ddim", calibration_steps=20),
        Variant("cfg-3", calibration_cfg_scale=3.0),
        Variant("refined", refinements=3),
    ),
    confidence=None,
)
