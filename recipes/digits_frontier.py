"""The digits comparison whose figures the README quotes: full depth over steps, plans over budgets, controls.

dyndit compare digits_frontier --out runs/frontier               # resumable
"""

from dataclasses import replace

from dyndit.calibration import CalibrationSettings
from dyndit.experiment import Controls
from dyndit.recipes.digits import quickstart

experiment = replace(
    quickstart,
    calibration=CalibrationSettings(num_pictures=512, num_bands=10),
    full_steps=(4, 5, 6, 7, 8, 10, 12, 14, 17, 20),
    dynamic_steps=(10, 20),
    budgets=(0.4, 0.5, 0.6, 0.7, 0.8),
    controls=Controls(solver="ddim", steps=10, depths=(6,)),
    num_blocks=5,
    num_images=500,
)
