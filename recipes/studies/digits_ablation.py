"""Ablations on digits from the other side: every lever on, those of the calibration off, one at a time.

    dyndit compare digits_ablation --out runs/ablation                # resumable

The comparison's own arms (`searched`) have them all: adapters on the trunk, wide heads, states of the sampler, errors
weighted by path KL, guides of the model's own exits, forecasts with a learned correction, measured plans that correct
the prediction, a band for each step. A variant lacks what its name says; `digits_ablation_training` goes on with what
the exits are trained by. `digits_levers`, `digits_distillation` and `digits_calibration` ask the opposite question:
what does each bring alone.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.studies.digits_levers import distill as plain
from dyndit.recipes.studies.digits_levers import experiment as levers

table = CalibrationSettings(
    num_pictures=96, num_bands=10, batch_size=48, num_depths=5, own_guides=True, forecast_ages=2
)
distill = replace(
    plain,
    exits=replace(plain.exits, head="wide"),
    trunk="lora",
    trunk_rate=1.0,
    states="sampler",
    weighting="path-kl",
    forecasts=True,
)
experiment = replace(
    levers,
    distill=distill,
    calibration=table,
    refinements=2,
    full_steps=(4, 5, 7, 10, 20),
    variants=(
        Variant("no-own-guides", calibration=replace(table, own_guides=False)),
        Variant("no-forecasts", calibration=replace(table, forecast_ages=0)),
        Variant("not-refined", refinements=0),
        Variant("5-bands", calibration=replace(table, num_bands=5, forecast_ages=0)),
    ),
    confidence=None,
    peers=(),
)
