"""Digits: what is a shift table worth at other steps or guidance, and do measured plans correct it?

    dyndit compare digits_calibration --model runs/levers/model --out runs/calibration   # resumable

`--model` gives the exits and the table of `digits_levers`; without it the run makes them first. All plans are for UniPC
at 10 steps and guidance 1.5. The comparison's own arms (`searched`) have a table of the same steps. "ddim-20" has a
table of 20 DDIM steps, "cfg-3" a table of guidance 3. "refined" corrects the first table by three measured plans.

Measured (docs/results/calibration), Fréchet distance against `searched`, budgets 0.3 / 0.45, by the extractor that
plans are calibrated on: ddim-20 -0.01 / -0.05, cfg-3 +0.15 / +0.00, refined -0.06 / -0.11. So at 0.45 one table serves
other steps and guidance too. 25 minutes with exits and tables on 2 cores of an AMD EPYC, 2026-11-24, including a
variant with second-order terms that the code no longer has.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.digits import study

experiment = replace(
    study,
    variants=(
        Variant("ddim-20", calibration_solver="ddim", calibration_steps=20),
        Variant("cfg-3", calibration_cfg_scale=3.0),
        Variant("refined", refinements=3),
    ),
)
