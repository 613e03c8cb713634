"""The digits comparison whose figures the README quotes: full depth over steps, plans over budgets, controls.

dyndit compare digits_frontier --out runs/frontier               # resumable
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Controls
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.digits import quickstart

experiment = replace(
    quickstart,
    calibration=CalibrationSettings(num_pictures=384, num_bands=10, batch_size=64),
    full_steps=(4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 25),
    dynamic_steps=(10, 20),
    budgets=(0.45, 0.55, 0.65, 0.75, 0.85),
    unguided_steps=(5, 10, 20),
    controls=Controls(solver="ddim", steps=10, depths=(6,)),
    num_blocks=5,
    num_images=500,
)
