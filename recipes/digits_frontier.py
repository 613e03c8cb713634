"""Digits: compare full depth over steps, plans over budgets, and controls. The README quotes these figures.

    dyndit compare digits_frontier --out runs/frontier               # resumable

Measured: plans save 57 to 60% of the time at 10 and 20 steps of DDIM and UniPC, with a Fréchet distance below full
depth's (docs/results/digits). It took 54 minutes on 2 cores of an AMD EPYC, 2026-11-23: 11 for the table.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Controls
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes import digits

experiment = replace(
    digits.quickstart,
    calibration=CalibrationSettings(num_pictures=384, num_bands=10, batch_size=64),
    full_steps=(4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 25),
    dynamic_steps=(10, 20),
    budgets=(0.45, 0.55, 0.65, 0.75, 0.85),
    unguided_steps=(5, 10, 20),
    controls=Controls(solver="ddim", steps=10, depths=(6,)),
    num_images=500,
)
