"""Digits by rectified flow: the backbone and the recipe of `digits`, under another process.

    dyndit quickstart --family flow                                        # all of it
    dyndit train digits_flow --out runs/flow                               # the backbone alone
    dyndit train digits --process flow --out runs/flow                     # the same
    dyndit distill digits_flow --model runs/flow --out runs/flow-exits     # the exits alone

DDPM beside it, in one report:

    dyndit quickstart --from-scratch --out runs/quickstart-ddpm
    dyndit report runs/quickstart-flow runs/quickstart-ddpm --out runs/processes

The table also holds guidance by the model's own exits, and forecasts. Quality and cost are not yet measured.
"""

from dataclasses import replace

from dyndit.calibration.measure import CalibrationSettings
from dyndit.process import RectifiedFlow
from dyndit.recipes import digits

train = digits.train.under(RectifiedFlow())

distill = replace(digits.distill, forecasts=True, solver="flow-euler", num_steps=10)

quickstart = replace(
    digits.quickstart,
    model="",
    train=train,
    distill=distill,
    calibration=CalibrationSettings(
        num_pictures=128, num_bands=10, batch_size=64, num_depths=5, own_guides=True, forecast_ages=1
    ),
    calibration_solver="flow-euler",
    full_steps=(4, 8, 10, 14, 20),
    dynamic_steps=(4, 8, 10, 20),
    solvers=("flow-euler",),
    full_solvers=("flow-heun",),
)
