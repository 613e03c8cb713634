"""Digits by rectified flow: the backbone and the recipe of `digits`, under another process.

    dyndit quickstart --family flow                                        # all of it
    dyndit train digits_flow --out runs/flow                               # the backbone alone
    dyndit train digits --process flow --out runs/flow                     # the same
    dyndit distill digits_flow --model runs/flow --out runs/flow-exits     # the exits alone

`experiment` is DDPM beside it: the same backbone, updates, steps, budgets and pictures. One report shows both:

    dyndit compare digits_flow --from-scratch --out runs/ddpm
    dyndit report runs/quickstart-flow runs/ddpm --out runs/processes

The tables also hold guidance by the model's own exits, and forecasts. Quality and cost are in docs/family.md.
"""

from dataclasses import replace
from itertools import product

from dyndit.calibration.measure import CalibrationSettings
from dyndit.process import RectifiedFlow
from dyndit.recipes import digits

STEPS = (1, 2, 3, 4, 6, 8, 10, 14, 20)

train = digits.train.under(RectifiedFlow())

distill = replace(digits.distill, forecasts=True, solver="flow-euler", num_steps=10)

experiment = replace(
    digits.quickstart,
    distill=replace(distill, solver="ddim"),
    calibration=CalibrationSettings(
        num_pictures=96, num_bands=10, batch_size=48, num_depths=4, own_guides=True, forecast_ages=1
    ),
    full_points=(*product(("ddim",), STEPS), *product(("unipc",), (4, 10, 20))),
    dynamic_steps=(4, 8, 10, 20),
    solvers=("ddim",),
    num_images=200,
    batch_size=50,
)

quickstart = replace(
    experiment,
    model="",
    train=train,
    distill=distill,
    calibration_solver="flow-euler",
    full_points=(*product(("flow-euler",), STEPS), *product(("flow-heun",), (2, 5, 10))),
    solvers=("flow-euler",),
)
