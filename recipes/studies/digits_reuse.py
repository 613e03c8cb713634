"""Digits: does a plan gain by reusing the guidance of earlier steps?

    dyndit compare digits_reuse --out runs/reuse                     # resumable

The comparison's own arms (`searched`) have a table of 256 seeds with a band for each of 10 steps. The variant's table
also holds steps that reuse the guidance of the previous step.

Measured (docs/experiments.md, 2026-11-23), Fréchet distance with UniPC by the extractor that plans are calibrated on,
with reuse against without: 1.56 against 1.28 at budget 0.3, 1.19 and 1.16 at 0.4, 1.13 and 1.10 at 0.5, 1.09 and 1.08
at 0.65. So reuse is off by default. On 2 cores of an AMD EPYC: 5 minutes for the variant's table and 8 for sampling,
besides exits and the first table.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.digits import study

table = replace(study.calibration, num_pictures=256)
experiment = replace(
    study,
    calibration=table,
    calibration_solver="ddim",
    solvers=("ddim", "unipc"),
    full_steps=(5, 7, 10, 15, 20),
    budgets=(0.3, 0.4, 0.5, 0.65),
    variants=(Variant("reuse", calibration=replace(table, held=True)),),
)
