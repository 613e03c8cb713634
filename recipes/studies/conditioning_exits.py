"""Digits: exits and plans on a backbone of the conditioning study, beside its full depth at fewer steps.

    python -m dyndit.recipes.studies.conditioning digits runs/conditioning
    dyndit compare conditioning_exits --model runs/conditioning/models/in-context-s0 --out runs/exits-in-context

Once for each of the four ways to condition; all else is equal. DDIM, guidance 1.5, four budgets at 10 steps.

Measured: docs/family.md has every plan, losing ones too, and the minutes of exits and table.
"""

from dataclasses import replace

from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.digits import quickstart

experiment = replace(
    quickstart,
    model="",
    train=None,
    calibration=CalibrationSettings(num_pictures=128, num_bands=10, batch_size=64, num_depths=4),
    full_steps=(3, 4, 5, 6, 8, 10, 14),
    dynamic_steps=(10,),
    budgets=(0.35, 0.5, 0.65, 0.8),
    solvers=("ddim",),
    num_images=300,
    batch_size=50,
)
